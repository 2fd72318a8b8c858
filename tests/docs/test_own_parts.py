"""The tutorial's package of own parts, docs/tutorials/own_parts: its loss by definition, and every command on it."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxcl.errors import UserError
from jaxcl.method import Embedding, Term, sharding

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "docs" / "tutorials" / "own_parts"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FOLDER), str(FOLDER.parents[2])]))


def jaxcl(*argv, **options):
    command = [sys.executable, "-m", "jaxcl", *argv]
    return subprocess.run(command, capture_output=True, text=True, cwd=FOLDER, timeout=300, **options)


@pytest.mark.parametrize("devices", [1, 8])
def test_its_loss_is_the_papers(devices):
    from my_parts.terms import AlignUniform

    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(16, 5)) for _ in range(2))
    term = AlignUniform(temperature=1.5, uniformity=0.7)

    def loss(a, b, axis_name=None):
        e = {"view1": Embedding(a, a), "view2": Embedding(b, b)}
        return term(e, jnp.zeros(len(a), jnp.int32), axis_name=axis_name)

    if devices > 1:
        mesh, P = sharding.make_mesh(devices), jax.sharding.PartitionSpec
        rows = P(sharding.AXIS)
        loss_fn = jax.shard_map(lambda a, b: loss(a, b, sharding.AXIS), mesh=mesh, in_specs=(rows, rows), out_specs=P())
    else:
        loss_fn = loss

    def by_hand(a, b):
        a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
        align = np.mean([np.sum((x - y) ** 2) for x, y in zip(a, b, strict=True)])
        uniform = [
            np.log(np.mean([np.exp(-1.5 * np.sum((x[i] - x[j]) ** 2)) for i in range(16) for j in range(16) if i != j]))
            for x in (a, b)
        ]
        return align + 0.7 * np.mean(uniform)

    value, grad = jax.jit(jax.value_and_grad(loss_fn))(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    np.testing.assert_allclose(value, by_hand(a, b), rtol=1e-5)
    chex.assert_shape(grad, a.shape)
    for i, d in ((0, 0), (7, 3)):
        step = np.zeros_like(a)
        step[i, d] = 1e-4
        np.testing.assert_allclose(grad[i, d], (by_hand(a + step, b) - by_hand(a - step, b)) / 2e-4, atol=1e-4)


def test_all_commands_run_on_them(tmp_path):
    """Train, stopped by SIGTERM; resume in another process; evaluate, embed and export in a third."""
    workdir = tmp_path / "run"
    train = ["train", "--config=config.py", f"--workdir={workdir}", "--config.report=False"]
    train += ["--config.duration=400 steps", "--config.checkpoint.every=50 steps"]
    process = subprocess.Popen([sys.executable, "-m", "jaxcl", *train], cwd=FOLDER, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 240
    while not (workdir / "checkpoints" / "50").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75, process.stderr.read().decode()

    config = json.loads((workdir / "config.json").read_text())
    assert config["terms"]["align"]["kind"] == "my_parts.terms:AlignUniform"
    done = jaxcl(*train)
    assert done.returncode == 0 and "resuming" in done.stderr, done.stderr
    results = json.loads((workdir / "results.json").read_text())
    assert -1 <= results["silhouette"]["mean"] <= 1 and results["knn"]["accuracy"] > 0.34  # chance: 1/3

    found = jaxcl("evaluate", f"--workdir={workdir}", "--suite=my_parts.evaluators:Silhouette")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["silhouette"]["mean"] == pytest.approx(results["silhouette"]["mean"], abs=1e-5)

    features = jaxcl("embed", f"--workdir={workdir}", f"--out={tmp_path / 'features.npz'}")
    assert features.returncode == 0, features.stderr
    exported = jaxcl("export", f"--workdir={workdir}", f"--out={tmp_path / 'backbone'}")
    assert exported.returncode == 0, exported.stderr
    weights = safetensors.numpy.load_file(tmp_path / "backbone" / "backbone.safetensors")
    assert any(name.startswith("params.") for name in weights)

    from jaxcl import load_backbone

    backbone = load_backbone(tmp_path / "backbone")
    with np.load(tmp_path / "features.npz") as arrays:
        assert arrays["features"].shape[1] == backbone.features == 32


@pytest.mark.parametrize(
    "override, words",
    [
        ("terms.align.temperature=0.0", "terms.align.temperature is 0.0"),
        ("terms.align.temprature=1.0", "temprature"),
        ("terms.align.kind=my_parts.terms:Nothing", "my_parts.terms has no Nothing"),
        ("terms.align.kind=my_parts.stages:Erase", "terms.align.kind is 'my_parts.stages:Erase', which is no term"),
        ("terms.align.kind=subprocess:Popen", "which is no term"),
        ("data.source=my_parts.sources:Shapes:many", "data.source"),
        ("model.kind=no_such_package.module:Thing", "there is no module no_such_package"),
    ],
)
def test_mistakes_end_in_one_line(override, words, tmp_path):
    out = jaxcl("train", "--config=config.py", f"--workdir={tmp_path / 'run'}", f"--config.{override}")
    assert out.returncode == 2 and words in out.stderr and out.stderr.count("\n") == 1, out.stderr
    assert not (tmp_path / "run").exists()


def test_a_misspelt_attribute_is_refused():
    with pytest.raises(UserError, match="memorys.*memories"):

        class Misspelt(Term):
            @property
            def memorys(self):
                return ("queue",)
