"""How far a classifier's confidence is from its accuracy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxcl.errors import UserError


@functools.partial(jax.jit, static_argnames="num_bins")
def expected_calibration_error(
    probs: ArrayLike, labels: ArrayLike, *, num_bins: int = 10, where: ArrayLike | None = None
) -> jax.Array:
    """Top-label expected calibration error: sum over bins of (count / N) * |accuracy - confidence|.

    Args:
      probs: [N, C] class probabilities.
      labels: [N] int; negative rows are ignored.
      num_bins: equal bins of [0, 1] by confidence, closed on the left; the last also holds 1.
      where: [N] bool, False for padded rows.

    Returns:
      A scalar, a fraction from 0 to 1 (0 with no row to count).

    References:
      Guo et al., "On Calibration of Modern Neural Networks", arXiv:1706.04599, eq. 3.
    """
    bins = reliability(probs, labels, num_bins=num_bins, where=where)
    gap = jnp.abs(bins["accuracy"] - bins["confidence"])
    return jnp.sum(bins["count"] * gap) / jnp.maximum(jnp.sum(bins["count"]), 1)


@functools.partial(jax.jit, static_argnames="num_bins")
def reliability(
    probs: ArrayLike, labels: ArrayLike, num_bins: int = 10, *, where: ArrayLike | None = None
) -> dict[str, jax.Array]:
    """The bins of a reliability diagram; arguments as for `expected_calibration_error`.

    Returns:
      {"count": [num_bins] int32, "accuracy": [num_bins], "confidence": [num_bins]}: rows in each bin, their
      top-1 accuracy and mean confidence, 0 for an empty bin.
    """
    probs, labels = jnp.asarray(probs), jnp.asarray(labels)
    if probs.ndim != 2 or labels.shape != (len(probs),):
        raise UserError(
            f"calibration: probs of shape {probs.shape} and labels of shape {labels.shape}, "
            "expected [rows, classes] and [rows]"
        )
    dtype = jnp.promote_types(probs.dtype, jnp.float32)
    probs = probs.astype(dtype)
    valid = labels >= 0 if where is None else (labels >= 0) & jnp.asarray(where, bool)
    # Just below 1, as in the reference library, so that a certain answer has a bin.
    confidence = jnp.minimum(jnp.max(probs, axis=1), 1 - jnp.finfo(dtype).eps)
    hit = jnp.argmax(probs, axis=1) == labels
    # Against the edges themselves: floor(confidence * num_bins) rounds some edges into the bin below.
    # Made by numpy: XLA may divide by multiplying with 1 / num_bins, and 3 * 0.1 is above 0.3.
    edges = jnp.asarray(np.arange(num_bins) / num_bins, dtype)
    index = jnp.searchsorted(edges, confidence, side="right") - 1
    index = jnp.where(valid, index, num_bins)  # out of range: dropped

    def per_bin(values):
        return jnp.zeros(num_bins, values.dtype).at[index].add(values, mode="drop")

    count = per_bin(jnp.ones(len(probs), jnp.int32))
    rows = jnp.maximum(count, 1)
    return {
        "count": count,
        "accuracy": per_bin(hit.astype(dtype)) / rows,
        "confidence": per_bin(confidence) / rows,
    }
