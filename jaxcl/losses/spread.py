"""Class-conditional losses across views: attract, class-conditional InfoNCE, and their weighted mean L_spread.

Letters: V views, B samples (of this device), D features; for an ordered pair of views, R anchor rows (this device's
samples in the later view) and C candidate columns (all samples in the earlier view). "Element" is a sample's position
in the global batch.

Everything that looks at all R x C logits is one of two sweeps of the engine: sums over the candidates of functions of
one logit and its row's and column's values. All else is O(B D).
"""

import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxcl.errors import UserError
from jaxcl.losses.common import (
    NORM_FLOOR,
    AxisName,
    check_above_zero,
    check_choice,
    check_floating,
    check_shape,
    first_row,
    total,
    unit,
    widened,
)
from jaxcl.losses.engine import How, choose, row_sums
from jaxcl.losses.tiles import Side, Sums

Norm = Literal["unit", "none", "released"]
Implementation = Literal["auto", "dense", "tiled", "ring"]
UNLABELLED = -1


def attract(
    views: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    where: ArrayLike | None = None,
    temperature: float = 0.5,
    positives_in_denominator: bool = False,
    positive_weight: float = 1.0,
    clip_positive: float | None = None,
    norm: Norm = "unit",
    implementation: Implementation = "auto",
    axis_name: AxisName = None,
) -> jax.Array:
    """L_attract: supervised contrast across views whose denominator holds one positive at a time and the negatives.

    For each ordered pair of views (a, c) with c < a the anchors are x[a, i] and the candidates x[c, j] alone. With
    s_ij = cos(x[a, i], x[c, j]) / temperature, P(i) the samples of i's class *including i itself* (its other view)
    and N(i) all others::

        l_i  = 1 / |P(i)| * sum_{p in P(i)} [ log(exp(s_ip) + sum_{j in N(i)} exp(s_ij)) - s_ip ]
        loss = mean of l_i over the B anchors, then over the V (V - 1) / 2 pairs of views

    Which of the many losses called SupCon this is:

    * The other positives of i are *not* in the denominator; `positives_in_denominator=True` puts
      w * sum_{j in P(i)} exp(s_ij) there instead of exp(s_ip), with w = `positive_weight`. At w = 1 that is the
      "out" form of Khosla et al. restricted to the other view.
    * One direction only: the later view's rows against the earlier view's, B candidates and not 2B - 1.
    * labels=None makes it InfoNCE across views: every sample is its own class.

    Args:
      views: [V, B, D], V >= 2, view v of sample i; any float type, computed in float32 at least.
      labels: [B] int, the class of each sample, or None. -1 is unlabelled: that anchor has P(i) = {i}, and is a
        negative of all others.
      where: [B] bool, False for padded samples. They are neither anchors nor candidates and may hold anything.
      temperature: > 0.
      positives_in_denominator: see above.
      positive_weight: w > 0; other than 1 only with positives_in_denominator.
      clip_positive: the attracted logit is min(s_ip, clip_positive) (after the division by the temperature); the
        denominator is not clipped. None: no clip. The authors' released code behaves as clip_positive=1.0 by
        default, which keeps a class apart: its cosines settle at the temperature instead of 1.
      norm: "unit" for cosines, a zero vector staying zero; "none" for inner products; "released" for the authors'
        <x[a, i], x[c, j]> / (|x[a, j]| |x[c, j]|), both norms from column j.
      implementation: "dense" forms all B x B logits of a pair of views; "tiled" never holds them; "ring" passes
        the candidates round the devices of `axis_name`; "auto" chooses. All give the same number.
      axis_name: inside `jax.shard_map`, the mesh axis (or axes) over which the batch is split: every argument
        holds this device's samples, and the result is the loss of the global batch, equal on all devices.

    Returns:
      A scalar, float32 or wider. 0 if no sample counts.

    Raises:
      UserError: shapes or types that do not match, unknown options, positive_weight without
        positives_in_denominator, "ring" without axis_name.

    References:
      Chen et al., "Perfectly Balanced: Improving Transfer and Robustness of Supervised Contrastive Learning",
      arXiv:2204.07596, and the attract term of Fu et al., "The Details Matter: Preventing Class Collapse in
      Supervised Contrastive Learning" (2022).
    """
    arrays, how = _checked("attract", views, labels, where, temperature, norm, implementation, axis_name)
    _check_positives("attract", positives_in_denominator, positive_weight, clip_positive)
    options = dict(norm=norm, how=how, axis_name=axis_name)
    inside = bool(positives_in_denominator)
    numbers = temperature, positive_weight, clip_positive
    return _terms(*arrays, *numbers, terms=("attract",), positives_in_denominator=inside, **options)["attract"]


