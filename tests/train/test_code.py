"""Cases C.11: a run that goes on under other code says so, in one line; it goes on all the same."""

import json

import numpy as np
import pytest
from etils import epath

from jaxcl.runtime import storage
from jaxcl.train import code, run_folder

CONFIG, FACTS = {"seed": 0}, {"num_examples": 64}
WARNINGS = dict(level="WARNING", logger="jaxcl")


def claimed(folder, **options):
    run_folder.claim(epath.Path(folder), CONFIG, FACTS, True, **options).close()


@pytest.fixture
def folder(tmp_path):
    """A run with a checkpoint."""
    claimed(tmp_path)
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    return tmp_path


def change(folder, **changes):
    path = folder / "environment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"packages": {"jax": "0.9.9", "flax": code.packages()["flax"]}}, ["jax 0.9.9 -> "]),
        ({"python": "3.1.4"}, ["Python 3.1 -> "]),
        ({"commit": "0123456789ab"}, ["commit 0123456789ab -> "]),
        ({"code": {"jaxcl": "00", "parts": "00"}}, ["files of jaxcl", "files of your own parts"]),
    ],
)
def test_other_code_is_said(folder, changes, words, caplog, monkeypatch):
    """Cases C.11."""
    monkeypatch.setattr(run_folder, "_commit", lambda: "ba9876543210")
    change(folder, **{"commit": "ba9876543210"} | changes)
    with caplog.at_level(**WARNINGS):
        claimed(folder)
    (record,) = caplog.records
    text = record.getMessage()
    assert str(folder) in text and "\n" not in text and all(word in text for word in words)
    caplog.clear()
    with caplog.at_level(**WARNINGS):
        claimed(folder)  # the environment was written again
    assert not caplog.records


def test_a_replay_says_it_and_leaves_the_environment(folder, caplog):
    """Cases C.11."""
    change(folder, python="3.1.4")
    before = (folder / "environment.json").read_bytes()
    with caplog.at_level(**WARNINGS):
        claimed(folder, record=False)
    assert len(caplog.records) == 1 and (folder / "environment.json").read_bytes() == before


def test_nothing_is_said_where_nothing_is_known(folder, caplog):
    """Cases C.11: the patch level of Python; an older version's or a damaged environment; a run without checkpoints."""
    with caplog.at_level(**WARNINGS):
        version = code.python_version()
        change(folder, python=f"{version}.99", code={"jaxcl": 3}, packages=[], commit="")
        claimed(folder)
        for content in (b"\xff", b"[]", b"{}", b'{"packages": {"jax": 3}}'):
            (folder / "environment.json").write_bytes(content)
            claimed(folder)
        assert storage.read_json(folder / "environment.json")["packages"] == code.packages()
        change(folder, python="3.1.4")
        (folder / "checkpoints" / "4").rmdir()
        claimed(folder)
    assert not caplog.records


def test_hashes_follow_the_files(tmp_path, monkeypatch):
    """Cases C.11: of the user's own parts, by the config's words."""
    path = tmp_path / "part_of_mine_11.py"
    path.write_text("A = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    import part_of_mine_11  # noqa: F401

    config = {"terms": {"a": {"kind": "part_of_mine_11:A"}}, "data": {"source": "npz:x"}}
    one, none = code.hashes(config), code.hashes({"data": {"source": "npz:x"}})
    assert one["jaxcl"] == none["jaxcl"] and one["parts"] != none["parts"]
    path.write_text("A = 2\n")
    assert code.hashes(config)["parts"] not in (one["parts"], none["parts"])
    assert len(np.unique([*one.values(), *none.values()])) == 3
