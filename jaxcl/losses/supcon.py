"""Supervised contrastive loss with background rows, extra negatives, padding and global batches.

Letters: N samples, V views, D features, M extra negatives; R anchor rows, C columns (all that can stand in a
denominator: the N*V elements, then the M extra negatives). "Element" means one view of one sample.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxcl.errors import UserError
from jaxcl.losses.common import check_above_zero, check_choice, check_floating, check_shape, total, unit
from jaxcl.losses.engine import How, choose, is_bounded
from jaxcl.losses.supcon_rows import Batch, by_engine, by_matrix


def supcon(
    features: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    mask: ArrayLike | None = None,
    background: ArrayLike | None = None,
    where: ArrayLike | None = None,
    negatives: ArrayLike | None = None,
    negatives_where: ArrayLike | None = None,
    negatives_count: float = 1,
    temperature: float = 0.1,
    base_temperature: float | None = None,
    anchors: Literal["all", "first"] = "all",
    anchor_mean: Literal["all", "positive"] = "all",
    normalize: bool = True,
    implementation: Literal["auto", "dense", "tiled", "ring"] = "auto",
    axis_name: str | tuple[str, ...] | None = None,
) -> jax.Array:
    """Supervised contrastive loss, the "out" form of Khosla et al. (2020), eq. 2, averaged over anchors.

    With elements i = (sample, view), s_ij = <z_i, z_j> / temperature, A(i) every element but i, and P(i) the
    elements of A(i) that are positives of i::

        l_i  = -(temperature / base_temperature) / |P(i)|
               * sum_{p in P(i)} (s_ip - log sum_{a in A(i)} exp(s_ia))
        loss = mean of l_i over the anchors;  l_i = 0 where P(i) is empty

    Which of the many losses called SupCon this is:

    * L_out: the logarithm is inside the sum over positives. Libraries that reuse a SimCLR function with class
      ids compute L_in, a different number, infinite for an anchor without a positive.
    * The other positives stay in the denominator; NT-Xent as written for pairs leaves them out.
    * anchor_mean="all" divides by all anchors, those without a positive count 0 (the authors' released code);
      "positive" divides by the anchors that have one (metric-learning libraries). The paper sums.
    * base_temperature=None means no factor, as in the paper. The authors' code multiplies by
      temperature / 0.07: pass base_temperature=0.07 for its numbers.

    Args:
      features: [N, V, ...], any float type; trailing axes are flattened to D. Computed in float32 at least.
      labels: [N], or None. Only equality counts: an unlabelled sample needs an id of its own.
      mask: [N, N] positives instead of labels (non-zero = positive), row = anchor's sample, column = contrast
        sample, need not be symmetric. Under `axis_name`: [N of this device, N of the global batch]. With
        neither labels nor mask, the other views of the same sample are the positives (SimCLR).
      background: [N] bool, samples that are only negatives: every view of them stands in every denominator,
        none is an anchor or a positive (ExConB), and they do not count in the mean.
      where: [N] bool, False for padded samples. They are left out everywhere and may hold anything.
      negatives: [M, ...] further vectors that are only negatives, one each, flattened to the same D.
      negatives_where: [M] bool, False for padded negatives.
      negatives_count: how often each extra negative counts in a denominator, > 0. `negatives` with count V
        equals `background` samples whose V views are equal, at one encoder pass instead of V.
      temperature: > 0.
      base_temperature: > 0, or None for `temperature`.
      anchors: "all" views are anchors, or only the "first" of each sample.
      anchor_mean: see above.
      normalize: scale each vector to unit length. A zero vector stays zero, with zero gradient.
      implementation: how, not what; all agree to rounding. "dense" forms all logits at once. "tiled" keeps a few
        numbers a row and recomputes tiles for the gradient: O((N V + M) D) memory, and beyond some thousand
        elements also the fastest; it has a first reverse-mode derivative only. "ring", under `axis_name`, is tiled
        with the blocks of the devices going round instead of being gathered. "auto": dense up to
        `jaxcl.losses.limits` logits on a device, then tiled, or ring with `axis_name`; differentiated as "tiled" is.
        A mask is an N x N matrix anyway: for it "tiled" takes tiles of rows, and there is no ring.
      axis_name: inside `jax.shard_map`, the mesh axis (or axes) over which the batch is split. Every row
        argument then holds this device's rows; anchors of this device meet the columns of all devices, and
        the result is the loss of the global batch, equal on every device.
        Differentiate outside or inside of the shard_map; inside, leave its `check_vma` on (the default):
        without it JAX counts the gradient once for each device.

    Returns:
      A scalar, float32 or wider. 0 if there is no anchor.

    Raises:
      UserError: labels and mask together, fewer than 3 dimensions, shapes that do not match, unknown options.

    References:
      Khosla et al., "Supervised Contrastive Learning", arXiv:2004.11362, eq. 2; background negatives:
      Zhang et al., "ExCon: Explanation-driven Supervised Contrastive Learning", arXiv:2111.14271.
    """
    features, labels, mask, background, where, negatives, negatives_where = (
        None if x is None else jnp.asarray(x)
        for x in (features, labels, mask, background, where, negatives, negatives_where)
    )
    _check_options(temperature, base_temperature, negatives_count, anchors, anchor_mean)
    _check_shapes(features, labels, mask, background, where, negatives, negatives_where, axis_name)

    n, num_views = features.shape[:2]
    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    columns = devices * (n * num_views + (0 if negatives is None else len(negatives)))
    how = choose("supcon", implementation, n * (num_views if anchors == "all" else 1), columns, axis_name)
    if mask is not None and how.form == "ring":
        if implementation == "ring":
            raise UserError("supcon: implementation='ring' cannot carry a mask, expected labels; or use 'tiled'")
        how = how._replace(form="tiled")
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
        how=how,
        axis_name=axis_name,
    )


# Compiled as one: op by op, the first call in a notebook would compile some sixty little programs.
@functools.partial(jax.jit, static_argnames=("anchors", "anchor_mean", "normalize", "bounded", "how", "axis_name"))
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
    anchors: str,
    anchor_mean: str,
    normalize: bool,
    bounded: bool,
    how: How,
    axis_name,
):
    num_samples, num_views, dim = *features.shape[:2], math.prod(features.shape[2:])
    dtype = jnp.promote_types(features.dtype, jnp.float32)
    temperature = jnp.asarray(temperature, dtype)
    scale = 1.0 if base_temperature is None else temperature / jnp.asarray(base_temperature, dtype)
    # Half of the temperature on each side: anchors and columns are then the same vectors.
    shrink = lax.rsqrt(temperature)

    kept = None if where is None else where.astype(bool)
    real = kept
    if background is not None:
        real = ~background.astype(bool) if kept is None else kept & ~background.astype(bool)
    batch = Batch(
        z=_vectors(features.reshape(num_samples, num_views, dim), kept, dtype, normalize, shrink),
        labels=labels,
        mask=mask,
        kept=kept,
        real=real,
        negatives=None,
        negatives_kept=None,
        negatives_count=jnp.asarray(negatives_count, dtype),
    )
    if negatives is not None:
        valid = None if negatives_where is None else negatives_where.astype(bool)
        z_MxD = _vectors(negatives.reshape(len(negatives), dim), valid, dtype, normalize, shrink)
        batch = batch._replace(negatives=z_MxD, negatives_kept=valid)

    dense = how.form == "dense" and (how.asked or axis_name is not None)  # otherwise the engine's one tile is faster
    if dense or mask is not None:
        loss_R, positive_R = by_matrix(batch, anchors=anchors, form=how.form, axis_name=axis_name)
    else:
        loss_R, positive_R = by_engine(batch, anchors=anchors, bounded=bounded, how=how, axis_name=axis_name)
    if anchor_mean == "positive":
        count = jnp.sum(positive_R, dtype=jnp.int32)
    else:
        num_real = num_samples if real is None else jnp.sum(real, dtype=jnp.int32)
        count = jnp.asarray(num_real * (len(loss_R) // num_samples), jnp.int32)
    loss, count = total(jnp.sum(loss_R), axis_name), total(count, axis_name)
    return scale * loss / jnp.maximum(count, 1).astype(dtype)


def _vectors(x: jax.Array, kept: jax.Array | None, dtype, normalize: bool, shrink: jax.Array) -> jax.Array:
    """Rows in the working precision, padded ones zeroed (0 * NaN would poison the gradient), scaled by `shrink`."""
    x = x.astype(dtype)
    if kept is not None:
        x = jnp.where(kept.reshape(-1, *[1] * (x.ndim - 1)), x, 0)
    return (unit(x) if normalize else x) * shrink


def _check_options(temperature, base_temperature, negatives_count, anchors, anchor_mean):
    check_above_zero(
        "supcon", temperature=temperature, base_temperature=base_temperature, negatives_count=negatives_count
    )
    check_choice("supcon", "anchors", anchors, ("all", "first"))
    check_choice("supcon", "anchor_mean", anchor_mean, ("all", "positive"))


def _check_shapes(features, labels, mask, background, where, negatives, negatives_where, axis_name):
    if features.ndim < 3:
        raise UserError(
            f"supcon: features of shape {features.shape}, expected [samples, views, ...]; "
            "for one view a sample pass features[:, None]"
        )
    if labels is not None and mask is not None:
        raise UserError("supcon: labels and mask both given, expected one of them or neither")
    check_floating("supcon", features=features)
    if 0 in features.shape[:2]:
        raise UserError(f"supcon: features of shape {features.shape}, expected at least one sample and view")
    n = features.shape[0]
    for name, value in (("labels", labels), ("background", background), ("where", where)):
        if value is not None:
            check_shape("supcon", name, value, (n,), "one a sample")
    if mask is not None:
        columns = n if axis_name is None else n * lax.axis_size(axis_name)
        check_shape("supcon", "mask", mask, (n, columns))
    if negatives is None:
        if negatives_where is not None:
            raise UserError("supcon: negatives_where given without negatives, expected both or neither")
        return
    dim = math.prod(features.shape[2:])
    if negatives.ndim < 2 or math.prod(negatives.shape[1:]) != dim:
        raise UserError(f"supcon: negatives of shape {negatives.shape}, expected [count, {dim}] like the features")
    if negatives_where is not None:
        check_shape("supcon", "negatives_where", negatives_where, (len(negatives),))
