"""How many cores this process may use, which is fewer than the machine has in a container or under an affinity."""

import math
import os
import pathlib


def usable_cores() -> int:
    """At least 1: the cores of the process's affinity, at most its share of time in a container (cgroup)."""
    if hasattr(os, "process_cpu_count"):  # Python 3.13; it knows the affinity, and PYTHON_CPU_COUNT
        count = os.process_cpu_count() or 1
    else:
        count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(count, share_of_time())))


def share_of_time(root: str = "/") -> float:
    """Cores' worth of time that the control groups of this process allow; infinity without a limit.

    root: of the file system, for tests.
    """
    groups = pathlib.Path(root, "proc/self/cgroup")
    try:
        lines = [line.split(":", 2) for line in groups.read_text().splitlines() if line.count(":") >= 2]
    except OSError:
        return math.inf
    mount, shares = pathlib.Path(root, "sys/fs/cgroup"), [math.inf]
    for _, controllers, path in lines:
        if not controllers:  # version 2
            places, read = (mount, mount / "unified"), _version2
        elif "cpu" in controllers.split(","):
            places, read = (mount / controllers, mount / "cpu", mount / "cpu,cpuacct"), _version1
        else:
            continue
        # A limit may be on any group above; a container sees its own group at the root.
        inside = pathlib.PurePosixPath(path.lstrip("/"))
        for place in places:
            shares += [read(place / group) for group in (inside, *inside.parents)]
    return min(shares)


def _version2(group: pathlib.Path) -> float:
    """`cpu.max` holds quota and period in microseconds, or "max"."""
    try:
        quota, period = (group / "cpu.max").read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


def _version1(group: pathlib.Path) -> float:
    try:
        quota, period = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return quota / period if quota > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf
