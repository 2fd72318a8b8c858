"""Logistic regression by Adam against a written-out loop, and what it does with rows, epochs and test images."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.errors import UserError
from jaxcl.evaluate import fit_logistic, probe_logits

D, C = 6, 3


def data(n=40, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, C, n)
    return (np.eye(C, D)[labels] + 0.7 * rng.normal(size=(n, D))).astype(np.float32), labels


def fit(features, labels, **options):
    return fit_logistic(
        features, labels, num_classes=C, **(dict(epochs=15, batch_size=64, learning_rate=0.05) | options)
    )


def slow_adam(weights, bias, x, y, rate, epochs):
    """Full-batch Adam, epoch by epoch: -> weights, bias, losses before each step."""
    params, losses = np.concatenate([weights, bias[None]]).astype(np.float64), []
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1).astype(np.float64)
    m, v = np.zeros_like(params), np.zeros_like(params)
    for t in range(1, epochs + 1):
        scores = x @ params
        probs = np.exp(scores - scores.max(1, keepdims=True))
        probs /= probs.sum(1, keepdims=True)
        losses.append(-np.log(probs[np.arange(len(y)), y]).mean())
        gradient = x.T @ (probs - np.eye(C)[y]) / len(y)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        params -= rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return params[:-1], params[-1], losses


def test_the_loop():
    """On one batch that holds every row, the order of rows is no part of the answer."""
    features, labels = data()
    test = data(30, seed=1)
    start = fit(features, labels, learning_rate=0.0, test=test).probe
    got = fit(features, labels, test=test)
    weights, bias, losses = slow_adam(start.weights, start.bias, features, labels, 0.05, 15)
    np.testing.assert_allclose(got.probe.weights, weights, atol=1e-4)
    np.testing.assert_allclose(got.probe.bias, bias, atol=1e-4)
    np.testing.assert_allclose(got.loss, losses, rtol=1e-4)
    hits = np.argmax(probe_logits(got.probe, test[0]), 1) == test[1]
    np.testing.assert_allclose(got.test_accuracy[-1], hits.mean(), rtol=1e-6)
    assert hits.mean() > np.mean(np.argmax(probe_logits(start, test[0]), 1) == test[1])


def test_the_first_weights():
    features, labels = data()
    start = fit(features, labels, learning_rate=0.0, test=data(30, seed=1)).probe
    everything = np.concatenate([np.ravel(start.weights), start.bias])
    assert np.abs(everything).max() <= D**-0.5 and np.abs(everything).max() > 0.8 * D**-0.5
    assert len(np.unique(everything)) == everything.size


def test_minibatches_cover_the_rows_in_a_new_order_each_epoch():
    """40 rows in batches of 16: two steps an epoch, eight rows left out, other ones the next time."""
    features, labels = data()
    got = fit(features, labels, batch_size=16, epochs=30)
    same = fit(features, labels, batch_size=16, epochs=30)
    other = fit(features, labels, batch_size=16, epochs=30, seed=1)
    np.testing.assert_array_equal(got.probe.weights, same.probe.weights)
    assert not np.array_equal(got.probe.weights, other.probe.weights)
    assert got.loss.shape == (30,) and got.loss[-1] < 0.7 * got.loss[0]
    # At rate 0 the loss of an epoch is that of its 32 rows: it differs from epoch to epoch, and about the whole's.
    still = np.asarray(fit(features, labels, batch_size=16, epochs=30, learning_rate=0.0).loss)
    whole = float(fit(features, labels, epochs=1, learning_rate=0.0).loss[0])
    assert len(np.unique(still)) > 20
    np.testing.assert_allclose(still.mean(), whole, rtol=0.03)


def test_unlabelled_rows_are_left_out():
    features, labels = data()
    more = np.concatenate([features[:20], np.full((9, D), np.nan, np.float32), features[20:]])
    marked = np.concatenate([labels[:20], np.full(9, -1), labels[20:]])
    test, unknown = data(30, seed=1), np.array([1, -1, 0, -1])
    want = fit(features, labels, test=test)
    got = fit(more, marked, test=test)
    np.testing.assert_array_equal(got.probe.weights, want.probe.weights)
    few = fit(features, labels, test=(features[:4], unknown))
    hits = np.argmax(np.asarray(probe_logits(few.probe, features[:4])), 1) == unknown
    np.testing.assert_allclose(few.test_accuracy[-1], hits[[0, 2]].mean())
    assert np.isnan(fit(features, labels).test_accuracy).all()


def test_half_precision():
    features, labels = data()
    half = fit(jnp.asarray(features, jnp.bfloat16), labels)
    assert half.probe.weights.dtype == jnp.float32 and np.isfinite(half.loss).all()


def test_mistakes():
    features, labels = data()
    for arguments, options, words in (
        ((features, labels[:5]), {}, "labels of shape \\(5,\\)"),
        ((features, labels), dict(test=(features[:, :2], labels)), "features of shape \\(40, 2\\)"),
        ((features, np.full(40, -1)), {}, "no row has a label"),
        ((features, labels), dict(epochs=0), "epochs=0"),
        ((features, labels), dict(batch_size=0), "batch_size=0"),
    ):
        with pytest.raises(UserError, match=words):
            fit(*arguments, **options)
