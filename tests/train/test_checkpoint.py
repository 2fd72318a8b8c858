"""Checkpoints: the same bits on another number of devices, and never half of one."""

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile

import jax
import numpy as np
import pytest
import tiny

from jaxcl.errors import Preempted, UserError
from jaxcl.method import sharding
from jaxcl.method.init_state import init_state
from jaxcl.train.checkpoint import Checkpoints, Preemption
from jaxcl.train.step_names import complete_steps


@functools.cache
def shapes(features=12):
    c = tiny.config(stage=False)
    c.model.head_features = features
    recipe = tiny.recipe(c)
    return jax.eval_shape(lambda: init_state(recipe))


def state_of(seed=0, *, step=0, devices=1, features=12):
    state = tiny.fill(shapes(features), seed).replace(step=np.int32(step))
    return sharding.device_put(state, sharding.replicated(sharding.make_mesh(devices)))


def abstract(devices=1, features=12):
    where = sharding.replicated(sharding.make_mesh(devices))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes(features))


def bits(state):
    plain = state.replace(key=jax.random.key_data(state.key))
    return jax.tree.map(np.asarray, plain)


def assert_same(a, b):
    a, b = bits(a), bits(b)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with steps 3 and 7, written from eight devices."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.latest is None and complete_steps(folder / "none") == ()
        for step in (3, 7):
            checkpoints.save(step, state_of(seed=step, step=step, devices=8))
        checkpoints.wait()
        assert checkpoints.latest == 7
    return folder


ODD = ["[2024] photos", "a*b", "what?", "back\\slash", "100% #1", "new\nline", "~x", "{a,b}", os.fsdecode(b"caf\xe9")]


