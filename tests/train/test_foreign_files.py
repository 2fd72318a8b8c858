"""Files of a run folder that are cut off, binary or another program's: one line, by the path, and nothing lost."""

import json
import shutil
import time
import zipfile

import numpy as np
import pytest
import tiny
from etils import epath
from train_checks import config

from jaxcl.commands.compare import runs as compared
from jaxcl.commands.compare import sweeps
from jaxcl.data import shuffle, source_of
from jaxcl.errors import UserError
from jaxcl.models import weights
from jaxcl.runtime import storage
from jaxcl.train import loop
from jaxcl.train.best import Best
from jaxcl.train.checkpoint import MANIFEST, Checkpoints
from jaxcl.train.profile import read_step_time
from jaxcl.train.run_folder import ROW_ORDER
from jaxcl.train.runs import open_run

BAD = {
    "empty": b"",
    "cut": b'{"name": "exc',
    "binary": b"\x80\xff\x00\x93",
    "list": b"[1, 2]",
    "text": b'"config"',
    "nested": b"[" * 200000,
}


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    return tiny.colours(tmp_path_factory.mktemp("data") / "colours.npz")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, npz):
    folder = tmp_path_factory.mktemp("run")
    tiny.saved_run(folder, config(npz=npz))
    (folder / "results.json").write_text("{}")
    return folder


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def begun(folder, c):
    """A run that training continues, at step 3 -> its state."""
    state = tiny.saved_run(folder, c)
    path = folder / "data.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {ROW_ORDER: shuffle.ORDER}))
    return state


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("bad", BAD)
def test_one_object_or_one_line(tmp_path, bad):
    """Cases C.9."""
    path = tmp_path / "x.json"
    path.write_bytes(BAD[bad])
    with pytest.raises(UserError) as error:
        storage.read_json(path, advice="ask")
    assert str(error.value).startswith(f"{path} cannot be read: ") and str(error.value).endswith("; ask")
    assert "\n" not in str(error.value)
    path.write_text('{"a": 1}')
    assert storage.read_json(path, "a") == {"a": 1}
    with pytest.raises(UserError):
        storage.read_json(path, "b")


@pytest.mark.parametrize("bad", ["empty", "binary", "list"])
@pytest.mark.parametrize("name", ["config", "data", "results"])
def test_training_goes_on_in_it(run, npz, name, bad):
    """Cases C.9: config.json, data.json and results.json at the start of a run."""
    if name != "results":
        (run / "results.json").unlink()
    (run / f"{name}.json").write_bytes(BAD[bad])
    before = files(run)
    with pytest.raises(UserError) as error:
        loop.run(config(npz=npz), run)
    assert str(error.value).startswith(f"{run / name}.json cannot be read") and files(run) == before


@pytest.mark.parametrize("key, value", [("seed", 9), ("config", "another")])
def test_results_of_another_run(run, npz, key, value):
    """Cases C.9: they are not given out as this run's."""
    (run / "results.json").write_text(json.dumps({key: value}))
    before = files(run)
    with pytest.raises(UserError, match="results.json"):
        loop.run(config(npz=npz), run)
    assert files(run) == before


@pytest.mark.parametrize("bad", ["cut", "binary", "list"])
@pytest.mark.parametrize("name", ["config", "data", "environment"])
def test_it_is_opened(run, name, bad):
    """Cases C.9: evaluate, embed and export."""
    (run / f"{name}.json").write_bytes(BAD[bad])
    with pytest.raises(UserError, match=f"{run / name}.json cannot be read"):
        open_run(run)
    if name == "config":
        with pytest.raises(UserError, match=f"{run / name}.json cannot be read"):
            compared.config_of(run)


@pytest.mark.parametrize(
    "name, content",
    [
        ("config", {}),
        ("config", {"model": 3}),
        ("config", {"model": {"kind": 7}}),
        ("config", {"terms": [1]}),
        ("data", {}),
        ("data", {"image_shape": "big"}),
        ("data", {"image_shape": [16, 16, 3]}),
    ],
)
def test_json_of_another_program(run, name, content):
    """Cases C.9: whole, but not ours."""
    (run / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        open_run(run)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [{"step": "3", "validation_accuracy": 0.5}, {"step": 3, "validation_accuracy": {}}])
