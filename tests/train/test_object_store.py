"""A whole run in gs://, against an object store in this process: stopped, gone on with, evaluated, damaged."""

import json
import os

import jax
import numpy as np
import pytest
import tiny
from etils import epath
from fake_gcs import serve
from train_checks import config, final_state, record, writer_that

from jaxcl.errors import UserError
from jaxcl.report import MetricsWriter, read_metrics
from jaxcl.runtime import lock, storage
from jaxcl.train import log, profile
from jaxcl.train import loop as train

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture
def store(monkeypatch):
    with serve(monkeypatch) as found:
        yield found


def test_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert os.fspath(storage.folder("gs://bucket/a/run")) == "gs://bucket/a/run"
    assert os.fspath(storage.folder("runs/a")) == str(tmp_path / "runs" / "a")
    assert storage.is_remote("gs://bucket/x") and not storage.is_remote("runs/x")


def test_metrics_are_put_up_whole_and_cut_back(store):
    with MetricsWriter("gs://bucket/run") as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": step / 2})
        assert not store.puts.get("bucket/run/metrics.jsonl")  # not once a line
        writer.flush()
        assert [r["step"] for r in read_metrics("gs://bucket/run")] == [1, 2, 3, 4, 5]
        writer.write(6, {"loss": 3.0})
    assert store.puts["bucket/run/metrics.jsonl"] == 2
    with MetricsWriter("gs://bucket/run", first_step=3) as writer:
        assert [r["step"] for r in read_metrics("gs://bucket/run")] == [1, 2, 3]
        writer.write(4, {"loss": 9.0})
    assert [(r["step"], r["loss"]) for r in read_metrics("gs://bucket/run")][-2:] == [(3, 1.5), (4, 9.0)]
    boards = store.below("bucket/run/tensorboard/")
    assert len(boards) == 2 and all(store[b] for b in boards)


def test_lock(store):
    first = lock.RunLock("gs://bucket/run", touch=0.05)
    held = json.loads(store["bucket/run/lock.json"])
    with pytest.raises(UserError, match="gs://bucket/run is in use by process"):
        lock.RunLock("gs://bucket/run")
    # As another machine sees it: the owner touches it, so it lives.
    store.put("bucket/run/lock.json", json.dumps(held | {"touched": 1, "boot": "elsewhere"}).encode())
    first.close()
    assert "bucket/run/lock.json" not in store


def test_a_trace_is_put_up(store):
    update = jax.jit(lambda state, batch: state + batch)
    state = batch = np.ones(4, np.float32)
    trace = profile.Profile(epath.Path("gs://bucket/run"), 2, begin=1)
    for step in range(4):
        trace.before(step, state)
        with trace.waiting(), trace.update(step):
            state = update(state, batch)
        trace.after(step, update, state, batch)
    assert trace.close() == ""  # it is over
    assert any(n.endswith(".xplane.pb") for n in store.below("bucket/run/profile/plugins/profile/"))
    assert profile.read_step_time("gs://bucket/run")["updates"] == [2, 3]
    assert profile.read_step_time("gs://bucket/another") is None


@pytest.mark.slow
def test_a_run(store, tmp_path, monkeypatch):
    npz = tiny.colours(tmp_path / "colours.npz")
    store.put("bucket/colours.npz", npz.read_bytes())
    c = config("supcon", npz=npz)
    c.duration, c.eval.every, c.report, c.log_examples = "8 steps", "0", True, True
    reference = train.run(c, tmp_path / "local")

    away = config("supcon", npz="gs://bucket/colours.npz")
    away.duration, away.eval.every, away.report, away.log_examples = "8 steps", "0", True, True

    class Pulled(Exception):
        pass

    def pull():
        raise Pulled

    with monkeypatch.context() as m:
        m.setattr(log, "MetricsWriter", writer_that(pull, 7))
        with pytest.raises(Pulled):
            train.run(away, "gs://bucket/run")
    assert "bucket/run/checkpoints/4/manifest.json" in store and "bucket/run/results.json" not in store
    results = train.run(away, "gs://bucket/run")
    assert results["classifier"] == reference["classifier"]
    assert record("gs://bucket/run") == record(tmp_path / "local")
    names = {n.removeprefix("bucket/run/").split("/")[0] for n in store.below("bucket/run/")}
    assert names == {p.name for p in (tmp_path / "local").iterdir()}
    assert b"<html" in store["bucket/run/report/index.html"] and "bucket/run/report/curves.png" in store
    assert store["bucket/run/examples.jsonl"] == (tmp_path / "local" / "examples.jsonl").read_bytes()
    state, wanted = final_state(storage.folder("gs://bucket/run"), c), final_state(tmp_path / "local", c)
    np.testing.assert_array_equal(state.step, wanted.step)
    # The damaged one is set aside in a store without renaming, too.
    del store["bucket/run/results.json"]
    broken = next(n for n in store.below("bucket/run/checkpoints/8/state/d/"))
    store.put(broken, store[broken][:-1])
    assert train.run(away, "gs://bucket/run")["classifier"] == reference["classifier"]
    assert store.below("bucket/run/checkpoints/damaged-8/") and store.below("bucket/run/checkpoints/8/manifest.json")
