"""The project's configs with a vision transformer in place of their ResNet: they train, stop, and go on the same."""

import json
import shutil

import numpy as np
import pytest
import tiny
from train_checks import config_module, record, shrink

from jaxcl import config as base
from jaxcl.errors import UserError
from jaxcl.train import loop as train

STEPS = 6


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    return tiny.colours(tmp_path_factory.mktemp("data") / "colours.npz")


def with_transformer(name, npz):
    c = shrink(config_module(name).get_config(), npz)
    for view in (c.views.view1, c.views.view2):
        view.jitter_p = view.grayscale = 0.0  # colour compiles slowly
    base.with_kind(c, "model", "vision_transformer")
    c.model.update(dict(patch=4, width=16, depth=2, heads=2, layer_scale=0.5, registers=1, drop_path=0.2, remat=True))
    c.size, c.devices, c.duration, c.checkpoint.every = tiny.SIDE, 1, f"{STEPS} steps", "3 steps"
    c.eval.every, c.eval.tap, c.eval.final = "0", "block1", ("knn",)
    for part in (*c.stages, *c.passes):
        if "tap" in part:
            part.tap, part.start = "block1", "50%"
        if "norm_set" in part:
            part.norm_set = ""  # there are no batch norms, so no sets of them
    return c


slow = pytest.mark.slow  # one update of each is in tests/models/test_vision_transformer.py


@pytest.mark.parametrize("name", ["excon", pytest.param("simclr", marks=slow), pytest.param("clae", marks=slow)])
def test_a_run_is_continued(name, npz, tmp_path):
    """From the checkpoint in the middle the second half is the same, bit for bit."""
    c = with_transformer(name, npz)
    results = train.run(c, tmp_path)
    lines = {step: row for step, rows in record(tmp_path).items() for row in rows if "loss" in row}
    assert sorted(lines) == list(range(1, STEPS + 1)) and 0 <= results["knn"]["accuracy"] <= 1
    assert all(np.isfinite(row["loss"]) for row in lines.values())
    extra = {"simclr": "loss", "excon": "saliency/accepted", "clae": "loss/adversarial"}[name]
    assert extra in lines[STEPS], sorted(lines[STEPS])

    (tmp_path / "results.json").unlink()
    shutil.rmtree(tmp_path / "checkpoints" / f"{STEPS}")
    again = train.run(c, tmp_path)
    assert json.loads(json.dumps(again["knn"])) == json.loads(json.dumps(results["knn"]))
    resumed = {step: row for step, rows in record(tmp_path).items() for row in rows if "loss" in row}
    assert resumed == lines


def test_sets_of_batch_norms_are_refused(npz, tmp_path):
    c = with_transformer("clae", npz)
    c.stages[0].norm_set = "adv"
    with pytest.raises(UserError, match=r"^stages\[0\]\.norm_set"):
        train.run(c, tmp_path)
