"""Batch normalisation with a hand-written gradient, which ignores padded rows at no cost.

N batch, C channels, n values of a channel (rows that count, times the positions of a map).

Source: Ioffe and Szegedy 2015, arXiv 1502.03167. Variables, running statistics and the variance as E[x^2] - E[x]^2
follow `flax.linen.BatchNorm`, which has the same values and gradients; but far from 0 this variance keeps its digits.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array
# Means of more deviations than this cost digits of E[x^2] - E[x]^2: some 5e-5 of the result at 16, in float32.
FAR = 16


def zero_rows(x: Array, where: Array | None) -> Array:
    """x [N,...] with zeros in the rows where `where` [N] is False, as `BatchNorm` needs them; None: x unchanged."""
    return x if where is None else jnp.where(_by_row(where, x.ndim), x, 0)


class BatchNorm(nn.Module):
    """x [...,C] normalised over all axes but the last; scale, bias and running statistics as in flax's module.

    Padded rows have `where` [N] False, and must be zero: apply `zero_rows` once, in front of a network. A convolution
    without bias, a ReLU, a pool, a sum and this norm keep them zero. They add nothing to sums, so the statistics of the
    other rows need no selection. Nothing checks this: padded rows with other values give wrong statistics. The incoming
    gradient of these rows must be zero too, which it is if the loss does not depend on them.

    The gradient takes two sums, where flax's takes three, and needs no copy of x - mean or of the scaled gradient.
    """

    momentum: float = 0.9  # share of the running statistics that a batch keeps
    epsilon: float = 1e-5
    dtype: Any = None  # of the result; None: that of x
    use_scale: bool = True
    use_bias: bool = True
    zero_scale: bool = False  # the scale starts at 0 instead of 1

    @nn.compact
    def __call__(self, x: Array, use_running_average: bool = False, where: Array | None = None) -> Array:
        """where: [N] bool, rows that count in the statistics; the other rows of x are zero, and stay zero."""
        C, f32 = x.shape[-1], jnp.float32
        mean = self.variable("batch_stats", "mean", jnp.zeros, (C,), f32)
        var = self.variable("batch_stats", "var", jnp.ones, (C,), f32)
        start = nn.initializers.zeros if self.zero_scale else nn.initializers.ones
        scale = self.param("scale", start, (C,), f32) if self.use_scale else jnp.ones(C, f32)
        bias = self.param("bias", nn.initializers.zeros, (C,), f32) if self.use_bias else jnp.zeros(C, f32)
        dtype = self.dtype or x.dtype
        if use_running_average:
            wide = x.astype(jnp.promote_types(x.dtype, f32))
            return ((wide - mean.value) * (jax.lax.rsqrt(var.value + self.epsilon) * scale) + bias).astype(dtype)
        y, batch_mean, batch_var = normalize(x, scale, bias, where, self.epsilon)
        if not self.is_initializing():
            for kept, new in ((mean, batch_mean), (var, batch_var)):
                kept.value = self.momentum * kept.value + (1 - self.momentum) * new
        return y.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def normalize(x: Array, scale: Array, bias: Array, where: Array | None, epsilon: float) -> tuple[Array, Array, Array]:
    """Normalise x [N,...,C] by the statistics of the batch -> (y, float32 at least, mean [C], biased variance [C]).

    where: [N] bool, as for `BatchNorm`. No gradient flows through the returned mean and variance.
    """
    return _forward(x, scale, bias, where, epsilon)[0]


def _forward(x, scale, bias, where, epsilon):
    wide, axes = x.astype(jnp.promote_types(x.dtype, jnp.float32)), tuple(range(x.ndim - 1))
    n = x.size // x.shape[-1]
    if where is not None:  # without any row the statistics are zero, not NaN
        n = jnp.maximum(where.sum(), 1) * (n // len(x))
    mean = wide.sum(axes) / n
    var = jnp.maximum(jnp.square(wide).sum(axes) / n - jnp.square(mean), 0)
    # That difference loses the digits that the mean is longer than the deviation. Channels where it loses many, which
    # are rare, are summed once more, from x - mean.
    far = jnp.square(mean) > FAR**2 * var
    again = jax.lax.cond(jnp.any(far), lambda: _centred(wide, mean, where) / n, lambda: jnp.zeros_like(var))
    var = jnp.where(far, again, var)
    inverse = jax.lax.rsqrt(var + epsilon)
    slope = inverse * scale
    y = wide * slope + _constant(bias - mean * slope, where, x.ndim)
    return (y, mean, var), (x, scale, mean, inverse, n, where)


def _centred(wide, mean, where):
    """The sum of the squares of x - mean in each channel."""
    apart = wide - mean if where is None else jnp.where(_by_row(where, wide.ndim), wide - mean, 0)
    return jnp.square(apart).sum(range(wide.ndim - 1))


def _backward(epsilon, saved, given):
    x, scale, mean, inverse, n, where = saved
    g, wide, axes = given[0], x.astype(given[0].dtype), tuple(range(x.ndim - 1))
    bias_gradient = g.sum(axes)
    # The sum of g times the normalised x, from the sum of g * x, so that x - mean is never stored.
    scale_gradient = ((g * wide).sum(axes) - mean * bias_gradient) * inverse
    slope = inverse * scale
    of_x = -slope * inverse * scale_gradient / n
    dx = g * slope + wide * of_x + _constant(-slope * bias_gradient / n - of_x * mean, where, x.ndim)
    return dx.astype(x.dtype), scale_gradient, bias_gradient, None


normalize.defvjp(_forward, _backward)


def _constant(value_C: Array, where: Array | None, ndim: int) -> Array:
    """The constant added to each channel, in the rows that count only."""
    return value_C if where is None else jnp.where(_by_row(where, ndim), value_C, 0)


def _by_row(where: Array, ndim: int) -> Array:
    return where.reshape(-1, *(1,) * (ndim - 1))
