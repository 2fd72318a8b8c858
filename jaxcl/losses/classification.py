"""Softmax cross-entropy with labels or distributions as targets, which skips unlabelled and padded rows."""

import functools

import jax
import jax.numpy as jnp

from jaxcl.errors import UserError
from jaxcl.losses.common import Array, AxisName, total, widened


@functools.partial(jax.jit, static_argnames=("axis_name",))
def cross_entropy(
    logits: Array,
    labels: Array,
    *,
    where: Array | None = None,
    label_smoothing: float = 0.0,
    axis_name: AxisName = None,
) -> Array:
    """Mean softmax cross-entropy over the labelled rows.

    Args:
      logits: [..., C], any float type, or anything that `jnp.asarray` takes. Computed in float32 at least.
      labels: [...] int, a class in [0, C); a negative label (-1) marks an unlabelled row, which is ignored. Or
        [..., C] of a floating type: one distribution for each row (mixed or distilled targets), used unchanged.
      where: [...] bool, False for padded rows, which are ignored and may hold any value.
      label_smoothing: e in [0, 1]. The target becomes (1 - e) * target + e / C.
      axis_name: inside `jax.shard_map`, the mesh axis (or axes) over which the rows are split. The mean is over
        the rows of all devices, and equal on every device.

    Returns:
      A scalar, float32 or wider: the mean over the labelled, valid rows. 0 if there are none.

    Raises:
      UserError: shapes or types that do not match.

    Example:
      loss = losses.cross_entropy(logits, labels, label_smoothing=0.1)
    """
    (logits,), labels = widened(logits), jnp.asarray(labels)
    soft = jnp.issubdtype(labels.dtype, jnp.floating)
    if logits.ndim < 1 or labels.shape != (logits.shape if soft else logits.shape[:-1]):
        raise UserError(
            f"cross_entropy: labels of type {labels.dtype} and shape {labels.shape} for logits of shape "
            f"{logits.shape}, expected one label (integer) or one distribution (floating point) for each row of logits"
        )
    valid = jnp.ones(logits.shape[:-1], bool) if soft else labels >= 0
    if where is not None:
        valid &= jnp.asarray(where, bool)
    logits = jnp.where(valid[..., None], logits, 0)  # padding may be NaN, and 0 * NaN would make the gradient NaN
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    if soft:
        picked = jnp.sum(jnp.where(valid[..., None], labels, 0).astype(logits.dtype) * log_probs, axis=-1)
    else:
        picked = jnp.take_along_axis(log_probs, jnp.where(valid, labels, 0)[..., None], axis=-1)[..., 0]
    loss = -(1 - label_smoothing) * picked - label_smoothing * jnp.mean(log_probs, axis=-1)
    loss_sum, count = jnp.sum(jnp.where(valid, loss, 0)), jnp.sum(valid, dtype=jnp.int32)
    return total(loss_sum, axis_name) / jnp.maximum(total(count, axis_name), 1)
