"""Reconstruction error against numpy, with padding and on several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_checks import assert_user_error, on_devices, value_and_grads

from jaxcl.losses.reconstruction import reconstruction


def make(seed=0, n=6):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(n, 4, 3, 2)) for _ in range(2)]


def test_value_and_gradient(wide):
    x_hat, x = make()
    value, grads = value_and_grads(reconstruction, x_hat, x)
    np.testing.assert_allclose(value, np.mean((x_hat - x) ** 2), rtol=1e-13)
    np.testing.assert_allclose(grads[0], 2 * (x_hat - x) / x.size, rtol=1e-12)
    np.testing.assert_array_equal(grads[1], -grads[0])
    assert reconstruction(x, x) == 0
    for shape in ((6,), (144, 1), (6, 24)):
        a, b = x_hat.reshape(-1)[: np.prod(shape)].reshape(shape), x.reshape(-1)[: np.prod(shape)].reshape(shape)
        np.testing.assert_allclose(reconstruction(a, b), np.mean((a - b) ** 2), rtol=1e-13)


@pytest.mark.parametrize("filler", [0.0, 1e30, np.nan])
def test_padding_changes_nothing(filler):
    x_hat, x = (a.astype(np.float32) for a in make())
    where = np.arange(6) % 3 != 1
    value, grads = value_and_grads(reconstruction, x_hat[where], x[where])
    x_hat[~where] = filler
    got, got_grads = value_and_grads(reconstruction, x_hat, x, where=where)
    np.testing.assert_allclose(got, value, rtol=1e-6)
    np.testing.assert_allclose(got_grads[0][where], grads[0], rtol=1e-6)
    assert not np.any(got_grads[0][~where])
    none, none_grads = value_and_grads(reconstruction, x_hat, x, where=np.zeros(6, bool))
    assert none == 0 and not np.any(none_grads[0])


def test_half_precision_inputs_are_widened_first():
    x_hat, x = (jnp.asarray(a, jnp.bfloat16) for a in make())
    value, grads = value_and_grads(reconstruction, x_hat, x)
    assert value.dtype == jnp.float32 and grads[0].dtype == jnp.bfloat16
    want = np.mean((np.asarray(x_hat, np.float64) - np.asarray(x, np.float64)) ** 2)
    np.testing.assert_allclose(value, want, rtol=1e-6)


def test_divergence_shows_and_vmap(wide):
    x_hat, x = make()
    np.testing.assert_allclose(
        jax.vmap(reconstruction)(x_hat, x), np.mean((x_hat - x) ** 2, axis=(1, 2, 3)), rtol=1e-13
    )
    x_hat[1, 2, 0, 1] = np.nan
    assert np.isnan(reconstruction(x_hat, x))


@pytest.mark.parametrize("devices,inside", [(1, False), (2, False), (8, False), (8, True)])
def test_same_on_1_2_and_8_devices(wide, devices, inside):
    x_hat, x = make(n=16)
    where = np.arange(16) % 5 != 1  # the devices hold different numbers of rows

    def local(x_hat, x, where):
        return reconstruction(x_hat, x, where=where != 0, axis_name="data")

    value, grads = on_devices(devices, local, [x_hat, x, where.astype(float)], inside=inside)
    want, want_grads = value_and_grads(reconstruction, x_hat, x, where=where)
    np.testing.assert_allclose(value, np.mean((x_hat - x)[where] ** 2), rtol=1e-13)
    np.testing.assert_allclose(value, want, rtol=1e-13)
    for got, expected in zip(grads, want_grads, strict=False):
        np.testing.assert_allclose(got, expected, atol=1e-15)


@pytest.mark.parametrize(
    "x_hat,x,options,key",
    [
        (np.ones((6, 4), np.float32), np.ones((6, 5), np.float32), {}, "x"),
        (np.ones((6, 4), np.float32), np.ones((6, 4), np.uint8), {}, "x"),
        (np.ones((6, 0), np.float32), np.ones((6, 0), np.float32), {}, "x_hat"),
        (np.float32(1), np.float32(1), {}, "x_hat"),
        (np.ones((6, 4), np.float32), np.ones((6, 4), np.float32), dict(where=np.ones((6, 4), bool)), "where"),
    ],
)
def test_mistakes_are_one_line(x_hat, x, options, key):
    assert_user_error(lambda: reconstruction(x_hat, x, **options), f"reconstruction: {key} ")
