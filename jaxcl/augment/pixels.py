"""Units of images: bytes, floats in [0, 1], and values normalised by the mean and deviation of the data."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxcl.errors import UserError

ROUNDING = 0.01  # how far outside [0, 1] a float image may go, as after resizing


def to_float(images: ArrayLike) -> jax.Array:
    """Images as float32 in [0, 1].

    Args:
      images: uint8 of any shape, which is divided by 255; or floats in [0, 1], which keep their values.

    Raises:
      UserError: another dtype, or floats outside [0, 1]. Values are not checked under a JAX transformation.
    """
    images = images if isinstance(images, jax.Array) else np.asarray(images)
    if images.dtype == np.uint8:
        return jnp.asarray(images).astype(jnp.float32) / 255.0
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(f"images are {images.dtype}; expected uint8, or floats in [0, 1]")
    if not isinstance(images, jax.core.Tracer) and images.size:
        low, high = float(images.min()), float(images.max())
        if low < -ROUNDING or high > 1 + ROUNDING:
            raise UserError(f"float images go from {low:g} to {high:g}; expected 0 to 1, or uint8")
    return jnp.asarray(images).astype(jnp.float32)


def normalize(images: jax.Array, mean: ArrayLike, std: ArrayLike) -> jax.Array:
    """(images - mean) / std per channel; mean and std [C] in the units of the images."""
    return (images - jnp.asarray(mean, images.dtype)) / jnp.asarray(std, images.dtype)


def denormalize(images: jax.Array, mean: ArrayLike, std: ArrayLike) -> jax.Array:
    """The inverse of `normalize`: images * std + mean, not clipped."""
    return images * jnp.asarray(std, images.dtype) + jnp.asarray(mean, images.dtype)
