"""Row reductions of a similarity matrix: what a loss reduces, the running state of a row, and the math of one tile.

With similarities s = rows.z @ cols.z.T, a loss describes the statistics of its rows by a `Reduction`: an entry function
maps s to one or more arrays of the same shape, and each array is reduced over its columns by a sum or a log-sum-exp.
The loops over tiles are in `jaxcl/losses/tiles.py`, whose header explains the algorithm.

Shapes: a tile has T rows, U columns and D features.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.losses.common import Array

Tree = Any
Kind = Literal["lse", "sum"]


class Operand(NamedTuple):
    """The row vectors or the column vectors of a similarity matrix, with the values that entries may use.

    R stands for any leading shape, for example [n, T] once the operand is cut into tiles.
    """

    z: Array  # [R, D]; s = rows.z @ cols.z.T, so one of the operands must be divided by the temperature
    constants: Tree = ()  # arrays [R] without gradient, such as labels
    values: Tree = ()  # arrays [R] with gradient
    valid: Array | None = None  # [R] bool, False for rows that no reduction includes. None: all rows are valid
    ids: Array | None = None  # [R] int; a row and a column with equal ids are the same vector. None: no such pair


@dataclasses.dataclass(frozen=True)
class Reduction:
    """What to compute for each row. Equal reductions share a compiled program, so `entry_fn` should not be a lambda."""

    # (s, own, other, is_self) -> one array of the shape of s for each kind.
    #   own, other: (constants, values) of the operands, broadcast against s. The statistic belongs to `own`.
    #   is_self: bool like s, True where a vector meets itself. None where that cannot happen.
    entry_fn: Callable[[Array, Tree, Tree, Array | None], tuple[Array, ...]]
    kinds: tuple[Kind, ...]
    # |s| <= SAFE_LOGIT is certain, as for unit vectors and a temperature above 0.02: "lse" needs no running maximum.
    bounded: bool = False
    # The columns get no gradient, which saves a third of the backward pass. Requires `cols`.
    constant_columns: bool = False


# ---- entry functions that several losses use


def all_but_self(s: Array, own: Tree, other: Tree, is_self: Array | None) -> tuple[Array]:
    """Entry function of a log-sum-exp over every column except the row's own vector."""
    return (s if is_self is None else jnp.where(is_self, -jnp.inf, s),)


def equal(own: Array, other: Array) -> Array:
    """own == other as a mask of the tile, written in one order for both axes, so that XLA shares the two uses."""
    return own == other if own.shape[-1] == 1 else other == own


# ---- the statistics of a row: init_state, tile_state and merge_states accumulate them, finalize returns them


def init_state(reduction: Reduction, like: Array) -> Tree:
    """The state of no columns, per kind (maximum, sum of exponentials) or (sum,), each [...] for `like` [..., D]."""
    # Made from `like` and not from its shape: inside jax.shard_map the result varies over the same mesh axes.
    zero = jnp.zeros_like(like[..., 0])
    low = jnp.full_like(zero, -jnp.inf)
    return tuple((low, zero) if k == "lse" and not reduction.bounded else (zero,) for k in reduction.kinds)


def merge_states(a: Tree, b: Tree) -> Tree:
    """The state of the union of two disjoint sets of columns."""
    merged = []
    for x, y in zip(a, b, strict=True):
        if len(x) == 1:
            merged.append((x[0] + y[0],))
        else:
            top = jnp.maximum(x[0], y[0])
            shift = _finite(top)
            merged.append((top, x[1] * jnp.exp(x[0] - shift) + y[1] * jnp.exp(y[0] - shift)))
    return tuple(merged)


def finalize(reduction: Reduction, state: Tree) -> tuple[Array, ...]:
    """The statistics of a state: sums and log-sum-exps. A log-sum-exp over no column is -inf."""
    return tuple(
        x[0] if kind == "sum" else (jnp.log(x[0]) if reduction.bounded else _finite(x[0]) + jnp.log(x[1]))
        for x, kind in zip(state, reduction.kinds, strict=True)
    )


def backward_weights(reduction: Reduction, out: tuple[Array, ...], cotangents: tuple[Array, ...]) -> Tree:
    """Values of a row from which `tile_vjp` computes the cotangents of its entries.

    With g the cotangent of a statistic `out`: (g,) for a sum, whose entries all get g. An entry x of a log-sum-exp gets
    g * exp(x - out): (g, out), or (g * exp(-out),) where the logits are bounded and this cannot overflow.
    """
    weights = []
    for x, g, kind in zip(out, cotangents, reduction.kinds, strict=True):
        if kind == "sum":
            weights.append((g,))
            continue
        some = x != -jnp.inf
        lse = jnp.where(some, x, 0)
        g = jnp.where(some, g, 0)
        weights.append((g * jnp.exp(-lse),) if reduction.bounded else (g, lse))
    return tuple(weights)


def _finite(top: Array) -> Array:
    return jnp.where(top == -jnp.inf, 0, top)  # the maximum of no column


