"""Barlow Twins: the cross-correlation of two views' features should be the identity.

Letters: N rows (images on this device), D and E features.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxcl.errors import UserError
from jaxcl.losses.common import AxisName, check_floating, check_shape, total, widened

# Added to the variance, as batch normalisation does.
EPSILON = 1e-5


def barlow_twins(
    z1: ArrayLike,
    z2: ArrayLike,
    *,
    off_diagonal_weight: float = 3.9e-3,
    scale: float = 1 / 32,
    axis_name: AxisName = None,
) -> jax.Array:
    """Barlow Twins' redundancy reduction, over the features standardised by the global batch.

    With u1, u2 the views' features, each less its mean and divided by sqrt(variance + 1e-5) over the batch (biased
    variance, no scale or offset learnt), and C = u1^T u2 / batch size::

        loss = scale * ( sum_d (C_dd - 1)^2 + off_diagonal_weight * sum_{d != e} C_de^2 )

    Which of the forms of this loss it is: the correlation divides by the batch size and not by norms, so a constant
    feature has correlation 0 (it costs `scale`, with finite gradient); the whole sum is multiplied by `scale`, as in
    the first public code, whose constants are the defaults. The paper's table has scale 1 and weight 5e-3.

    Args:
      z1: [N, D], any float type, projections of the first views. Computed in float32 at least.
      z2: [N, D], projections of the second views. Both views receive gradient.
      off_diagonal_weight: lambda of the paper.
      scale: factor of the whole loss.
      axis_name: inside `jax.shard_map`, the mesh axis (or axes) over which the rows are split. Mean, variance and
        correlation are then those of the global batch, and so is the result, equal on every device.

    Returns:
      A scalar, float32 or wider.

    Raises:
      UserError: shapes that do not match, integers, a global batch of one row (it has no variance).

    References:
      Zbontar et al., "Barlow Twins", arXiv:2103.03230, eq. 1; constants as in Zhang and Ma, "Rethinking the
      Augmentation Module in Contrastive Learning", arXiv:2206.00227.
    """
    z1, z2 = jnp.asarray(z1), jnp.asarray(z2)
    check_floating("barlow_twins", z1=z1, z2=z2)
    if z1.ndim != 2 or 0 in z1.shape:
        raise UserError(f"barlow_twins: z1 of shape {z1.shape}, expected [images, features], none of them 0")
    check_shape("barlow_twins", "z2", z2, z1.shape, "like z1")
    if total(len(z1), axis_name) < 2:
        raise UserError("barlow_twins: a batch of one row has no variance, expected at least 2; raise batch_size")
    return _barlow_twins(z1, z2, off_diagonal_weight, scale, axis_name=axis_name)


# Compiled as one: op by op, the first call in a notebook would compile dozens of little programs.
@functools.partial(jax.jit, static_argnames="axis_name")
def _barlow_twins(z1, z2, off_diagonal_weight, scale, *, axis_name):
    z1, z2 = widened(z1, z2)
    off_diagonal_weight, scale = jnp.asarray(off_diagonal_weight, z1.dtype), jnp.asarray(scale, z1.dtype)
    count = total(len(z1), axis_name)
    u1_NxD, u2_NxE = (_standardised(z, count, axis_name) for z in (z1, z2))
    c_DxE = total(jnp.einsum("nd,ne->de", u1_NxD, u2_NxE, precision=lax.Precision.HIGHEST), axis_name) / count
    diagonal = jnp.eye(len(c_DxE), dtype=bool)
    return scale * jnp.sum(jnp.where(diagonal, (c_DxE - 1) ** 2, off_diagonal_weight * c_DxE**2))


def _standardised(z_NxD, count, axis_name):
    """Each feature with mean 0 and variance 1 over the rows of all devices."""
    # The variance from centred values: the mean of squares less the squared mean loses all digits of a large offset.
    centred_NxD = z_NxD - total(jnp.sum(z_NxD, axis=0), axis_name) / count
    variance_D = total(jnp.sum(centred_NxD**2, axis=0), axis_name) / count
    return centred_NxD * lax.rsqrt(variance_D + EPSILON)
