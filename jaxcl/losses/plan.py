"""How a loss with a similarity matrix is computed: the names of the implementations and the choice between them."""

import contextlib
import dataclasses
import numbers
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args

import jax

from jaxcl.errors import UserError
from jaxcl.losses.common import AxisName, check_choice

# The only list of implementations; docs/losses.md describes each. "auto" chooses one of the others.
Implementation = Literal["auto", "dense", "tiled", "ring"]

# Without a running maximum, exp(s) for |s| up to this, and a sum of 2**30 such terms, stay normal float32 numbers.
SAFE_LOGIT = 50.0

# ---- tuned on a CPU; every backend uses these, because no other backend has been measured (docs/losses.md)

# Up to this many logits on a device (9 MiB in float32) the dense implementation is about as fast as the tiled one.
CPU_DENSE_LOGITS = 1536**2
# The few [tile, tile] arrays of the engine should stay in the CPU's cache.
CPU_TILE = 512


@dataclasses.dataclass(frozen=True)
class Limits:
    """Sizes by which the losses choose an implementation; see `limits`."""

    dense_logits: int = CPU_DENSE_LOGITS
    tile: int = CPU_TILE


_DEFAULT_LIMITS = Limits()
# A context of JAX is local to a thread, and its value is a part of the key of every jit cache: a compiled function is
# traced again where the limits differ from those under which it was traced.
_limits = jax.make_user_context(_DEFAULT_LIMITS)


def current_limits() -> Limits:
    """The limits of this thread."""
    return _limits.value


@contextlib.contextmanager
def limits(**overrides: int) -> Iterator[Limits]:
    """Context manager that changes the sizes by which the losses choose an implementation.

    The limits belong to the thread that enters the block. A jitted function that was traced under other limits is
    traced and compiled again.

    Args:
      dense_logits: "auto" is dense up to this many logits (rows x columns) on a device, at least 0. 0 means never.
      tile: number of rows and of columns of a tile, at least 1.

    Yields:
      The limits within the block.

    Raises:
      UserError: an unknown name or a value out of range.

    Example:
      with losses.limits(dense_logits=0, tile=1024):
          loss = losses.supcon(features, labels)
    """
    least = {"dense_logits": 0, "tile": 1}
    for name, value in overrides.items():
        if name not in least or not isinstance(value, int) or value < least[name]:
            raise UserError(f"limits: {name}={value!r}, expected dense_logits at least 0 or tile at least 1")
    inside = dataclasses.replace(current_limits(), **overrides)
    with _limits(inside):
        yield inside


class Plan(NamedTuple):
    """How one call of a loss is computed. It is a static argument of every compiled loss."""

    implementation: Literal["dense", "tiled", "ring"]
    tile: int
    # The caller asked for the implementation by name. A plan of "auto" may replace JAX's gradient by a faster one that
    # can be differentiated once only.
    explicit: bool = True


def choose_plan(loss: str, implementation: str, rows: int, columns: int, axis_name: AxisName) -> Plan:
    """Resolves "auto" by the current limits.

    Args:
      loss: name of the loss, for messages.
      implementation: one of `Implementation`.
      rows: rows of the similarity matrix on this device.
      columns: columns of the similarity matrix, over all devices.
      axis_name: mesh axis over which the rows are split, or None.

    Raises:
      UserError: an unknown implementation, or "ring" without `axis_name`.
    """
    check_choice(loss, "implementation", implementation, get_args(Implementation))
    if implementation == "ring" and axis_name is None:
        raise UserError(f"{loss}: implementation='ring' without axis_name, expected a mesh axis; or use 'tiled'")
    now = current_limits()
    if implementation != "auto":
        return Plan(implementation, now.tile)
    large = "tiled" if axis_name is None else "ring"
    return Plan("dense" if rows * columns <= now.dense_logits else large, now.tile, explicit=False)


def is_bounded(unit_vectors: bool, temperature: Any) -> bool:
    """Whether |logit| <= SAFE_LOGIT is certain before the values are known. A traced temperature is not certain."""
    return unit_vectors and isinstance(temperature, numbers.Real) and 1 <= temperature * SAFE_LOGIT
