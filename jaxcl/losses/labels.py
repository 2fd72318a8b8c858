"""Labels and flags as a caller passes them, looked at before JAX narrows 64-bit numbers to 32 bits.

Concrete values are looked at on the host. Nothing is done with traced values, nor with arrays of which this process
holds a part only.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.errors import UserError
from jaxcl.losses.common import concrete

INT32 = np.iinfo(np.int32)


def as_array(labels: Any) -> np.ndarray | jax.Array:
    """Labels as an array that is not narrowed: of type object for integers that no 64-bit type holds."""
    if hasattr(labels, "dtype"):
        return labels
    if concrete(labels) is None:
        return jnp.asarray(labels)
    values = np.asarray(labels)
    if values.dtype.kind == "f":  # NumPy makes floats of integers that need both a sign and 64 bits
        exact = np.asarray(labels, object)
        return exact if all(isinstance(v, int) for v in exact.ravel()) else values
    return values


def class_ids(what: str, labels: Any, *, integers: bool = False) -> jax.Array:
    """Labels as an array in which two entries are equal if and only if they were equal before.

    What 32 bits cannot tell apart is numbered: negative labels stay negative, and -1 stays -1.

    Raises:
      UserError: NaN, which equals nothing; a type that is no number, or no integer with `integers`.
    """
    labels = as_array(labels)
    if isinstance(labels, jax.Array) and np.can_cast(labels.dtype, np.int32):
        return labels
    floating, integer = (jnp.issubdtype(labels.dtype, kind) for kind in (jnp.floating, jnp.integer))
    if labels.dtype == object and all(isinstance(v, int) for v in labels.ravel()):
        return jnp.asarray(_numbered(labels))
    if not (integer or labels.dtype == bool or (floating and not integers)):
        raise UserError(
            f"{what}: labels has type {labels.dtype}, expected integers, such as np.unique(..., return_inverse=True) "
            "makes, or -1 for unlabelled"
        )
    values = concrete(labels)
    if values is None:
        return jnp.asarray(labels)
    if floating and np.isnan(values).any():
        raise UserError(f"{what}: labels holds NaN, which equals no class, expected an id for each sample")
    return jnp.asarray(labels if _fits(values) else _numbered(values))


def _fits(values: np.ndarray) -> bool:
    """Whether all values keep their differences in the type that JAX gives them, and integers as int32."""
    if values.dtype.kind in "iu":
        small = np.can_cast(values.dtype, np.int32)
        return small or not values.size or INT32.min <= values.min() <= values.max() <= INT32.max
    return values.dtype.itemsize < 8 or np.array_equal(values.astype(np.float32), values)


def _numbered(values: np.ndarray) -> np.ndarray:
    found, number = np.unique(values, return_inverse=True)
    number = number.reshape(values.shape) - int((found < 0).sum())
    return np.where((number < 0) & ((found != -1).all()), number - 1, number).astype(np.int32)


def class_numbers(what: str, labels: Any, num_classes: int, where: Any = None) -> jax.Array:
    """`checked_numbers` as an array of JAX."""
    checked = checked_numbers(what, labels, num_classes, where)
    return checked if isinstance(checked, jax.Array) else jnp.asarray(checked)


def checked_numbers(what: str, labels: Any, num_classes: int, where: Any = None) -> np.ndarray | jax.Array:
    """Labels that number `num_classes` classes, any shape; a negative one (-1) marks an unlabelled row.

    An array stays as it is, because a jitted function takes those of NumPy several times as fast as `jnp.asarray` does.

    Args:
      what: the function, for messages.
      where: bool like the labels, False for rows that may hold anything.

    Raises:
      UserError: labels that are not integers, or one that is not below `num_classes`.
    """
    labels = as_array(labels)
    # `kind` is fast; types that only JAX has are of kind "V".
    if labels.dtype.kind not in "iubO" and not jnp.issubdtype(labels.dtype, jnp.integer):
        raise UserError(f"{what}: labels of type {labels.dtype}, expected integers: a class from 0, or -1 for no label")
    values = concrete(labels)
    if values is None or not values.size:
        return labels
    counted = None if where is None else concrete(where)
    if counted is not None and counted.shape == values.shape:
        values = np.where(counted.astype(bool), values, -1)
    # `reduce` and not `max`, which is a function of Python, and takes as long as the rest of this one.
    if (where is None or counted is not None) and np.maximum.reduce(values, axis=None) >= num_classes:
        row = int(np.argmax(values.ravel() >= num_classes))
        raise UserError(
            f"{what}: labels has {values.ravel()[row]} in row {row}, expected at most {num_classes - 1} for "
            f"{num_classes} classes, or -1 for no label"
        )
    if values.itemsize > 4 and (values.dtype.kind == "O" or np.minimum.reduce(values, axis=None) < INT32.min):
        return np.maximum(values, -1).astype(np.int32)  # narrowed, it would be another class
    return labels


def flags(x: Any) -> jax.Array | None:
    """`x` as an array that is not 0 where `x` is not; None stays None. Narrowing would make 0 of 2**32 and of 1e-50."""
    if x is None or isinstance(x, jax.Array):
        return x
    values = concrete(x)
    return jnp.asarray(x if values is None or values.dtype.kind not in "iuf" else values != 0)
