"""The cache of compiled programs: JAX's persistent cache, in a folder of the user's cache directory.

JAX_COMPILATION_CACHE_DIR (local or gs://) names another folder, which is used unchanged. JAXCL_COMPILE_CACHE=off turns
the cache off. If anything goes wrong with the cache, programs are compiled without it.

- A program for a CPU may use any instruction of the CPU that compiled it. XLA also loads it on other CPUs and only logs
  a warning. Hosts may share a home folder, so each kind of CPU has its own cache folder.
- JAX writes an entry in place. An entry cut short by a kill or a full disk cannot be read, and JAX would never write it
  again, so it is deleted when reading fails.
- JAX's own size limit needs another package, and one lost file stops all writing (JAX issue 39880). The least recently
  used entries are therefore deleted here, when a command starts.
- A run of several processes has no cache by default. Only the first process would write; and on GPUs, which compile
  together, processes that find an entry would keep the others waiting. A shared folder may be given.

This module does not import JAX, so that a mistake in the flags is reported without that import.
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

from jaxcl.runtime import messages

logger = logging.getLogger("jaxcl")
MAX_BYTES = 2**30  # for all kinds of CPU together; a default run needs a few MiB
MIN_SECONDS = 0.0  # of compilation: reading even the smallest program is faster than compiling it


def turn_on(environ: MutableMapping[str, str] = os.environ) -> pathlib.Path | None:
    """Turn the cache on. Call it before anything is compiled.

    Returns:
      The default folder; None if the cache is off or the user has chosen another folder.
    """
    if environ.get("JAXCL_COMPILE_CACHE", "").lower() == "off":
        return None
    chosen = environ.get("JAX_COMPILATION_CACHE_DIR", _in_jax("compilation_cache_dir"))  # "": off
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
    """The folder, private to the user; None if nothing can be written, as in a container without a home."""
    try:
        # A relative path does not count (XDG base directory specification).
        base = pathlib.Path(environ.get("XDG_CACHE_HOME", ""))
        base = base if base.is_absolute() else pathlib.Path("~/.cache").expanduser()
        folder = base / "jaxcl" / "compiled" / cpu()
        folder.mkdir(parents=True, exist_ok=True)
        # Entries are programs that will be run, so nobody else may write there.
        (base / "jaxcl" / "compiled").chmod(0o700)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: there is no home folder
        return None


def cpu() -> str:
    """A name for the kind of CPU; equal names mean equal instruction sets."""
    words = [platform.machine(), platform.processor()]
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text().partition("\n\n")[0]  # the first core
        keys = "vendor_id|cpu family|model|model name|stepping|flags|Features|CPU \\w+"
        words += [f"{k}={v}" for k, v in re.findall(rf"^({keys})\s*: *(.*)$", text, re.M)]
    except OSError:
        pass
    return f"{platform.machine() or 'cpu'}-{hashlib.sha256(' '.join(words).encode()).hexdigest()[:12]}"


def prune(folder: pathlib.Path, max_bytes: int = MAX_BYTES) -> int:
    """Delete the least recently used files until the rest fits; -> number of deleted files."""
    entries, deleted = [], 0
    for where, _, names in os.walk(folder):  # os.walk skips folders it cannot read
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
    """The value of a JAX option that a config file or a calling program has set."""
    return getattr(sys.modules["jax"].config, f"jax_{name}", None) if "jax" in sys.modules else None


def _tell_jax(environ: MutableMapping[str, str], name: str, value: str | float) -> None:
    """Set a JAX option: by its environment variable before JAX is imported, afterwards directly."""
    if "jax" in sys.modules:
        sys.modules["jax"].config.update(f"jax_{name}", value)
    else:
        environ[f"JAX_{name.upper()}"] = str(value)


def _say_failures_once(folder: pathlib.Path | None) -> None:
    """Log one line in place of JAX's warnings about each program that it cannot read or write."""
    shown = warnings.showwarning
    if getattr(shown, "of_compile_cache", False):
        return
    said: list[str] = []

    def show(message, category, filename, lineno, file=None, line=None):
        failed = messages.COMPILE_CACHE_FAILED.match(str(message))
        if not failed:
            return shown(message, category, filename, lineno, file, line)
        doing, program, reason = failed.groups()
        if doing == "reading" and folder is not None:
            forget(folder, program)
        if not said:
            said.append(reason)
            line = (reason.splitlines() or [""])[0][:200]
            logger.warning("the cache of compiled programs cannot be used; compiling instead: %s", line)

    show.of_compile_cache = True
    warnings.showwarning = show
    warnings.filterwarnings("always", message=messages.COMPILE_CACHE_WARNING)


def forget(folder: pathlib.Path, program: str) -> None:
    """Delete the unreadable entries of a program, which JAX would keep forever.

    JAX does not name the entry. All entries of the program are deleted unless some are seen to be cut short.
    """
    entries = list(folder.glob(f"{program}-*-cache"))
    for path in [p for p in entries if _cut_short(p)] or entries:
        try:
            path.unlink()
        except OSError:
            pass


def _cut_short(path: pathlib.Path) -> bool:
    """Whether an entry is incomplete; False for entries that JAX compressed with zstd, which are not checked."""
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
