"""Soft-max cross-entropy that skips unlabelled and padded rows."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxcl.errors import UserError


@jax.jit
def cross_entropy(
    logits: ArrayLike, labels: ArrayLike, *, where: ArrayLike | None = None, label_smoothing: float = 0.0
) -> jax.Array:
    """Mean soft-max cross-entropy over the labelled rows.

    Args:
      logits: [..., C], any float type; computed in float32 at least.
      labels: [...] int, a class in [0, C); negative (-1) marks an unlabelled row, which is ignored.
      where: [...] bool, False for padded rows, which are ignored and may hold anything.
      label_smoothing: e in [0, 1]: the target is (1 - e) on the label plus e / C on every class.

    Returns:
      A scalar, float32 or wider: the mean over the rows that count, 0 if there are none.

    Raises:
      UserError: shapes that do not match.
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    if logits.ndim < 1 or labels.shape != logits.shape[:-1]:
        raise UserError(
            f"cross_entropy: labels of shape {labels.shape} for logits of shape {logits.shape}, "
            "expected one label a row of logits"
        )
    valid = labels >= 0 if where is None else (labels >= 0) & jnp.asarray(where, bool)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    logits = jnp.where(valid[..., None], logits, 0)  # padding may be NaN; 0 * NaN would reach the gradient
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    picked = jnp.take_along_axis(log_probs, jnp.where(valid, labels, 0)[..., None], axis=-1)[..., 0]
    loss = -(1 - label_smoothing) * picked - label_smoothing * jnp.mean(log_probs, axis=-1)
    return jnp.sum(jnp.where(valid, loss, 0)) / jnp.maximum(jnp.sum(valid, dtype=jnp.int32), 1)