def class_conditional_infonce(
    views: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    where: ArrayLike | None = None,
    temperature: float = 0.5,
    norm: Norm = "unit",
    implementation: Implementation = "auto",
    axis_name: AxisName = None,
) -> jax.Array:
    """Class-conditional InfoNCE ("repel"): tell an image's other view from the other images of its class.

    In the notation of `attract`::

        l_i  = log sum_{j in P(i)} exp(s_ij) - s_ii
        loss = mean of l_i over the B anchors, then over the V (V - 1) / 2 pairs of views

    No sample of another class takes part. A sample that is alone in its class, or unlabelled, contributes 0; so the
    loss is 0 for labels=None.

    Args:
      views, labels, where, temperature, norm, implementation, axis_name: as in `attract`.

    Returns:
      A scalar, float32 or wider. 0 if no sample counts.

    Raises:
      UserError: shapes or types that do not match, unknown options, "ring" without axis_name.

    References:
      Chen et al., "Perfectly Balanced", arXiv:2204.07596: the class-conditional InfoNCE term.
    """
    arrays, how = _checked(
        "class_conditional_infonce", views, labels, where, temperature, norm, implementation, axis_name
    )
    options = dict(norm=norm, how=how, axis_name=axis_name)
    return _terms(*arrays, temperature, 1.0, None, terms=("repel",), **options)["repel"]


