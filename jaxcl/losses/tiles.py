"""Row sums over a similarity matrix that is never held: one tile at a time, recomputed for the gradient.

The engine under the losses. A loss says what it sums: `entries(s, own, other, itself)` maps similarities to one or more
arrays of the same shape, and each is reduced over the columns, by "sum" or by "lse" (log-sum-exp with a running
maximum). Only those row statistics are kept; the backward pass visits the tiles again. Where rows and columns are the
same vectors, each pair of tiles is visited once and serves both its rows and its columns.

Letters: R rows, C columns, D features, n tiles of T rows, m tiles of U columns.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
Tree = Any
Kind = Literal["lse", "sum"]

# Without a maximum subtracted, exp(s) of |s| up to this and the sums of 2**30 of them stay normal numbers in float32.
SAFE_LOGIT = 50.0


class Side(NamedTuple):
    """The vectors of the rows, or of the columns, and what the entries know of them. Any leading shape, e.g. [n, T]."""

    z: Array  # [R, D]; s = rows.z @ cols.z.T, so a temperature must be in here
    fixed: Tree = ()  # arrays [R] without a gradient: labels, flags
    values: Tree = ()  # arrays [R] with a gradient
    valid: Array | None = None  # [R] bool: False rows are in nobody's sums; None: all count
    element: Array | None = None  # [R] int: equal on both sides marks a vector meeting itself


@dataclasses.dataclass(frozen=True)
class Sums:
    """What to sum. Equal plans (equal fields) share a compiled program, so `entries` should be a named function."""

    # (s, own, other, itself) -> one array per kind. own, other: (fixed, values) broadcast against s; `own` belongs to
    # the row the sum is for. itself: bool like s, or None where no pair can be a vector with itself.
    entries: Callable[[Array, Tree, Tree, Array | None], tuple[Array, ...]]
    kinds: tuple[Kind, ...]
    # |s| <= SAFE_LOGIT is known beforehand, as for unit vectors and a temperature above 0.02: no running maximum.
    bounded: bool = False
    # The columns get no gradient, which saves a third of the backward pass. Only with columns of their own.
    constant_columns: bool = False


def logits(s: Array, own: Tree, other: Tree, itself: Array | None) -> tuple[Array]:
    """Entries of a plain log-sum-exp over every column but the row's own vector."""
    return (s if itself is None else jnp.where(itself, -jnp.inf, s),)


def equal(own: Array, other: Array) -> Array:
    """own == other as a mask of the tile, written in one order whoever owns it: both uses of a tile then share it."""
    return own == other if own.shape[-1] == 1 else other == own


def dot(a: Array, b: Array) -> Array:
    """[T, D], [U, D] -> [T, U] in full precision: TF32 and bfloat16 passes round too much for a logit."""
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)


