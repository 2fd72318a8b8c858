"""Row statistics at any size: tiled on one device, over a ring of devices, with a gradient that recomputes.

On a ring every device keeps its rows and the blocks of columns travel. Where rows and columns are the same vectors a
block goes only half way round: two blocks that meet serve both their owners, what is summed for the visitor (and, in
the backward pass, its gradient) travels with it, and goes home at the end.
"""

import contextlib
import dataclasses
import functools
import numbers
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.errors import UserError
from jaxcl.losses import tiles
from jaxcl.losses.common import AxisName, check_choice, first_row, gather
from jaxcl.losses.tiles import Side, Sums

Array = jax.Array
Tree = Any
IMPLEMENTATIONS = ("auto", "dense", "tiled", "ring")


@dataclasses.dataclass(frozen=True)
class Limits:
    """Sizes at which the losses choose how to compute; see `limits`."""

    # "auto" forms the logits of a device at once up to this many (9 MiB in float32), and tiles above. On two CPU cores
    # dense and tiled take the same time at about 1,500 rows of one batch, and at 3,000 to 4,000 across two views.
    dense_logits: int = 1536**2
    # Rows and columns of a tile. Its few arrays of logits should stay in the cache: on a CPU 512 beats 256 and, from
    # 3,000 rows on, 1,024.
    tile: int = 512


_limits = Limits()


@contextlib.contextmanager
def limits(**overrides: int) -> Iterator[Limits]:
    """Within the block, losses that are called or traced choose by other sizes: `with limits(tile=2048): ...`

    Args:
      dense_logits: "auto" is dense up to this many logits a device, rows x columns; 0: never.
      tile: rows and columns of a tile of the engine.

    Raises:
      UserError: an unknown name or a value below its least (0 and 1).
    """
    global _limits
    for name, value in overrides.items():
        if name not in ("dense_logits", "tile") or not isinstance(value, int) or value < (name == "tile"):
            raise UserError(f"limits: {name}={value!r}, expected dense_logits at least 0 or tile at least 1")
    before, _limits = _limits, dataclasses.replace(_limits, **overrides)
    try:
        yield _limits
    finally:
        _limits = before


class How(NamedTuple):
    """How a loss is computed: chosen before tracing, so that it is part of what identifies a compiled program."""

    form: Literal["dense", "tiled", "ring"]
    tile: int
    asked: bool = True  # for by name, and with it all that it can; False: by "auto", for its speed


def choose(loss: str, implementation: str, rows: int, columns: int, axis_name: AxisName) -> How:
    """The form for `rows` of this device against `columns` of all. Errors: UserError for an unknown implementation."""
    check_choice(loss, "implementation", implementation, IMPLEMENTATIONS)
    if implementation == "ring" and axis_name is None:
        raise UserError(f"{loss}: implementation='ring' without axis_name, expected a mesh axis; or use 'tiled'")
    if implementation != "auto":
        return How(implementation, _limits.tile)
    large = "tiled" if axis_name is None else "ring"
    return How("dense" if rows * columns <= _limits.dense_logits else large, _limits.tile, asked=False)


def is_bounded(unit_vectors: bool, temperature: Any) -> bool:
    """Whether no logit can exceed SAFE_LOGIT, as far as that is known before the numbers are."""
    return unit_vectors and isinstance(temperature, numbers.Real) and 1 <= temperature * tiles.SAFE_LOGIT


def row_sums(
    sums: Sums, rows: Side, cols: Side | None = None, *, how: How, axis_name: AxisName = None
) -> tuple[Array, ...]:
    """The statistics of `sums` for every row, [R] each, in memory linear in R + C.

    cols None: the rows themselves, without each row's own column. axis_name: inside `jax.shard_map`, `rows` and `cols`
    are this device's parts, and its rows are summed over the columns of all devices: in a "ring", or, "dense" and
    "tiled", over columns gathered beforehand. "dense" holds the R x C logits and can be differentiated in every way, if
    it was asked for; the others in reverse mode once.
    """
    count = len(rows.z)
    if axis_name is not None and how.form != "ring":
        if cols is None:
            mine = first_row(count, axis_name) + jnp.arange(count, dtype=jnp.int32)
            rows = cols = rows._replace(element=mine)
        cols = jax.tree.map(lambda x: gather(x, axis_name), cols)
        axis_name = None
    if how.form == "dense":
        # Where rows meet themselves our own gradient takes one product, and JAX's two.
        return _one_tile(sums, rows) if cols is None and not how.asked else tiles.whole(sums, rows, cols)
    rows = tiles.split(rows, how.tile)
    cols = None if cols is None else tiles.split(cols, how.tile)
    rows, cols = jax.tree.map(lambda x: _varying(x, axis_name), (rows, cols))
    out = _row_sums(sums, axis_name, rows, cols)
    return tuple(x.reshape(-1)[:count] for x in out)


def _varying(x: Array, axis_name: AxisName) -> Array:
    """Marked as differing between the devices, as everything that travels is, even if all hold the same."""
    for name in (axis_name,) if isinstance(axis_name, str) else axis_name or ():
        try:
            x = lax.pcast(x, name, to="varying")
        except ValueError:  # it is already
            pass
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _one_tile(sums: Sums, rows: Side) -> tuple[Array, ...]:
    return tiles.finish(sums, tiles.alone(sums, rows))


def _one_tile_forward(sums, rows):
    out = _one_tile(sums, rows)
    return out, (rows, out)


