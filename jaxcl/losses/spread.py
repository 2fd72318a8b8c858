"""Class-conditional losses across views: attract, class-conditional InfoNCE, and their weighted mean L_spread.

Shapes: V views, B samples of this device, D features. `jaxcl/losses/spread_rows.py` computes them.
"""

import math
from typing import get_args

import jax
import jax.numpy as jnp

from jaxcl.errors import UserError
from jaxcl.losses.common import (
    Array,
    AxisName,
    check_above_zero,
    check_choice,
    check_floating,
    check_shape,
    number,
    total,
)
from jaxcl.losses.labels import class_ids, flags
from jaxcl.losses.plan import Implementation, choose_plan
from jaxcl.losses.spread_rows import Norm, class_terms

# More views than this are refused: they are samples in the layout [samples, views, features] of `supcon`.
MAX_VIEWS = 32


def attract(
    views: Array,
    labels: Array | None = None,
    *,
    where: Array | None = None,
    temperature: float = 0.5,
    positives_in_denominator: bool = False,
    positive_weight: float = 1.0,
    clip_positive: float | None = None,
    norm: Norm = "unit",
    implementation: Implementation = "auto",
    axis_name: AxisName = None,
) -> Array:
    """L_attract: supervised contrast across views whose denominator holds one positive and the negatives.

    For each ordered pair of views (a, c) with c < a, the anchors are x[a, i] and the only candidates are x[c, j]. With
    s_ij = cos(x[a, i], x[c, j]) / temperature, P(i) the samples of i's class *including i itself* (its other view)
    and N(i) all others::

        l_i  = 1 / |P(i)| * sum_{p in P(i)} [ log(exp(s_ip) + sum_{j in N(i)} exp(s_ij)) - s_ip ]
        loss = mean of l_i over the B anchors, then over the V (V - 1) / 2 pairs of views

    How it differs from the other losses called SupCon:

    * The other positives of i are *not* in the denominator. `positives_in_denominator=True` puts
      w * sum_{j in P(i)} exp(s_ij) there instead of exp(s_ip), with w = `positive_weight`. With w = 1 that is the
      "out" form of Khosla et al. restricted to the other view.
    * It has one direction: the later view's rows against the B rows of the earlier view, not all 2B - 1 others.
    * labels=None makes it InfoNCE across views: every sample is its own class.

    Collapsed encoder: if all vectors are equal, l_i is log(1 + |N(i)|), or log(B) with `positives_in_denominator` and
    w = 1 (both without a clip). Without labels the loss is log(B). B is that of the global batch under `axis_name`.

    Args:
      views: [V, B, D], 2 <= V <= 32, view v of sample i; any float type, or anything that `jnp.asarray` takes.
        Computed in float32 at least. For features [B, V, D], the layout of `supcon`, pass
        `jnp.moveaxis(features, 1, 0)`.
      labels: [B] int, the class of each sample, or None. -1 means unlabelled: that anchor has P(i) = {i}, and is a
        negative of all others.
      where: [B] bool, False for padded samples. They are neither anchors nor candidates and may hold any value.
      temperature: > 0.
      positives_in_denominator: see above.
      positive_weight: w > 0. Values other than 1 require positives_in_denominator.
      clip_positive: the attracted logit is min(s_ip, clip_positive), after the division by the temperature. The
        denominator is not clipped. None: no clip. The authors' released code behaves like clip_positive=1.0 by
        default, which keeps the samples of a class apart: their cosines settle at the temperature instead of 1.
      norm: "unit" for cosines, where a zero vector stays zero; "none" for inner products; "released" for the authors'
        <x[a, i], x[c, j]> / (|x[a, j]| |x[c, j]|), with both norms from column j.
      implementation: how the [B, B] logits of a pair of views are computed; the result is equal up to rounding.
        "dense" forms all logits at once. "tiled" keeps a few numbers for each row and computes the tiles again for
        the gradient; it supports reverse-mode differentiation once. "ring" is tiled, with the candidates travelling
        round the devices of `axis_name`. "auto" chooses by size (`jaxcl.losses.limits`).
      axis_name: inside `jax.shard_map`, the mesh axis (or axes) over which the batch is split. Every argument then
        holds this device's samples, and the result is the loss of the global batch, equal on all devices.

    Returns:
      A scalar, float32 or wider. 0 if no sample is valid.

    Raises:
      UserError: shapes or types that do not match, more than 32 views, unknown options, positive_weight without
        positives_in_denominator, or "ring" without axis_name.

    Example:
      loss = losses.attract(jnp.stack([z1, z2]), labels)

    References:
      Chen et al., "Perfectly Balanced: Improving Transfer and Robustness of Supervised Contrastive Learning",
      arXiv:2204.07596, and the attract term of Fu et al., "The Details Matter: Preventing Class Collapse in
      Supervised Contrastive Learning" (2022).
    """
    arrays, plan = _checked("attract", views, labels, where, temperature, norm, implementation, axis_name)
    _check_positives("attract", positives_in_denominator, positive_weight, clip_positive)
    options = dict(norm=norm, plan=plan, axis_name=axis_name)
    inside = bool(positives_in_denominator)
    numbers = temperature, positive_weight, clip_positive
    return class_terms(*arrays, *numbers, terms=("attract",), positives_in_denominator=inside, **options)["attract"]


