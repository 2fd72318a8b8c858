"""Instance spreading (UEL): each view identifies its partner, and no other row is mistaken for it.

Shapes: B images on this device, N = 2B rows (first views, then second views), D features.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.errors import UserError
from jaxcl.losses.common import (
    Array,
    AxisName,
    check_above_zero,
    check_floating,
    first_row,
    number,
    total,
    widened,
)
from jaxcl.losses.engine import reduce_rows
from jaxcl.losses.plan import Implementation, Plan, choose_plan
from jaxcl.losses.reduction import Operand, Reduction

LOG_2 = math.log(2)


def instance_spread(
    features: Array,
    *,
    temperature: float = 0.1,
    negative_multiplier: float = 1.0,
    implementation: Implementation = "auto",
    axis_name: AxisName = None,
) -> Array:
    """Instance-spreading loss of a batch (the baseline "UEL" in CLAE).

    With N = 2B rows X, partners p(i) = i +- B, keys Y = stop_gradient(X), S_ij = <X_i, Y_j> / temperature and
    m = negative_multiplier::

        P_ij = exp(S_ij) / Z_i,   Z_i = exp(S_ip(i)) + m * sum_{j not in {i, p(i)}} exp(S_ij)
        loss = -mean over i of ( log P_ip(i) + m * sum_{j not in {i, p(i)}} log(1 - P_ij) )

    Several losses have this name. Here the sum over j runs over the probabilities that row i is taken for j (not
    that j is taken for i), the keys are constant as in the released code of CLAE, and the rows are not scaled to unit
    length.

    If one negative has a probability above 1/2, log(1 - P) is computed from the terms of the other rows. A
    probability that rounds to 1 then gives a large finite loss and a usable gradient instead of infinity.

    Collapsed encoder: if all rows are equal and m = 1, the loss is log(N - 1) + (N - 2) log((N - 1) / (N - 2)), which
    is about log(N - 1) + 1, with the global N under `axis_name`.

    Args:
      features: [2B, D], any float type, or anything that `jnp.asarray` takes: B first views, then the second views of
        the same images in the same order. Computed in float32 at least. Pass unit rows for cosine similarity.
      temperature: > 0.
      negative_multiplier: m >= 1. Below 1 a P_ij could exceed 1.
      implementation: how the [2B, 2B] matrix is computed; the result is equal up to rounding. "dense" forms all
        logits at once. "tiled" keeps a few numbers for each row and computes the tiles again for the gradient; it
        supports reverse-mode differentiation once. "ring" is tiled, with the blocks of the devices travelling round
        (needs `axis_name`). "auto" chooses by size (`jaxcl.losses.limits`).
      axis_name: inside `jax.shard_map`, the mesh axis (or axes) over which the images are split. Each device
        then holds [2b, D]: first views of its b images, then their second views. The result is the loss of the
        global batch, equal on every device.

    Returns:
      A scalar, float32 or wider.

    Raises:
      UserError: features not [2B, D], an odd number of rows, integers, a global batch of one image (no negatives), an
        unknown implementation, or "ring" without `axis_name`.

    Example:
      loss = losses.instance_spread(jnp.concatenate([unit_z1, unit_z2]))

    References:
      Ye et al., "Unsupervised Embedding Learning via Invariant and Spreading Instance Feature", CVPR 2019,
      arXiv:1904.03436. The batch form: Ho and Vasconcelos, "Contrastive Learning with Adversarial Examples",
      arXiv:2010.12050.
    """
    features = jnp.asarray(features)
    check_floating("instance_spread", features=features)
    if features.ndim != 2 or 0 in features.shape or len(features) % 2:
        raise UserError(
            f"instance_spread: features has shape {features.shape}, expected [2 * images, features]: "
            "first views, then second views"
        )
    check_above_zero("instance_spread", temperature=temperature)
    multiplier = number(negative_multiplier)
    if multiplier is not None and not multiplier >= 1:
        raise UserError(f"instance_spread: negative_multiplier={negative_multiplier}, expected a number of at least 1")
    if total(len(features), axis_name) < 4:
        raise UserError(
            "instance_spread: features holds one image and so no negatives, expected at least 2; raise batch_size"
        )
    rows = len(features)
    plan = choose_plan("instance_spread", implementation, rows, total(rows, axis_name), axis_name)
    return _instance_spread(features, temperature, negative_multiplier, plan=plan, axis_name=axis_name)


# Compiled as a whole: op by op, the first call in a notebook would compile dozens of small programs.
@functools.partial(jax.jit, static_argnames=("plan", "axis_name"))
def _instance_spread(x_NxD, temperature, multiplier, *, plan, axis_name):
    (x_NxD,) = widened(x_NxD)
    y_NxD = lax.stop_gradient(x_NxD)
    x_NxD = x_NxD / jnp.asarray(temperature, x_NxD.dtype)
    half = len(x_NxD) // 2
    positive_N = jnp.sum(x_NxD * jnp.roll(y_NxD, half, axis=0), axis=1)
    id_N = first_row(len(x_NxD), axis_name) + jnp.arange(len(x_NxD), dtype=jnp.int32)
    constants = (id_N, jnp.roll(id_N, half))
    rows = Operand(x_NxD, constants, ids=id_N)
    columns = Operand(y_NxD, constants, ids=id_N)
    loss_N = _row_losses(rows, columns, positive_N, jnp.asarray(multiplier, x_NxD.dtype), plan, axis_name)
    return total(jnp.sum(loss_N), axis_name) / total(len(loss_N), axis_name)


def _row_losses(rows: Operand, columns: Operand, positive_N, multiplier, plan: Plan, axis_name: AxisName):
    """Loss of each row of this device [N]. `rows` are already divided by the temperature."""
    log_m = jnp.log(multiplier)
    negatives = Reduction(_negative_logits, ("lse",), constant_columns=True)
    (log_sum_N,) = reduce_rows(negatives, rows, columns, plan=plan, axis_name=axis_name)
    log_negatives_N = log_m + log_sum_N
    log_z_N = jnp.logaddexp(log_negatives_N, positive_N)

    # At most one negative of a row has a probability above 1/2; it is computed separately.
    rejections = Reduction(_rejections, ("sum", "lse", "sum", "sum"), constant_columns=True)
    rows = rows._replace(values=log_z_N)
    columns = columns._replace(values=jnp.zeros_like(log_z_N))
    rejected_N, log_others_N, top_N, num_top_N = reduce_rows(rejections, rows, columns, plan=plan, axis_name=axis_name)
    has_top_N = num_top_N > 0
    top_N = jnp.where(has_top_N, top_N, 0)
    # Z without that negative: the positive, the other negatives, and m - 1 copies of the negative itself.
    copies_N = jnp.where(multiplier > 1, jnp.log(jnp.where(multiplier > 1, multiplier - 1, 1)) + top_N, -jnp.inf)
    log_rest_N = jnp.logaddexp(jnp.logaddexp(log_m + log_others_N, positive_N), copies_N) - log_z_N
    rejected_N += jnp.where(has_top_N, log_rest_N, 0)
    # -log P as a softplus keeps its digits where P is near 1.
    return jax.nn.softplus(log_negatives_N - positive_N) - multiplier * rejected_N


# Entry functions; own, other: ((id, id of the partner), log Z or 0) of the row and of the column.


def _is_negative(own, other, is_self):
    (_, partner), (id_, _) = own[0], other[0]
    return (id_ != partner) & ~is_self


def _negative_logits(s, own, other, is_self):
    # Masked before the maximum and the exponentials, so that masked entries have gradient 0 and not NaN.
    return (jnp.where(_is_negative(own, other, is_self), s, -jnp.inf),)


def _rejections(s, own, other, is_self):
    """log(1 - P) of the negatives with P <= 1/2, their logits, and the logit of the one with P > 1/2 with its count."""
    negative = _is_negative(own, other, is_self)
    log_p = s - own[1]
    top = negative & (log_p > -LOG_2)
    usual = negative & ~top
    rejected = jnp.log1p(-jnp.exp(jnp.where(usual, log_p, -1)))
    return (
        jnp.where(usual, rejected, 0),
        jnp.where(usual, s, -jnp.inf),
        jnp.where(top, s, 0),
        top.astype(s.dtype),
    )
