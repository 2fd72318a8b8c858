"""The loss of every anchor of SupCon: from the whole matrix, in tiles of rows for a general mask, or by the engine.

Letters: N samples, V views, D features, M extra negatives; R anchor rows, C columns (all that can stand in a
denominator: the N*V elements, then the M extra negatives). "Element" means one view of one sample.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.losses.common import AxisName, first_row, gather, inner
from jaxcl.losses.engine import How, row_sums
from jaxcl.losses.tiles import Side, Sums, equal, log_add, logits

# A tile of rows holds at most this many logits (16 MiB in float32), so memory does not grow with the batch squared.
TILE_ENTRIES = 2**22
TILE_ROWS_MAX = 1024


class Batch(NamedTuple):
    """This device's part of the batch."""

    z: jax.Array  # [N, V, D], padded samples zeroed, divided by the root of the temperature
    labels: jax.Array | None  # [N]; None: the other views of a sample are its positives
    mask: jax.Array | None  # [N, N of all devices]
    kept: jax.Array | None  # [N] bool, not padded; None: all
    real: jax.Array | None  # [N] bool, an anchor and a possible positive; None: all
    negatives: jax.Array | None  # [M, D], scaled like z
    negatives_kept: jax.Array | None  # [M] bool
    negatives_count: jax.Array  # scalar


class _Rows(NamedTuple):
    """Anchors. `sample` counts this device's samples, `element` the elements of the global batch."""

    z: jax.Array  # [R, D]
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


# ---- from the matrix


def by_matrix(batch: Batch, *, anchors: str, form: str, axis_name: AxisName) -> tuple[jax.Array, jax.Array]:
    """Loss of each anchor (0 without a positive) [R], and whether it has a positive [R]; any kind of positives.

    form "dense" holds the R x C logits; else a tile of rows at a time, recomputed for the gradient.
    """
    num_samples, num_views, dim = batch.z.shape
    kept = jnp.ones(num_samples, bool) if batch.kept is None else batch.kept
    real = kept if batch.real is None else batch.real
    first_sample = first_row(num_samples, axis_name)
    labels = first_sample + jnp.arange(num_samples, dtype=jnp.int32) if batch.labels is None else batch.labels

    def everywhere(x):
        return gather(x, axis_name)

    columns = _element_columns(everywhere(batch.z), everywhere(labels), everywhere(kept), everywhere(real))
    if batch.negatives is not None:
        valid = jnp.ones(len(batch.negatives), bool) if batch.negatives_kept is None else batch.negatives_kept
        columns = _append_negatives(columns, everywhere(batch.negatives), everywhere(valid), batch.negatives_count)
    views = num_views if anchors == "all" else 1
    sample_R = jnp.repeat(jnp.arange(num_samples, dtype=jnp.int32), views)
    view_R = jnp.tile(jnp.arange(views, dtype=jnp.int32), num_samples)
    rows = _Rows(
        z=batch.z[:, :views].reshape(len(sample_R), dim),
        sample=sample_R,
        element=(first_sample + sample_R) * num_views + view_R,
        label=labels[sample_R],
        real=real[sample_R],
    )
    return (_row_losses if form == "dense" else _tiled_row_losses)(rows, columns, batch.mask)


def _row_losses(rows: _Rows, columns: _Columns, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    s_RxC = inner(rows.z, columns.z)
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


# ---- by the engine


def _labelled(s, own, other, itself):
    """Entries: logits, and those of positives. own, other: ((label, real or None), ())."""
    (label, _), (other_label, real) = own[0], other[0]
    positive = equal(label, other_label)
    if real is not None:
        positive &= real
    if itself is None:
        return s, jnp.where(positive, s, 0)
    return jnp.where(itself, -jnp.inf, s), jnp.where(positive & ~itself, s, 0)


def by_engine(
    batch: Batch, *, anchors: str, bounded: bool, how: How, axis_name: AxisName
) -> tuple[jax.Array, jax.Array]:
    """As `by_matrix`, without a mask, in memory linear in the batch."""
    num_samples, num_views, dim = batch.z.shape
    views = num_views if anchors == "all" else 1

    def side(first: int, last: int) -> Side:
        def each(x):
            return None if x is None else jnp.repeat(x, last - first)

        return Side(
            z=batch.z[:, first:last].reshape(-1, dim),
            fixed=() if batch.labels is None else (each(batch.labels), each(batch.real)),
            valid=each(batch.kept),
        )

    sums = Sums(logits, ("lse",), bounded) if batch.labels is None else Sums(_labelled, ("lse", "sum"), bounded)
    rows = side(0, views)
    parts = [row_sums(sums, rows, how=how, axis_name=axis_name)]
    if views < num_views:
        parts.append(row_sums(sums, rows, side(views, num_views), how=how, axis_name=axis_name))
    lses = [p[0] for p in parts]
    if batch.negatives is not None and len(batch.negatives):
        plain = Sums(logits, ("lse",), bounded)
        extra = Side(batch.negatives, valid=batch.negatives_kept)
        (lse_R,) = row_sums(plain, Side(rows.z), extra, how=how, axis_name=axis_name)
        # c equal terms exp(s) in a sum are exp(s + log c)
        lses.append(lse_R + jnp.log(batch.negatives_count))
    lse_R = functools.reduce(log_add, lses)

    if batch.labels is None:
        attract_R = _between_views(batch.z)[:, :views].reshape(-1)
        count_N = jnp.full(num_samples, num_views - 1)
    else:
        attract_R = sum(p[1] for p in parts)
        count_N = _class_sizes(batch.labels, batch.real, how.form, axis_name) * num_views - 1
    real = jnp.ones(num_samples, bool) if batch.real is None else batch.real
    count_R = jnp.repeat(jnp.where(real, count_N, 0), views)
    has_R = count_R > 0
    # Without a positive there may be no column at all, and the logarithm is -inf.
    lse_R = jnp.where(has_R, lse_R, 0)
    return jnp.where(has_R, lse_R - attract_R / jnp.maximum(count_R, 1), 0), has_R


@jax.checkpoint  # its intermediates are as large as the features, and cheaper to form again than to keep
def _between_views(z_NxVxD: jax.Array) -> jax.Array:
    """Each view's inner product with the sum of the sample's other views [N, V]."""
    others_NxVxD = jnp.sum(z_NxVxD, axis=1, keepdims=True) - z_NxVxD
    return jnp.sum(others_NxVxD * z_NxVxD, axis=-1)


def _class_sizes(labels: jax.Array, real: jax.Array | None, form: str, axis_name: AxisName) -> jax.Array:
    """How many real samples of the global batch bear each sample's label [N]; no table of classes.

    In O(N log N); where the logits are dense anyway each label is compared with each, without sorting.
    """
    everyone = gather(labels, axis_name)
    counts = jnp.ones(len(everyone), jnp.int32) if real is None else gather(real, axis_name).astype(jnp.int32)
    if form == "dense":
        return jnp.sum(jnp.where(labels[:, None] == everyone[None], counts[None], 0), axis=1)
    order = jnp.argsort(everyone)
    up_to = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts[order])])
    ranks = [jnp.searchsorted(everyone[order], labels, side=s) for s in ("left", "right")]
    return up_to[ranks[1]] - up_to[ranks[0]]