def _one_tile_backward(sums, residuals, cotangents):
    rows, out = residuals
    dz, dvalues = tiles.alone_pull(sums, rows, tiles.pulls(sums, out, cotangents))
    return (Side(dz, fixed=None, values=dvalues, valid=None, element=None),)


_one_tile.defvjp(_one_tile_forward, _one_tile_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _row_sums(sums: Sums, axis_name: AxisName, rows: Side, cols: Side | None) -> tuple[Array, ...]:
    return _forward(sums, axis_name, rows, cols)[0]


def _forward(sums, axis_name, rows, cols):
    state = tiles.zero_state(sums, rows.z)
    if axis_name is None or lax.axis_size(axis_name) == 1:
        if cols is None:
            state = tiles.within(sums, rows, state)
        else:
            state, _ = tiles.between(sums, rows, cols, state)
    elif cols is None:
        state = _half_ring(sums, axis_name, rows, state)
    else:
        state = _ring(sums, axis_name, rows, cols, state)
    out = tiles.finish(sums, state)
    return out, (rows, cols, out)


def _backward(sums, axis_name, residuals, cotangents):
    rows, cols, out = residuals
    pull = tiles.pulls(sums, out, cotangents)
    grads, their_grads = tiles.zero_grads(rows), None
    alone = axis_name is None or lax.axis_size(axis_name) == 1
    if cols is None:
        grads = tiles.within_pull(sums, rows, pull, grads)
        if not alone:
            grads = _half_ring_pull(sums, axis_name, rows, pull, grads)
    else:
        their_grads = tiles.zero_grads(cols)
        if alone:
            grads, their_grads = tiles.between_pull(sums, rows, cols, pull, None, grads, their_grads)
        else:
            grads, their_grads = _ring_pull(sums, axis_name, rows, cols, pull, grads, their_grads)
    return _cotangent(rows, grads), _cotangent(cols, their_grads)


def _cotangent(side: Side | None, grads: Tree) -> Side | None:
    if side is None:
        return None
    return Side(jnp.swapaxes(grads[0], -1, -2), fixed=None, values=grads[1], valid=None, element=None)


_row_sums.defvjp(_forward, _backward)


# ---- over devices


def _shift(tree: Tree, axis_name: AxisName, steps: int) -> Tree:
    """Every device's arrays go `steps` places round the ring."""
    count = lax.axis_size(axis_name)
    pairs = [(i, (i + steps) % count) for i in range(count)]
    return jax.tree.map(lambda x: lax.ppermute(x, axis_name, pairs), tree)


def _ring(sums, axis_name, rows, cols, state):
    """Every block of columns visits every device; a hop is on its way while the last block is summed."""

    def hop(_, carry):
        visitor, state = carry
        following = _shift(visitor, axis_name, 1)
        state, _ = tiles.between(sums, rows, visitor, state)
        return following, state

    return lax.fori_loop(0, lax.axis_size(axis_name), hop, (cols, state))[1]


def _ring_pull(sums, axis_name, rows, cols, pull, grads, their_grads):
    def hop(_, carry):
        visitor, their_grads, grads = carry
        following = _shift(visitor, axis_name, 1)
        grads, their_grads = tiles.between_pull(sums, rows, visitor, pull, None, grads, their_grads)
        if not sums.constant_columns:
            their_grads = _shift(their_grads, axis_name, 1)
        return following, their_grads, grads

    _, their_grads, grads = lax.fori_loop(0, lax.axis_size(axis_name), hop, (cols, their_grads, grads))
    return grads, their_grads  # all the way round: home again


def _half_ring(sums, axis_name, rows, state):
    count = lax.axis_size(axis_name)
    state = tiles.within(sums, rows, state)
    rows = rows._replace(element=None)  # from here on, nobody meets itself

    def hop(_, carry):
        visitor, their_state, state = carry
        visitor, their_state = _shift((visitor, their_state), axis_name, 1)
        state, their_state = tiles.between(sums, rows, visitor, state, their_state)
        return visitor, their_state, state

    hops = (count - 1) // 2
    visitor, their_state, state = lax.fori_loop(0, hops, hop, (rows, tiles.zero_state(sums, rows.z), state))
    state = tiles.merge(state, _shift(their_state, axis_name, -hops))
    if count % 2 == 0:  # opposite devices meet on both, each for its own rows
        state, _ = tiles.between(sums, rows, _shift(visitor, axis_name, 1), state)
    return state


def _half_ring_pull(sums, axis_name, rows, pull, grads):
    count = lax.axis_size(axis_name)
    rows = rows._replace(element=None)

    def hop(_, carry):
        visitor, their_pull, their_grads, grads = carry
        visitor, their_pull, their_grads = _shift((visitor, their_pull, their_grads), axis_name, 1)
        grads, their_grads = tiles.between_pull(sums, rows, visitor, pull, their_pull, grads, their_grads)
        return visitor, their_pull, their_grads, grads

    hops = (count - 1) // 2
    carry = (rows, pull, tiles.zero_grads(rows), grads)
    visitor, _, their_grads, grads = lax.fori_loop(0, hops, hop, carry)
    if count % 2 == 0:
        visitor, their_grads = _shift((visitor, their_grads), axis_name, 1)
        grads, their_grads = tiles.between_pull(sums, rows, visitor, pull, None, grads, their_grads)
        hops += 1
    return jax.tree.map(jnp.add, grads, _shift(their_grads, axis_name, -hops))
