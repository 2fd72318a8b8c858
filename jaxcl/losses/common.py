"""What every loss needs: the working precision, unit vectors, checks of arguments, and sums over devices."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.errors import UserError

# One mesh axis or several; None: all rows are here.
AxisName = str | tuple[str, ...] | None

# Shorter vectors have no direction worth a gradient of 1/norm: they stay zero and receive none.
NORM_FLOOR = 1e-12


def widened(*arrays: Any) -> list[jax.Array]:
    """The arrays in their common floating type, float32 at least."""
    arrays = [jnp.asarray(a) for a in arrays]
    dtype = jnp.promote_types(jnp.result_type(*arrays), jnp.float32)
    return [a.astype(dtype) for a in arrays]


def unit(x: jax.Array) -> jax.Array:
    """Vectors along the last axis scaled to length 1; a zero vector stays zero, with zero gradient.

    NaN is not short: it must reach the loss, which is how divergence is noticed.
    """
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    usable = ~(square <= NORM_FLOOR**2)
    return jnp.where(usable, x * lax.rsqrt(jnp.where(usable, square, 1)), 0)


def inner(a: jax.Array, b: jax.Array) -> jax.Array:
    """All inner products of rows, a [..., R, D], b [..., C, D] -> [..., R, C], in full precision on every device."""
    # The default precision of a TPU or of TF32 rounds the inputs to fewer bits than a logit of 1/temperature needs.
    return jnp.einsum("...rd,...cd->...rc", a, b, precision=lax.Precision.HIGHEST)


def gather(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """The rows of all devices, in order of device; `x` itself without an axis."""
    return x if axis_name is None else lax.all_gather(x, axis_name, axis=0, tiled=True)


def total(x: Any, axis_name: AxisName) -> Any:
    """Sum over the devices of an axis; `x` itself without one."""
    return x if axis_name is None else lax.psum(x, axis_name)


def first_row(rows: int, axis_name: AxisName) -> jax.Array | int:
    """Position of this device's first row in the global batch."""
    return 0 if axis_name is None else lax.axis_index(axis_name) * rows


def check_choice(loss: str, name: str, value: Any, choices: Sequence[Any]) -> None:
    """UserError unless `value` is one of `choices`."""
    if value not in choices:
        raise UserError(f"{loss}: {name}={value!r}, expected one of {', '.join(map(str, choices))}")


def check_above_zero(loss: str, **values: Any) -> None:
    """UserError for a Python number that is not above 0; traced values pass."""
    for name, value in values.items():
        if isinstance(value, (int, float)) and not value > 0:
            raise UserError(f"{loss}: {name}={value}, expected a number above 0")


def check_floating(loss: str, **arrays: jax.Array) -> None:
    """UserError unless every array holds floating-point numbers."""
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise UserError(f"{loss}: {name} of type {array.dtype}, expected floating point")


def check_shape(loss: str, name: str, array: jax.Array, shape: tuple[int, ...], why: str = "") -> None:
    """UserError unless `array` has exactly this shape."""
    if array.shape != shape:
        raise UserError(f"{loss}: {name} of shape {array.shape}, expected {shape}{why and ': ' + why}")
