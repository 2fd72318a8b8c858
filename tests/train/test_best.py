"""The state that is best on validation images: kept, and what a run that asks for it is evaluated by."""

import numpy as np
import pytest
import tiny
from train_checks import config

from jaxcl.errors import UserError
from jaxcl.evaluate.suite import Evaluation
from jaxcl.train import loop as train
from jaxcl.train.runs import load_run


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    return tiny.colours(tmp_path_factory.mktemp("data") / "colours.npz")


@pytest.fixture
def run_of(npz, tmp_path, monkeypatch):
    """(eval.state) -> (results, steps of the states that the final suite measured); step 2 is the best of 2, 4, 6."""
    measured, final, quick = [], Evaluation.final, Evaluation.quick

    def scored(self, state, mesh, split="validation"):
        return quick(self, state, mesh, split=split) | {"eval/classifier_accuracy": 1 / int(state.step)}

    def recorded(self, state, mesh):
        measured.append(int(state.step))
        return final(self, state, mesh)

    monkeypatch.setattr(Evaluation, "quick", scored)
    monkeypatch.setattr(Evaluation, "final", recorded)

    def run(state):
        c = config("supcon", npz=npz)
        c.duration, c.eval.every, c.data.validation, c.eval.state = "6 steps", "2 steps", 0.25, state
        return train.run(c, tmp_path / state), measured

    return run


@pytest.mark.parametrize("state, step", [("best", 2), ("last", 6)])
def test_the_final_suite_measures(run_of, tmp_path, state, step):
    """cases E.1: also when the run is opened again."""
    results, measured = run_of(state)
    assert measured == [step] and results["best"]["step"] == 2
    opened = load_run(tmp_path / state)
    assert opened.step == step == int(np.asarray(opened.state.step))
    assert load_run(tmp_path / state, step=6).step == 6


@pytest.mark.parametrize("key, value", [("data.validation", 0.0), ("checkpoint.keep_best", False)])
def test_nothing_to_select_by(npz, tmp_path, key, value):
    """cases E.1."""
    c = config("supcon", npz=npz)
    c.eval.state, c.data.validation = "best", 0.25
    node, name = key.split(".")
    c[node][name] = value
    with pytest.raises(UserError, match=r"^eval\.state "):
        train.run(c, tmp_path / "run")
    assert not (tmp_path / "run").exists()
