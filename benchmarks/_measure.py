"""Helpers of all benchmarks: a description of the machine, repeated timing, and peak memory."""

import gc
import importlib.metadata
import os
import pathlib
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import jaxcl
from jaxcl.runtime.cores import usable_cores

ROOT = pathlib.Path(__file__).resolve().parents[1]
UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


# ---- the machine


def cores() -> int:
    """Cores this process may use."""
    return usable_cores()


def machine(packages: tuple[str, ...]) -> dict[str, str]:
    """Processor, memory, Python, and the versions of the installed ones of these packages."""
    model, flags, total = platform.processor() or platform.machine(), "", 0
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(re.findall(r"^(model name|flags)\s*: (.*)$", info.read_text(), re.MULTILINE))
        model, flags = fields.get("model name", model), fields.get("flags", "")
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    widest = next((name for name, flag in (("AVX-512", "avx512f"), ("AVX2", "avx2")) if flag in flags.split()), "")
    return {
        "processor": f"{cores()} cores of {model}" + (f" ({widest})" if widest else ""),
        "memory": size(total),
        "Python": platform.python_version(),
        # jaxcl may run from its folder, without being installed.
        **{n: v for n in packages if (v := jaxcl.__version__ if n == "jaxcl" else installed(n))},
    }


def installed(package: str) -> str | None:
    """The version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# ---- numbers in words


def parse_bytes(text: str) -> int:
    """'8GiB' -> bytes."""
    match = re.fullmatch(r"([0-9.]+)\s*([A-Za-z]*)", text.strip())
    if not match or match[2] not in UNITS:
        raise ValueError(f"{text!r}: expected a number and one of {', '.join(filter(None, UNITS))}")
    return int(float(match[1]) * UNITS[match[2]])


def figures(x: float) -> str:
    """Three digits, without an exponent."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def size(count: float) -> str:
    """Bytes in MiB below 1 GiB, in GiB above."""
    return f"{figures(count / 2**30)} GiB" if count >= 2**30 else f"{figures(count / 2**20)} MiB"


def duration(seconds: float) -> str:
    return f"{figures(seconds)} s" if seconds >= 1 else f"{figures(seconds * 1e3)} ms"


# ---- time


def seconds_per_call(run: Callable[[], object], calls: int) -> float:
    """Seconds per call, over `calls` in a row."""
    begun = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begun) / calls


# ---- memory


def _status(field: str) -> int | None:
    """A size in /proc/self/status, in bytes; None where there is no such file."""
    status = pathlib.Path("/proc/self/status")
    found = re.search(rf"^{field}:\s*(\d+) kB$", status.read_text(), re.MULTILINE) if status.exists() else None
    return int(found[1]) * 1024 if found else None


def peak_increase(run: Callable[[], object]) -> int:
    """The largest rise of the resident memory of this process during `run`, in bytes.

    Linux can reset the peak (clear_refs). Elsewhere this is the rise of ru_maxrss of getrusage, which does not see
    memory below an earlier peak.
    """
    gc.collect()
    time.sleep(0.2)  # another thread may still free buffers of the run before
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        before, peak = _status("VmRSS"), lambda: _status("VmHWM")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024

        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

        before = peak()
    result = run()  # kept, because the returned arrays count
    after = peak()
    del result
    return max(0, after - before)


# With these, glibc returns freed blocks to the system, so that only memory in use is counted.
LIVE = {"MALLOC_MMAP_THRESHOLD_": str(2**17), "MALLOC_TRIM_THRESHOLD_": str(2**17)}


def fresh_process(module: str, *arguments: str, environment: dict[str, str]) -> tuple[list[str], str]:
    """Runs `python -m module arguments` -> (lines of stdout, error): error is "" or the last line of stderr."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    errors = done.stderr.strip().splitlines() or ["no message"]
    return done.stdout.splitlines(), f"exit code {done.returncode}: {errors[-1]}" if done.returncode else ""
