"""Supervised contrastive loss with background samples, extra negatives, padding and global batches.

Shapes: N samples, V views, D features, M extra negatives; R anchors, C columns (the vectors of the denominators:
the N V elements, then the M extra negatives). An element is one view of one sample.
"""

import functools
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.errors import UserError
from jaxcl.losses.common import (
    Array,
    AxisName,
    check_above_zero,
    check_choice,
    check_floating,
    check_shape,
    total,
    unit,
)
from jaxcl.losses.labels import class_ids, flags
from jaxcl.losses.plan import Implementation, Plan, choose_plan, is_bounded
from jaxcl.losses.supcon_rows import Batch, losses_by_matrix, losses_by_reduction

Anchors = Literal["all", "first"]
AnchorMean = Literal["all", "positive"]


def supcon(
    features: Array,
    labels: Array | None = None,
    *,
    mask: Array | None = None,
    background: Array | None = None,
    where: Array | None = None,
    negatives: Array | None = None,
    negatives_where: Array | None = None,
    negatives_count: float = 1,
    temperature: float = 0.1,
    base_temperature: float | None = None,
    anchors: Anchors = "all",
    anchor_mean: AnchorMean = "all",
    normalize: bool = True,
    implementation: Implementation = "auto",
    axis_name: AxisName = None,
) -> Array:
    """Supervised contrastive loss, the "out" form of Khosla et al. (2020), eq. 2, averaged over anchors.

    With elements i = (sample, view), s_ij = <z_i, z_j> / temperature, A(i) every element but i, and P(i) the
    elements of A(i) that are positives of i::

        l_i  = -(temperature / base_temperature) / |P(i)|
               * sum_{p in P(i)} (s_ip - log sum_{a in A(i)} exp(s_ia))
        loss = mean of l_i over the anchors;  l_i = 0 where P(i) is empty

    How it differs from the other losses called SupCon (docs/losses.md compares five):

    * It is L_out: the logarithm is inside the sum over positives. Libraries that pass class ids to a SimCLR function
      compute L_in, a different number, which is infinite for an anchor without a positive.
    * The other positives stay in the denominator. NT-Xent as written for pairs leaves them out.
    * anchor_mean="all" divides by the number of all anchors, and those without a positive count 0 (the authors'
      released code). "positive" divides by the number of anchors that have one (metric-learning libraries). The
      paper sums.
    * base_temperature=None means no factor, as in the paper. The authors' code multiplies by
      temperature / 0.07: pass base_temperature=0.07 for its numbers.

    Collapsed encoder: if all vectors are equal, an anchor with a positive has the loss log(N V - 1) (times
    temperature / base_temperature): with two views log(2N - 1), for example 5.541 for 128 samples, with the global N
    under `axis_name`. Background samples count in N; M extra negatives make it log(N V - 1 + M negatives_count). A loss
    that stays at this value has learnt nothing.

    Args:
      features: [N, V, ...], any float type, or anything that `jnp.asarray` takes. Trailing axes are flattened to D.
        Computed in float32 at least. For views [V, N, D], the layout of `spread`, pass `jnp.moveaxis(views, 0, 1)`.
      labels: [N], or None. Only equality counts, so an unlabelled sample needs an id that no other sample has.
      mask: [N, N] positives instead of labels (non-zero = positive); row = the anchor's sample, column = the contrast
        sample. It need not be symmetric. Under `axis_name`: [N of this device, N of the global batch]. With
        neither labels nor mask, the other views of the same sample are the positives (SimCLR).
      background: [N] bool, samples that are only negatives (ExConB): each of their views is in every denominator,
        none is an anchor or a positive, and they do not count in the mean.
      where: [N] bool, False for padded samples. They are excluded everywhere and may hold any value.
      negatives: [M, ...] further vectors that are only negatives, flattened to the same D.
      negatives_where: [M] bool, False for padded negatives.
      negatives_count: how often each extra negative counts in a denominator, > 0. `negatives` with count V
        equals `background` samples whose V views are equal, but needs one encoder pass instead of V.
      temperature: > 0.
      base_temperature: > 0, or None for `temperature`.
      anchors: "all" views are anchors, or only the "first" of each sample.
      anchor_mean: see above.
      normalize: scale each vector to unit length. A zero vector stays zero, with zero gradient.
      implementation: how the logits are computed; the result is equal up to rounding. "dense" forms all logits at once.
        "tiled" keeps a few numbers for each row and computes the tiles again for the gradient: it needs
        O((N V + M) D) memory, is also the fastest for large batches, and supports reverse-mode differentiation once.
        "ring" needs `axis_name`: it is tiled, and the blocks of the devices travel round instead of being gathered.
        "auto": dense up to `jaxcl.losses.limits` logits on a device, then tiled, or ring with `axis_name`;
        differentiated like "tiled". A mask is an N x N matrix anyway: for it "tiled" takes tiles of rows, and "ring"
        is refused.
      axis_name: inside `jax.shard_map`, the mesh axis (or axes) over which the batch is split. Every row
        argument then holds this device's rows. The anchors of this device meet the columns of all devices, and
        the result is the loss of the global batch, equal on every device.
        Differentiate outside or inside the shard_map. Inside, leave its `check_vma` on (the default):
        without it JAX counts the gradient once for each device.

    Returns:
      A scalar, float32 or wider. 0 if there is no anchor.

    Raises:
      UserError: labels and mask together, labels that are NaN or no numbers, fewer than 3 dimensions, shapes that do
        not match, unknown options, or "ring" with a mask or without `axis_name`.

    Example:
      features = jnp.stack([z1, z2], axis=1)  # [N, 2, D]
      loss = losses.supcon(features, labels, temperature=0.1)

    References:
      Khosla et al., "Supervised Contrastive Learning", arXiv:2004.11362, eq. 2. Background negatives:
      Zhang et al., "ExCon: Explanation-driven Supervised Contrastive Learning", arXiv:2111.14271.
    """
    features, negatives = (None if x is None else jnp.asarray(x) for x in (features, negatives))
    mask, background, where, negatives_where = map(flags, (mask, background, where, negatives_where))
    labels = None if labels is None else class_ids("supcon", labels)
    _check_options(temperature, base_temperature, negatives_count, anchors, anchor_mean)
    _check_shapes(features, labels, mask, background, where, negatives, negatives_where, axis_name)

    n, num_views = features.shape[:2]
    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    columns = devices * (n * num_views + (0 if negatives is None else len(negatives)))
    plan = choose_plan("supcon", implementation, n * (num_views if anchors == "all" else 1), columns, axis_name)
    if mask is not None and plan.implementation == "ring":
        if implementation == "ring":
            raise UserError("supcon: implementation='ring' does not support mask, expected labels; or use 'tiled'")
        plan = plan._replace(implementation="tiled")
    return _supcon(
        features,
        labels,
        mask,
        background,
        where,
        negatives,
        negatives_where,
        negatives_count,
        temperature,
        base_temperature,
        anchors=anchors,
        anchor_mean=anchor_mean,
        normalize=normalize,
        bounded=is_bounded(normalize, temperature),
        plan=plan,
        axis_name=axis_name,
    )


