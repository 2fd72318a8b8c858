"""Tiled forward and backward passes of row reductions: the [R, C] similarity matrix never exists as a whole.

Shapes. R rows and C columns have D features. `to_tiles` cuts the rows [R, D] into n tiles [n, T, D] and the columns
[C, D] into m tiles [m, U, D]. Statistics of the rows are [n, T], one array for each kind of the `Reduction`.

Forward pass. For row tile i and column tile j, and for each statistic:

    s     = rows.z[i] @ cols.z[j].T                                      [T, U]
    x     = entry_fn(s, ...)                                             [T, U]
    state = merge_states(state, (max(x, 1), sum(exp(x - max), 1)))       [T] each; (sum(x, 1),) for kind "sum"

After the last column tile, `finalize` turns the state into the statistics `out` [n, T]. Only the operands and `out` are
kept for the backward pass, so memory grows with R + C and not with R C.

Backward pass. With g [n, T] the cotangents of `out`, each tile s is computed again:

    dx          = g                    for kind "sum"                    [T, U]
    dx          = g * exp(x - out)     for kind "lse" (a softmax)        [T, U]
    ds          = vjp of entry_fn at dx                                  [T, U]
    d rows.z[i] += ds @ cols.z[j]                                        [T, D]
    d cols.z[j] += ds.T @ rows.z[i]                                      [U, D]

Self block. Where rows and columns are the same vectors, tile (j, i) is the transpose of tile (i, j). `self_block`
computes only the tiles with j >= i and reduces each along both axes: along axis 1 for the rows of tile i, along axis 0
for those of tile j. A tile on the diagonal is its own transpose (`self_tile`).

Cross block. `cross_block` reduces rows over other columns. On request it also reduces the columns over the rows, which
the half ring of `jaxcl/losses/engine.py` uses.

`init_cotangents` holds the cotangents of z transposed, [n, D, T]. This layout is tuned on a CPU, where it makes
adding the columns' cotangents faster. It is correct on every backend.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.losses.common import Array
from jaxcl.losses.reduction import (
    Operand,
    Reduction,
    Tree,
    cols_cotangent_transposed,
    merge_states,
    rows_cotangent,
    self_mask,
    similarities,
    tile_state,
    tile_vjp,
)

# ---- cutting into tiles


def to_tiles(operand: Operand, tile: int) -> Operand:
    """[R, ...] -> [n, T, ...] with T at most `tile` and little padding. Padded rows are not valid."""
    rows = len(operand.z)
    count = max(1, -(-rows // tile))
    size = -(-rows // count)
    size = min(-(-size // 8) * 8, max(tile, size)) if count > 1 else size  # whole vector registers
    padding = -rows % size
    if padding and operand.valid is None:
        operand = operand._replace(valid=jnp.ones(rows, bool))

    def cut(x: Array) -> Array:
        return jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, size, *x.shape[1:])

    operand = jax.tree.map(cut, operand)
    if padding and operand.ids is not None:  # 0 is the id of a vector
        operand = operand._replace(ids=jnp.where(operand.valid, operand.ids, -1))
    return operand


def init_cotangents(operand: Operand) -> tuple[Array, Tree]:
    """Zero cotangents of (z, values) to add to; that of z is transposed, [n, D, T]."""
    return jnp.zeros_like(jnp.swapaxes(operand.z, -1, -2)), jax.tree.map(jnp.zeros_like, operand.values)


# ---- one tile of rows against itself


def self_tile(reduction: Reduction, operand: Operand) -> Tree:
    """State of one tile of rows [T] over the same rows, without each row's own column."""
    diagonal = jnp.eye(len(operand.z), dtype=bool)
    return tile_state(reduction, similarities(operand.z, operand.z), operand, operand, diagonal, 1)


def self_tile_vjp(reduction: Reduction, operand: Operand, weights: Tree) -> tuple[Array, Tree]:
    """Backward pass of `self_tile`: cotangents of (z, values), where z is [T, D].

    The tile is its own transpose. Its columns' cotangents are therefore known in the order of its rows, and one matrix
    product gives the cotangent of z instead of two.
    """
    s, diagonal = similarities(operand.z, operand.z), jnp.eye(len(operand.z), dtype=bool)
    ds, own, other = tile_vjp(reduction, s, operand, operand, diagonal, 1, weights)
    ds_t, _, _ = tile_vjp(reduction, s, operand, operand, diagonal, 0, weights)
    return rows_cotangent(ds + ds_t, operand.z), _tree_add(own, other)


# ---- a block of tiles against itself


def self_block(reduction: Reduction, operand: Operand, state: Tree) -> Tree:
    """Merges into `state` the state of a block [n, T] over itself, without each row's own column."""
    n = len(operand.z)

    def row_tile(i, state):
        a = _get_tile(operand, i)
        state_a = self_tile(reduction, a)

        def column_tile(j, carry):
            state_a, state = carry
            b = _get_tile(operand, j)
            s = similarities(a.z, b.z)
            state_a = merge_states(state_a, tile_state(reduction, s, a, b, None, 1))
            state_b = merge_states(_get_tile(state, j), tile_state(reduction, s, b, a, None, 0))
            return state_a, _set_tile(state, j, state_b)

        state_a, state = lax.fori_loop(i + 1, n, column_tile, (state_a, state))
        return _set_tile(state, i, merge_states(_get_tile(state, i), state_a))

    return lax.fori_loop(0, n, row_tile, state)


