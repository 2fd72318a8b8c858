"""Memory of a CPU in large pages, for which Linux must be asked before a program begins.

XLA takes the temporary memory of a program anew each time it runs it and gives it back afterwards: some 170 MB for an
update of the default configs, 41,000 pages of 4 KiB that the kernel clears and hands out one by one. In pages of 2 MiB
they are some 500, and an update takes 0.6 of the time (docs/benchmarks.md). glibc asks for them if told to by a
variable that it reads when a process starts, so a command starts itself again, in the same process, with that variable.

JAXCL_HUGE_PAGES=off: it does not. For a notebook, start its server with GLIBC_TUNABLES=glibc.malloc.hugetlb=1.
"""

import os
import pathlib
import platform
import sys

TUNABLE = "glibc.malloc.hugetlb"
_MODE = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def ask(package: str = "jaxcl") -> None:
    """Start `python -m PACKAGE.COMMAND` again with large pages, where that helps; returns where it does not."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None or not spec.name.startswith(f"{package}.") or not (more := environ()):
        return  # whoever else calls a command of ours has a process that is not ours to replace
    try:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | more)
    except OSError:  # slower, but right
        pass


def environ() -> dict[str, str]:
    """What a process needs in its environment to get large pages; nothing where it has them, or cannot."""
    if not wanted():
        return {}
    return {"GLIBC_TUNABLES": ":".join(filter(None, (os.environ.get("GLIBC_TUNABLES"), f"{TUNABLE}=1")))}


def wanted() -> bool:
    """Whether a process like this one would get large pages only if it asked for them, and may."""
    if os.environ.get("JAXCL_HUGE_PAGES", "").lower() == "off" or TUNABLE in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    library, version = platform.libc_ver()
    if library != "glibc" or tuple(int(n) for n in version.split(".")[:2] if n.isdigit()) < (2, 35):
        return False  # it knows no such variable
    try:
        return "[madvise]" in _MODE.read_text()  # [always]: they come by themselves; [never]: not at all
    except OSError:
        return False
