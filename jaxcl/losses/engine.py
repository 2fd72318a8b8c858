"""Row reductions of any size: dense, tiled on one device, or over a ring of devices.

`reduce_rows` chooses by its plan. The tiled and ring implementations have a custom vjp that computes each tile again
(`jaxcl/losses/tiles.py` explains the algorithm).

Ring. Every device keeps its rows, and blocks of columns travel from device to device. Half ring: where rows and columns
are the same vectors, a block travels only half way round. Two blocks that meet serve both owners, so the state of the
visiting rows (in the backward pass, their cotangents) travels with them and returns to its owner at the end.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.losses import tiles
from jaxcl.losses.common import Array, AxisName, all_gather, first_row
from jaxcl.losses.plan import Plan
from jaxcl.losses.reduction import (
    Operand,
    Reduction,
    Tree,
    backward_weights,
    dense_statistics,
    finalize,
    init_state,
    merge_states,
)


def reduce_rows(
    reduction: Reduction, rows: Operand, cols: Operand | None = None, *, plan: Plan, axis_name: AxisName = None
) -> tuple[Array, ...]:
    """The statistics of `reduction` for every row, [R] each.

    Args:
      reduction: what to compute.
      rows: [R] row vectors.
      cols: [C] column vectors. None: the rows themselves, where no row includes its own column.
      plan: "tiled" and "ring" need memory linear in R + C and support reverse-mode differentiation once. "dense" holds
        the R x C logits; an explicit dense plan supports every mode of differentiation.
      axis_name: inside `jax.shard_map`, the mesh axis over which rows and columns are split. The rows of this device
        are reduced over the columns of all devices. "dense" and "tiled" all-gather the columns first.
    """
    count = len(rows.z)
    if axis_name is not None and plan.implementation != "ring":
        if cols is None:
            ids = first_row(count, axis_name) + jnp.arange(count, dtype=jnp.int32)
            rows = cols = rows._replace(ids=ids)
        cols = jax.tree.map(lambda x: all_gather(x, axis_name), cols)
        axis_name = None
    if plan.implementation == "dense":
        # Where the rows meet themselves, our own gradient needs one matrix product and JAX's needs two.
        own_gradient = cols is None and not plan.explicit
        return _reduce_self_tile(reduction, rows) if own_gradient else dense_statistics(reduction, rows, cols)
    rows = tiles.to_tiles(rows, plan.tile)
    cols = None if cols is None else tiles.to_tiles(cols, plan.tile)
    rows, cols = jax.tree.map(lambda x: _varying(x, axis_name), (rows, cols))
    out = _reduce_tiles(reduction, axis_name, rows, cols)
    return tuple(x.reshape(-1)[:count] for x in out)


def _varying(x: Array, axis_name: AxisName) -> Array:
    """Marks `x` as different on each device, as every array that travels must be, even if all devices hold the same."""
    for name in (axis_name,) if isinstance(axis_name, str) else axis_name or ():
        try:
            x = lax.pcast(x, name, to="varying")
        except ValueError:  # it is marked already
            pass
    return x


# ---- one tile of all rows, with a gradient of one matrix product


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _reduce_self_tile(reduction: Reduction, rows: Operand) -> tuple[Array, ...]:
    return finalize(reduction, tiles.self_tile(reduction, rows))


def _reduce_self_tile_fwd(reduction, rows):
    out = _reduce_self_tile(reduction, rows)
    return out, (rows, out)


def _reduce_self_tile_bwd(reduction, residuals, cotangents):
    rows, out = residuals
    dz, dvalues = tiles.self_tile_vjp(reduction, rows, backward_weights(reduction, out, cotangents))
    return (Operand(dz, constants=None, values=dvalues, valid=None, ids=None),)


_reduce_self_tile.defvjp(_reduce_self_tile_fwd, _reduce_self_tile_bwd)


# ---- many tiles, on one device or on a ring


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _reduce_tiles(reduction: Reduction, axis_name: AxisName, rows: Operand, cols: Operand | None) -> tuple[Array, ...]:
    return _reduce_tiles_fwd(reduction, axis_name, rows, cols)[0]


def _reduce_tiles_fwd(reduction, axis_name, rows, cols):
    state = init_state(reduction, rows.z)
    if axis_name is None or lax.axis_size(axis_name) == 1:
        if cols is None:
            state = tiles.self_block(reduction, rows, state)
        else:
            state, _ = tiles.cross_block(reduction, rows, cols, state)
    elif cols is None:
        state = _half_ring(reduction, axis_name, rows, state)
    else:
        state = _ring(reduction, axis_name, rows, cols, state)
    out = finalize(reduction, state)
    return out, (rows, cols, out)


def _reduce_tiles_bwd(reduction, axis_name, residuals, cotangents):
    rows, cols, out = residuals
    weights = backward_weights(reduction, out, cotangents)
    grads, cols_grads = tiles.init_cotangents(rows), None
    one_device = axis_name is None or lax.axis_size(axis_name) == 1
    if cols is None:
        grads = tiles.self_block_vjp(reduction, rows, weights, grads)
        if not one_device:
            grads = _half_ring_vjp(reduction, axis_name, rows, weights, grads)
    else:
        cols_grads = tiles.init_cotangents(cols)
        if one_device:
            grads, cols_grads = tiles.cross_block_vjp(reduction, rows, cols, weights, None, grads, cols_grads)
        else:
            grads, cols_grads = _ring_vjp(reduction, axis_name, rows, cols, weights, grads, cols_grads)
    return _as_operand(grads), _as_operand(cols_grads)


def _as_operand(cotangents: Tree | None) -> Operand | None:
    """Cotangents of `tiles.init_cotangents` in the structure of their operand. Constants and masks have none."""
    if cotangents is None:
        return None
    dz_t, dvalues = cotangents
    return Operand(jnp.swapaxes(dz_t, -1, -2), constants=None, values=dvalues, valid=None, ids=None)


_reduce_tiles.defvjp(_reduce_tiles_fwd, _reduce_tiles_bwd)


# ---- rings of devices


def _rotate(tree: Tree, axis_name: AxisName, steps: int) -> Tree:
    """Sends the arrays of every device `steps` places round the ring."""
    count = lax.axis_size(axis_name)
    pairs = [(i, (i + steps) % count) for i in range(count)]
    return jax.tree.map(lambda x: lax.ppermute(x, axis_name, pairs), tree)


def _ring(reduction, axis_name, rows, cols, state):
    """State of the rows over the columns of all devices. The next block travels while this one is reduced."""

    def hop(_, carry):
        visiting, state = carry
        following = _rotate(visiting, axis_name, 1)
        state, _ = tiles.cross_block(reduction, rows, visiting, state)
        return following, state

    return lax.fori_loop(0, lax.axis_size(axis_name), hop, (cols, state))[1]


def _ring_vjp(reduction, axis_name, rows, cols, weights, grads, cols_grads):
    """Backward pass of `_ring`. The cotangents of a block of columns travel with it."""

    def hop(_, carry):
        visiting, cols_grads, grads = carry
        following = _rotate(visiting, axis_name, 1)
        grads, cols_grads = tiles.cross_block_vjp(reduction, rows, visiting, weights, None, grads, cols_grads)
        if not reduction.constant_columns:
            cols_grads = _rotate(cols_grads, axis_name, 1)
        return following, cols_grads, grads

    _, cols_grads, grads = lax.fori_loop(0, lax.axis_size(axis_name), hop, (cols, cols_grads, grads))
    return grads, cols_grads  # after a full round the cotangents are on the device of their columns


def _half_ring(reduction, axis_name, rows, state):
    """State of the rows over the rows of all devices, without each row's own column."""
    count = lax.axis_size(axis_name)
    state = tiles.self_block(reduction, rows, state)
    rows = rows._replace(ids=None)  # blocks of two devices have no vector in common

    def hop(_, carry):
        visiting, visiting_state, state = carry
        visiting, visiting_state = _rotate((visiting, visiting_state), axis_name, 1)
        state, visiting_state = tiles.cross_block(reduction, rows, visiting, state, visiting_state)
        return visiting, visiting_state, state

    hops = (count - 1) // 2
    carry = (rows, init_state(reduction, rows.z), state)
    visiting, visiting_state, state = lax.fori_loop(0, hops, hop, carry)
    state = merge_states(state, _rotate(visiting_state, axis_name, -hops))
    if count % 2 == 0:  # opposite devices meet twice; each reduces its own rows only
        state, _ = tiles.cross_block(reduction, rows, _rotate(visiting, axis_name, 1), state)
    return state


def _half_ring_vjp(reduction, axis_name, rows, weights, grads):
    """Backward pass of `_half_ring` without its self block. Visiting rows carry their weights and cotangents."""
    count = lax.axis_size(axis_name)
    rows = rows._replace(ids=None)

    def hop(_, carry):
        visiting, visiting_weights, visiting_grads, grads = carry
        visiting, visiting_weights, visiting_grads = _rotate((visiting, visiting_weights, visiting_grads), axis_name, 1)
        grads, visiting_grads = tiles.cross_block_vjp(
            reduction, rows, visiting, weights, visiting_weights, grads, visiting_grads
        )
        return visiting, visiting_weights, visiting_grads, grads

    hops = (count - 1) // 2
    carry = (rows, weights, tiles.init_cotangents(rows), grads)
    visiting, _, visiting_grads, grads = lax.fori_loop(0, hops, hop, carry)
    if count % 2 == 0:
        visiting, visiting_grads = _rotate((visiting, visiting_grads), axis_name, 1)
        grads, visiting_grads = tiles.cross_block_vjp(reduction, rows, visiting, weights, None, grads, visiting_grads)
        hops += 1
    return jax.tree.map(jnp.add, grads, _rotate(visiting_grads, axis_name, -hops))