# Compiled as a whole: op by op, the first call in a notebook would compile dozens of small programs.
@functools.partial(jax.jit, static_argnames=("anchors", "anchor_mean", "normalize", "bounded", "plan", "axis_name"))
def _supcon(
    features,
    labels,
    mask,
    background,
    where,
    negatives,
    negatives_where,
    negatives_count,
    temperature,
    base_temperature,
    *,
    anchors: Anchors,
    anchor_mean: AnchorMean,
    normalize: bool,
    bounded: bool,
    plan: Plan,
    axis_name: AxisName,
):
    num_samples, num_views, dim = *features.shape[:2], math.prod(features.shape[2:])
    dtype = jnp.promote_types(features.dtype, jnp.float32)
    temperature = jnp.asarray(temperature, dtype)
    scale = 1.0 if base_temperature is None else temperature / jnp.asarray(base_temperature, dtype)
    # Each operand is divided by the root of the temperature, so that anchors and columns are the same vectors.
    shrink = lax.rsqrt(temperature)

    valid = None if where is None else where.astype(bool)
    foreground = valid
    if background is not None:
        foreground = ~background.astype(bool) if valid is None else valid & ~background.astype(bool)
    batch = Batch(
        z=_vectors(features.reshape(num_samples, num_views, dim), valid, dtype, normalize, shrink),
        labels=labels,
        mask=mask,
        valid=valid,
        foreground=foreground,
        negatives=None,
        negatives_valid=None,
        negatives_count=jnp.asarray(negatives_count, dtype),
    )
    if negatives is not None:
        negatives_valid = None if negatives_where is None else negatives_where.astype(bool)
        z_MxD = _vectors(negatives.reshape(len(negatives), dim), negatives_valid, dtype, normalize, shrink)
        batch = batch._replace(negatives=z_MxD, negatives_valid=negatives_valid)

    # A dense plan of "auto" on one device takes the engine, whose gradient of a single tile is faster.
    dense = plan.implementation == "dense" and (plan.explicit or axis_name is not None)
    if dense or mask is not None:
        loss_R, positive_R = losses_by_matrix(batch, anchors=anchors, plan=plan, axis_name=axis_name)
    else:
        loss_R, positive_R = losses_by_reduction(
            batch, anchors=anchors, bounded=bounded, plan=plan, axis_name=axis_name
        )
    if anchor_mean == "positive":
        count = jnp.sum(positive_R, dtype=jnp.int32)
    else:
        num_foreground = num_samples if foreground is None else jnp.sum(foreground, dtype=jnp.int32)
        count = jnp.asarray(num_foreground * (len(loss_R) // num_samples), jnp.int32)
    loss, count = total(jnp.sum(loss_R), axis_name), total(count, axis_name)
    return scale * loss / jnp.maximum(count, 1).astype(dtype)


def _vectors(x: Array, valid: Array | None, dtype, normalize: bool, shrink: Array) -> Array:
    """Rows in the working precision, scaled by `shrink`. Zeroes padded rows: 0 * NaN would make the gradient NaN."""
    x = x.astype(dtype)
    if valid is not None:
        x = jnp.where(valid.reshape(-1, *[1] * (x.ndim - 1)), x, 0)
    return (unit(x) if normalize else x) * shrink


def _check_options(temperature, base_temperature, negatives_count, anchors, anchor_mean):
    check_above_zero(
        "supcon", temperature=temperature, base_temperature=base_temperature, negatives_count=negatives_count
    )
    check_choice("supcon", "anchors", anchors, get_args(Anchors))
    check_choice("supcon", "anchor_mean", anchor_mean, get_args(AnchorMean))


def _check_shapes(features, labels, mask, background, where, negatives, negatives_where, axis_name):
    if features.ndim < 3:
        raise UserError(
            f"supcon: features has shape {features.shape}, expected [samples, views, ...]; "
            "if each sample has one view, pass features[:, None]"
        )
    if labels is not None and mask is not None:
        raise UserError("supcon: labels and mask are both given, expected one of them or neither")
    check_floating("supcon", features=features)
    if 0 in features.shape[:2]:
        raise UserError(f"supcon: features has shape {features.shape}, expected at least one sample and view")
    n = features.shape[0]
    for name, value in (("labels", labels), ("background", background), ("where", where)):
        if value is not None:
            check_shape("supcon", name, value, (n,), _shape_hint(value, features))
    if mask is not None:
        columns = n if axis_name is None else n * lax.axis_size(axis_name)
        check_shape("supcon", "mask", mask, (n, columns))
    if negatives is None:
        if negatives_where is not None:
            raise UserError("supcon: negatives_where is given without negatives, expected both or neither")
        return
    dim = math.prod(features.shape[2:])
    if negatives.ndim < 2 or math.prod(negatives.shape[1:]) != dim:
        raise UserError(f"supcon: negatives has shape {negatives.shape}, expected [count, {dim}] like the features")
    if negatives_where is not None:
        check_shape("supcon", "negatives_where", negatives_where, (len(negatives),))


def _shape_hint(value, features):
    if value.shape == features.shape[1:2]:
        return "one for each sample; for features [views, samples, ...] pass jnp.moveaxis(features, 0, 1)"
    return "one for each sample"
