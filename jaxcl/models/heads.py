"""Heads on pooled features: projection MLP and linear classifier, initialised like torch's Linear."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array

# Uniform +-1/sqrt(fan_in), the default of the authors' framework, for weights and biases alike.
dense_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _bias_init(fan_in: int):
    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Dense(nn.Module):
    """A dense layer with the torch default initialisation."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.Dense(
            self.features,
            kernel_init=dense_init,
            bias_init=_bias_init(x.shape[-1]),
            dtype=self.dtype,
            name="dense",
        )(x)


class ProjectionHead(nn.Module):
    """Features [N,D] -> embedding [N,features], not normalised: `hidden_layers` times Dense(D) - ReLU, then Dense.

    With features 0 there is no head: the embedding is the features themselves.
    """

    features: int = 128
    hidden_layers: int = 1
    hidden: int = 0  # 0: as wide as the input
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, h: Array) -> Array:
        if not self.features:
            return h
        for i in range(self.hidden_layers):
            h = nn.relu(Dense(self.hidden or h.shape[-1], self.dtype, name=f"hidden{i}")(h))
        return Dense(self.features, self.dtype, name="out")(h).astype(jnp.promote_types(self.dtype, jnp.float32))
