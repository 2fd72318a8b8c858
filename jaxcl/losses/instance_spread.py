"""Instance spreading (UEL): each view finds its partner, and every other row denies being found.

Letters: B images on this device, N = 2B rows (view 1, then view 2), C columns of the global batch, D features.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxcl.errors import UserError
from jaxcl.losses.common import (
    AxisName,
    check_above_zero,
    check_floating,
    first_row,
    total,
    widened,
)
from jaxcl.losses.engine import How, choose, row_sums
from jaxcl.losses.tiles import Side, Sums

LOG_2 = math.log(2)


def instance_spread(
    features: ArrayLike,
    *,
    temperature: float = 0.1,
    negative_multiplier: float = 1.0,
    implementation: Literal["auto", "dense", "tiled", "ring"] = "auto",
    axis_name: AxisName = None,
) -> jax.Array:
    """Instance-spreading loss of a batch (the baseline "UEL" in CLAE).

    With N = 2B rows X, partners p(i) = i +- B, keys Y = stop_gradient(X), S_ij = <X_i, Y_j> / temperature and
    m = negative_multiplier::

        P_ij = exp(S_ij) / Z_i,   Z_i = exp(S_ip(i)) + m * sum_{j not in {i, p(i)}} exp(S_ij)
        loss = -mean over i of ( log P_ip(i) + m * sum_{j not in {i, p(i)}} log(1 - P_ij) )

    Which of the losses of this name it is: the sum over j runs over the chances that row i is taken for j (not
    that j is taken for i), the key side is constant as in the released code of CLAE, and nothing is scaled to
    unit length inside.

    The negative that takes most of the row is computed as the logarithm of what is left for the others, so a
    chance that rounds to 1 gives a large finite loss and a usable gradient rather than infinity.

    Args:
      features: [2B, D], any float type: B first views, then the second views of the same images in the same
        order. Computed in float32 at least. Pass unit rows for cosine similarity.
      temperature: > 0.
      negative_multiplier: m >= 1; below 1 a P_ij could exceed 1.
      implementation: how the [2B, 2B] part is computed; the number is the same. "dense" forms all logits at
        once, "tiled" keeps a few numbers a row and recomputes tiles for the gradient (a first reverse-mode
        derivative only), "ring" is tiled with the blocks going from device to device (needs `axis_name`),
        "auto" chooses by size (`jaxcl.losses.limits`).
      axis_name: inside `jax.shard_map`, the mesh axis (or axes) over which the images are split. Each device
        then holds [2b, D]: first views of its b images, then their second views. The result is the loss of the
        global batch, equal on every device.

    Returns:
      A scalar, float32 or wider.

    Raises:
      UserError: not [2B, D], an odd number of rows, integers, a global batch of one image (no negatives), unknown
        implementation, "ring" without `axis_name`.

    References:
      Ye et al., "Unsupervised Embedding Learning via Invariant and Spreading Instance Feature", CVPR 2019; batch
      form as in Ho and Vasconcelos, "Contrastive Learning with Adversarial Examples", arXiv:2010.12050.
    """
    features = jnp.asarray(features)
    check_floating("instance_spread", features=features)
    if features.ndim != 2 or 0 in features.shape or len(features) % 2:
        raise UserError(
            f"instance_spread: features of shape {features.shape}, expected [2 * images, features]: "
            "first views, then second views"
        )
    check_above_zero("instance_spread", temperature=temperature)
    if isinstance(negative_multiplier, (int, float)) and not negative_multiplier >= 1:
        raise UserError(f"instance_spread: negative_multiplier={negative_multiplier}, expected a number from 1 up")
    if total(len(features), axis_name) < 4:
        raise UserError(
            "instance_spread: a batch of one image has no negatives, expected at least 2 images; raise batch_size"
        )
    rows = len(features)
    how = choose("instance_spread", implementation, rows, total(rows, axis_name), axis_name)
    return _instance_spread(features, temperature, negative_multiplier, how=how, axis_name=axis_name)


# Compiled as one: op by op, the first call in a notebook would compile dozens of little programs.
@functools.partial(jax.jit, static_argnames=("how", "axis_name"))
def _instance_spread(x_NxD, temperature, multiplier, *, how, axis_name):
    (x_NxD,) = widened(x_NxD)
    y_NxD = lax.stop_gradient(x_NxD)
    x_NxD = x_NxD / jnp.asarray(temperature, x_NxD.dtype)
    half = len(x_NxD) // 2
    positive_N = jnp.sum(x_NxD * jnp.roll(y_NxD, half, axis=0), axis=1)
    element_N = first_row(len(x_NxD), axis_name) + jnp.arange(len(x_NxD), dtype=jnp.int32)
    ids = (element_N, jnp.roll(element_N, half))
    rows = Side(x_NxD, ids, element=element_N)
    columns = Side(y_NxD, ids, element=element_N)
    loss_N = _row_losses(rows, columns, positive_N, jnp.asarray(multiplier, x_NxD.dtype), how, axis_name)
    return total(jnp.sum(loss_N), axis_name) / total(len(loss_N), axis_name)


def _row_losses(rows: Side, columns: Side, positive_N, multiplier, how: How, axis_name: AxisName):
    """Loss of each of this device's rows [N]; `rows` are already divided by the temperature."""
    log_m = jnp.log(multiplier)
    first = Sums(_negatives, ("lse",), constant_columns=True)
    (log_rest_N,) = row_sums(first, rows, columns, how=how, axis_name=axis_name)
    log_negatives_N = log_m + log_rest_N
    log_z_N = jnp.logaddexp(log_negatives_N, positive_N)

    # Only one negative can hold more than half of its row; it is set apart.
    chances = Sums(_denials, ("sum", "lse", "sum", "sum"), constant_columns=True)
    rows = rows._replace(values=log_z_N)
    columns = columns._replace(values=jnp.zeros_like(log_z_N))
    denied_N, log_others_N, top_N, is_over_N = row_sums(chances, rows, columns, how=how, axis_name=axis_name)
    over_N = is_over_N > 0
    top_N = jnp.where(over_N, top_N, 0)
    # What it leaves of Z: the positive, the others, and m - 1 more times itself.
    more_N = jnp.where(multiplier > 1, jnp.log(jnp.where(multiplier > 1, multiplier - 1, 1)) + top_N, -jnp.inf)
    left_N = jnp.logaddexp(jnp.logaddexp(log_m + log_others_N, positive_N), more_N) - log_z_N
    denied_N += jnp.where(over_N, left_N, 0)
    # -log P as softplus keeps its digits where P is near 1.
    return jax.nn.softplus(log_negatives_N - positive_N) - multiplier * denied_N


def _negative(own, other, itself):
    (_, partner), (element, _) = own[0], other[0]
    return (element != partner) & ~itself


def _negatives(s, own, other, itself):
    # Masked before the maximum and the exponentials, so that what is masked has gradient 0 and not NaN.
    return (jnp.where(_negative(own, other, itself), s, -jnp.inf),)


def _denials(s, own, other, itself):
    """log(1 - P) of negatives up to one half, their logits, and the logit of the one above with its count."""
    negative = _negative(own, other, itself)
    log_chance = s - own[1]
    over = negative & (log_chance > -LOG_2)
    usual = negative & ~over
    denied = jnp.log1p(-jnp.exp(jnp.where(usual, log_chance, -1)))
    return (
        jnp.where(usual, denied, 0),
        jnp.where(usual, s, -jnp.inf),
        jnp.where(over, s, 0),
        over.astype(s.dtype),
    )
