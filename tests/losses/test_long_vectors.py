"""Vectors whose squared length overflows float32: a loss shows it, a measurement is right."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl import losses
from jaxcl.evaluate import collapse_metrics, knn_predict, nearest_neighbours
from jaxcl.evaluate.rows import normalized
from jaxcl.losses.common import rescaled, unit

X = np.random.default_rng(0).normal(size=(8, 2, 6)).astype(np.float32)
LONG = X * np.float32(1e20)
A, B = X[:, 0], X[:, 1]
Y = np.arange(8) // 2
LOSSES = {
    "supcon": lambda x: losses.supcon(x, Y),
    "spread": lambda x: losses.spread(np.moveaxis(x, 1, 0), Y)[0],
    "released": lambda x: losses.attract(np.moveaxis(x, 1, 0), Y, norm="released"),
    "nt_xent": lambda x: losses.nt_xent(x[:, 0], x[:, 1]),
    "moco": lambda x: losses.moco(x[:, 0], x[:, 1], jnp.eye(6)),
    "byol": lambda x: losses.byol(x[:, 0], x[:, 1], A, B),
    "simsiam": lambda x: losses.simsiam(A, B, x[:, 0], x[:, 1]),
    "barlow_twins": lambda x: losses.barlow_twins(x[:, 0], x[:, 1]),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_overflow_is_nan_in_a_loss(loss):
    """cases A.11: similarity 0 would hide that the encoder diverges."""
    assert np.isfinite(loss(X)) and np.isnan(loss(LONG))


@pytest.mark.parametrize("scale", [1e-30, 1e-23, 1e-13, 1e20, 1e37])
def test_no_scale_changes_a_measurement(scale):
    """cases A.11"""
    wide = (X.astype(np.float64) * scale).astype(np.float32)
    for got, want in zip(nearest_neighbours(wide[:, 0], wide[:, 1], k=8), nearest_neighbours(A, B, k=8), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    got, want = (knn_predict(x[:, 0], Y, x[:, 1], k=4, num_classes=4) for x in (wide, X))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    got, want = collapse_metrics(wide, Y), collapse_metrics(X, Y)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_unit_rows_at_any_scale(scale):
    """cases A.11: of groups and of neighbours."""
    np.testing.assert_allclose(normalized(A * np.float32(scale)), normalized(A), rtol=1e-6)


def test_rescaled_is_exact():
    """cases A.11: a power of 2 changes no digit of a usual vector, nor of what becomes of it."""
    x = jnp.asarray(A)
    assert (unit(rescaled(x)) == unit(x)).all() and (rescaled(x) * 8 == rescaled(x * 8) * 8).all()
    edge = jnp.array([[3.4e38, -3.4e38], [1.2e-38, 0], [0, 0]])
    largest = jnp.max(jnp.abs(rescaled(edge)), axis=1)
    assert (largest[:2] >= 0.5).all() and (largest < 1).all() and largest[2] == 0
