"""The attract and class-conditional InfoNCE terms of all anchors, for each ordered pair of views.

Shapes: V views, B samples of this device, D features. For an ordered pair of views, the anchor rows are this device's
samples in the later view, and the candidate columns are all samples in the earlier view.

Every function of all logits is one of two row reductions (`jaxcl/losses/reduction.py`). The rest is O(B D).
"""

import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from jaxcl.losses.common import NORM_FLOOR, Array, AxisName, first_row, inverse_root, total, unit, widened
from jaxcl.losses.engine import reduce_rows
from jaxcl.losses.plan import Plan
from jaxcl.losses.reduction import Operand, Reduction

Norm = Literal["unit", "none", "released"]
UNLABELLED = -1


# Compiled as a whole: op by op, the first call in a notebook would compile dozens of small programs.
@functools.partial(jax.jit, static_argnames=("terms", "positives_in_denominator", "norm", "plan", "axis_name"))
def class_terms(
    views,
    labels,
    where,
    temperature,
    positive_weight,
    clip,
    *,
    terms: Sequence[str],
    positives_in_denominator: bool = False,
    norm: Norm,
    plan: Plan,
    axis_name: AxisName,
) -> dict[str, Array]:
    """The losses named in `terms`: "attract" (A) and "repel" (R), see `jaxcl.losses.spread`.

    Args:
      views: [V, B, D].
      labels: [B], or None.
      where: [B], or None.
      temperature, positive_weight: scalars.
      clip: scalar, or None.
    """
    (views_VxBxD,) = widened(views)
    dtype = views_VxBxD.dtype
    num_views, num_samples, _ = views_VxBxD.shape
    temperature, positive_weight = jnp.asarray(temperature, dtype), jnp.asarray(positive_weight, dtype)
    clip = None if clip is None else jnp.asarray(clip, dtype)

    valid_B = jnp.ones(num_samples, bool) if where is None else where.astype(bool)
    views_VxBxD = jnp.where(valid_B[None, :, None], views_VxBxD, 0)  # padding may be NaN, and 0 * NaN is NaN
    id_B = first_row(num_samples, axis_name) + jnp.arange(num_samples, dtype=jnp.int32)
    label_B = id_B if labels is None else labels.astype(jnp.promote_types(labels.dtype, jnp.int32))

    sums = dict.fromkeys(terms, 0.0)
    pairs = [(a, c) for a in range(num_views) for c in range(a)]
    for a, c in pairs:
        z_BxD, y_BxD = _logit_factors(views_VxBxD[a], views_VxBxD[c], norm)
        clip_B = None if clip is None else jnp.full(num_samples, clip)
        rows = Operand(z_BxD / temperature, constants=(label_B, id_B, clip_B))
        columns = Operand(y_BxD, constants=(label_B, id_B, clip_B), valid=valid_B)
        by_class = Reduction(_classes, ("lse", "lse", "sum"))
        if "attract" in terms and positives_in_denominator:
            by_class = Reduction(_classes_and_positives, ("lse", "lse", "sum", "sum"))
        same_B, other_B, count_B, *positive_B = reduce_rows(by_class, rows, columns, plan=plan, axis_name=axis_name)

        if "attract" in terms:
            if positives_in_denominator:
                # P(i) holds i, so only padded anchors have no positive, and logaddexp gets at most one -inf.
                together_B = jnp.where(valid_B, same_B, 0) + jnp.log(positive_weight)
                loss_B = _log_add_exp(together_B, other_B) - positive_B[0] / jnp.maximum(count_B, 1)
            else:
                anchors = rows._replace(values=other_B)
                candidates = columns._replace(values=jnp.zeros_like(other_B))
                attractions = Reduction(_attractions, ("sum",))
                (loss_B,) = reduce_rows(attractions, anchors, candidates, plan=plan, axis_name=axis_name)
                loss_B /= jnp.maximum(count_B, 1)
            sums["attract"] += jnp.sum(jnp.where(valid_B, loss_B, 0))
        if "repel" in terms:
            # An anchor that is alone in its class has exactly 0, without the rounding error of a large logit.
            self_B = jnp.sum(rows.z * columns.z, axis=1)
            together_B = jnp.where(valid_B & (count_B > 1), same_B, self_B)
            sums["repel"] += jnp.sum(together_B - self_B)

    scale = jnp.maximum(total(jnp.sum(valid_B, dtype=jnp.int32), axis_name), 1) * len(pairs)
    return {name: total(value, axis_name) / scale.astype(dtype) for name, value in sums.items()}


def _logit_factors(x_BxD: Array, y_BxD: Array, norm: Norm) -> tuple[Array, Array]:
    """Row and column vectors. Their inner products are the logits multiplied by the temperature."""
    if norm == "unit":
        return unit(x_BxD), unit(y_BxD)
    if norm == "released":  # both norms are of the column's sample
        square = jnp.sum(x_BxD * x_BxD, axis=-1, keepdims=True)
        usable = ~(square <= NORM_FLOOR**2)
        return x_BxD, unit(y_BxD) * jnp.where(usable, inverse_root(jnp.where(usable, square, 1)), 0)
    return x_BxD, y_BxD


# Entry functions; own, other: ((label, id, clip or None), values) of the anchor and of the candidate.


def _same(own, other):
    """P(i) as a mask. All other candidates are in N(i)."""
    (label, id_, _), (other_label, other_id, _) = own[0], other[0]
    return (id_ == other_id) | (label == other_label) & (label != UNLABELLED)


def _classes(s, own, other, is_self):
    """First reduction: logits of the anchor's class, logits of the other classes, and 1 for each positive."""
    same = _same(own, other)
    return jnp.where(same, s, -jnp.inf), jnp.where(same, -jnp.inf, s), same.astype(s.dtype)


def _classes_and_positives(s, own, other, is_self):
    """`_classes`, and the clipped logits of the positives."""
    clip = own[0][2]
    clipped = s if clip is None else jnp.where(s > clip, clip, s)
    return *_classes(s, own, other, is_self), jnp.where(_same(own, other), clipped, 0)


def _attractions(s, own, other, is_self):
    """Second reduction: logaddexp(s, log_other) - min(s, clip) of each positive. log_other may be -inf."""
    same, clip, log_other = _same(own, other), own[0][2], own[1]
    s = jnp.where(same, s, 0)
    # Equal to softplus(log_other - s) + max(s - clip, 0), which does not cancel large logits.
    loss = _log_add_exp(0.0, log_other - s)
    if clip is not None:
        loss += jnp.where(s > clip, s - clip, 0)
    return (jnp.where(same, loss, 0),)


def _log_add_exp(a: Array | float, b: Array) -> Array:
    """log(exp(a) + exp(b)) for finite a. b = -inf gives a, with zero gradient for b."""
    # Not `b > -inf`: NaN must pass through, because the training loop detects divergence by a NaN loss.
    empty = jnp.isneginf(b)
    return a + jnp.where(empty, 0, jax.nn.softplus(jnp.where(empty, 0, b) - a))
