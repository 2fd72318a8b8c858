"""Soft-max cross-entropy with labels or distributions as targets, that skips unlabelled and padded rows."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxcl.errors import UserError
from jaxcl.losses.common import AxisName, total, widened


@functools.partial(jax.jit, static_argnames=("axis_name",))
def cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    where: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    axis_name: AxisName = None,
) -> jax.Array:
    """Mean soft-max cross-entropy over the labelled rows.

    Args:
      logits: [..., C], any float type; computed in float32 at least.
      labels: [...] int, a class in [0, C); negative (-1) marks an unlabelled row, which is ignored. Or [..., C] of a
        floating type: a distribution a row (mixed or distilled targets), used as it is.
      where: [...] bool, False for padded rows, which are ignored and may hold anything.
      label_smoothing: e in [0, 1]: the target is (1 - e) times itself plus e / C on every class.
      axis_name: inside `jax.shard_map`, the mesh axis (or axes) over which the rows are split: the mean is over
        the rows of all devices, and equal on them.

    Returns:
      A scalar, float32 or wider: the mean over the rows that count, 0 if there are none.

    Raises:
      UserError: shapes or types that do not match.
    """
    (logits,), labels = widened(logits), jnp.asarray(labels)
    soft = jnp.issubdtype(labels.dtype, jnp.floating)
    if logits.ndim < 1 or labels.shape != (logits.shape if soft else logits.shape[:-1]):
        raise UserError(
            f"cross_entropy: labels of type {labels.dtype} and shape {labels.shape} for logits of shape "
            f"{logits.shape}, expected one label a row of logits (integers) or one distribution a row (floating point)"
        )
    valid = jnp.ones(logits.shape[:-1], bool) if soft else labels >= 0
    if where is not None:
        valid &= jnp.asarray(where, bool)
    logits = jnp.where(valid[..., None], logits, 0)  # padding may be NaN; 0 * NaN would reach the gradient
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    if soft:
        picked = jnp.sum(jnp.where(valid[..., None], labels, 0).astype(logits.dtype) * log_probs, axis=-1)
    else:
        picked = jnp.take_along_axis(log_probs, jnp.where(valid, labels, 0)[..., None], axis=-1)[..., 0]
    loss = -(1 - label_smoothing) * picked - label_smoothing * jnp.mean(log_probs, axis=-1)
    loss_sum, count = jnp.sum(jnp.where(valid, loss, 0)), jnp.sum(valid, dtype=jnp.int32)
    return total(loss_sum, axis_name) / jnp.maximum(total(count, axis_name), 1)