def spread(
    views: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    a_lc: float = 1.0,
    a_spread: float = 1.0,
    where: ArrayLike | None = None,
    temperature: float = 0.5,
    positives_in_denominator: bool = False,
    positive_weight: float = 1.0,
    clip_positive: float | None = None,
    norm: Norm = "unit",
    implementation: Implementation = "auto",
    axis_name: AxisName = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """L_spread: the weighted mean of `attract` (A) and `class_conditional_infonce` (R), from shared sweeps.

    ::

        total = (a_lc * A + a_spread * R) / (a_lc + a_spread)    if a_spread > 0
        total = a_lc * A                                         if a_spread = 0 (not divided, as in the released code)

    The paper's alpha is a_lc / (a_lc + a_spread). The more weight R has, the further a class spreads; at K classes of
    n points each it collapses to a point from alpha = 1 / (1 + q K / (K - 1)) on, where q = e / (1 + e) and
    e = n (K - 1) exp(-K / ((K - 1) temperature)).

    Args:
      views, labels and the options of `attract`: as there. The clip and the denominator concern A alone.
      a_lc: weight of A, >= 0; may be traced.
      a_spread: weight of R, >= 0; may be traced. The two weights are not both 0.

    Returns:
      (total, {"attract": A, "repel": R}), scalars in float32 or wider. A and R are unweighted and always true
      values, also where their weight is 0.

    Raises:
      UserError: as `attract`, and for negative weights.

    References:
      Chen et al., "Perfectly Balanced", arXiv:2204.07596; authors' released code.
    """
    arrays, how = _checked("spread", views, labels, where, temperature, norm, implementation, axis_name)
    _check_positives("spread", positives_in_denominator, positive_weight, clip_positive)
    _check_weights(a_lc, a_spread)
    options = dict(norm=norm, how=how, axis_name=axis_name)
    inside = bool(positives_in_denominator)
    numbers = temperature, positive_weight, clip_positive
    values = _terms(*arrays, *numbers, terms=("attract", "repel"), positives_in_denominator=inside, **options)
    return _weighted(values["attract"], values["repel"], a_lc, a_spread), values


@jax.jit
def _weighted(a, r, a_lc, a_spread):
    a_lc, a_spread = jnp.asarray(a_lc, a.dtype), jnp.asarray(a_spread, a.dtype)
    # The divisor is replaced, not only the quotient: gradients with respect to the weights stay finite.
    divisor = jnp.where(a_spread > 0, a_lc + a_spread, 1)
    return (a_lc * a + a_spread * r) / divisor


# Compiled as one: op by op, the first call in a notebook would compile dozens of little programs.
@functools.partial(jax.jit, static_argnames=("terms", "positives_in_denominator", "norm", "how", "axis_name"))
def _terms(
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
    how: How,
    axis_name: AxisName,
) -> dict[str, jax.Array]:
    """The losses named in `terms`: "attract" (A), "repel" (R)."""
    (views_VxBxD,) = widened(views)
    dtype = views_VxBxD.dtype
    num_views, num_samples, _ = views_VxBxD.shape
    temperature, positive_weight = jnp.asarray(temperature, dtype), jnp.asarray(positive_weight, dtype)
    clip = None if clip is None else jnp.asarray(clip, dtype)

    valid_B = jnp.ones(num_samples, bool) if where is None else where.astype(bool)
    views_VxBxD = jnp.where(valid_B[None, :, None], views_VxBxD, 0)  # padding may be NaN, and 0 * NaN is NaN
    element_B = first_row(num_samples, axis_name) + jnp.arange(num_samples, dtype=jnp.int32)
    label_B = element_B if labels is None else labels.astype(jnp.int32)

    sums = dict.fromkeys(terms, 0.0)
    pairs = [(a, c) for a in range(num_views) for c in range(a)]
    for a, c in pairs:
        z_BxD, y_BxD = _logit_factors(views_VxBxD[a], views_VxBxD[c], norm)
        clip_B = None if clip is None else jnp.full(num_samples, clip)
        rows = Side(z_BxD / temperature, fixed=(label_B, element_B, clip_B))
        columns = Side(y_BxD, fixed=(label_B, element_B, clip_B), valid=valid_B)
        first = Sums(_classes, ("lse", "lse", "sum"))
        if "attract" in terms and positives_in_denominator:
            first = Sums(_classes_and_positives, ("lse", "lse", "sum", "sum"))
        same_B, other_B, count_B, *positive_B = row_sums(first, rows, columns, how=how, axis_name=axis_name)

        if "attract" in terms:
            if positives_in_denominator:
                # P(i) holds i, so only padded anchors have none: logaddexp sees at most one -inf.
                together_B = jnp.where(valid_B, same_B, 0) + jnp.log(positive_weight)
                loss_B = _log_add(together_B, other_B) - positive_B[0] / jnp.maximum(count_B, 1)
            else:
                anchors = rows._replace(values=other_B)
                candidates = columns._replace(values=jnp.zeros_like(other_B))
                (loss_B,) = row_sums(Sums(_attractions, ("sum",)), anchors, candidates, how=how, axis_name=axis_name)
                loss_B /= jnp.maximum(count_B, 1)
            sums["attract"] += jnp.sum(jnp.where(valid_B, loss_B, 0))
        if "repel" in terms:
            # Alone in its class, an anchor has exactly 0; the difference would leave the rounding of a large logit.
            own_B = jnp.sum(rows.z * columns.z, axis=1)
            together_B = jnp.where(valid_B & (count_B > 1), same_B, own_B)
            sums["repel"] += jnp.sum(together_B - own_B)

    scale = jnp.maximum(total(jnp.sum(valid_B, dtype=jnp.int32), axis_name), 1) * len(pairs)
    return {name: total(value, axis_name) / scale.astype(dtype) for name, value in sums.items()}


def _logit_factors(x_BxD: jax.Array, y_BxD: jax.Array, norm: Norm) -> tuple[jax.Array, jax.Array]:
    """Row and column vectors whose inner products are the logits times the temperature."""
    if norm == "unit":
        return unit(x_BxD), unit(y_BxD)
    if norm == "released":  # both norms are those of the column's sample
        square = jnp.sum(x_BxD * x_BxD, axis=-1, keepdims=True)
        usable = ~(square <= NORM_FLOOR**2)
        return x_BxD, unit(y_BxD) * jnp.where(usable, lax.rsqrt(jnp.where(usable, square, 1)), 0)
    return x_BxD, y_BxD


# own, other: ((label, element, clip or None), values) of the anchor and of the candidate


def _same(own, other):
    """P(i) as a mask; what is not in it is in N(i)."""
    (label, element, _), (other_label, other_element, _) = own[0], other[0]
    return (element == other_element) | (label == other_label) & (label != UNLABELLED)


def _classes(s, own, other, itself):
    """First sweep: logits of the anchor's class and of the others, and one for each positive."""
    same = _same(own, other)
    return jnp.where(same, s, -jnp.inf), jnp.where(same, -jnp.inf, s), same.astype(s.dtype)


def _classes_and_positives(s, own, other, itself):
    clip = own[0][2]
    clipped = s if clip is None else jnp.where(s > clip, clip, s)
    return *_classes(s, own, other, itself), jnp.where(_same(own, other), clipped, 0)


def _attractions(s, own, other, itself):
    """Second sweep: logaddexp(s, log_other) - min(s, clip) of each positive; log_other may be -inf."""
    same, clip, log_other = _same(own, other), own[0][2], own[1]
    s = jnp.where(same, s, 0)
    # It is softplus(log_other - s) + max(s - clip, 0), which cancels no large logits.
    loss = _log_add(0.0, log_other - s)
    if clip is not None:
        loss += jnp.where(s > clip, s - clip, 0)
    return (jnp.where(same, loss, 0),)


def _log_add(a: jax.Array | float, b: jax.Array) -> jax.Array:
    """log(exp(a) + exp(b)) for finite a; b = -inf gives a, with zero gradient to b."""
    # Not `b > -inf`: NaN must pass through, which is how divergence is noticed.
    empty = jnp.isneginf(b)
    return a + jnp.where(empty, 0, jax.nn.softplus(jnp.where(empty, 0, b) - a))


def _checked(loss, views, labels, where, temperature, norm, implementation, axis_name):
    """The array arguments, once they and the common options are known to be right."""
    views, labels, where = (None if x is None else jnp.asarray(x) for x in (views, labels, where))
    if views.ndim != 3 or views.shape[0] < 2 or 0 in views.shape:
        raise UserError(f"{loss}: views of shape {views.shape}, expected [views >= 2, samples, features]")
    check_floating(loss, views=views)
    for name, value in (("labels", labels), ("where", where)):
        if value is not None:
            check_shape(loss, name, value, (views.shape[1],), "one a sample")
    if labels is not None and not (jnp.issubdtype(labels.dtype, jnp.integer) or labels.dtype == bool):
        raise UserError(f"{loss}: labels of type {labels.dtype}, expected integers; pass class ids, -1 for unlabelled")
    check_above_zero(loss, temperature=temperature)
    check_choice(loss, "norm", norm, ("unit", "none", "released"))
    rows = views.shape[1]
    how = choose(loss, implementation, rows, total(rows, axis_name), axis_name)
    return (views, labels, where), how


def _check_positives(loss, positives_in_denominator, positive_weight, clip_positive):
    check_above_zero(loss, positive_weight=positive_weight)
    # A traced weight cannot be looked at: to pass one is to mean it.
    if not positives_in_denominator and not (isinstance(positive_weight, (int, float)) and positive_weight == 1):
        raise UserError(
            f"{loss}: positive_weight given without positives_in_denominator, expected 1; "
            "set positives_in_denominator=True"
        )
    if isinstance(clip_positive, (int, float)) and clip_positive != clip_positive:
        raise UserError(f"{loss}: clip_positive={clip_positive}, expected a number or None")


def _check_weights(a_lc, a_spread):
    for name, value in (("a_lc", a_lc), ("a_spread", a_spread)):
        if isinstance(value, (int, float)) and not value >= 0:
            raise UserError(f"spread: {name}={value}, expected a number that is not negative")
    if all(isinstance(w, (int, float)) and w == 0 for w in (a_lc, a_spread)):
        raise UserError("spread: a_lc=0 and a_spread=0, expected at least one weight above 0")