def split(side: Side, tile: int) -> Side:
    """[R, ...] -> [n, T, ...] with T at most `tile` and little padding; padded rows are not valid."""
    rows = len(side.z)
    count = max(1, -(-rows // tile))
    size = -(-rows // count)
    size = min(-(-size // 8) * 8, max(tile, size)) if count > 1 else size  # whole vector registers
    padding = -rows % size
    if padding and side.valid is None:
        side = side._replace(valid=jnp.ones(rows, bool))

    def cut(x: Array) -> Array:
        return jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, size, *x.shape[1:])

    side = jax.tree.map(cut, side)
    if padding and side.element is not None:  # 0 is somebody's number
        side = side._replace(element=jnp.where(side.valid, side.element, -1))
    return side


# ---- one tile


def _entries(sums: Sums, s: Array, own: Side, other: Side, itself: Array | None, axis: int, values: Tree):
    """The masked entries of one tile. `own` runs along the rows for axis=1 (reduced over columns), else the columns."""

    def along(tree: Tree, rows: bool) -> Tree:
        return jax.tree.map(lambda x: x[:, None] if rows else x[None], tree)

    own_values, other_values = values
    rows = axis == 1
    out = sums.entries(
        s,
        (along(own.fixed, rows), along(own_values, rows)),
        (along(other.fixed, not rows), along(other_values, not rows)),
        itself,
    )
    if other.valid is not None:
        valid = along(other.valid, not rows)
        empty = {"lse": -jnp.inf, "sum": 0.0}
        out = tuple(jnp.where(valid, x, empty[k]) for x, k in zip(out, sums.kinds, strict=True))
    return out


def zero_state(sums: Sums, like: Array) -> Tree:
    """The statistics of no columns: per kind (maximum, sum of exponentials) or (sum,); [...] for `like` [..., D]."""
    # From `like` rather than from a shape: inside jax.shard_map it knows over which mesh axes a value differs.
    zero = jnp.zeros_like(like[..., 0])
    low = jnp.full_like(zero, -jnp.inf)
    return tuple((low, zero) if k == "lse" and not sums.bounded else (zero,) for k in sums.kinds)


def _tile_state(sums: Sums, s: Array, own: Side, other: Side, itself: Array | None, axis: int) -> Tree:
    out = _entries(sums, s, own, other, itself, axis, (own.values, other.values))
    state = []
    for x, kind in zip(out, sums.kinds, strict=True):
        if kind == "sum":
            state.append((jnp.sum(x, axis),))
        elif sums.bounded:
            state.append((jnp.sum(jnp.exp(x), axis),))
        else:
            top = jnp.max(x, axis)
            state.append((top, jnp.sum(jnp.exp(x - jnp.expand_dims(_finite(top), axis)), axis)))
    return tuple(state)


def _finite(top: Array) -> Array:
    return jnp.where(top == -jnp.inf, 0, top)  # no column yet


def merge(a: Tree, b: Tree) -> Tree:
    """Statistics of two disjoint sets of columns -> of both."""
    merged = []
    for x, y in zip(a, b, strict=True):
        if len(x) == 1:
            merged.append((x[0] + y[0],))
        else:
            top = jnp.maximum(x[0], y[0])
            shift = _finite(top)
            merged.append((top, x[1] * jnp.exp(x[0] - shift) + y[1] * jnp.exp(y[0] - shift)))
    return tuple(merged)


def finish(sums: Sums, state: Tree) -> tuple[Array, ...]:
    """Statistics -> the sums and log-sum-exps; -inf where no column counted."""
    return tuple(
        x[0] if kind == "sum" else (jnp.log(x[0]) if sums.bounded else _finite(x[0]) + jnp.log(x[1]))
        for x, kind in zip(state, sums.kinds, strict=True)
    )


def pulls(sums: Sums, out: tuple[Array, ...], cotangents: tuple[Array, ...]) -> Tree:
    """What the backward pass needs of a row: for an "lse", (its cotangent, itself), combined if that is safe."""
    kept = []
    for x, g, kind in zip(out, cotangents, sums.kinds, strict=True):
        if kind == "sum":
            kept.append((g,))
            continue
        some = x != -jnp.inf
        lse = jnp.where(some, x, 0)
        g = jnp.where(some, g, 0)
        kept.append((g * jnp.exp(-lse),) if sums.bounded else (g, lse))
    return tuple(kept)


def _tile_pull(sums: Sums, s: Array, own: Side, other: Side, itself, axis: int, pull: Tree):
    """Cotangents of one tile: (of s, of own.values, of other.values)."""

    def f(s, own_values, other_values):
        return _entries(sums, s, own, other, itself, axis, (own_values, other_values))

    out, back = jax.vjp(f, s, own.values, other.values)
    cotangents = []
    for x, kept, kind in zip(out, pull, sums.kinds, strict=True):
        kept = [jnp.expand_dims(k, axis) for k in kept]
        if kind == "sum":
            cotangents.append(jnp.broadcast_to(kept[0], x.shape))
        elif sums.bounded:
            cotangents.append(jnp.exp(x) * kept[0])
        else:
            cotangents.append(kept[0] * jnp.exp(x - kept[1]))
    return back(tuple(cotangents))


def whole(sums: Sums, rows: Side, cols: Side | None) -> tuple[Array, ...]:
    """All statistics from the one tile of all rows [R] and all columns [C], differentiated by JAX itself."""
    itself = jnp.eye(len(rows.z), dtype=bool) if cols is None else _meets_itself(rows, cols)
    cols = rows if cols is None else cols
    if sums.constant_columns:
        cols = lax.stop_gradient(cols)
    out = _entries(sums, dot(rows.z, cols.z), rows, cols, itself, 1, (rows.values, cols.values))
    return tuple(jnp.sum(x, 1) if k == "sum" else log_sum_exp(x) for x, k in zip(out, sums.kinds, strict=True))


def log_sum_exp(x_RxC: Array) -> Array:
    """Over the columns; -inf, with a zero gradient rather than NaN, where all are."""
    some = jnp.any(x_RxC != -jnp.inf, axis=1)
    return jnp.where(some, jax.nn.logsumexp(jnp.where(some[:, None], x_RxC, 0), axis=1), -jnp.inf)


def log_add(a: Array, b: Array) -> Array:
    """log(exp a + exp b); -inf, with a zero gradient rather than NaN, where both are."""
    some = (a != -jnp.inf) | (b != -jnp.inf)
    return jnp.where(some, jnp.logaddexp(jnp.where(some, a, 0), jnp.where(some, b, 0)), -jnp.inf)


# ---- one block of rows against one block of columns


def take(tree: Tree, i: Array | int) -> Tree:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def put(tree: Tree, i: Array | int, new: Tree) -> Tree:
    return jax.tree.map(lambda x, y: lax.dynamic_update_index_in_dim(x, y, i, 0), tree, new)


def add(tree: Tree, i: Array | int, new: Tree) -> Tree:
    return put(tree, i, jax.tree.map(jnp.add, take(tree, i), new))


def _meets_itself(a: Side, b: Side) -> Array | None:
    if a.element is None or b.element is None:
        return None
    return a.element[:, None] == b.element[None]


def _plus(a: Tree, b: Tree) -> Tree:
    return jax.tree.map(jnp.add, a, b)


def alone(sums: Sums, side: Side) -> Tree:
    """Statistics of one tile of rows [T] against itself, without each vector's own column."""
    return _tile_state(sums, dot(side.z, side.z), side, side, jnp.eye(len(side.z), dtype=bool), 1)


def alone_pull(sums: Sums, side: Side, pull: Tree) -> tuple[Array, Tree]:
    """Backward of `alone`: cotangents of (side.z, side.values).

    The tile is its own transpose, so what its columns get is known in the order of its rows: one product, not two.
    """
    s, diagonal = dot(side.z, side.z), jnp.eye(len(side.z), dtype=bool)
    ds, own, other = _tile_pull(sums, s, side, side, diagonal, 1, pull)
    ds_t, _, _ = _tile_pull(sums, s, side, side, diagonal, 0, pull)
    return _times(ds + ds_t, side.z), _plus(own, other)


def within(sums: Sums, side: Side, state: Tree) -> Tree:
    """Statistics of a block [n, T] against itself, without each vector's own column; every pair of tiles once."""
    n = len(side.z)

    def row(i, state):
        a = take(side, i)
        own = alone(sums, a)

        def column(j, carry):
            own, state = carry
            b = take(side, j)
            s = dot(a.z, b.z)
            own = merge(own, _tile_state(sums, s, a, b, None, 1))
            theirs = merge(take(state, j), _tile_state(sums, s, b, a, None, 0))
            return own, put(state, j, theirs)

        own, state = lax.fori_loop(i + 1, n, column, (own, state))
        return put(state, i, merge(take(state, i), own))

    return lax.fori_loop(0, n, row, state)


def within_pull(sums: Sums, side: Side, pull: Tree, grads: Tree) -> Tree:
    """Backward of `within`, added to the cotangents of (side.z transposed, side.values); see `zero_grads`."""
    n = len(side.z)

    def row(i, grads):
        a, pull_a = take(side, i), take(pull, i)
        mine = alone_pull(sums, a, pull_a)

        def column(j, carry):
            mine, grads = carry
            b = take(side, j)
            s = dot(a.z, b.z)
            ds, own, other = _tile_pull(sums, s, a, b, None, 1, pull_a)
            ds_t, own_t, other_t = _tile_pull(sums, s, b, a, None, 0, take(pull, j))
            ds = ds + ds_t
            mine = _plus(mine, (_times(ds, b.z), _plus(own, other_t)))
            return mine, add(grads, j, (_columns_times(ds, a.z), _plus(other, own_t)))

        (dz, dvalues), grads = lax.fori_loop(i + 1, n, column, (mine, grads))
        return add(grads, i, (dz.T, dvalues))

    return lax.fori_loop(0, n, row, grads)


def _times(ds: Array, z: Array) -> Array:
    """Cotangent of a tile's rows [T, D]."""
    return lax.dot_general(ds, z, (((1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)


def _columns_times(ds: Array, z: Array) -> Array:
    """Cotangent of a tile's columns, as [D, U]."""
    return lax.dot_general(z, ds, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)


def zero_grads(side: Side) -> tuple[Array, Tree]:
    """Cotangents of (z, values) to add to; those of z as [n, D, T].

    In that layout adding up the columns' cotangents makes the backward pass a fifth faster on a CPU.
    """
    return jnp.zeros_like(jnp.swapaxes(side.z, -1, -2)), jax.tree.map(jnp.zeros_like, side.values)


def between(
    sums: Sums, rows: Side, cols: Side, state: Tree, their_state: Tree | None = None
) -> tuple[Tree, Tree | None]:
    """Statistics of rows [n, T] over columns [m, U] merged into `state`; and of the columns over the rows, if asked."""
    n, m = rows.z.shape[0], cols.z.shape[0]

    def row(i, carry):
        a = take(rows, i)

        def column(j, carry):
            own, their_state = carry
            b = take(cols, j)
            s, itself = dot(a.z, b.z), _meets_itself(a, b)
            own = merge(own, _tile_state(sums, s, a, b, itself, 1))
            if their_state is not None:
                their_state = put(their_state, j, merge(take(their_state, j), _tile_state(sums, s, b, a, itself, 0)))
            return own, their_state

        state, their_state = carry
        own, their_state = lax.fori_loop(0, m, column, (take(state, i), their_state))
        return put(state, i, own), their_state

    return lax.fori_loop(0, n, row, (state, their_state))


def between_pull(sums: Sums, rows: Side, cols: Side, pull: Tree, their_pull: Tree | None, grads, their_grads):
    """Backward of `between`, added to the cotangents of the rows and of the columns, both as in `zero_grads`."""
    n, m = rows.z.shape[0], cols.z.shape[0]

    def row(i, carry):
        a, pull_a = take(rows, i), take(pull, i)

        def column(j, carry):
            mine, their_grads = carry
            b = take(cols, j)
            s, itself = dot(a.z, b.z), _meets_itself(a, b)
            ds, own, other = _tile_pull(sums, s, a, b, itself, 1, pull_a)
            if their_pull is not None:
                ds_t, own_t, other_t = _tile_pull(sums, s, b, a, itself, 0, take(their_pull, j))
                ds, own, other = ds + ds_t, _plus(own, other_t), _plus(other, own_t)
            mine = _plus(mine, (_times(ds, b.z), own))
            if sums.constant_columns:
                return mine, their_grads
            return mine, add(their_grads, j, (_columns_times(ds, a.z), other))

        grads, their_grads = carry
        mine = jax.tree.map(jnp.zeros_like, (a.z, a.values))
        (dz, dvalues), their_grads = lax.fori_loop(0, m, column, (mine, their_grads))
        return add(grads, i, (dz.T, dvalues)), their_grads

    return lax.fori_loop(0, n, row, (grads, their_grads))
