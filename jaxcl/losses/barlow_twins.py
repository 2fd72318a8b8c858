"""Barlow Twins: the cross-correlation matrix of the features of two views should be the identity.

Shapes: N rows (images on this device), D and E features.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.errors import UserError
from jaxcl.losses.common import Array, AxisName, check_floating, check_shape, inverse_root, total, widened

# Added to the variance, as batch normalisation does.
EPSILON = 1e-5


def barlow_twins(
    z1: Array,
    z2: Array,
    *,
    off_diagonal_weight: float = 3.9e-3,
    scale: float = 1 / 32,
    axis_name: AxisName = None,
) -> Array:
    """Redundancy reduction of Barlow Twins, with features standardised over the global batch.

    With u1, u2 the features of the views, each minus its mean and divided by sqrt(variance + 1e-5) over the batch
    (biased variance, no learnt scale or offset), and C = u1^T u2 / batch size::

        loss = scale * ( sum_d (C_dd - 1)^2 + off_diagonal_weight * sum_{d != e} C_de^2 )

    This loss has several forms. Here the correlation divides by the batch size and not by norms, so a constant
    feature has correlation 0 (it costs `scale`, with finite gradient). The whole sum is multiplied by `scale`, as in
    the first public code; the defaults are the constants of that code. The paper uses scale 1 and weight 5e-3.

    Collapsed encoder: if all rows are equal, every correlation is 0 and the loss is scale * D.

    Args:
      z1: [N, D], any float type, projections of the first views, or anything that `jnp.asarray` takes. Computed in
        float32 at least.
      z2: [N, D], projections of the second views. Both views receive gradient.
      off_diagonal_weight: lambda in the paper.
      scale: factor of the whole loss.
      axis_name: inside `jax.shard_map`, the mesh axis (or axes) over which the rows are split. Mean, variance,
        correlation and the result are then those of the global batch, equal on every device.

    Returns:
      A scalar, float32 or wider.

    Raises:
      UserError: shapes that do not match, integers, or a global batch of one row (it has no variance).

    Example:
      loss = losses.barlow_twins(z1, z2, off_diagonal_weight=5e-3, scale=1.0)

    References:
      Zbontar et al., "Barlow Twins", arXiv:2103.03230, eq. 1. Constants as in Zhang and Ma, "Rethinking the
      Augmentation Module in Contrastive Learning", arXiv:2206.00227.
    """
    z1, z2 = jnp.asarray(z1), jnp.asarray(z2)
    check_floating("barlow_twins", z1=z1, z2=z2)
    if z1.ndim != 2 or 0 in z1.shape:
        raise UserError(f"barlow_twins: z1 has shape {z1.shape}, expected [images, features], neither of them 0")
    check_shape("barlow_twins", "z2", z2, z1.shape, "like z1")
    if total(len(z1), axis_name) < 2:
        raise UserError("barlow_twins: z1 holds one row and so no variance, expected at least 2; raise batch_size")
    return _barlow_twins(z1, z2, off_diagonal_weight, scale, axis_name=axis_name)


# Compiled as a whole: op by op, the first call in a notebook would compile dozens of small programs.
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
    """Scales each feature to mean 0 and variance 1 over the rows of all devices."""
    # From centred values: the mean of squares minus the squared mean loses all digits if the mean is large.
    centred_NxD = z_NxD - total(jnp.sum(z_NxD, axis=0), axis_name) / count
    variance_D = total(jnp.sum(centred_NxD**2, axis=0), axis_name) / count
    return centred_NxD * inverse_root(variance_D + EPSILON)
