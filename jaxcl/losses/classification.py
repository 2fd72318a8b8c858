"""Softmax cross-entropy with labels or distributions as targets, which skips unlabelled and padded rows."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.errors import UserError
from jaxcl.losses.common import Array, AxisName, number, total, widened
from jaxcl.losses.labels import as_array, checked_numbers, flags


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
      logits: [..., C], any float type, or anything that `jnp.asarray` takes. Computed in float32 at least. -inf masks
        a class: its probability is 0, and it adds nothing unless its target is above 0.
      labels: [...] int, a class in [0, C); a negative label (-1) marks an unlabelled row, which is ignored. Or
        [..., C] of a floating type: one distribution for each row (mixed or distilled targets), used unchanged. A
        traced label of C or more makes value and gradient NaN.
      where: [...] bool, False for padded rows, which are ignored and may hold any value.
      label_smoothing: e in [0, 1]. The target becomes (1 - e) * target + e / C. Above 0 the loss of a row with a masked
        class is infinite.
      axis_name: inside `jax.shard_map`, the mesh axis (or axes) over which the rows are split. The mean is over
        the rows of all devices, and equal on every device.

    Returns:
      A scalar, float32 or wider: the mean over the labelled, valid rows. 0 if there are none.

    Raises:
      UserError: shapes or types that do not match, or a label that is no class.

    Example:
      loss = losses.cross_entropy(logits, labels, label_smoothing=0.1)
    """
    # What is an array goes to the program as it is: `jnp.asarray` takes as long as small losses do.
    logits = logits if hasattr(logits, "dtype") else jnp.asarray(logits)
    labels = as_array(labels)
    soft = jnp.issubdtype(labels.dtype, jnp.floating)
    if logits.ndim < 1 or labels.shape != (logits.shape if soft else logits.shape[:-1]):
        raise UserError(
            f"cross_entropy: labels of type {labels.dtype} and shape {labels.shape} for logits of shape "
            f"{logits.shape}, expected one label (integer) or one distribution (floating point) for each row of logits"
        )
    smoothing = number(label_smoothing)
    if smoothing is not None and not 0 <= smoothing <= 1:
        raise UserError(f"cross_entropy: label_smoothing={smoothing}, expected a number from 0 to 1")
    labels = labels if soft else checked_numbers("cross_entropy", labels, logits.shape[-1], where)
    return _cross_entropy(logits, labels, flags(where), label_smoothing if smoothing != 0 else None, axis_name)


@functools.partial(jax.jit, static_argnums=4)
def _cross_entropy(logits, labels, where, label_smoothing, axis_name):
    (logits,) = widened(logits)
    soft, num_classes = jnp.issubdtype(labels.dtype, jnp.floating), logits.shape[-1]
    valid = jnp.ones(logits.shape[:-1], bool) if soft else labels >= 0
    if where is not None:
        valid &= where.astype(bool)
    logits = jnp.where(valid[..., None], logits, 0)  # padding may be NaN, and 0 * NaN would make the gradient NaN
    if soft:
        log_probs = jax.nn.log_softmax(logits, axis=-1)
        target = jnp.where(valid[..., None], labels, 0).astype(logits.dtype)
        picked = jnp.sum(_weighted(target, log_probs), axis=-1)
    else:
        # The terms of log_softmax, without its array of the size of the logits.
        largest = lax.stop_gradient(jnp.max(logits, axis=-1))
        log_sum = jnp.log(jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1))
        number_N = jnp.where(valid, labels, 0)
        picked = jnp.take_along_axis(logits, number_N[..., None], axis=-1, mode="clip")[..., 0] - largest - log_sum
        picked *= jnp.where(number_N >= num_classes, jnp.nan, 1)  # its gradient too
    loss = -picked
    if label_smoothing is not None:
        mean = jnp.mean(log_probs if soft else logits - (largest + log_sum)[..., None], axis=-1)
        loss = -_weighted(1 - label_smoothing, picked) - _weighted(label_smoothing, mean)
    loss_sum, count = jnp.sum(jnp.where(valid, loss, 0)), jnp.sum(valid, dtype=jnp.int32)
    return total(loss_sum, axis_name) / jnp.maximum(total(count, axis_name), 1)


def _weighted(weight: Array, log_probs: Array) -> Array:
    """weight * log_probs, and 0 where the weight is 0 and the probability too."""
    return weight * jnp.where((weight == 0) & jnp.isneginf(log_probs), 0, log_probs)
