"""Reconstruction error of an autoencoder."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxcl.errors import UserError
from jaxcl.losses.common import AxisName, check_floating, check_shape, total, widened


def reconstruction(
    x_hat: ArrayLike, x: ArrayLike, *, where: ArrayLike | None = None, axis_name: AxisName = None
) -> jax.Array:
    """Mean squared error over all elements (pixels and channels) of the rows that exist.

    A mean, not a sum over pixels: its scale does not depend on the size of the image. Nothing is clipped, and the
    unit is the square of the inputs' (normalised pixels in Thanos). No class enters: the autoencoder of Thanos is
    class-conditional only through a cross-entropy on the same latent.

    Args:
      x_hat: [N, ...], any float type, the decoder's output. Computed in float32 at least.
      x: like x_hat, what it should be. It receives gradient too if it is differentiated.
      where: [N] bool, False for padded rows: they count nothing and may hold anything.
      axis_name: inside `jax.shard_map`, the mesh axis (or axes) over which the rows are split; the result is
        then the mean over the global batch, equal on every device.

    Returns:
      A scalar, float32 or wider. 0 if no row exists.

    Raises:
      UserError: shapes that do not match, or integers (normalise images first).

    References:
      Chen et al., "Perfectly Balanced: Improving Transfer and Robustness of Supervised Contrastive Learning",
      arXiv:2204.07596, the autoencoder of Thanos.
    """
    x_hat, x = jnp.asarray(x_hat), jnp.asarray(x)
    check_floating("reconstruction", x_hat=x_hat, x=x)
    if x_hat.ndim < 1 or 0 in x_hat.shape[1:]:
        raise UserError(f"reconstruction: x_hat of shape {x_hat.shape}, expected [images, ...] with elements in each")
    check_shape("reconstruction", "x", x, x_hat.shape, "like x_hat")
    if where is not None:
        where = jnp.asarray(where)
        check_shape("reconstruction", "where", where, x_hat.shape[:1], "one a row")
        where = where.astype(bool)
    return _reconstruction(x_hat, x, where, axis_name=axis_name)


@functools.partial(jax.jit, static_argnames="axis_name")
def _reconstruction(x_hat, x, where, *, axis_name):
    x_hat, x = widened(x_hat, x)
    error = x_hat - x
    kept_N = jnp.ones(len(error), bool) if where is None else where
    # Zeroed before the square: the gradient of a padded row would otherwise be 0 times what it holds.
    error = jnp.where(jnp.expand_dims(kept_N, range(1, error.ndim)), error, 0)
    # Rows are counted, not elements: those of a large batch of images overflow 32 bits.
    mean_N = jnp.mean(error**2, axis=tuple(range(1, error.ndim)))
    count = total(jnp.sum(kept_N, dtype=jnp.int32), axis_name)
    return total(jnp.sum(mean_N), axis_name) / jnp.maximum(count, 1).astype(error.dtype)
