"""Large memory pages for a CPU process. On Linux a process must ask for them before it starts.

XLA allocates the temporary memory of a program anew for each call and frees it afterwards, so the kernel clears and
maps tens of thousands of 4 KiB pages in every update. With 2 MiB pages there are a few hundred (docs/benchmarks.md has
the times). glibc asks for large pages if an environment variable says so when the process starts. A command therefore
restarts itself once, in the same process, with that variable.

JAXCL_HUGE_PAGES=off prevents the restart. For a notebook, start its server with GLIBC_TUNABLES=glibc.malloc.hugetlb=1.
"""

import os
import pathlib
import platform
import sys

TUNABLE = "glibc.malloc.hugetlb"
_MODE = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def ask(package: str = "jaxcl", *, script: bool = False) -> None:
    """Restart this command with large pages where that helps; return where it does not.

    Only a process of this package is restarted: one started by `python -m PACKAGE` or `python -m PACKAGE.MODULE`, or,
    with `script`, by the package's console script. Any other process belongs to somebody else.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    ours = script if spec is None else spec.name.startswith(f"{package}.")
    if not ours or not (more := environ()):
        return
    try:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | more)
    except OSError:  # the command still works, only slower
        pass


def environ() -> dict[str, str]:
    """The environment variables that give a process large pages; empty if it has them already or cannot get them."""
    if not wanted():
        return {}
    return {"GLIBC_TUNABLES": ":".join(filter(None, (os.environ.get("GLIBC_TUNABLES"), f"{TUNABLE}=1")))}


def wanted() -> bool:
    """Whether the environment variable would make a difference for a process like this one."""
    if os.environ.get("JAXCL_HUGE_PAGES", "").lower() == "off" or TUNABLE in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    library, version = platform.libc_ver()
    if library != "glibc" or tuple(int(n) for n in version.split(".")[:2] if n.isdigit()) < (2, 35):
        return False  # older versions do not know the variable
    try:
        return "[madvise]" in _MODE.read_text()  # [always]: no need to ask; [never]: no use
    except OSError:
        return False
