"""Two processes of one run that differ, and one that ends alone: all end with the code of the mistake."""

import socket

import jax
import numpy as np
import pytest
import tiny
from processes import ROOT, one_line
from test_distributed import FLAGS, free_address, launch

from jaxcl.data import source_of
from jaxcl.runtime import together
from jaxcl.train import agreement

COMMON = [f for f in FLAGS if "data.limit" not in f and "configs/" not in f] + [f"--config={ROOT}/configs/excon.py"]
# A command in a folder of its own.
PROGRAM = """
import os, sys
os.chdir(sys.argv.pop(1))
from jaxcl.main import main
from jaxcl.runtime import distributed, entry, huge_pages
huge_pages.ask = lambda **_: None
distributed.wants_guard = lambda _: False
entry.leave(main)
"""


@pytest.fixture
def arrays(tmp_path):
    tiny.colours(tmp_path / "all.npz")
    with np.load(tmp_path / "all.npz") as file:
        return dict(file)


def changed(arrays, what):
    """The same set, but for one pixel, or for the labels."""
    if what == "pixels":
        images = arrays["train_images"].copy()
        images[7, 3, 3, 0] ^= 1
        return arrays | {"train_images": images}
    return arrays | {"train_labels": np.roll(arrays["train_labels"], 1)}


def ended(tmp_path, sets, *flags, own=((), ())):
    """Run two processes, each in a folder with its own x.npz -> the last line of each; both end with code 2."""
    address, processes = free_address(), []
    for i, arrays in enumerate(sets):
        folder = tmp_path / str(i)
        folder.mkdir()
        if arrays:
            np.savez(folder / "x.npz", **arrays)
        flags_i = ["--config.data.source=npz:x.npz", f"--workdir={tmp_path / 'run'}", *flags, *own[i]]
        processes.append(launch(1, "-c", PROGRAM, str(folder), *COMMON, *flags_i, f"--distributed={address},2,{i}"))
    try:
        said = [p.communicate(timeout=200)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [2, 2], "\n=====\n".join(said)
    assert not (tmp_path / "run").exists()
    return [text.strip().splitlines()[-1].removeprefix("jaxcl: ") for text in said]


@pytest.mark.parametrize(
    "key, values",
    [
        ("--config.optimizer.lr", ("0.1", "0.2")),
        pytest.param("--profile", ("1", "2"), marks=pytest.mark.slow),
        pytest.param("--config.eval.knn_k", ("5", "6"), marks=pytest.mark.slow),
    ],
)
def test_hosts_of_another_config(tmp_path, arrays, key, values):
    """Cases C.1: nothing is trained; every process names the key and both values."""
    for line in ended(tmp_path, [arrays, arrays], own=[[f"{key}={value}"] for value in values]):
        assert line.startswith(f"{key.removeprefix('--config.')} is ") and all(v in line for v in values)


@pytest.mark.slow
def test_hosts_of_another_folder(tmp_path, arrays):
    """Cases C.1: one of them has a checkpoint; looking for it must not make the others wait."""
    (tmp_path / "other" / "checkpoints" / "4").mkdir(parents=True)
    for line in ended(tmp_path, [arrays, arrays], own=[[], [f"--workdir={tmp_path / 'other'}"]]):
        assert line.startswith("--workdir is ")


@pytest.mark.parametrize("what", ["pixels", pytest.param("labels", marks=pytest.mark.slow)])
def test_hosts_of_other_data(tmp_path, arrays, what):
    """Cases C.1: other images or labels at the same path."""
    for line in ended(tmp_path, [arrays, changed(arrays, what)]):
        assert line.startswith(f"data.source (train) {what} is ")


@pytest.mark.parametrize("wrong", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_mistake_on_one_host(tmp_path, arrays, wrong):
    """Cases C.2: one host lacks the file. Code 2 everywhere, at once, and the mistake is the last line."""
    lines = ended(tmp_path, [None if i == wrong else arrays for i in range(2)])
    assert "x.npz" in lines[wrong]
    assert lines[1 - wrong] == f"process {wrong} of this run has ended: {lines[wrong]}"


def test_fingerprints_of_data(tmp_path, arrays):
    """Cases C.1: a pixel, the order of the labels; in memory or not."""

    def of(content, inner=False):
        np.savez(tmp_path / "x.npz", **content)
        c = tiny.config()
        with c.ignore_type():
            c.data.source = f"npz:{tmp_path / 'x.npz'}"
        source = source_of(c, "train")
        return agreement.fingerprint(agreement.Source.take(source, np.arange(len(source))) if inner else source)

    for inner in (False, True):
        one = of(arrays, inner)
        for what in ("pixels", "labels"):
            other = of(changed(arrays, what), inner)
            assert {k for k in one if one[k] != other[k]} == {what}
        assert of(arrays, inner) == one


def test_one_process_agrees_with_itself():
    """Cases C.1: nothing to compare, and nothing is started for it."""
    assert not together.several() and together.everyone("é") == ["é"]
    together.same({"a": 1}, "")
    together.tell("nobody listens", 2)
    assert jax.process_count() == 1


def test_a_port_in_use(tmp_path):
    """Cases C.8: refused by the flag's name."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        spec = f"--distributed=127.0.0.1:{server.getsockname()[1]},2,0"
        process = launch(1, "-m", "jaxcl.main", *FLAGS, spec, f"--workdir={tmp_path / 'run'}")
        text = process.communicate(timeout=100)[0]
    assert process.returncode == 2 and one_line(text).startswith(f"jaxcl: {spec}")
    assert not (tmp_path / "run").exists()
