"""Supervised contrastive loss with background rows, extra negatives, padding and global batches.

Letters: N samples, V views, D features, M extra negatives; R anchor rows, C columns (all that can stand in a
denominator: the N*V elements, then the M extra negatives). "Element" means one view of one sample.
"""

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxcl.errors import UserError

# "auto" forms the R x C logits at once up to this many elements squared (64 MiB in float32), then tiles.
DENSE_ELEMENTS = 4096
# A tile holds at most this many logits (16 MiB in float32), so memory does not grow with the batch squared.
TILE_ENTRIES = 2**22
TILE_ROWS_MAX = 1024
# Shorter vectors have no direction worth a gradient of 1/norm: they stay zero and receive none.
NORM_FLOOR = 1e-12


class _Rows(NamedTuple):
    """Anchors. `sample` counts this device's samples, `element` the elements of the global batch."""

    z: jax.Array  # [R, D], already divided by the temperature
    sample: jax.Array  # [R] int32
    element: jax.Array  # [R] int32
    label: jax.Array  # [R]
    real: jax.Array  # [R] bool: counts as an anchor


class _Columns(NamedTuple):
    """Contrast set. `bias` is added to the logits: 0, log(count) for extra negatives, -inf where excluded."""

    z: jax.Array  # [C, D]
    sample: jax.Array  # [C] int32, of the global batch
    element: jax.Array  # [C] int32, -1 for extra negatives
    label: jax.Array  # [C]
    real: jax.Array  # [C] bool: may be a positive
    bias: jax.Array  # [C]


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
    implementation: Literal["auto", "dense", "tiled"] = "auto",
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
      implementation: "dense" forms all logits at once. "tiled" computes the same number in row tiles that are
        recomputed for the gradient: O((N V + M) D) memory plus one tile. "auto" is dense up to 4,096 elements
        (more exactly: as many logits as 4,096 squared), tiled above.
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
    _check_options(temperature, base_temperature, negatives_count, anchors, anchor_mean, implementation)
    _check_shapes(features, labels, mask, background, where, negatives, negatives_where, axis_name)

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
        implementation=implementation,
        axis_name=axis_name,
    )


# Compiled as one: op by op, the first call in a notebook would compile some sixty little programs.
@functools.partial(jax.jit, static_argnames=("anchors", "anchor_mean", "normalize", "implementation", "axis_name"))
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
    anchors,
    anchor_mean,
    normalize,
    implementation,
    axis_name,
):
    num_samples, num_views, dim = *features.shape[:2], math.prod(features.shape[2:])
    dtype = jnp.promote_types(features.dtype, jnp.float32)
    temperature = jnp.asarray(temperature, dtype)
    scale = 1.0 if base_temperature is None else temperature / jnp.asarray(base_temperature, dtype)

    kept = jnp.ones(num_samples, bool) if where is None else where.astype(bool)
    real = kept if background is None else kept & ~background.astype(bool)
    z_NxVxD = _vectors(features.reshape(num_samples, num_views, dim), kept[:, None], dtype, normalize)

    if axis_name is None:
        first_sample, everywhere = 0, lambda x: x
    else:
        first_sample = lax.axis_index(axis_name) * num_samples
        everywhere = lambda x: lax.all_gather(x, axis_name, axis=0, tiled=True)  # noqa: E731
    if labels is None:
        labels = first_sample + jnp.arange(num_samples, dtype=jnp.int32)

    # The contrast set: all elements of the global batch, then the extra negatives.
    columns = _element_columns(everywhere(z_NxVxD), everywhere(labels), everywhere(kept), everywhere(real))
    if negatives is not None:
        valid = jnp.ones(len(negatives), bool) if negatives_where is None else negatives_where.astype(bool)
        z_MxD = _vectors(negatives.reshape(len(negatives), dim), valid, dtype, normalize)
        columns = _append_negatives(columns, everywhere(z_MxD), everywhere(valid), negatives_count)

    # The anchors: this device's elements.
    num_anchor_views = num_views if anchors == "all" else 1
    sample_R = jnp.repeat(jnp.arange(num_samples, dtype=jnp.int32), num_anchor_views)
    view_R = jnp.tile(jnp.arange(num_anchor_views, dtype=jnp.int32), num_samples)
    rows = _Rows(
        z=z_NxVxD[:, :num_anchor_views].reshape(len(sample_R), dim) / temperature,
        sample=sample_R,
        element=(first_sample + sample_R) * num_views + view_R,
        label=labels[sample_R],
        real=real[sample_R],
    )

    num_logits = len(rows.z) * len(columns.z)
    if implementation == "dense" or (implementation == "auto" and num_logits <= DENSE_ELEMENTS**2):
        loss_R, positive_R = _row_losses(rows, columns, mask)
    else:
        loss_R, positive_R = _tiled_row_losses(rows, columns, mask)

    total = jnp.sum(loss_R)
    count = jnp.sum(rows.real if anchor_mean == "all" else positive_R, dtype=jnp.int32)
    if axis_name is not None:
        total, count = lax.psum((total, count), axis_name)
    return scale * total / jnp.maximum(count, 1).astype(dtype)


