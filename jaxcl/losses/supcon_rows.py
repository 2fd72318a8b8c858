"""The loss of each SupCon anchor, from the whole matrix of logits (any mask) or from row reductions (labels or pairs).

Shapes: N samples, V views, D features, M extra negatives; R anchors, C columns (the vectors of the denominators:
the N V elements, then the M extra negatives). An element is one view of one sample.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.losses.common import AxisName, all_gather, first_row, inner
from jaxcl.losses.engine import reduce_rows
from jaxcl.losses.plan import Plan
from jaxcl.losses.reduction import Operand, Reduction, all_but_self, equal

# With a mask, a tile of rows holds at most this many logits (16 MiB in float32).
TILE_ENTRIES = 2**22
TILE_ROWS_MAX = 1024


class Batch(NamedTuple):
    """The samples of this device."""

    z: jax.Array  # [N, V, D], padded samples zeroed, divided by the root of the temperature
    labels: jax.Array | None  # [N]; None: the other views of a sample are its positives
    mask: jax.Array | None  # [N, N of all devices]
    valid: jax.Array | None  # [N] bool, not padded; None: all
    foreground: jax.Array | None  # [N] bool, valid and not background: may be an anchor and a positive; None: all
    negatives: jax.Array | None  # [M, D], scaled like z
    negatives_valid: jax.Array | None  # [M] bool; None: all
    negatives_count: jax.Array  # scalar


# ---- from the matrix


class _Rows(NamedTuple):
    """Anchors. `sample` counts the samples of this device, `element` the elements of the global batch."""

    z: jax.Array  # [R, D]
    sample: jax.Array  # [R] int32
    element: jax.Array  # [R] int32
    label: jax.Array  # [R]
    foreground: jax.Array  # [R] bool: counts as an anchor


class _Columns(NamedTuple):
    """Columns. `bias` is added to the logits: 0, log(count) for extra negatives, -inf for excluded columns."""

    z: jax.Array  # [C, D]
    sample: jax.Array  # [C] int32, of the global batch
    element: jax.Array  # [C] int32, -1 for extra negatives
    label: jax.Array  # [C]
    foreground: jax.Array  # [C] bool: may be a positive
    bias: jax.Array  # [C]


def losses_by_matrix(batch: Batch, *, anchors: str, plan: Plan, axis_name: AxisName) -> tuple[jax.Array, jax.Array]:
    """Loss of each anchor (0 without a positive) [R], and whether it has a positive [R]. Supports labels and masks.

    A "dense" plan holds the R x C logits. Any other plan computes a tile of rows at a time, and again for the gradient.
    """
    num_samples, num_views, dim = batch.z.shape
    valid = jnp.ones(num_samples, bool) if batch.valid is None else batch.valid
    foreground = valid if batch.foreground is None else batch.foreground
    first_sample = first_row(num_samples, axis_name)
    labels = first_sample + jnp.arange(num_samples, dtype=jnp.int32) if batch.labels is None else batch.labels

    def gather(x):
        return all_gather(x, axis_name)

    columns = _element_columns(gather(batch.z), gather(labels), gather(valid), gather(foreground))
    if batch.negatives is not None:
        negatives_valid = batch.negatives_valid
        if negatives_valid is None:
            negatives_valid = jnp.ones(len(batch.negatives), bool)
        columns = _append_negatives(columns, gather(batch.negatives), gather(negatives_valid), batch.negatives_count)
    views = num_views if anchors == "all" else 1
    sample_R = jnp.repeat(jnp.arange(num_samples, dtype=jnp.int32), views)
    view_R = jnp.tile(jnp.arange(views, dtype=jnp.int32), num_samples)
    rows = _Rows(
        z=batch.z[:, :views].reshape(len(sample_R), dim),
        sample=sample_R,
        element=(first_sample + sample_R) * num_views + view_R,
        label=labels[sample_R],
        foreground=foreground[sample_R],
    )
    return (_row_losses if plan.implementation == "dense" else _tiled_row_losses)(rows, columns, batch.mask)


def _row_losses(rows: _Rows, columns: _Columns, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    s_RxC = inner(rows.z, columns.z)
    is_self_RxC = rows.element[:, None] == columns.element[None]
    # Masked before the maximum: with the self term in it, a small temperature would underflow all other terms.
    a_RxC = jnp.where(is_self_RxC, -jnp.inf, s_RxC + columns.bias[None])
    top_R = lax.stop_gradient(jnp.max(a_RxC, axis=1))
    top_R = jnp.where(jnp.isfinite(top_R), top_R, 0)  # A(i) is empty
    sum_R = jnp.sum(jnp.exp(a_RxC - top_R[:, None]), axis=1)
    log_sum_R = jnp.log(jnp.where(sum_R > 0, sum_R, 1))

    if mask is None:
        same_RxC = rows.label[:, None] == columns.label[None]
    else:
        same_RxC = mask[rows.sample][:, columns.sample] != 0
    positive_RxC = same_RxC & rows.foreground[:, None] & columns.foreground[None] & ~is_self_RxC
    count_R = jnp.sum(positive_RxC, axis=1, dtype=jnp.int32)
    # Relative to the row's maximum, like the logarithm above; otherwise large logits would lose digits.
    attract_R = jnp.sum(jnp.where(positive_RxC, s_RxC - top_R[:, None], 0), axis=1) / jnp.maximum(count_R, 1)
    return jnp.where(count_R > 0, log_sum_R - attract_R, 0), count_R > 0


def _tiled_row_losses(rows: _Rows, columns: _Columns, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """`_row_losses` for one tile of anchors at a time. The backward pass computes the logits of each tile again."""
    num_rows = len(rows.z)
    tile = min(num_rows, TILE_ROWS_MAX, max(8, TILE_ENTRIES // len(columns.z)))
    padding = -num_rows % tile

    def to_tiles(x):
        return jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, tile, *x.shape[1:])

    # Padded rows get foreground=False and so have no positive: their loss is 0.
    tile_losses = jax.checkpoint(lambda one_tile: _row_losses(one_tile, columns, mask))
    loss_TxR, positive_TxR = lax.map(tile_losses, jax.tree.map(to_tiles, rows))
    return loss_TxR.reshape(-1)[:num_rows], positive_TxR.reshape(-1)[:num_rows]


def _element_columns(z_NxVxD: jax.Array, labels: jax.Array, valid: jax.Array, foreground: jax.Array) -> _Columns:
    num_samples, num_views, dim = z_NxVxD.shape
    sample_C = jnp.repeat(jnp.arange(num_samples, dtype=jnp.int32), num_views)
    return _Columns(
        z=z_NxVxD.reshape(num_samples * num_views, dim),
        sample=sample_C,
        element=jnp.arange(num_samples * num_views, dtype=jnp.int32),
        label=labels[sample_C],
        foreground=foreground[sample_C],
        bias=jnp.where(valid, 0, -jnp.inf).astype(z_NxVxD.dtype)[sample_C],
    )


def _append_negatives(columns: _Columns, z_MxD: jax.Array, valid: jax.Array, count: float) -> _Columns:
    ids = jnp.zeros(len(z_MxD), jnp.int32)
    dtype = columns.bias.dtype
    extra = _Columns(
        z=z_MxD,
        sample=ids,  # any sample: `foreground` excludes the column from the positives
        element=ids - 1,
        label=ids.astype(columns.label.dtype),
        foreground=ids > 0,
        # c equal terms exp(s) in a sum are exp(s + log c)
        bias=jnp.where(valid, jnp.log(jnp.asarray(count, dtype)), -jnp.inf).astype(dtype),
    )
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), columns, extra)


# ---- from row reductions


def _logits_and_positives(s, own, other, is_self):
    """Entry function: logits, and logits of the positives. own, other: ((label, foreground or None), ())."""
    (label, _), (other_label, foreground) = own[0], other[0]
    positive = equal(label, other_label)
    if foreground is not None:
        positive &= foreground
    if is_self is None:
        return s, jnp.where(positive, s, 0)
    return jnp.where(is_self, -jnp.inf, s), jnp.where(positive & ~is_self, s, 0)


def losses_by_reduction(
    batch: Batch, *, anchors: str, bounded: bool, plan: Plan, axis_name: AxisName
) -> tuple[jax.Array, jax.Array]:
    """Like `losses_by_matrix`, for labels or pairs but not for a mask, with memory linear in the batch."""
    num_samples, num_views, dim = batch.z.shape
    views = num_views if anchors == "all" else 1

    def operand(first: int, last: int) -> Operand:
        """The elements of the views from `first` up to, but not including, `last`."""

        def per_element(x):
            return None if x is None else jnp.repeat(x, last - first)

        return Operand(
            z=batch.z[:, first:last].reshape(-1, dim),
            constants=() if batch.labels is None else (per_element(batch.labels), per_element(batch.foreground)),
            valid=per_element(batch.valid),
        )

    all_logits = Reduction(all_but_self, ("lse",), bounded)
    reduction = all_logits if batch.labels is None else Reduction(_logits_and_positives, ("lse", "sum"), bounded)
    rows = operand(0, views)
    statistics = [reduce_rows(reduction, rows, plan=plan, axis_name=axis_name)]
    if views < num_views:
        other_views = operand(views, num_views)
        statistics.append(reduce_rows(reduction, rows, other_views, plan=plan, axis_name=axis_name))
    log_sums = [x[0] for x in statistics]
    if batch.negatives is not None and len(batch.negatives):
        negatives = Operand(batch.negatives, valid=batch.negatives_valid)
        (log_sum_R,) = reduce_rows(all_logits, Operand(rows.z), negatives, plan=plan, axis_name=axis_name)
        # c equal terms exp(s) in a sum are exp(s + log c)
        log_sums.append(log_sum_R + jnp.log(batch.negatives_count))
    log_sum_R = functools.reduce(_log_add_exp, log_sums)

    if batch.labels is None:
        attract_R = _sum_over_other_views(batch.z)[:, :views].reshape(-1)
        count_N = jnp.full(num_samples, num_views - 1)
    else:
        attract_R = sum(x[1] for x in statistics)
        count_N = _class_sizes(batch.labels, batch.foreground, plan, axis_name) * num_views - 1
    foreground = jnp.ones(num_samples, bool) if batch.foreground is None else batch.foreground
    count_R = jnp.repeat(jnp.where(foreground, count_N, 0), views)
    has_R = count_R > 0
    # An anchor without a positive may have no column at all; its log-sum-exp is then -inf.
    log_sum_R = jnp.where(has_R, log_sum_R, 0)
    return jnp.where(has_R, log_sum_R - attract_R / jnp.maximum(count_R, 1), 0), has_R


def _log_add_exp(a: jax.Array, b: jax.Array) -> jax.Array:
    """log(exp a + exp b). Where both are -inf it is -inf, with zero gradient instead of NaN."""
    some = (a != -jnp.inf) | (b != -jnp.inf)
    return jnp.where(some, jnp.logaddexp(jnp.where(some, a, 0), jnp.where(some, b, 0)), -jnp.inf)


@jax.checkpoint  # its intermediates are as large as the features; computing them again is cheaper than keeping them
def _sum_over_other_views(z_NxVxD: jax.Array) -> jax.Array:
    """Inner product of each view with the sum of the sample's other views [N, V]."""
    others_NxVxD = jnp.sum(z_NxVxD, axis=1, keepdims=True) - z_NxVxD
    return jnp.sum(others_NxVxD * z_NxVxD, axis=-1)


def _class_sizes(labels: jax.Array, foreground: jax.Array | None, plan: Plan, axis_name: AxisName) -> jax.Array:
    """Number of foreground samples of the global batch that have each sample's label [N], for labels of any value.

    Takes O(N log N) time. A dense plan compares all pairs of labels instead, which avoids the sort.
    """
    all_labels = all_gather(labels, axis_name)
    if foreground is None:
        counts = jnp.ones(len(all_labels), jnp.int32)
    else:
        counts = all_gather(foreground, axis_name).astype(jnp.int32)
    if plan.implementation == "dense":
        return jnp.sum(jnp.where(labels[:, None] == all_labels[None], counts[None], 0), axis=1)
    order = jnp.argsort(all_labels)
    up_to = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts[order])])
    ranks = [jnp.searchsorted(all_labels[order], labels, side=s) for s in ("left", "right")]
    return up_to[ranks[1]] - up_to[ranks[0]]
