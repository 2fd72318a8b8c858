"""The rectifier against JAX's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.models.activations import relu


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_gradients_are_those_of_jax(dtype):
    """At zeros of both signs, infinities and subnormal numbers too."""
    odd = [0.0, -0.0, jnp.inf, -jnp.inf, 1e-40, -1e-40, 1e30, -1e30]
    x = jnp.concatenate([jnp.array(odd), jax.random.normal(jax.random.key(0), (1000,))]).astype(dtype)
    g = jax.random.normal(jax.random.key(1), x.shape, x.dtype)
    for f in (lambda f: jax.vjp(f, x), lambda f: jax.vjp(jax.jit(f), x)):
        (y, back), (expected, back_expected) = f(relu), f(jax.nn.relu)
        assert y.dtype == x.dtype
        np.testing.assert_array_equal(y.astype("float32"), expected.astype("float32"))
        np.testing.assert_array_equal(back(g)[0].astype("float32"), back_expected(g)[0].astype("float32"))


def test_a_nan_is_not_hidden():
    assert jnp.isnan(jax.jit(relu)(jnp.array([jnp.nan, -1.0]))).tolist() == [True, False]