def _row_losses(rows: _Rows, columns: _Columns, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Loss of each anchor (0 without a positive) [R], and whether it has a positive [R]."""
    s_RxC = jnp.matmul(rows.z, columns.z.T, precision=lax.Precision.HIGHEST)
    itself_RxC = rows.element[:, None] == columns.element[None]
    # Masked before the maximum: were the self term in it, a small temperature would underflow all others.
    a_RxC = jnp.where(itself_RxC, -jnp.inf, s_RxC + columns.bias[None])
    top_R = lax.stop_gradient(jnp.max(a_RxC, axis=1))
    top_R = jnp.where(jnp.isfinite(top_R), top_R, 0)  # an empty A(i)
    sum_R = jnp.sum(jnp.exp(a_RxC - top_R[:, None]), axis=1)
    log_sum_R = jnp.log(jnp.where(sum_R > 0, sum_R, 1))

    if mask is None:
        same_RxC = rows.label[:, None] == columns.label[None]
    else:
        same_RxC = mask[rows.sample][:, columns.sample] != 0
    positive_RxC = same_RxC & rows.real[:, None] & columns.real[None] & ~itself_RxC
    count_R = jnp.sum(positive_RxC, axis=1, dtype=jnp.int32)
    # Relative to the row's maximum, like the logarithm above: large logits would lose digits otherwise.
    attract_R = jnp.sum(jnp.where(positive_RxC, s_RxC - top_R[:, None], 0), axis=1) / jnp.maximum(count_R, 1)
    return jnp.where(count_R > 0, log_sum_R - attract_R, 0), count_R > 0


def _tiled_row_losses(rows: _Rows, columns: _Columns, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """`_row_losses`, a tile of anchors at a time; the backward pass recomputes each tile's logits."""
    num_rows = len(rows.z)
    tile = min(num_rows, TILE_ROWS_MAX, max(8, TILE_ENTRIES // len(columns.z)))
    padding = -num_rows % tile

    def split(x):
        return jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, tile, *x.shape[1:])

    # Padded rows come out with real=False, hence without positives: loss 0.
    block = jax.checkpoint(lambda one_tile: _row_losses(one_tile, columns, mask))
    loss_TxR, positive_TxR = lax.map(block, jax.tree.map(split, rows))
    return loss_TxR.reshape(-1)[:num_rows], positive_TxR.reshape(-1)[:num_rows]


def _element_columns(z_NxVxD: jax.Array, labels: jax.Array, kept: jax.Array, real: jax.Array) -> _Columns:
    num_samples, num_views, dim = z_NxVxD.shape
    sample_C = jnp.repeat(jnp.arange(num_samples, dtype=jnp.int32), num_views)
    return _Columns(
        z=z_NxVxD.reshape(num_samples * num_views, dim),
        sample=sample_C,
        element=jnp.arange(num_samples * num_views, dtype=jnp.int32),
        label=labels[sample_C],
        real=real[sample_C],
        bias=jnp.where(kept, 0, -jnp.inf).astype(z_NxVxD.dtype)[sample_C],
    )


def _append_negatives(columns: _Columns, z_MxD: jax.Array, valid: jax.Array, count: float) -> _Columns:
    ids = jnp.zeros(len(z_MxD), jnp.int32)
    dtype = columns.bias.dtype
    extra = _Columns(
        z=z_MxD,
        sample=ids,  # any sample: `real` keeps it from being a positive
        element=ids - 1,
        label=ids.astype(columns.label.dtype),
        real=ids > 0,
        # c equal terms exp(s) in a sum are exp(s + log c)
        bias=jnp.where(valid, jnp.log(jnp.asarray(count, dtype)), -jnp.inf).astype(dtype),
    )
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), columns, extra)


