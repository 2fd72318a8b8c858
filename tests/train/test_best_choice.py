"""The choice of the best state: on the validation split alone, and measured once on the test split."""

import types

import numpy as np
import pytest
from etils import epath

from jaxcl.train import best as module
from jaxcl.train.best import Best


class Kept:
    """Checkpoints in memory: the state that was saved last."""

    saved = None

    def __init__(self, path, keep):
        assert path.name == "best" and keep == 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def save(self, step, state):
        Kept.saved = state

    def restore(self, state):
        return Kept.saved


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "Checkpoints", Kept)
    monkeypatch.setattr(Kept, "saved", None)

    def of(keep_best=True, validation=0.1):
        checkpoint, data = types.SimpleNamespace(keep_best=keep_best), types.SimpleNamespace(validation=validation)
        return Best(epath.Path(tmp_path), types.SimpleNamespace(checkpoint=checkpoint, data=data))

    return of


class Measured:
    """An evaluation where the test accuracy falls as the validation accuracy of a state rises."""

    def __init__(self):
        self.asked = []

    def quick(self, state, mesh, split=None):
        self.asked.append((state.name, split))
        value = state.validation if split is None else 1 - state.validation
        return {"eval/classifier_accuracy": value, "eval/knn_accuracy": 0.5}


def state(name, validation, step):
    return types.SimpleNamespace(name=name, validation=validation, step=np.int32(step))


def test_the_best_is_the_first_of_the_best_on_the_validation_split(make):
    """Whatever its test accuracy, which is measured once, in the end; cases F."""
    best, evaluation = make(), Measured()
    for s in (state("a", 0.3, 1), state("b", 0.7, 2), state("c", 0.7, 3), state("d", 0.2, 4)):
        best.offer(int(s.step), s, evaluation.quick(s, None))
    evaluation.asked.clear()
    results, chosen = best.result(evaluation, state("last", 0.6, 5), lambda s: s, None)
    assert (results["best"]["step"], results["best"]["validation_accuracy"], chosen.name) == (2, 0.7, "b")
    assert results["best"]["classifier_accuracy"] == pytest.approx(0.3)
    assert evaluation.asked == [("last", None), ("b", "test")]
    again = make()  # a later process goes on from what was best
    again.offer(6, state("e", 0.65, 6), {"eval/classifier_accuracy": 0.65})
    assert Kept.saved.name == "b"
    again.offer(7, state("f", 0.9, 7), {"eval/classifier_accuracy": 0.9})
    assert Kept.saved.name == "f"


@pytest.mark.parametrize("options", [dict(validation=0.0), dict(keep_best=False)])
def test_nothing_is_chosen_on_the_test_split(make, options):
    """Without images held out there is no best state; cases F."""
    best, last = make(**options), state("a", 0.9, 1)
    best.offer(1, last, {"eval/classifier_accuracy": 0.9})
    assert best.result(Measured(), last, lambda s: s, None) == ({}, last)
    assert Kept.saved is None


def test_the_classifier_comes_before_neighbours(make):
    """cases F."""
    best = make()
    best.offer(1, state("a", 0, 1), {"eval/knn_accuracy": 0.4})
    best.offer(2, state("b", 0, 2), {"eval/classifier_accuracy": 0.3, "eval/knn_accuracy": 0.9})
    best.offer(3, state("c", 0, 3), {"loss": 0.1})
    assert Kept.saved.name == "a"
