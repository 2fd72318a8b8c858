"""What is kept of a loss that is not finite, and any update made again: the same bits, and the first array to blame."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from etils import epath
from processes import ROOT, cli, one_line
from train_checks import config_module, shrink

from jaxcl.data import shuffle
from jaxcl.data.shuffle import Shuffled
from jaxcl.errors import Diverged, UserError
from jaxcl.report import read_metrics
from jaxcl.runtime.lock import RunLock
from jaxcl.train import loop as train
from jaxcl.train import replay
from jaxcl.train.best import Best
from jaxcl.train.checkpoint import Checkpoints
from jaxcl.train.runs import open_run

CLOCK = {"step", "time", "lr", "images_per_second", "data_wait"}


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    return tiny.colours(tmp_path_factory.mktemp("data") / "colours.npz")


def short(name, npz, steps=3, every=2, start="0", preset=""):
    """A config of the project on the tiny network, without evaluations."""
    c = shrink(config_module(name).get_config(preset), npz)
    for view in c.views.values():
        for key in {"jitter_p", "grayscale"} & set(view):
            view[key] = 0.0  # colour compiles slowly
    for stage in c.stages:
        stage.start = start
        if "tap" in stage:
            stage.tap = "stage1"
    c.duration, c.checkpoint.every, c.devices = f"{steps} steps", f"{every} steps", 1
    c.eval.every, c.eval.quick, c.eval.final, c.collapse_every = "0", (), (), "1 step"
    return c


def contents(folder):
    """Everything in a run folder but what a replay writes."""
    return {
        str(p.relative_to(folder)): hashlib.blake2b(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file() and not p.name.startswith("replay_")
    }


def rows_of(step, seed=0):
    return Shuffled(64, batch_size=16, seed=seed)(step - 1).tolist()


# ---- healthy updates


@pytest.mark.parametrize(
    "name, start, steps",
    [("excon", "50%", {3: 2, 2: 0}), ("clae", "0", {3: 2}), ("moco", "0", {3: 2})],
)
def test_any_update_again(name, start, steps, npz, tmp_path, capsys):
    """From a checkpoint and from the start: every metric is that of the run to the bit, and the run stays as it was."""
    c = short(name, npz, start=start)
    train.run(c, tmp_path)
    before = contents(tmp_path)
    capsys.readouterr()
    for step, begin in steps.items():
        found = replay.run(c, tmp_path, step)
        (row,) = (row for row in read_metrics(tmp_path) if row["step"] == step)
        assert found["metrics"]["loss"] == row["loss"]
        numbers = {k for k, v in row.items() if k not in CLOCK and not isinstance(v, list)}
        assert set(found["recorded"]["same"]) == numbers and found["recorded"]["differ"] == {}
        assert found["from"]["step"] == begin and found["batch"]["index"] == rows_of(step)
        assert found["first"] is None and len(found["arrays"]) > 50
        assert len(found["phase"]["stages"]) == (0 if (start, step) == ("50%", 2) else len(c.stages))
        # The other program: the same up to rounding.
        loss = sum(term["weight"] * term["value"] for term in found["terms"].values())
        assert loss == pytest.approx(found["metrics"]["loss"], rel=1e-4)
        norms = np.array([layer["gradient"] for layer in found["layers"].values()])
        assert np.sqrt(np.sum(norms**2)) == pytest.approx(found["metrics"]["grad_norm"], rel=1e-3)
        assert "encoder/stages_1_0/conv1" in found["layers"]
        assert all(layer["parameter"] >= 0 and layer["update"] >= 0 for layer in found["layers"].values())
        assert json.loads((tmp_path / "nan" / f"replay_{step}.json").read_text()) == json.loads(json.dumps(found))
        shown = capsys.readouterr().out
        assert all(word in shown for word in (*found["terms"], *found["layers"], *found["metrics"]))
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_an_update_that_trains_only_the_probe(npz, tmp_path, capsys):
    """The updates before it are of two programs; it has neither terms nor gradients of the encoder."""
    c = short("supcon", npz, steps=4, every=3, preset="garments,alternating")
    train.run(c, tmp_path)
    for step, begin in ((8, 6), (5, 0)):
        found = replay.run(c, tmp_path, step)
        assert found["phase"]["learns"] == "probe" and found["from"]["step"] == begin
        assert (found["terms"], found["layers"], found["first"]) == ({}, {}, None)
        assert "probe/loss" in found["recorded"]["same"] and found["recorded"]["differ"] == {}
        assert "probe/loss" in capsys.readouterr().out


def test_what_cannot_be_replayed(npz, tmp_path, monkeypatch, capsys):
    """One line, code 2, nothing written: no such update, no run, another config, a run in progress."""
    c = short("supcon", npz)
    run = tmp_path / "run"
    begun(run, c)
    before = contents(tmp_path)
    for step in (0, 4, -1):
        with pytest.raises(UserError) as error:
            replay.run(c, run, step)
        assert "\n" not in str(error.value) and "1 to 3" in str(error.value)
    with pytest.raises(UserError, match="config.json"):
        replay.run(c, tmp_path / "nothing", 1)
    with pytest.raises(UserError, match=f"{run} is in use"), RunLock(run):
        replay.run(c, run, 1)
    other = short("supcon", npz)
    other.seed = 1
    with pytest.raises(UserError, match="seed"):
        replay.run(other, run, 1)
    assert contents(tmp_path) == before and not (run / "nan").exists()
    supcon = f"--config={ROOT}/configs/supcon.py"
    for flags in (
        ["--replay=0"],
        ["--replay=x"],
        ["--replay=1", "--profile=2"],
        [f"--workdir={tmp_path}", "--replay=1"],
    ):
        code, out, err = cli(["train", supcon, *flags], monkeypatch, capsys)
        assert (code, out) == (2, "") and "--replay" in one_line(err)


# ---- updates that are not finite


def begun(folder, c, change=lambda params: params):
    """A run at step 3 with parameters that were filled, not trained, and then changed."""
    state = tiny.saved_run(folder / "first", c)
    (folder / "config.json").write_text((folder / "first" / "config.json").read_text())
    data = json.loads((folder / "first" / "data.json").read_text()) | {"row_order": shuffle.ORDER}
    (folder / "data.json").write_text(json.dumps(data))
    state = state.replace(params=change(state.params))
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(3, jax.device_put(state))
    return state


@pytest.fixture(scope="module")
def burst(npz, tmp_path_factory):
    """A run whose loss is NaN at step 2: its learning rate is absurd."""
    workdir, c = tmp_path_factory.mktemp("burst"), short("supcon", npz)
    c.optimizer.kind, c.optimizer.lr, c.optimizer.schedule, c.optimizer.warmup = "sgd", 1e30, "constant", "0"
    c.log_examples = True
    with pytest.raises(Diverged) as error:
        train.run(c, workdir)
    return workdir, c, error.value


def test_the_last_batch_is_kept(burst, npz):
    workdir, c, error = burst
    assert error.step == error.update == 2 and "--replay=2" in str(error) and "\n" not in str(error)
    kept = json.loads((workdir / "nan" / "batch_2.json").read_text())
    assert kept["step"] == 2 and kept["batch"]["index"] == rows_of(2)
    lines = [json.loads(line) for line in (workdir / "examples.jsonl").read_text().splitlines()]
    assert {"step": 2, "index": kept["batch"]["index"]} in lines  # what the loop really had
    with np.load(npz) as arrays:
        assert kept["batch"]["label"] == arrays["train_labels"][rows_of(2)].tolist()
    assert (kept["batch"]["source"], kept["batch"]["split"], kept["batch"]["epoch"]) == (f"npz:{npz}", "train", 0)
    key = jax.random.fold_in(jax.random.key(c.seed, impl="threefry2x32"), 1)
    assert kept["key"] == {
        "seed": c.seed, "impl": "threefry2x32", "step": 1, "data": jax.random.key_data(key).tolist()
    }  # fmt: skip
    assert kept["metrics"]["loss"] == "nan" and kept["state"] == {"step": 0, "folder": ""}
    assert "NaN" not in (workdir / "nan" / "batch_2.json").read_text()  # JSON has no such word


def test_the_update_that_burst(burst):
    """The parameters of step 1 are finite and absurd: the first thing that is not finite is made from them."""
    workdir, c, _ = burst
    found = replay.run(c, workdir, 2)
    assert found["metrics"]["loss"] == "nan" and "loss" in found["recorded"]["same"]
    assert found["recorded"]["differ"] == {}
    first = found["first"]
    assert first["name"].startswith("encode view1 + view2: ResNet/stem") and first["pass"] == "forward"
    assert all(layer["parameter"] != "nan" for layer in found["layers"].values())
    assert replay.run(c, workdir, 1)["first"] is None


def test_the_state_that_was_saved_before_it(npz, tmp_path, monkeypatch):
    """Cases C.5: a replay begins with it; a metric that differs from the run is shown."""
    c = short("supcon", npz, steps=4)
    compile_update = train.compile_update

    def poisoned(*args):
        update = compile_update(*args)

        def run(state, batch):
            state, metrics = update(state, batch)
            with jax.transfer_guard("allow"):
                return state, metrics | {"loss": metrics["loss"] * (np.nan if int(state.step) == 3 else 1)}

        return run

    monkeypatch.setattr(train, "compile_update", poisoned)
    with pytest.raises(Diverged):
        train.run(c, tmp_path)
    assert not (tmp_path / "checkpoints" / "2").exists() and (tmp_path / "nan" / "checkpoints" / "2").is_dir()
    kept = json.loads((tmp_path / "nan" / "batch_3.json").read_text())
    assert kept["state"] == {"step": 2, "folder": "nan/checkpoints"}
    found = replay.run(c, tmp_path, 3)
    assert found["from"] == kept["state"] and found["first"] is None
    assert list(found["recorded"]["differ"]) == ["loss"] and "grad_norm" in found["recorded"]["same"]


@pytest.mark.parametrize("part", ["params", "batch_stats", "opt_state", "memory"])
def test_no_part_of_what_is_saved_is_ruined(part, npz, tmp_path, monkeypatch):
    """Cases C.5: losses are still finite when the state is saved, but no run could go on from it."""
    c = short("supcon", npz, steps=4)

    def nothing_learned(*_):
        def update(state, batch):
            with jax.transfer_guard("allow"):
                step = int(state.step) + 1
                state = state.replace(step=np.int32(step))
                if step == 2:
                    spoil = lambda x: x * np.nan if jnp.issubdtype(x.dtype, jnp.inexact) else x  # noqa: E731
                    state = state.replace(**{part: jax.tree.map(spoil, getattr(state, part))})
                return jax.device_put(state), {"loss": np.float32(1)}

        return update

    monkeypatch.setattr(train, "compile_update", nothing_learned)
    monkeypatch.setattr(train, "compile_monitor", lambda *_: lambda state, batch: {})
    with pytest.raises(Diverged) as error:
        train.run(c, tmp_path)
    assert error.value.update == 2 and error.value.step == 3 and "\n" not in str(error.value)
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    assert json.loads((tmp_path / "nan" / "batch_2.json").read_text())["metrics"] == {"loss": 1.0}


@pytest.mark.parametrize("score", [np.nan, np.inf, None])
def test_no_state_is_the_best_by_a_score_that_is_none(npz, tmp_path, score):
    """Cases C.5."""
    c = short("supcon", npz)
    c.data.validation = 0.25
    Best(epath.Path(tmp_path), c).offer(2, None, {} if score is None else {"eval/knn_accuracy": score})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "path, name, way",
    [
        (("encoder", "stages_1_0", "conv1", "kernel"), "encode view1 + view2: ResNet/stages_1_0/conv1", "forward"),
        (("head", "out", "dense", "kernel"), "encode view1 + view2: ProjectionHead/out/dense", "forward"),
    ],
)
def test_the_layer_is_named(path, name, way, npz, tmp_path):
    """Its parameters are finite, but so large that its outputs are not."""
    c = short("supcon", npz, steps=4)

    def change(params):
        node = params
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = np.full_like(node[path[-1]], 3e38)
        return params

    begun(tmp_path, c, change)
    found = replay.run(c, tmp_path, 4)
    assert (found["first"]["name"], found["first"]["pass"]) == (name, way)
    assert found["first"]["not_finite"] > 0 and found["from"] == {"step": 3, "folder": "checkpoints"}
    assert open_run(tmp_path).step == 3
    assert found["layers"]["/".join(path[:-1])]["parameter"] == "inf"  # of finite entries, but beyond float32


def test_a_parameter_that_is_not_finite_comes_before_all(npz, tmp_path):
    c = short("supcon", npz, steps=4)

    def change(params):
        params["encoder"]["stages_0_0"]["bn2"]["bias"][1] = np.inf
        return params

    begun(tmp_path, c, change)
    first = replay.run(c, tmp_path, 4)["first"]
    assert first["name"] == "state: params/encoder/stages_0_0/bn2/bias" and first["not_finite"] == 1


def test_norms_of_layers():
    """Of kernel and bias together; no overflow in the squares, and NaN is not lost."""
    tree = {
        "a": {"kernel": jnp.array([[3.0, 0.0]]), "bias": jnp.array([4.0])},
        "b": {"c": {"kernel": jnp.full(4, 1e30)}},
        "d": {"scale": jnp.zeros(3)},
        "e": {"scale": jnp.array([1.0, jnp.nan])},
        "f": {"scale": jnp.array([1.0, -jnp.inf])},
    }
    found = {k: float(v) for k, v in replay.norm_by_layer(tree).items()}
    assert found["a"] == 5 and found["b/c"] == pytest.approx(2e30) and found["d"] == 0
    assert np.isnan(found["e"]) and found["f"] == np.inf