def _vectors(x: jax.Array, kept: jax.Array, dtype: jnp.dtype, normalize: bool) -> jax.Array:
    """Rows in the working precision, padded ones zeroed (0 * NaN would poison the gradient), unit length."""
    x = jnp.where(kept[..., None], x.astype(dtype), 0)
    if not normalize:
        return x
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    usable = ~(square <= NORM_FLOOR**2)  # NaN is not short: it must reach the loss, which is how divergence is noticed
    return jnp.where(usable, x * lax.rsqrt(jnp.where(usable, square, 1)), 0)


def _check_options(temperature, base_temperature, negatives_count, anchors, anchor_mean, implementation):
    for name, value in (
        ("temperature", temperature),
        ("base_temperature", base_temperature),
        ("negatives_count", negatives_count),
    ):
        if isinstance(value, (int, float)) and not value > 0:
            raise UserError(f"supcon: {name}={value}, expected a number above 0")
    for name, value, choices in (
        ("anchors", anchors, ("all", "first")),
        ("anchor_mean", anchor_mean, ("all", "positive")),
        ("implementation", implementation, ("auto", "dense", "tiled")),
    ):
        if value not in choices:
            raise UserError(f"supcon: {name}={value!r}, expected one of {', '.join(choices)}")


def _check_shapes(features, labels, mask, background, where, negatives, negatives_where, axis_name):
    if features.ndim < 3:
        raise UserError(
            f"supcon: features of shape {features.shape}, expected [samples, views, ...]; "
            "for one view a sample pass features[:, None]"
        )
    if labels is not None and mask is not None:
        raise UserError("supcon: labels and mask both given, expected one of them or neither")
    if not jnp.issubdtype(features.dtype, jnp.floating):
        raise UserError(f"supcon: features of type {features.dtype}, expected floating point")
    if 0 in features.shape[:2]:
        raise UserError(f"supcon: features of shape {features.shape}, expected at least one sample and view")
    n = features.shape[0]
    for name, value in (("labels", labels), ("background", background), ("where", where)):
        if value is not None and value.shape != (n,):
            raise UserError(f"supcon: {name} of shape {value.shape}, expected ({n},): one a sample")
    if mask is not None:
        columns = n if axis_name is None else n * lax.axis_size(axis_name)
        if mask.shape != (n, columns):
            raise UserError(f"supcon: mask of shape {mask.shape}, expected ({n}, {columns})")
    if negatives is None:
        if negatives_where is not None:
            raise UserError("supcon: negatives_where given without negatives, expected both or neither")
        return
    dim = math.prod(features.shape[2:])
    if negatives.ndim < 2 or math.prod(negatives.shape[1:]) != dim:
        raise UserError(f"supcon: negatives of shape {negatives.shape}, expected [count, {dim}] like the features")
    if negatives_where is not None and negatives_where.shape != (len(negatives),):
        raise UserError(f"supcon: negatives_where of shape {negatives_where.shape}, expected ({len(negatives)},)")
