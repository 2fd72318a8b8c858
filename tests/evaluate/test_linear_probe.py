"""The linear probe against scikit-learn's optimum, on features of any scale, and rows that must not count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from jaxcl.errors import UserError
from jaxcl.evaluate import fit_linear_probe, probe_logits
from jaxcl.losses import cross_entropy


def data(n=300, d=8, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, d)) * np.geomspace(0.01, 50, d) + np.linspace(-20, 5, d)
    scores = ((features - features.mean(0)) / features.std(0)) @ rng.normal(size=(d, classes))
    return features.astype(np.float32), np.argmax(scores + rng.gumbel(size=(n, classes)), 1)


@pytest.mark.parametrize("l2", [1e-3, 0.1])
def test_scikit_learn_finds_the_same_optimum(l2):
    features, labels = data()
    probe = fit_linear_probe(features, labels, num_classes=3, l2=l2, tolerance=1e-6)
    standard = (features - features.mean(0)) / features.std(0)
    model = LogisticRegression(C=1 / (l2 * len(labels)), tol=1e-8, max_iter=5000).fit(standard, labels)
    np.testing.assert_allclose(jax.nn.softmax(probe_logits(probe, features)), model.predict_proba(standard), atol=1e-3)
    np.testing.assert_allclose(np.asarray(probe.weights).T * features.std(0), model.coef_, atol=3e-3)


def test_without_standardising():
    features, labels = data()
    features = (features - features.mean(0)) / features.std(0) * 2
    probe = fit_linear_probe(features, labels, num_classes=3, l2=0.05, standardize=False, tolerance=1e-6)
    model = LogisticRegression(C=1 / (0.05 * len(labels)), tol=1e-8, max_iter=5000).fit(features, labels)
    np.testing.assert_allclose(probe.weights.T, model.coef_, atol=3e-3)


def test_it_is_a_stationary_point():
    features, labels = data()
    with jax.enable_x64(True):
        features = jnp.asarray((features - features.mean(0)) / features.std(0), jnp.float64)
        probe = fit_linear_probe(features, labels, num_classes=3, l2=1e-2, standardize=False, tolerance=1e-8)
        assert probe.weights.dtype == jnp.float64
        probs = np.asarray(jax.nn.softmax(probe_logits(probe, features)))
    residual = (probs - np.eye(3)[labels]) / len(labels)
    np.testing.assert_allclose(np.asarray(features).T @ residual + 1e-2 * np.asarray(probe.weights), 0, atol=2e-8)
    np.testing.assert_allclose(residual.sum(0), 0, atol=2e-8)


def test_scale_and_shift_change_nothing():
    features, labels = data()
    want = probe_logits(fit_linear_probe(features, labels, num_classes=3), features)
    moved = features * 7 - 3
    probe = fit_linear_probe(moved, labels, num_classes=3)
    np.testing.assert_allclose(probe_logits(probe, moved), want, atol=0.02)


def test_unlabelled_rows_may_hold_anything():
    features, labels = data()
    labels[:20] = -1
    probes = []
    for filler in (0.0, 1e6, np.nan):
        features[:20] = filler
        probes.append(fit_linear_probe(features, labels, num_classes=3))
    for probe in probes[1:]:
        jax.tree.map(np.testing.assert_array_equal, probe, probes[0])
    nobody = fit_linear_probe(features, np.full(300, -1), num_classes=3)
    assert not nobody.weights.any() and not nobody.bias.any()


def test_constant_features_separable_classes_and_a_class_nobody_has():
    labels = np.random.default_rng(0).integers(0, 2, 300)
    features = np.zeros((300, 8), np.float32)
    features[:, 0], features[:, 1] = labels * 2.0 - 1, 3.0
    probe = fit_linear_probe(features, labels, num_classes=3, l2=0.0)
    logits = probe_logits(probe, features)
    assert np.isfinite(logits).all() and np.all(np.argmax(logits, 1) == labels)


def test_half_precision():
    features, labels = data()
    half = fit_linear_probe(jnp.asarray(features, jnp.bfloat16), labels, num_classes=3)
    assert half.weights.dtype == jnp.float32 and np.isfinite(half.weights).all()


def test_max_steps_is_kept():
    features, labels = data()
    few = fit_linear_probe(features, labels, num_classes=3, max_steps=1)
    many = fit_linear_probe(features, labels, num_classes=3)
    loss = [float(cross_entropy(probe_logits(p, features), labels)) for p in (few, many)]
    assert loss[1] < loss[0] - 0.01 < np.log(3)


def test_mistakes():
    with pytest.raises(UserError, match="expected \\[rows, features\\] and \\[rows\\]"):
        fit_linear_probe(np.ones((5, 2)), np.zeros(4, int), num_classes=2)


@pytest.mark.parametrize("scale", [1e-30, 1e-7, 1e-3, 1e25])
def test_the_scale_of_features_changes_nothing(scale):
    """cases A.10"""
    features, labels = data()
    wide = (np.asarray(features, np.float64) * scale).astype(np.float32)
    want = probe_logits(fit_linear_probe(features, labels, num_classes=3), features)
    got = probe_logits(fit_linear_probe(wide, labels, num_classes=3), wide)
    np.testing.assert_allclose(got, want, atol=2e-3)


def test_constant_features_of_any_size_have_no_weight():
    """cases A.10: a deviation that is rounding alone would amplify it."""
    features, labels = data()
    constant = np.full((len(features), 3), [1e-9, 0.1, 1e9], np.float32)
    probe = fit_linear_probe(np.concatenate([features, constant], 1), labels, num_classes=3)
    want = fit_linear_probe(features, labels, num_classes=3)
    np.testing.assert_allclose(probe.weights[: features.shape[1]], want.weights, atol=2e-3)
    np.testing.assert_array_equal(probe.weights[features.shape[1] :], 0)


def test_labels_that_are_no_class():
    """cases A.2"""
    features, labels = data()
    for bad in (3, 2**32):
        with pytest.raises(UserError, match="labels has"):
            fit_linear_probe(features, np.where(np.arange(len(labels)) == 7, bad, labels), num_classes=3)
    with pytest.raises(UserError, match="type float64"):
        fit_linear_probe(features, labels.astype(float), num_classes=3)
    traced = jax.jit(lambda y: fit_linear_probe(features, y, num_classes=3))
    assert np.isnan(traced(np.where(np.arange(len(labels)) == 7, 3, labels)).weights).all()
    assert np.isfinite(traced(labels).weights).all()


def test_rows_that_are_not_finite():
    """cases A.7"""
    features, labels = data()
    features[5, 1] = np.inf
    with pytest.raises(UserError, match="row 5"):
        fit_linear_probe(features, labels, num_classes=3)
    assert np.isnan(jax.jit(lambda x: fit_linear_probe(x, labels, num_classes=3))(features).weights).all()
    labels[5] = -1
    assert np.isfinite(fit_linear_probe(features, labels, num_classes=3).weights).all()