def class_conditional_infonce(
    views: Array,
    labels: Array | None = None,
    *,
    where: Array | None = None,
    temperature: float = 0.5,
    norm: Norm = "unit",
    implementation: Implementation = "auto",
    axis_name: AxisName = None,
) -> Array:
    """Class-conditional InfoNCE ("repel"): tell an image's other view from the other images of its class.

    For each ordered pair of views (a, c) with c < a, the anchors are x[a, i] and the candidates x[c, j]. With
    s_ij = cos(x[a, i], x[c, j]) / temperature and P(i) the samples of i's class including i itself::

        l_i  = log sum_{j in P(i)} exp(s_ij) - s_ii
        loss = mean of l_i over the B anchors, then over the V (V - 1) / 2 pairs of views

    Samples of other classes have no influence. A sample that is alone in its class, or unlabelled, contributes 0, so
    the loss is 0 for labels=None.

    Collapsed classes: if all vectors of a class of n samples are equal, its anchors have l_i = log(n).

    Args:
      views: [V, B, D], 2 <= V <= 32, view v of sample i; any float type, or anything that `jnp.asarray` takes.
        Computed in float32 at least. For features [B, V, D], the layout of `supcon`, pass
        `jnp.moveaxis(features, 1, 0)`.
      labels: [B] int, the class of each sample, or None. -1 means unlabelled.
      where: [B] bool, False for padded samples. They are neither anchors nor candidates and may hold any value.
      temperature: > 0.
      norm: "unit" for cosines, where a zero vector stays zero; "none" for inner products; "released" for the authors'
        <x[a, i], x[c, j]> / (|x[a, j]| |x[c, j]|), with both norms from column j.
      implementation: how the [B, B] logits of a pair of views are computed; the result is equal up to rounding.
        "dense" forms all logits at once. "tiled" keeps a few numbers for each row and computes the tiles again for
        the gradient; it supports reverse-mode differentiation once. "ring" is tiled, with the candidates travelling
        round the devices of `axis_name`. "auto" chooses by size (`jaxcl.losses.limits`).
      axis_name: inside `jax.shard_map`, the mesh axis (or axes) over which the batch is split. Every argument then
        holds this device's samples, and the result is the loss of the global batch, equal on all devices.

    Returns:
      A scalar, float32 or wider. 0 if no sample is valid.

    Raises:
      UserError: shapes or types that do not match, more than 32 views, unknown options, or "ring" without axis_name.

    Example:
      loss = losses.class_conditional_infonce(jnp.stack([z1, z2]), labels)

    References:
      Chen et al., "Perfectly Balanced", arXiv:2204.07596: the class-conditional InfoNCE term.
    """
    arrays, plan = _checked(
        "class_conditional_infonce", views, labels, where, temperature, norm, implementation, axis_name
    )
    options = dict(norm=norm, plan=plan, axis_name=axis_name)
    return class_terms(*arrays, temperature, 1.0, None, terms=("repel",), **options)["repel"]