def self_block_vjp(reduction: Reduction, operand: Operand, weights: Tree, cotangents: Tree) -> Tree:
    """Backward pass of `self_block`, added to `cotangents`, which are as of `init_cotangents`."""
    n = len(operand.z)

    def row_tile(i, cotangents):
        a, weights_a = _get_tile(operand, i), _get_tile(weights, i)
        cotangents_a = self_tile_vjp(reduction, a, weights_a)

        def column_tile(j, carry):
            cotangents_a, cotangents = carry
            b = _get_tile(operand, j)
            s = similarities(a.z, b.z)
            ds, own, other = tile_vjp(reduction, s, a, b, None, 1, weights_a)
            ds_t, own_t, other_t = tile_vjp(reduction, s, b, a, None, 0, _get_tile(weights, j))
            ds = ds + ds_t
            cotangents_a = _tree_add(cotangents_a, (rows_cotangent(ds, b.z), _tree_add(own, other_t)))
            cotangents_b = (cols_cotangent_transposed(ds, a.z), _tree_add(other, own_t))
            return cotangents_a, _add_to_tile(cotangents, j, cotangents_b)

        (dz, dvalues), cotangents = lax.fori_loop(i + 1, n, column_tile, (cotangents_a, cotangents))
        return _add_to_tile(cotangents, i, (dz.T, dvalues))

    return lax.fori_loop(0, n, row_tile, cotangents)


# ---- a block of row tiles against a block of column tiles


def cross_block(
    reduction: Reduction, rows: Operand, cols: Operand, state: Tree, cols_state: Tree | None = None
) -> tuple[Tree, Tree | None]:
    """Merges into `state` the state of rows [n, T] over columns [m, U].

    With `cols_state`, also merges into it the state of the columns over the rows. Returns both states.
    """
    n, m = rows.z.shape[0], cols.z.shape[0]

    def row_tile(i, carry):
        a = _get_tile(rows, i)

        def column_tile(j, carry):
            state_a, cols_state = carry
            b = _get_tile(cols, j)
            s, is_self = similarities(a.z, b.z), self_mask(a, b)
            state_a = merge_states(state_a, tile_state(reduction, s, a, b, is_self, 1))
            if cols_state is not None:
                state_b = merge_states(_get_tile(cols_state, j), tile_state(reduction, s, b, a, is_self, 0))
                cols_state = _set_tile(cols_state, j, state_b)
            return state_a, cols_state

        state, cols_state = carry
        state_a, cols_state = lax.fori_loop(0, m, column_tile, (_get_tile(state, i), cols_state))
        return _set_tile(state, i, state_a), cols_state

    return lax.fori_loop(0, n, row_tile, (state, cols_state))


def cross_block_vjp(
    reduction: Reduction,
    rows: Operand,
    cols: Operand,
    weights: Tree,
    cols_weights: Tree | None,
    cotangents: Tree,
    cols_cotangents: Tree,
) -> tuple[Tree, Tree]:
    """Backward pass of `cross_block`, added to the cotangents of the rows and of the columns.

    `weights` and `cols_weights` are the backward weights of `state` and `cols_state`. Both cotangents are as of
    `init_cotangents`.
    """
    n, m = rows.z.shape[0], cols.z.shape[0]

    def row_tile(i, carry):
        a, weights_a = _get_tile(rows, i), _get_tile(weights, i)

        def column_tile(j, carry):
            cotangents_a, cols_cotangents = carry
            b = _get_tile(cols, j)
            s, is_self = similarities(a.z, b.z), self_mask(a, b)
            ds, own, other = tile_vjp(reduction, s, a, b, is_self, 1, weights_a)
            if cols_weights is not None:
                ds_t, own_t, other_t = tile_vjp(reduction, s, b, a, is_self, 0, _get_tile(cols_weights, j))
                ds, own, other = ds + ds_t, _tree_add(own, other_t), _tree_add(other, own_t)
            cotangents_a = _tree_add(cotangents_a, (rows_cotangent(ds, b.z), own))
            if reduction.constant_columns:
                return cotangents_a, cols_cotangents
            cotangents_b = (cols_cotangent_transposed(ds, a.z), other)
            return cotangents_a, _add_to_tile(cols_cotangents, j, cotangents_b)

        cotangents, cols_cotangents = carry
        zeros = jax.tree.map(jnp.zeros_like, (a.z, a.values))
        (dz, dvalues), cols_cotangents = lax.fori_loop(0, m, column_tile, (zeros, cols_cotangents))
        return _add_to_tile(cotangents, i, (dz.T, dvalues)), cols_cotangents

    return lax.fori_loop(0, n, row_tile, (cotangents, cols_cotangents))


# ---- trees whose leaves have a leading axis of tiles


def _get_tile(tree: Tree, i: Array | int) -> Tree:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def _set_tile(tree: Tree, i: Array | int, new: Tree) -> Tree:
    return jax.tree.map(lambda x, y: lax.dynamic_update_index_in_dim(x, y, i, 0), tree, new)


def _add_to_tile(tree: Tree, i: Array | int, new: Tree) -> Tree:
    return _set_tile(tree, i, _tree_add(_get_tile(tree, i), new))


def _tree_add(a: Tree, b: Tree) -> Tree:
    return jax.tree.map(jnp.add, a, b)
