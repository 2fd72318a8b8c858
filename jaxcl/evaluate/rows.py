"""Checks of features and labels that a caller gives, row by row."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.errors import UserError
from jaxcl.losses.common import concrete


class NotFinite(UserError):
    """Features hold NaN or infinity: what is measured on them would be wrong without a word."""


def check_finite(what: str, features: jax.Array | np.ndarray, counted: jax.Array | np.ndarray | None = None) -> None:
    """Raises NotFinite for a row of features [N,D] that holds NaN or infinity. Traced values are not looked at.

    Args:
      what: the function and its argument, for the message.
      counted: bool [N], False for rows that may hold anything.
    """
    if isinstance(features, jax.core.Tracer) or isinstance(counted, jax.core.Tracer):
        return
    if isinstance(features, jax.Array):
        with jax.ensure_compile_time_eval():  # it may be a constant of a function that is being traced
            finite = concrete(_finite_rows(features))
    else:
        finite = np.isfinite(features).all(1)
    counted = True if counted is None else concrete(counted)
    if finite is None or counted is None or (bad := ~finite & counted).sum() == 0:
        return
    rows = np.flatnonzero(bad)
    raise NotFinite(
        f"{what}: row {rows[0]} holds NaN or infinity ({len(rows)} of {len(bad)} rows do), expected finite features; "
        "leave out such rows, or look for what made them"
    )


def check_images(features: np.ndarray, source: Any, split: str) -> None:
    """Raises NotFinite by the name of the first image of a source whose features [N,D] are not finite."""
    rows = np.flatnonzero(~np.isfinite(features).all(1))
    if len(rows):
        names = source.extras.get("name")
        name = f"row {rows[0]}" if names is None else str(names[rows[0]])
        raise NotFinite(
            f"the features of {len(rows)} of {len(features)} {split} images hold NaN or infinity (the first: {name}); "
            "look at this image, or whether the encoder has diverged"
        )


@jax.jit
def _finite_rows(features):
    return jnp.all(jnp.isfinite(features), axis=1)


def normalized(x: np.ndarray) -> np.ndarray:
    """Rows [N,D] at unit length, float32; rows of zeros stay zero."""
    x = np.asarray(x, np.float32)
    largest = np.abs(x).max(1, keepdims=True, initial=0)
    x = np.ldexp(x, -np.frexp(largest)[1])  # squares of the result neither overflow nor vanish
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
