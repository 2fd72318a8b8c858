"""Paths as people write them."""

import os
import pathlib

import pytest

from jaxcl.errors import UserError
from jaxcl.runtime import storage
from jaxcl.runtime.flags import Flags


@pytest.fixture
def home(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_the_home(home):
    """Cases B.2: a shell leaves the ~ of --workdir=~/x; it is the home wherever a path is read, once or twice."""
    for path in ("~/x", pathlib.Path("~/x")):
        assert os.fspath(storage.expanded(path)) == os.fspath(storage.folder(path)) == str(home / "x")
    here = home.parent / "here"
    for path in ("./~/x", here / "~" / "x"):
        for found in (storage.expanded(path), storage.expanded(storage.expanded(path)), storage.folder(path)):
            assert os.fspath(found) == str(here / "~" / "x")
    for path in ("runs/x", "gs://bucket/~/x", "no~tilde", "/tmp/~x"):
        assert os.fspath(storage.expanded(path)) == path


def test_flags_that_are_paths(home):
    """Cases B.2: in every flag for a file or folder, one or several."""
    flags = Flags("")
    flags.path("out", "", "A folder.")
    flags.paths("workdir", "Folders.")
    given = flags.parse(["x", "--out=~/a", "--workdir=~/b", "--workdir=c"])
    assert given.out == str(home / "a") and given.workdir == [str(home / "b"), "c"]
    given = flags.parse(["x"])
    assert given.out == "" and given.workdir == []


def test_patterns_are_not_looked_for_in_the_folder(tmp_path):
    """Cases B.2: a folder whose name is a pattern."""
    for name in ("[ab]", "a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file.txt").write_text(name)
    assert [p.read_text() for p in storage.matching(tmp_path / "[ab]", "*.txt")] == ["[ab]"]


def test_a_link_that_cannot_be_made(tmp_path, monkeypatch):
    """Cases B.2: refused in one line; a plain name needs no link."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    assert storage.plain_link(tmp_path / "run") == tmp_path / "run"
    with pytest.raises(UserError) as error:
        storage.plain_link(tmp_path / "[run]")
    assert "\n" not in str(error.value)
