"""A command restarts itself with large pages once, and only a command of this package does."""

import os
import subprocess
import sys
import types

import pytest

from jaxcl.runtime import huge_pages


@pytest.fixture
def mode(tmp_path, monkeypatch):
    """Sets what the kernel says, on a machine with a glibc that knows of it."""
    path = tmp_path / "enabled"
    monkeypatch.setattr(huge_pages, "_MODE", path)
    monkeypatch.setattr(huge_pages.platform, "libc_ver", lambda: ("glibc", "2.36"))
    for name in ("GLIBC_TUNABLES", "JAXCL_HUGE_PAGES"):
        monkeypatch.delenv(name, raising=False)
    return path.write_text


def test_where_they_help(mode, monkeypatch):
    assert not huge_pages.wanted()  # no such file: another system
    for words, want in (("always [madvise] never", True), ("[always] madvise never", False), ("[never]", False)):
        mode(words)
        assert huge_pages.wanted() == want
    mode("always [madvise] never")
    for name, value in (("JAXCL_HUGE_PAGES", "off"), ("GLIBC_TUNABLES", "a.b=1:glibc.malloc.hugetlb=0")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert not huge_pages.wanted()  # the user has chosen
    for library in (("glibc", "2.31"), ("", "")):
        monkeypatch.setattr(huge_pages.platform, "libc_ver", lambda library=library: library)
        assert not huge_pages.wanted()


def test_only_a_command_of_ours_starts_again(mode, monkeypatch):
    mode("always [madvise] never")
    started = []
    monkeypatch.setattr(huge_pages.os, "execve", lambda *a: started.append(a))
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "jaxcl.main", "--config=a.py"])
    started_by = [
        ("pytest.__main__", False, False),  # python -m pytest
        (None, False, False),  # python script.py
        ("jaxcl.main", False, True),
        ("jaxcl.__main__", False, True),  # python -m jaxcl
        (None, True, True),  # the console script
    ]
    for name, script, again in started_by:
        spec = name and types.SimpleNamespace(name=name)
        monkeypatch.setitem(sys.modules, "__main__", types.SimpleNamespace(__spec__=spec))
        started.clear()
        huge_pages.ask(script=script)
        assert len(started) == again, name
    ((program, command, environ),) = started
    assert program == sys.executable and command == [sys.executable, "-m", "jaxcl.main", "--config=a.py"]
    assert environ["GLIBC_TUNABLES"] == "glibc.malloc.check=0:glibc.malloc.hugetlb=1"


def test_a_real_command(tmp_path):
    (tmp_path / "c.py").write_text(
        "import os\nfrom jaxcl.errors import UserError\n"
        "def get_config():\n    raise UserError(f'has {os.environ.get(\"GLIBC_TUNABLES\")}')\n"
    )
    environ = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", "JAXCL_HUGE_PAGES")}
    for more, tunables in (({}, "glibc.malloc.hugetlb=1" if huge_pages.wanted() else None),
                           ({"JAXCL_HUGE_PAGES": "off"}, None)):  # fmt: skip
        for program in (("jaxcl.main",), ("jaxcl", "train")):
            command = [sys.executable, "-m", *program, f"--config={tmp_path / 'c.py'}"]
            done = subprocess.run(command, env=environ | more, capture_output=True, text=True)
            assert (done.returncode, done.stderr) == (2, f"jaxcl: has {tunables}\n")
