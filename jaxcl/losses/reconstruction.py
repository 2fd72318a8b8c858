"""Reconstruction error of an autoencoder."""

import functools

import jax
import jax.numpy as jnp

from jaxcl.errors import UserError
from jaxcl.losses.common import Array, AxisName, check_floating, check_shape, total, widened
from jaxcl.losses.labels import flags


def reconstruction(x_hat: Array, x: Array, *, where: Array | None = None, axis_name: AxisName = None) -> Array:
    """Mean squared error over all elements (pixels and channels) of the valid rows.

    It is a mean and not a sum over pixels, so its scale does not depend on the size of the image. Nothing is clipped.
    Its unit is the square of the unit of the inputs (normalised pixels in Thanos). It does not depend on classes: the
    autoencoder of Thanos is class-conditional only through a cross-entropy on the same latent.

    Args:
      x_hat: [N, ...], any float type, the output of the decoder, or anything that `jnp.asarray` takes. Computed in
        float32 at least.
      x: target of the shape of x_hat. It receives gradient too.
      where: [N] bool, False for padded rows, which do not count and may hold any value.
      axis_name: inside `jax.shard_map`, the mesh axis (or axes) over which the rows are split. The result is
        then the mean over the global batch, equal on every device.

    Returns:
      A scalar, float32 or wider. 0 if no row is valid.

    Raises:
      UserError: shapes that do not match, or integers (normalise images first).

    Example:
      loss = losses.reconstruction(decoder(z), images)

    References:
      Chen et al., "Perfectly Balanced: Improving Transfer and Robustness of Supervised Contrastive Learning",
      arXiv:2204.07596, the autoencoder of Thanos.
    """
    x_hat, x = jnp.asarray(x_hat), jnp.asarray(x)
    check_floating("reconstruction", x_hat=x_hat, x=x)
    if x_hat.ndim < 1 or 0 in x_hat.shape[1:]:
        raise UserError(
            f"reconstruction: x_hat has shape {x_hat.shape}, expected [images, ...] without an axis of length 0"
        )
    check_shape("reconstruction", "x", x, x_hat.shape, "like x_hat")
    if where is not None:
        where = flags(where)
        check_shape("reconstruction", "where", where, x_hat.shape[:1], "one for each row")
        where = where.astype(bool)
    return _reconstruction(x_hat, x, where, axis_name=axis_name)


@functools.partial(jax.jit, static_argnames="axis_name")
def _reconstruction(x_hat, x, where, *, axis_name):
    x_hat, x = widened(x_hat, x)
    error = x_hat - x
    valid_N = jnp.ones(len(error), bool) if where is None else where
    # Zeroed before the square: otherwise the gradient of a padded row would be 0 times its value, which may be NaN.
    error = jnp.where(jnp.expand_dims(valid_N, range(1, error.ndim)), error, 0)
    # Counts rows and not elements: the number of elements of a large batch of images overflows 32 bits.
    mean_N = jnp.mean(error**2, axis=tuple(range(1, error.ndim)))
    count = total(jnp.sum(valid_N, dtype=jnp.int32), axis_name)
    return total(jnp.sum(mean_N), axis_name) / jnp.maximum(count, 1).astype(error.dtype)
