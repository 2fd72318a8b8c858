"""Baselines of an own data set: an untrained encoder, the largest class, and the interval of a share."""

import types

import jax
import numpy as np
import pytest
from evaluations import evaluation, source
from scipy.stats import binomtest

from jaxcl.data import ArraySource
from jaxcl.evaluate.base import NotApplicable, share_interval
from jaxcl.evaluate.baselines import Pretrained, RawPixels
from jaxcl.evaluate.context import EvalContext
from jaxcl.evaluate.knn import neighbours_for
from jaxcl.evaluate.linear_probe import fit_linear_probe, probe_logits
from jaxcl.method.init_state import init_state


@pytest.mark.parametrize("right, count", [(0, 10), (10, 10), (45, 80), (1, 1), (3, 7), (1500, 2000)])
def test_the_interval_is_wilsons(right, count):
    expected = binomtest(right, count).proportion_ci(0.95, "wilson")
    np.testing.assert_allclose(share_interval(right / count, count), tuple(expected), atol=1e-4)


def test_the_largest_class_is_that_of_the_training_images():
    images = np.zeros((6, 4, 4, 3), np.uint8)
    labels = {"train": np.array([2, 2, 0, -1, -1, -1]), "test": np.array([0, 0, 2, 1, -1, 2])}

    def sources(split, _):
        moments = dict(mean=(0.5,) * 3, std=(0.5,) * 3)
        return ArraySource(images=images, labels=labels[split], class_names=("a", "b", "c"), split=split, **moments)

    e, state, mesh = evaluation(final=("majority",), sources=sources)
    results, _ = e.final(state, mesh)
    assert results["majority"]["accuracy"] == pytest.approx(2 / 5)  # class 2, of the five test images with a label


def test_the_untrained_encoder_is_the_one_that_training_began_with():
    e, state, mesh = evaluation(final=("untrained", "linear", "knn"))
    results, _ = e.final(state, mesh)
    fresh = jax.jit(lambda: init_state(e.recipe))()
    context = EvalContext(
        e, jax.device_put(fresh, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())), mesh, "test"
    )
    probe = fit_linear_probe(context.features("train"), source("train").labels, num_classes=4)
    predicted = np.asarray(probe_logits(probe, context.features("test"))).argmax(-1)
    assert results["untrained"]["accuracy"] == pytest.approx(np.mean(predicted == source("test").labels))
    low, high = results["untrained"]["accuracy_interval"]
    assert low <= results["untrained"]["accuracy"] <= high
    assert {"knn_accuracy", "knn_accuracy_interval"} <= results["untrained"].keys()
    assert "accuracy_interval" in results["linear"] and "accuracy_interval" in results["knn"]


@pytest.mark.parametrize(
    "counts, k, expected", [((3, 5, 247), 200, 5), ((500, 500), 200, 200), ((1,), 200, 1), ((0, 4, 4), 3, 3)]
)
def test_a_class_of_median_size_bounds_the_neighbours(counts, k, expected):
    labels = np.concatenate([np.repeat(np.arange(len(counts)), counts), [-1, -1]])
    assert neighbours_for(labels, k) == expected
    assert neighbours_for(np.array([-1]), k) == k


def test_the_pretrained_encoder_is_a_baseline_where_there_was_one(monkeypatch):
    e, state, mesh = evaluation(final=("pretrained", "knn", "linear"))
    with pytest.raises(NotApplicable):
        Pretrained()(EvalContext(e, state, mesh, "test"))
    e.config.model.weights = "some.safetensors"
    e.first = lambda: (state.params, state.batch_stats)  # those that are evaluated
    results, _ = e.final(state, mesh)
    assert results["pretrained"]["accuracy"] == results["linear"]["accuracy"]
    assert results["pretrained"]["knn_accuracy"] == results["knn"]["accuracy"]


def test_pixels_of_large_images_are_those_of_small_ones():
    small = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    found = []
    for images in (small, small.repeat(3, 1).repeat(3, 2)):
        moments = dict(mean=(0.5,) * 3, std=(0.5,) * 3)
        part = ArraySource(images=images, labels=np.arange(8) % 4, class_names=tuple("abcd"), split="test", **moments)
        context = types.SimpleNamespace(source=lambda _, part=part: part, test=part, num_classes=4)
        found.append(RawPixels()(context)[0])
    assert found[0] == found[1] and found[0]["accuracy"] == 1
