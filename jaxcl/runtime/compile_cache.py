"""Compiled programs are kept between runs: JAX's persistent cache, in a folder of the user's cache directory.

A folder of the user's choice (JAX_COMPILATION_CACHE_DIR, local or gs://) is left as it is; JAXCL_COMPILE_CACHE=off:
there is none. Whatever goes wrong with the cache, the program is compiled as if there were none.

- Programs for a CPU may use any instruction of the one that compiled them. XLA loads them elsewhere too, with a line in
  the log only (jaxlib 0.10.2, tried), so each kind of CPU has a folder of its own: hosts may share a home.
- JAX writes an entry in place. One cut short by a kill or a full disk cannot be read and would never be written again;
  it is deleted when that shows.
- JAX's own limit of the cache's size needs a package more, and one lost file ends its writing (JAX issue 39880): the
  entries used least recently are deleted here, when a command begins.
- Several processes of one run have none by default: only the first would write, and on GPUs, where compiling is done
  together, those that find an entry leave those waiting that do not. A folder that all of them share may be given.

This module imports nothing of JAX: a command that fails at its flags need not wait for it.
"""

import hashlib
import logging
import os
import pathlib
import platform
import re
import sys
import tempfile
import warnings
import zlib
from collections.abc import MutableMapping

logger = logging.getLogger("jaxcl")
MAX_BYTES = 2**30  # of programs for all kinds of CPU; those of a default run have 4 MiB
MIN_SECONDS = 0.0  # of compiling: even the smallest program is read in less (a default run has about 50)
_FAILED = re.compile(r"Error (reading|writing) persistent compilation cache entry for '([^']*)': (.*)", re.S)


def turn_on(environ: MutableMapping[str, str] = os.environ) -> pathlib.Path | None:
    """Keep what this process compiles, and use what earlier ones kept; before anything compiles.

    Returns:
      The default folder; None where nothing is kept, or where the user has chosen the place.
    """
    if environ.get("JAXCL_COMPILE_CACHE", "").lower() == "off":
        return None
    chosen = environ.get("JAX_COMPILATION_CACHE_DIR", _in_jax("compilation_cache_dir"))  # "": the user wants none
    folder = _default_folder(environ) if chosen is None else None
    if folder is not None:
        prune(folder.parent)
        _tell_jax(environ, "compilation_cache_dir", str(folder))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in environ:
            _tell_jax(environ, "persistent_cache_min_compile_time_secs", MIN_SECONDS)
    if place := folder or chosen:
        _say_failures_once(pathlib.Path(place) if "://" not in str(place) else None)
    return folder


def _default_folder(environ: MutableMapping[str, str]) -> pathlib.Path | None:
    """Made, the user's alone; None where nothing can be written, as in a container without a home."""
    try:
        # What the variable holds must be absolute to count (XDG base directory specification).
        base = pathlib.Path(environ.get("XDG_CACHE_HOME", ""))
        base = base if base.is_absolute() else pathlib.Path("~/.cache").expanduser()
        folder = base / "jaxcl" / "compiled" / cpu()
        folder.mkdir(parents=True, exist_ok=True)
        # Entries are programs that will be run: nobody else may put any there.
        (base / "jaxcl" / "compiled").chmod(0o700)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: no home can be found
        return None


def cpu() -> str:
    """A name for the kind of CPU: equal where all instructions are."""
    words = [platform.machine(), platform.processor()]
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text().partition("\n\n")[0]  # of the first core
        keys = "vendor_id|cpu family|model|model name|stepping|flags|Features|CPU \\w+"
        words += [f"{k}={v}" for k, v in re.findall(rf"^({keys})\s*: *(.*)$", text, re.M)]
    except OSError:
        pass
    return f"{platform.machine() or 'cpu'}-{hashlib.sha256(' '.join(words).encode()).hexdigest()[:12]}"


def prune(folder: pathlib.Path, max_bytes: int = MAX_BYTES) -> int:
    """Delete what was used least recently, until the rest fits; -> number of files deleted."""
    entries, deleted = [], 0
    for where, _, names in os.walk(folder):  # errors: as if there were nothing
        for name in names:
            path = os.path.join(where, name)
            try:
                found = os.stat(path)
            except OSError:  # another process was faster
                continue
            entries.append((max(found.st_atime, found.st_mtime), found.st_size, path))
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= max_bytes:
            break
        try:
            os.unlink(path)
            deleted += 1
        except OSError:
            pass
        total -= size
    return deleted


def _in_jax(name: str) -> str | None:
    """What a config file, or whoever called us, has told JAX."""
    return getattr(sys.modules["jax"].config, f"jax_{name}", None) if "jax" in sys.modules else None


def _tell_jax(environ: MutableMapping[str, str], name: str, value: str | float) -> None:
    """JAX reads its variables when it is imported, and never again."""
    if "jax" in sys.modules:
        sys.modules["jax"].config.update(f"jax_{name}", value)
    else:
        environ[f"JAX_{name.upper()}"] = str(value)


def _say_failures_once(folder: pathlib.Path | None) -> None:
    """JAX warns of each program that it cannot read or write; one line is enough for all of them."""
    shown = warnings.showwarning
    if getattr(shown, "of_compile_cache", False):
        return
    said: list[str] = []

    def show(message, category, filename, lineno, file=None, line=None):
        failed = _FAILED.match(str(message))
        if not failed:
            return shown(message, category, filename, lineno, file, line)
        doing, program, reason = failed.groups()
        if doing == "reading" and folder is not None:
            forget(folder, program)
        if not said:
            said.append(reason)
            line = (reason.splitlines() or [""])[0][:200]
            logger.warning("a compiled program could not be kept, or read again; compiling instead: %s", line)

    show.of_compile_cache = True
    warnings.showwarning = show
    warnings.filterwarnings("always", message="Error (reading|writing) persistent compilation cache")


def forget(folder: pathlib.Path, program: str) -> None:
    """Delete the entries of a program that cannot be read, which JAX would keep for ever; which they are it does not
    say. Where none is seen to be cut short, all of that program's."""
    entries = list(folder.glob(f"{program}-*-cache"))
    for path in [p for p in entries if _cut_short(p)] or entries:
        try:
            path.unlink()
        except OSError:
            pass


def _cut_short(path: pathlib.Path) -> bool:
    """Of an entry as JAX writes it without a package for zstd; with one this is not known, and False."""
    unpacker = zlib.decompressobj()
    try:
        data = path.read_bytes()
        if data[:1] not in (b"", b"\x78"):
            return False
        unpacker.decompress(data)
    except OSError:
        return False
    except zlib.error:
        return True
    return not unpacker.eof