def spread(
    views: Array,
    labels: Array | None = None,
    *,
    a_lc: float = 1.0,
    a_spread: float = 1.0,
    where: Array | None = None,
    temperature: float = 0.5,
    positives_in_denominator: bool = False,
    positive_weight: float = 1.0,
    clip_positive: float | None = None,
    norm: Norm = "unit",
    implementation: Implementation = "auto",
    axis_name: AxisName = None,
) -> tuple[Array, dict[str, Array]]:
    """L_spread: the weighted mean of `attract` (A) and `class_conditional_infonce` (R), which share their reductions.

    ::

        total = (a_lc * A + a_spread * R) / (a_lc + a_spread)    if a_spread > 0
        total = a_lc * A                                         if a_spread = 0 (not divided, as in the released code)

    The paper's alpha is a_lc / (a_lc + a_spread). A larger weight of R spreads the samples of a class further. With K
    classes of n points each, a class collapses to a point if alpha >= 1 / (1 + q K / (K - 1)), where q = e / (1 + e)
    and e = n (K - 1) exp(-K / ((K - 1) temperature)).

    Collapsed encoder: if all vectors are equal, A is the mean of log(1 + B - n_i) and R the mean of log(n_i), where n_i
    is the number of samples in the class of i. Without labels A is log(B) and R is 0.

    Args:
      views: [V, B, D], 2 <= V <= 32, view v of sample i; any float type, or anything that `jnp.asarray` takes.
        Computed in float32 at least. For features [B, V, D], the layout of `supcon`, pass
        `jnp.moveaxis(features, 1, 0)`.
      labels: [B] int, the class of each sample, or None (every sample is its own class). -1 means unlabelled: the
        sample is its own class.
      a_lc: weight of A, >= 0; may be traced.
      a_spread: weight of R, >= 0; may be traced. The two weights are not both 0.
      where: [B] bool, False for padded samples. They are neither anchors nor candidates and may hold any value.
      temperature: > 0, of both terms.
      positives_in_denominator: of A only; all positives of an anchor stand in its denominator, see `attract`.
      positive_weight: of A only; weight > 0 of those positives. Values other than 1 require positives_in_denominator.
      clip_positive: of A only; upper limit of the attracted logit, after the division by the temperature. None: no
        clip. The authors' released code behaves like clip_positive=1.0 by default.
      norm: "unit" for cosines, where a zero vector stays zero; "none" for inner products; "released" for the authors'
        <x[a, i], x[c, j]> / (|x[a, j]| |x[c, j]|), with both norms from column j.
      implementation: how the [B, B] logits of a pair of views are computed; the result is equal up to rounding.
        "dense" forms all logits at once. "tiled" keeps a few numbers for each row and computes the tiles again for
        the gradient; it supports reverse-mode differentiation once. "ring" is tiled, with the candidates travelling
        round the devices of `axis_name`. "auto" chooses by size (`jaxcl.losses.limits`).
      axis_name: inside `jax.shard_map`, the mesh axis (or axes) over which the batch is split. Every argument then
        holds this device's samples, and the result is the loss of the global batch, equal on all devices.

    Returns:
      (total, {"attract": A, "repel": R}), scalars in float32 or wider. A and R are not weighted, and are computed even
      where their weight is 0.

    Raises:
      UserError: shapes or types that do not match, more than 32 views, unknown options, positive_weight without
        positives_in_denominator, negative weights, both weights 0, or "ring" without axis_name.

    Example:
      loss, parts = losses.spread(jnp.stack([z1, z2]), labels, a_lc=1.0, a_spread=1.0)

    References:
      Chen et al., "Perfectly Balanced", arXiv:2204.07596, and the authors' released code.
    """
    arrays, plan = _checked("spread", views, labels, where, temperature, norm, implementation, axis_name)
    _check_positives("spread", positives_in_denominator, positive_weight, clip_positive)
    _check_weights(a_lc, a_spread)
    options = dict(norm=norm, plan=plan, axis_name=axis_name)
    inside = bool(positives_in_denominator)
    numbers = temperature, positive_weight, clip_positive
    values = class_terms(*arrays, *numbers, terms=("attract", "repel"), positives_in_denominator=inside, **options)
    return _weighted(values["attract"], values["repel"], a_lc, a_spread), values


@jax.jit
def _weighted(a, r, a_lc, a_spread):
    a_lc, a_spread = jnp.asarray(a_lc, a.dtype), jnp.asarray(a_spread, a.dtype)
    # The divisor is replaced and not only the quotient, so that gradients with respect to the weights stay finite.
    divisor = jnp.where(a_spread > 0, a_lc + a_spread, 1)
    return (a_lc * a + a_spread * r) / divisor


def _checked(loss, views, labels, where, temperature, norm, implementation, axis_name):
    """Checks the arrays and the common options -> (arrays, plan)."""
    views, where = jnp.asarray(views), flags(where)
    if views.ndim != 3 or views.shape[0] < 2 or 0 in views.shape:
        raise UserError(f"{loss}: views has shape {views.shape}, expected [views >= 2, samples, features]")
    if views.shape[0] > MAX_VIEWS:
        raise UserError(
            f"{loss}: views has shape {views.shape} and so {views.shape[0]} views, expected [views, samples, features] "
            f"with at most {MAX_VIEWS} views; for [samples, views, features] pass jnp.moveaxis(views, 1, 0)"
        )
    check_floating(loss, views=views)
    labels = None if labels is None else class_ids(loss, labels, integers=True)
    for name, value in (("labels", labels), ("where", where)):
        if value is not None:
            check_shape(loss, name, value, (views.shape[1],), _shape_hint(value, views))
    check_above_zero(loss, temperature=temperature)
    check_choice(loss, "norm", norm, get_args(Norm))
    rows = views.shape[1]
    plan = choose_plan(loss, implementation, rows, total(rows, axis_name), axis_name)
    return (views, labels, where), plan


def _shape_hint(value, views):
    if value.shape == views.shape[:1]:
        return "one for each sample; for views [samples, views, features] pass jnp.moveaxis(views, 1, 0)"
    return "one for each sample"


def _check_positives(loss, positives_in_denominator, positive_weight, clip_positive):
    check_above_zero(loss, positive_weight=positive_weight)
    # The value of a traced weight is unknown. A caller who passes one wants it to have an effect.
    if not positives_in_denominator and number(positive_weight) != 1:
        raise UserError(
            f"{loss}: positive_weight={positive_weight} without positives_in_denominator, expected 1; "
            "set positives_in_denominator=True"
        )
    if clip_positive is not None and math.isnan(number(clip_positive) or 0):
        raise UserError(f"{loss}: clip_positive={clip_positive}, expected a number or None")


def _check_weights(a_lc, a_spread):
    for name, value in (("a_lc", a_lc), ("a_spread", a_spread)):
        known = number(value)
        if known is not None and not known >= 0:
            raise UserError(f"spread: {name}={value}, expected a number of at least 0")
    if number(a_lc) == number(a_spread) == 0:
        raise UserError("spread: a_lc=0 and a_spread=0, expected at least one weight above 0")