# ---- one tile
#
# The statistics belong to `own`, and `other` is reduced. With axis=1, `own` are the rows of s and the columns are
# reduced. With axis=0, `own` are the columns of s and the rows are reduced.


def similarities(a: Array, b: Array) -> Array:
    """a [T, D], b [U, D] -> a @ b.T [T, U] in full precision: TF32 and bfloat16 round a logit too much."""
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)


def self_mask(rows: Operand, cols: Operand) -> Array | None:
    """[T, U] bool: where a vector meets itself. None if that cannot happen."""
    if rows.ids is None or cols.ids is None:
        return None
    return rows.ids[:, None] == cols.ids[None]


def tile_state(reduction: Reduction, s: Array, own: Operand, other: Operand, is_self: Array | None, axis: int) -> Tree:
    """The state of one tile [T, U], reduced along `axis`."""
    out = _entries(reduction, s, own, other, is_self, axis, (own.values, other.values))
    state = []
    for x, kind in zip(out, reduction.kinds, strict=True):
        if kind == "sum":
            state.append((jnp.sum(x, axis),))
        elif reduction.bounded:
            state.append((jnp.sum(jnp.exp(x), axis),))
        else:
            top = jnp.max(x, axis)
            state.append((top, jnp.sum(jnp.exp(x - jnp.expand_dims(_finite(top), axis)), axis)))
    return tuple(state)


def tile_vjp(
    reduction: Reduction, s: Array, own: Operand, other: Operand, is_self: Array | None, axis: int, weights: Tree
) -> tuple[Array, Tree, Tree]:
    """Backward pass of `tile_state`: cotangents of (s, own.values, other.values).

    `weights` are the `backward_weights` of `own`.
    """

    def entries(s, own_values, other_values):
        return _entries(reduction, s, own, other, is_self, axis, (own_values, other_values))

    out, entries_vjp = jax.vjp(entries, s, own.values, other.values)
    cotangents = []
    for x, weight, kind in zip(out, weights, reduction.kinds, strict=True):
        weight = [jnp.expand_dims(w, axis) for w in weight]
        if kind == "sum":
            cotangents.append(jnp.broadcast_to(weight[0], x.shape))
        elif reduction.bounded:
            cotangents.append(jnp.exp(x) * weight[0])
        else:
            cotangents.append(weight[0] * jnp.exp(x - weight[1]))
    return entries_vjp(tuple(cotangents))


def rows_cotangent(ds: Array, cols_z: Array) -> Array:
    """Cotangent of the rows of a tile, ds @ cols_z [T, D]."""
    return lax.dot_general(ds, cols_z, (((1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)


def cols_cotangent_transposed(ds: Array, rows_z: Array) -> Array:
    """Cotangent of the columns of a tile, transposed: rows_z.T @ ds [D, U]."""
    return lax.dot_general(rows_z, ds, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)


def _entries(
    reduction: Reduction, s: Array, own: Operand, other: Operand, is_self: Array | None, axis: int, values: Tree
) -> tuple[Array, ...]:
    """The entries of one tile. Those of invalid vectors of `other` do not change the statistic."""

    def broadcast(tree: Tree, along_rows: bool) -> Tree:
        return jax.tree.map(lambda x: x[:, None] if along_rows else x[None], tree)

    own_values, other_values = values
    own_is_rows = axis == 1
    out = reduction.entry_fn(
        s,
        (broadcast(own.constants, own_is_rows), broadcast(own_values, own_is_rows)),
        (broadcast(other.constants, not own_is_rows), broadcast(other_values, not own_is_rows)),
        is_self,
    )
    if other.valid is not None:
        valid = broadcast(other.valid, not own_is_rows)
        neutral = {"lse": -jnp.inf, "sum": 0.0}
        out = tuple(jnp.where(valid, x, neutral[k]) for x, k in zip(out, reduction.kinds, strict=True))
    return out


# ---- the matrix as one tile, with the gradient of JAX


def dense_statistics(reduction: Reduction, rows: Operand, cols: Operand | None) -> tuple[Array, ...]:
    """The statistics of all rows [R] from the whole [R, C] matrix. JAX can differentiate it in every mode.

    cols None: the rows themselves, where no row includes its own column.
    """
    is_self = jnp.eye(len(rows.z), dtype=bool) if cols is None else self_mask(rows, cols)
    cols = rows if cols is None else cols
    if reduction.constant_columns:
        cols = lax.stop_gradient(cols)
    out = _entries(reduction, similarities(rows.z, cols.z), rows, cols, is_self, 1, (rows.values, cols.values))
    return tuple(jnp.sum(x, 1) if k == "sum" else _log_sum_exp(x) for x, k in zip(out, reduction.kinds, strict=True))


def _log_sum_exp(x_RxC: Array) -> Array:
    """Log-sum-exp over the columns. Where all are -inf it is -inf, with zero gradient instead of NaN."""
    some = jnp.any(x_RxC != -jnp.inf, axis=1)
    return jnp.where(some, jax.nn.logsumexp(jnp.where(some[:, None], x_RxC, 0), axis=1), -jnp.inf)
