"""Calibration: the gap between a classifier's confidence and its accuracy.

N images, C classes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxcl.errors import UserError
from jaxcl.evaluate.base import Evaluator, Metric, Metrics, Panels, accuracy
from jaxcl.evaluate.context import EvalContext
from jaxcl.losses.labels import as_array, class_numbers, flags


def expected_calibration_error(
    probs: ArrayLike, labels: ArrayLike, *, num_bins: int = 10, where: ArrayLike | None = None
) -> jax.Array:
    """Top-label expected calibration error: sum over bins of (count / N) * |accuracy - confidence|.

    Args:
      probs: [N, C] class probabilities.
      labels: [N] int; rows with a negative label do not count.
      num_bins: equal bins of the confidence in [0, 1], closed on the left; the last one includes 1.
      where: [N] bool, False for padded rows.

    Returns:
      A scalar in [0, 1]; 0 if no row counts.

    Raises:
      UserError: shapes that do not match, num_bins below 1, or a label that is no class. A traced label that is no
        class counts as a miss.

    References:
      Guo et al. 2017, arXiv 1706.04599, eq. 3.
    """
    bins = reliability(probs, labels, num_bins=num_bins, where=where)
    gap = jnp.abs(bins["accuracy"] - bins["confidence"])
    return jnp.sum(bins["count"] * gap) / jnp.maximum(jnp.sum(bins["count"]), 1)


def reliability(
    probs: ArrayLike, labels: ArrayLike, num_bins: int = 10, *, where: ArrayLike | None = None
) -> dict[str, jax.Array]:
    """The bins of a reliability diagram; arguments and errors as in `expected_calibration_error`.

    Returns:
      {"count": int32 [num_bins], "accuracy": [num_bins], "confidence": [num_bins]}: the number of rows in each bin,
      their top-1 accuracy and their mean confidence, 0 for an empty bin.
    """
    probs, labels = jnp.asarray(probs), as_array(labels)
    if not isinstance(num_bins, (int, np.integer)) or num_bins < 1:
        raise UserError(f"calibration: num_bins={num_bins}, expected a whole number of at least 1")
    if probs.ndim != 2 or labels.shape != (len(probs),):
        raise UserError(
            f"calibration: probs of shape {probs.shape} and labels of shape {labels.shape}, "
            "expected [rows, classes] and [rows]"
        )
    labels = class_numbers("calibration", labels, probs.shape[1], where)
    return _bins(probs, labels, int(num_bins), flags(where))


@functools.partial(jax.jit, static_argnums=2)
def _bins(probs, labels, num_bins, where):
    dtype = jnp.promote_types(probs.dtype, jnp.float32)
    probs = probs.astype(dtype)
    valid = labels >= 0 if where is None else (labels >= 0) & where.astype(bool)
    # Just below 1, so that a confidence of 1 falls into the last bin, as in the reference library.
    confidence = jnp.minimum(jnp.max(probs, axis=1), 1 - jnp.finfo(dtype).eps)
    hit = jnp.argmax(probs, axis=1) == labels
    # Compared with the edges: floor(confidence * num_bins) would round some edges into the bin below. NumPy makes the
    # edges, because XLA may multiply by 1 / num_bins instead of dividing, and 3 * 0.1 is above 0.3.
    edges = jnp.asarray(np.arange(num_bins) / num_bins, dtype)
    index = jnp.searchsorted(edges, confidence, side="right") - 1
    index = jnp.where(valid, index, num_bins)  # out of range, so that `mode="drop"` ignores the row

    def per_bin(values):
        return jnp.zeros(num_bins, values.dtype).at[index].add(values, mode="drop")

    count = per_bin(jnp.ones(len(probs), jnp.int32))
    rows = jnp.maximum(count, 1)
    return {
        "count": count,
        "accuracy": per_bin(hit.astype(dtype)) / rows,
        "confidence": per_bin(confidence) / rows,
    }


def bins(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """`reliability` on the host."""
    return {k: np.asarray(v) for k, v in reliability(probabilities, labels).items()}


class Calibration(Evaluator):
    """Expected calibration error of the online classifier on the test split and, where there is one, its shifted form.

    Metrics: "clean" and "test_shifted", {"accuracy", "ece"} each.
    """

    needs_classifier = True
    needs_labels = ("test",)
    metrics = {
        "test_shifted.accuracy": Metric(
            "Online classifier, shifted test", meaning="on test images from another distribution than training images"
        ),
        "clean.ece": Metric("ECE, clean", "lower", meaning="the mean gap between confidence and accuracy"),
        "test_shifted.ece": Metric(
            "ECE, shifted test",
            "lower",
            meaning="the same on shifted test images, where networks tend to be too sure",
        ),
    }

    def __call__(self, context: EvalContext) -> tuple[Metrics, Panels]:
        metrics, diagrams = {}, {}
        for split in ("test", "test_shifted"):
            source = context.source(split)
            if source is None:
                continue
            probabilities = context.probabilities(split)
            name = "clean" if split == "test" else split
            metrics[name] = {
                "accuracy": accuracy(probabilities.argmax(-1), source.labels),
                "ece": float(expected_calibration_error(probabilities, source.labels)),
            }
            diagrams[name] = bins(probabilities, source.labels)
        return metrics, {"reliability": diagrams}