@pytest.mark.parametrize("name", ODD, ids=range(len(ODD)))
def test_any_name_of_a_folder(name, tmp_path, monkeypatch):
    """Cases B.2: what is saved in a folder of any name is read from it, also beside one that its name matches."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for i, folder in enumerate(("axb", "2 photos", name)):
        with Checkpoints(tmp_path / folder / "checkpoints") as checkpoints:
            checkpoints.save(1, state_of(seed=i, step=1))
    with Checkpoints(tmp_path / name / "checkpoints") as checkpoints:
        assert checkpoints.latest == 1
        assert_same(checkpoints.restore(abstract()), state_of(seed=2, step=1))
    manifest = json.loads((tmp_path / name / "checkpoints" / "1" / "manifest.json").read_text())
    assert manifest["files"]


@pytest.mark.parametrize("fault", ["metadata", "values"])
def test_what_cannot_be_read_back_does_not_count(fault, tmp_path, monkeypatch):
    """Cases B.2: a checkpoint gets its manifest only when it was read; otherwise the run ends in one line."""

    def broken(*args, **options):
        raise ValueError("no such array")

    with pytest.raises(UserError) as error, Checkpoints(tmp_path / "checkpoints") as checkpoints:
        monkeypatch.setattr(checkpoints._checkpointer, {"metadata": "metadata", "values": "load"}[fault], broken)
        checkpoints.save(1, state_of(step=1))
        checkpoints.wait()
    assert "\n" not in str(error.value) and "no checkpoint was saved yet" in str(error.value)
    assert not (tmp_path / "checkpoints" / "1" / "manifest.json").exists()


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


@pytest.mark.parametrize("devices", [8, 2, 1])
def test_any_number_of_devices(saved, devices):
    with Checkpoints(saved) as checkpoints:
        state = checkpoints.restore(abstract(devices))
    assert_same(state, state_of(seed=7, step=7))
    assert all(len(x.sharding.device_set) == devices for x in jax.tree.leaves(state))
    assert jax.random.key_impl(state.key) == jax.random.key_impl(jax.random.key(0))
    np.testing.assert_array_equal(jax.random.bits(state.key), jax.random.bits(jax.random.key(7)))


def test_eight_to_two_to_one(saved, tmp_path):
    """Through a checkpoint at each count."""
    with Checkpoints(saved) as checkpoints:
        state = checkpoints.restore(abstract(2))
    with Checkpoints(tmp_path / "two") as checkpoints:
        checkpoints.save(7, state)
        checkpoints.wait()
        state = checkpoints.restore(abstract(1))
    assert_same(state, state_of(seed=7, step=7))


def test_a_step_by_name_and_arrays_as_the_wish(saved):
    with Checkpoints(saved) as checkpoints:
        assert_same(checkpoints.restore(abstract(), 3), state_of(seed=3, step=3))
        assert_same(checkpoints.restore(state_of(seed=1)), state_of(seed=7, step=7))


def test_the_newest_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, state_of(step=step))
            checkpoints.wait()
        checkpoints.save(4, state_of(seed=9, step=4))  # a step saved twice is saved once
        checkpoints.wait()
        assert checkpoints.latest == 4
        assert_same(checkpoints.restore(abstract()), state_of(step=4))
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["3", "4"]


def test_a_donated_state_may_go_while_it_is_written(tmp_path):
    state = state_of(seed=5, step=5)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state)
        for x in jax.tree.leaves(state.params):
            x.delete()
        checkpoints.wait()
        assert_same(checkpoints.restore(abstract()), state_of(seed=5, step=5))


def test_a_half_written_checkpoint_is_not_the_latest(copy):
    """What a kill leaves: a folder under a temporary name, and one without its last file."""
    names = [p.name for p in (copy / "7").rglob("*") if p.is_file()]
    assert names
    shutil.copytree(copy / "7", copy / "9.orbax-checkpoint-tmp")
    shutil.copytree(copy / "7", copy / "11.orbax-checkpoint-tmp-1700000000")
    with Checkpoints(copy) as checkpoints:
        assert checkpoints.latest == 7
        assert_same(checkpoints.restore(abstract()), state_of(seed=7, step=7))
        checkpoints.save(9, state_of(seed=9, step=9))
        checkpoints.wait()
        assert checkpoints.latest == 9
        assert_same(checkpoints.restore(abstract()), state_of(seed=9, step=9))


def test_another_model_is_one_line(saved):
    for wrong in (abstract(features=13), other_tree()):
        with Checkpoints(saved) as checkpoints, pytest.raises(UserError) as error:
            checkpoints.restore(wrong)
        text = str(error.value)
        assert f"{saved.resolve()}/7 does not fit this model" in text and "--workdir" in text
        assert "\n" not in text and len(text) < 500


def other_tree():
    c = tiny.config(stage=False)
    c.model.stage_sizes = (1, 2)
    del c.memory.probe
    recipe = tiny.recipe(c)
    where = sharding.replicated(sharding.make_mesh(1))
    new = jax.eval_shape(lambda: init_state(recipe))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), new)


def test_preemption_is_noticed_and_the_handler_given_back():
    before = signal.getsignal(signal.SIGTERM)
    preemption = Preemption()
    try:
        assert not preemption.reached(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.reached(2)
    finally:
        preemption.close()
    assert signal.getsignal(signal.SIGTERM) is before
    preemption.close()


# ---- damage


def truncate(folder):
    path = next(iter((folder / "state" / "d").iterdir()))
    path.write_bytes(path.read_bytes()[:-1])


def flip(folder):
    path = next(iter((folder / "state" / "d").iterdir()))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lose(folder):
    (folder / "state" / "_METADATA").unlink()


def lose_unsealed(folder):
    """A kill came before the manifest, and then the disk lost a file."""
    (folder / "manifest.json").unlink()
    shutil.rmtree(folder / "state" / "d")
    shutil.rmtree(folder / "state" / "ocdbt.process_0")


def other_types(folder):
    """Orbax reads this file of every step before it opens any."""
    (folder / "_CHECKPOINT_METADATA").write_text('{"init_timestamp_nsecs": {"a": 1}}')


def no_object_unsealed(folder):
    (folder / "manifest.json").unlink()
    (folder / "_CHECKPOINT_METADATA").write_text("[1, 2]")


@pytest.mark.parametrize("damage", [truncate, flip, lose, lose_unsealed, other_types, no_object_unsealed])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(copy, damage, caplog):
    damage(copy / "7")
    with Checkpoints(copy) as checkpoints, caplog.at_level("WARNING", logger="jaxcl"):
        assert checkpoints.latest == 7 and complete_steps(copy) == (3, 7)
        assert_same(checkpoints.restore(abstract()), state_of(seed=3, step=3))
        (line,) = [r.getMessage() for r in caplog.records if r.name == "jaxcl"]
        assert f"{copy}/7 is damaged" in line and "\n" not in line
        assert checkpoints.latest == 3 and (copy / "damaged-7").is_dir()
        checkpoints.save(7, state_of(seed=9, step=7))  # its step comes again
        checkpoints.wait()
        assert_same(checkpoints.restore(abstract()), state_of(seed=9, step=7))


def test_damage_with_nothing_before_it(copy):
    flip(copy / "7")
    with Checkpoints(copy, read_only=True) as checkpoints, pytest.raises(UserError, match="step 7: .* has changed"):
        checkpoints.restore(abstract(), 7)
    truncate(copy / "3")
    with Checkpoints(copy) as checkpoints, pytest.raises(UserError) as error:
        checkpoints.restore(abstract())
    text = str(error.value)
    assert str(copy) in text and "step 7: " in text and "step 3: " in text and "\n" not in text
    assert (copy / "7").is_dir()  # left as it was found


def test_the_manifest_says_what_it_is_of(tmp_path):
    with Checkpoints(tmp_path, about={"config": "abc", "batch_size": 16}) as checkpoints:
        checkpoints.save(4, state_of(step=4))
    manifest = json.loads((tmp_path / "4" / "manifest.json").read_text())
    assert (manifest["step"], manifest["config"], manifest["batch_size"]) == (4, "abc", 16)
    on_disk = {os.path.relpath(p, tmp_path / "4"): p.stat().st_size for p in (tmp_path / "4").rglob("*") if p.is_file()}
    del on_disk["manifest.json"]
    assert {name: size for name, (size, _) in manifest["files"].items()} == on_disk


# ---- a full disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB, which only root may mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True)
    except OSError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip("may not mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line(small_disk):
    with pytest.raises(UserError) as error, Checkpoints(small_disk / "c") as checkpoints:
        checkpoints.save(1, state_of(step=1))
        checkpoints.wait()
        with contextlib.suppress(OSError), open(small_disk / "more", "wb", buffering=0) as more:
            while more.write(b"x" * 4096):
                pass
        checkpoints.save(2, state_of(step=2))
        checkpoints.wait()
    text = str(error.value)
    # The words for a full disk are those of the library that writes.
    assert re.search(rf"{small_disk}/c: no space left on (the )?device;", text)
    assert "checkpoint is step 1;" in text and "\n" not in text
    (small_disk / "more").unlink()
    with Checkpoints(small_disk / "c") as checkpoints:
        assert checkpoints.steps == (1,)
        assert_same(checkpoints.restore(abstract()), state_of(step=1))
        checkpoints.save(2, state_of(step=2))
        checkpoints.wait()
        assert checkpoints.latest == 2


# ---- notices outside of the loop


def test_preemption_before_and_after_the_loop():
    preemption = Preemption(at_once=True)
    try:
        with pytest.raises(Preempted):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        preemption.close()
    preemption = Preemption(at_once=True)
    try:
        preemption.loop_begins()
        assert not preemption.reached(1)
        preemption.loop_ended()
        with pytest.raises(Preempted):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # one is enough: what cleans up after it must not be torn
    finally:
        preemption.close()
