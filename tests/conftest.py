"""Eight fake CPU devices, a compilation cache, and the golden vectors of the authors' code."""

import os
import pathlib
import signal

ROOT = pathlib.Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"

# Most of the suite's time is compilation, and its arrays are small: no LLVM optimisations, the older of XLA's two
# generators of fused loops (users get the newer one), and programs in one piece. The last two saved about half of
# what was left, with jaxlib 0.10. Flags from outside come last and win.
FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
    "--xla_cpu_parallel_codegen_split_count=1",
]

# Before jax is imported anywhere, and for the processes that tests start: the suite runs on CPU with eight devices,
# whatever the machine has. With JAX_COMPILATION_CACHE_DIR=$(mktemp -d) it costs what it costs in a fresh clone.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join([*FLAGS, os.environ.get("XLA_FLAGS", "")])
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture
def usual_signals():
    """Requests to end are not ignored, as they are in what a shell starts by `nohup` or in the background."""
    usual = {"SIGINT": signal.default_int_handler, "SIGHUP": signal.SIG_DFL}
    numbers = {getattr(signal, name): handler for name, handler in usual.items() if hasattr(signal, name)}
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in numbers.items():
        if before[number] is signal.SIG_IGN:
            signal.signal(number, handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def golden():
    """`golden(paper, name)` -> dict of arrays of tests/golden/PAPER/NAME.npz; the README beside it defines them."""

    def load(paper: str, name: str) -> dict[str, np.ndarray]:
        with np.load(GOLDEN / paper / f"{name}.npz", allow_pickle=False) as arrays:
            return {k: arrays[k] for k in arrays.files}

    return load
