"""The number of cores that this process may use."""

import math
import os

import numpy as np
import pytest
from PIL import Image

from jaxcl.data import disk, listing, make_source
from jaxcl.runtime import cores

GROUPS = {
    "version 2, in a container": ("0::/\n", {"cpu.max": "200000 100000\n"}, 2.0),
    "version 2, a part of a core": ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
    "version 2, no limit": ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
    "version 2, above": ("0::/a.slice/b\n", {"a.slice/cpu.max": "300000 100000", "a.slice/b/cpu.max": "max 9"}, 3.0),
    "version 2, the smallest": ("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "50000 100000"}, 0.5),
    "version 1": (
        "3:memory:/m\n2:cpu,cpuacct:/docker/1\n1:name=systemd:/\n",
        {"cpu,cpuacct/docker/1/cpu.cfs_quota_us": "400000", "cpu,cpuacct/docker/1/cpu.cfs_period_us": "100000"},
        4.0,
    ),
    "version 1, seen from inside": (
        "2:cpu,cpuacct:/docker/1\n",
        {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"},
        1.0,
    ),
    "version 1, no limit": (
        "2:cpu:/\n",
        {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
        math.inf,
    ),
    "both": ("1:name=systemd:/\n0::/x\n", {"unified/x/cpu.max": "200000 100000"}, 2.0),
    "damaged": ("nonsense\n0::/\n", {"cpu.max": "many\n"}, math.inf),
}


@pytest.mark.parametrize("name", GROUPS)
def test_the_share_of_a_container(name, tmp_path):
    """Cases B.7: the limit of time that a container has, wherever its kernel keeps it."""
    groups, files, share = GROUPS[name]
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text(groups)
    for file, text in files.items():
        path = tmp_path / "sys" / "fs" / "cgroup" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert cores.share_of_time(str(tmp_path)) == share


def test_no_control_groups(tmp_path):
    assert cores.share_of_time(str(tmp_path)) == math.inf


def test_the_smaller_of_affinity_and_share(monkeypatch):
    """Cases B.7: 64 seen on 2 real cores are 2."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    if hasattr(os, "process_cpu_count"):
        monkeypatch.setattr(os, "process_cpu_count", lambda: 8)
    else:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for share, count in ((math.inf, 8), (2.0, 2), (1.5, 2), (0.2, 1), (100.0, 8)):
        monkeypatch.setattr(cores, "share_of_time", lambda share=share: share)
        assert cores.usable_cores() == count


def test_decoding_has_no_more_threads(tmp_path, monkeypatch):
    """Cases B.7: as many threads as usable cores, counted when a set is read; waiting for a bucket takes more."""
    used = []
    monkeypatch.setattr(disk, "usable_cores", lambda: 3)
    pool = disk.ThreadPoolExecutor
    monkeypatch.setattr(disk, "ThreadPoolExecutor", lambda count: used.append(count) or pool(count))
    for i in range(12):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
    make_source(f"folder:{tmp_path}")
    assert used and set(used) == {3}
    assert listing.Listing("x", ["gs://a/b"], ["b"], np.array(["train"]), np.zeros((3, 1))).threads == 8