def test_a_best_state_of_another_type(tmp_path, npz, content):
    """Cases C.9."""
    c = config(npz=npz)
    c.data.validation = 0.25
    (tmp_path / "best.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=str(tmp_path / "best.json")):
        Best(epath.Path(tmp_path), c)


def test_facts_of_another_type(run, npz):
    """Cases C.9: data.json is whole, but a number in it is a text."""
    path = run / "data.json"
    facts = json.loads(path.read_text()) | {ROW_ORDER: shuffle.ORDER}
    path.write_text(json.dumps(facts | {"mean": ["a", "b", "c"]}))
    (run / "results.json").unlink()
    with pytest.raises(UserError, match="mean"):
        loop.run(config(npz=npz), run)


@pytest.mark.parametrize("key, value", [("parts", 3), ("seconds", "1"), ("updates", [1]), ("parts", {"augment": "a"})])
def test_times_of_another_type(tmp_path, key, value):
    """Cases C.9: the profile, when the report is written."""
    (tmp_path / "profile").mkdir()
    whole = {"seconds": 1.0, "parts": {"augment": 0.5}, "data": 0.0, "rest": 0.5, "updates": [4, 6], "device": "cpu"}
    path = tmp_path / "profile" / "step_time.json"
    path.write_text(json.dumps(whole))
    assert read_step_time(tmp_path) == whole
    path.write_text(json.dumps(whole | {key: value}))
    with pytest.raises(UserError, match=str(path)):
        read_step_time(tmp_path)


@pytest.mark.parametrize("name", ["metrics.jsonl", "examples.jsonl"])
def test_a_folder_in_the_place_of_a_file(npz, tmp_path, name):
    """Cases C.9."""
    c = config(npz=npz)
    c.log_examples = True
    begun(tmp_path, c)
    (tmp_path / name).mkdir()
    with pytest.raises(UserError) as error:
        loop.run(c, tmp_path)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("rows", [3, [3], [{}], [{"config": "a", "grid": {}, "measures": 1}]])
def test_a_table_of_a_sweep_of_another_type(tmp_path, rows):
    """Cases C.9: compare reads it."""
    (tmp_path / "table.json").write_text(json.dumps({"rows": rows}))
    with pytest.raises(UserError, match=str(tmp_path / "table.json")):
        sweeps.read_invariance(tmp_path)


def test_a_folder_that_links_to_itself(tmp_path):
    """Cases C.10: in a checkpoint, whose files are hashed."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "z").write_text("")
    (tmp_path / "a" / "x").write_text("")
    (tmp_path / "a" / "b" / "loop").symlink_to(tmp_path / "a", target_is_directory=True)
    (tmp_path / "a" / "out").symlink_to(tmp_path / "c", target_is_directory=True)
    found = [str(p.relative_to(tmp_path / "a")) for p in storage.files(epath.Path(tmp_path / "a"))]
    assert sorted(found) == ["out/z", "x"]


@pytest.mark.parametrize(
    "content",
    [b"\xff", b"[]", b'{"files": 3}', b'{"files": {"a": 1}}', b'{"files": {"a": [1]}}', b"{}", b'{"files": []}'],
)
def test_a_manifest_of_another_type(run, content):
    """Cases C.9."""
    (run / "checkpoints" / "3" / MANIFEST).write_bytes(content)
    with pytest.raises(UserError) as error:
        open_run(run)
    assert "step 3: " in str(error.value) and "\n" not in str(error.value)


def test_a_checkpoint_under_another_number(run):
    """Cases C.9: a copy named 9999 does not count as step 9999."""
    shutil.copytree(run / "checkpoints" / "3", run / "checkpoints" / "9999")
    assert open_run(run).step == 3
    with pytest.raises(UserError):
        open_run(run, step=9999)


@pytest.mark.parametrize("kind", ["empty", "foreign", "copy"])
def test_a_stray_checkpoint_before_and_during_a_run(npz, tmp_path, kind):
    """Cases C.9: the run saves what it would have saved."""
    c = config(npz=npz)
    c.duration, c.eval.every, c.checkpoint.every = "4 steps", "0 steps", "2 steps"
    c.eval.final = ()
    state = begun(tmp_path, c)
    stray = tmp_path / "checkpoints" / "9999"
    if kind == "copy":
        shutil.copytree(stray.with_name("3"), stray)
    else:
        stray.mkdir()
        if kind == "foreign":
            (stray / "x").write_text("?")
    assert int(state.step) == 3
    loop.run(c, tmp_path)
    assert (tmp_path / "checkpoints" / "4" / MANIFEST).exists()
    assert not stray.exists() and stray.with_name("damaged-9999").exists()


@pytest.mark.parametrize("name", ["tensorboard", "checkpoints", "metrics.jsonl"])
def test_something_else_in_the_place_of(npz, tmp_path, name):
    """Cases C.9: one line by its path, and the records of the run stay."""
    c = config(npz=npz)
    begun(tmp_path, c)
    (tmp_path / "examples.jsonl").write_text('{"step": 1}\n')
    if name == "checkpoints":
        (tmp_path / name).rename(tmp_path / "kept")
        (tmp_path / name).write_text("notes")
    elif name == "tensorboard":
        (tmp_path / name).write_text("notes")
    else:
        (tmp_path / name).mkdir()
    with pytest.raises(UserError) as error:
        loop.run(c, tmp_path)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
    assert (tmp_path / name).is_dir() == (name == "metrics.jsonl")
    assert (tmp_path / "examples.jsonl").read_text() == '{"step": 1}\n'


def test_which_errors_are_of_the_run_folder(tmp_path):
    for path, wanted in {
        tmp_path / "run" / "tensorboard" / "events": True,
        tmp_path / "data.npz": False,
        tmp_path / "run": False,
        "_METADATA": True,  # a name in an open folder
        3: False,
        None: False,
    }.items():
        path = str(path) if isinstance(path, type(tmp_path)) else path
        assert storage.inside(path, tmp_path / "run") == wanted


def test_a_later_checkpoint_that_appears(tmp_path, saved, npz, monkeypatch):
    """Cases C.9: what Orbax declines to save is never taken for saved."""
    run = open_run(saved)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, run.state)
        checkpoints.wait()
        monkeypatch.setattr(checkpoints._checkpointer, "save_async", lambda *_, **__: None)
        with pytest.raises(UserError, match=f"{tmp_path}/3"):
            checkpoints.save(2, run.state)


def test_a_workdir_that_is_renamed(npz, tmp_path, monkeypatch):
    """Cases C.9: one line, and what was saved is where it went."""
    c = config(npz=npz)
    c.duration, c.eval.every, c.checkpoint.every = "6 steps", "0 steps", "2 steps"
    add = loop.TrainLog.add

    def moves(self, step, *rest):
        add(self, step, *rest)
        if step == 5:
            while not (tmp_path / "run" / "checkpoints" / "4" / MANIFEST).exists():
                time.sleep(0.02)
            (tmp_path / "run").rename(tmp_path / "elsewhere")

    monkeypatch.setattr(loop.TrainLog, "add", moves)
    with pytest.raises(UserError) as error:
        loop.run(c, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert (tmp_path / "elsewhere" / "checkpoints" / "4" / MANIFEST).exists()


def header(text, tensors=b""):
    text = text.encode()
    return len(text).to_bytes(8, "little") + text + tensors


@pytest.mark.parametrize(
    "about",
    [
        "[]",
        "3",
        '{"architecture": 3, "layout": "torch"}',
        '{"layout": []}',
        "\\ud800",
        '{"architecture": {"kind": []}}',
    ],
)
def test_weights_with_an_odd_description(tmp_path, about):
    """Cases C.9: safetensors."""
    tensor = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    path = tmp_path / "w.safetensors"
    path.write_bytes(header(json.dumps({"__metadata__": {"jaxcl": about}, "a": tensor}), bytes(4)))
    with pytest.raises(UserError) as error:
        weights.read(path)
    assert "\n" not in str(error.value)


def test_an_npz_that_declares_petabytes(tmp_path):
    """Cases C.9: the header of an array, and not the array."""
    path = tmp_path / "x.npz"
    np.savez(path, images=np.zeros((4, 8, 8, 3), np.uint8))
    for shape in (b"9999999999999, 8, 8, 3", b"10**99, 8", b"-4, 8, 8, 3"):
        head = b"{'descr': '|u1', 'fortran_order': False, 'shape': (" + shape + b"), }"
        head += b" " * (63 - (len(head) + 10) % 64) + b"\n"
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("images.npy", b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + bytes(8))
        c = tiny.config()
        with c.ignore_type():
            c.data.source = f"npz:{path}"
        with pytest.raises(UserError, match=str(path)):
            source_of(c, "train")
