"""What training has changed, against plain loops, and against the features that a run began with."""

import jax
import numpy as np
import pytest
import tiny
from evaluations import evaluation

from jaxcl.errors import UserError
from jaxcl.evaluate.drift import drift_metrics, linear_cka, nearest_others
from jaxcl.evaluate.registry import find_metric


def by_hand(x):
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return [max((j for j in range(len(x)) if j != i), key=lambda j: x[i] @ x[j]) for i in range(len(x))]


def test_the_equations():
    x, y = tiny.normal(40, 6), tiny.normal(40, 6, seed=1)
    labels = np.arange(40) % 3
    labels[:5] = -1
    found = drift_metrics(x, y, labels)
    assert found["nearest_agreement"] == np.mean(np.equal(by_hand(x), by_hand(y)))
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(found["cosine"], np.mean(cosines), rtol=1e-5)
    # HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) of the Gram matrices, as it is defined
    H = np.eye(40) - 1 / 40
    gram = [H @ (a @ a.T) @ H for a in (x.astype(np.float64), y.astype(np.float64))]
    hsic = [np.sum(a * b) for a, b in ((gram[0], gram[1]), (gram[0], gram[0]), (gram[1], gram[1]))]
    np.testing.assert_allclose(found["cka"], hsic[0] / np.sqrt(hsic[1] * hsic[2]), rtol=1e-9)
    known = labels[5:]
    assert found["nearest_accuracy_after"] == np.mean(known[by_hand(y[5:])] == known)
    s = np.linalg.svd((u := x / np.linalg.norm(x, axis=1, keepdims=True)) - u.mean(0), compute_uv=False)
    p = s / s.sum()
    np.testing.assert_allclose(found["rank_before"], np.exp(-(p * np.log(p)).sum()), rtol=1e-4)
    np.testing.assert_allclose(found["rank_kept"], found["rank_after"] / found["rank_before"])


def test_nothing_moved_and_what_a_rotation_changes():
    x = tiny.normal(1100, 5)  # more than one tile
    same = drift_metrics(x, x)
    assert same["nearest_agreement"] == 1 and same["rank_kept"] == 1 and "nearest_accuracy_after" not in same
    np.testing.assert_allclose([same["cosine"], same["cka"]], 1, rtol=1e-6)
    q, _ = np.linalg.qr(tiny.normal(5, 5, seed=2))
    turned = drift_metrics(x, 3 * x @ q)
    np.testing.assert_allclose([turned["cka"], turned["rank_kept"]], 1, rtol=1e-4)
    assert turned["nearest_agreement"] > 0.99 and turned["cosine"] < 0.9
    assert np.array_equal(nearest_others(x)[:50], by_hand(x)[:50])


def test_collapse_and_what_is_refused():
    x = tiny.normal(30, 8)
    collapsed = drift_metrics(x, np.outer(x[:, 0], np.ones(8)) + 1e-3 * x)
    assert collapsed["rank_kept"] < 0.5
    assert np.isnan(linear_cka(x, np.ones((30, 4))))
    for a, b in ((x, x[:3]), (x[:1], x[:1]), (x[0], x[0])):
        with pytest.raises(UserError):
            drift_metrics(a, b)


def test_against_the_first_weights_of_a_run():
    e, state, mesh = evaluation(final=("drift",))
    results, _ = e.final(state, mesh)
    assert "drift" not in results  # nobody knows how it began
    calls = []

    def first():
        calls.append(1)
        other = jax.tree.map(np.array, jax.device_get(state.params))
        other["encoder"]["stem_conv"]["kernel"] *= -1
        return other, jax.device_get(state.batch_stats)

    e.first = first
    for _ in range(2):
        found = e.final(state, mesh)[0]["drift"]
    assert len(calls) == 1  # the first features are computed once
    assert found["images"] == 20 and 0 < found["cka"] < 0.999 and -1 < found["cosine"] < 0.999
    for key in ("cka", "nearest_agreement", "rank_kept", "nearest_accuracy_after", "nearest_accuracy_before"):
        assert key in found and find_metric(f"drift.{key}").title
    e._first_features.clear()
    e.first = lambda: (state.params, state.batch_stats)
    found = e.final(state, mesh)[0]["drift"]
    assert found["nearest_agreement"] == 1 and found["nearest_accuracy_before"] == found["nearest_accuracy_after"]
