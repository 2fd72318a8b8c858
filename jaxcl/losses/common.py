"""Helpers shared by the losses: the working precision, unit vectors, argument checks and sums over devices."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcl.errors import UserError

# An input of a public loss: a jax.Array, or anything that `jnp.asarray` takes (a NumPy array, a list of numbers). The
# losses do not use `jax.typing.ArrayLike`, because `help()` expands it to a line of types for every argument.
Array = jax.Array

# The name of one mesh axis or of several. None: this device holds all rows.
AxisName = str | tuple[str, ...] | None

# `unit` returns zero, with zero gradient, for a shorter vector: the gradient of its direction, 1/norm, would explode.
NORM_FLOOR = 1e-12


def widened(*arrays: Any) -> list[jax.Array]:
    """Casts the arrays to their common floating type, which is float32 at least."""
    arrays = [jnp.asarray(a) for a in arrays]
    dtype = jnp.promote_types(jnp.result_type(*arrays), jnp.float32)
    return [a.astype(dtype) for a in arrays]


def concrete(x: Any) -> np.ndarray | None:
    """The values of `x` on the host; None where they are traced, or partly on other hosts."""
    if isinstance(x, np.ndarray):
        return x
    if isinstance(x, (list, tuple)):
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(x)):
            return None
    elif isinstance(x, jax.Array) and (isinstance(x, jax.core.Tracer) or not x.is_fully_addressable):
        return None
    return np.asarray(x)


def number(x: Any) -> float | None:
    """The value of a scalar: a number of Python or NumPy, or an array of one element. None where it is unknown."""
    if isinstance(x, (int, float)):
        return float(x)
    values = None if x is None else concrete(x)
    return float(values.item()) if values is not None and values.size == 1 and values.dtype.kind != "O" else None


def unit(x: jax.Array) -> jax.Array:
    """Scales vectors along the last axis to length 1. A zero vector stays zero and gets zero gradient.

    NaN counts as long, so that it reaches the loss: the training loop detects divergence by a NaN loss. So does a
    vector whose squared length overflows (1.8e19 or longer in float32), which becomes NaN; see `rescaled`.
    """
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    usable = ~(square <= NORM_FLOOR**2)
    return jnp.where(usable, x * inverse_root(jnp.where(usable, square, 1)), 0)


def inverse_root(square: jax.Array) -> jax.Array:
    """1 / sqrt(square), and NaN instead of 0 for a square that has overflowed."""
    return lax.rsqrt(jnp.where(jnp.isposinf(square), jnp.nan, square))


def rescaled(x: jax.Array) -> jax.Array:
    """Vectors divided by powers of 2, so that their largest entry is in [1/2, 1); zeros stay zero.

    The direction keeps all its digits. Squares of the result neither overflow nor vanish, as those of vectors longer
    than 1.8e19 or shorter than 1e-19 would.
    """
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True, initial=0)
    half = jnp.frexp(largest)[1] // 2  # in two steps: 2**128 is no float32
    return jnp.ldexp(jnp.ldexp(x, -half), half - jnp.frexp(largest)[1])


def inner(a: jax.Array, b: jax.Array) -> jax.Array:
    """Inner products of all pairs of rows, a [..., R, D], b [..., C, D] -> [..., R, C], in full precision."""
    # A TPU and TF32 round the inputs by default to fewer bits than a logit scaled by 1/temperature needs.
    return jnp.einsum("...rd,...cd->...rc", a, b, precision=lax.Precision.HIGHEST)


def all_gather(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """Concatenates the rows of all devices in device order. Without an axis, returns `x`."""
    return x if axis_name is None else lax.all_gather(x, axis_name, axis=0, tiled=True)


def total(x: Any, axis_name: AxisName) -> Any:
    """Sums over the devices of an axis (psum). Without an axis, returns `x`."""
    return x if axis_name is None else lax.psum(x, axis_name)


def first_row(rows: int, axis_name: AxisName) -> jax.Array | int:
    """Position of this device's first row in the global batch, for `rows` rows on each device."""
    return 0 if axis_name is None else lax.axis_index(axis_name) * rows


def check_choice(loss: str, name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raises UserError unless `value` is one of `choices`."""
    if value not in choices:
        raise UserError(f"{loss}: {name}={value!r}, expected one of {', '.join(map(str, choices))}")


def check_above_zero(loss: str, **values: Any) -> None:
    """Raises UserError for a number that is not above 0. Traced values cannot be checked and pass."""
    for name, value in values.items():
        known = number(value)
        if known is not None and not known > 0:
            raise UserError(f"{loss}: {name}={value}, expected a number above 0")


def check_floating(loss: str, **arrays: jax.Array) -> None:
    """Raises UserError unless every array has a floating-point type."""
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise UserError(f"{loss}: {name} has type {array.dtype}, expected floating point")


def check_shape(loss: str, name: str, array: jax.Array, shape: tuple[int, ...], why: str = "") -> None:
    """Raises UserError unless `array` has exactly this shape. `why` is added to the message."""
    if array.shape != shape:
        raise UserError(f"{loss}: {name} has shape {array.shape}, expected {shape}{why and ': ' + why}")
