"""White-box attacks on a classifier, in pixel units.

The attacked loss of an image is its log-odds against the true class, m = log sum_{c != y} exp(z_c) - z_y. The
cross-entropy is log(1 + exp(m)): its gradient is that of m times a positive number, so both give the same attack. But
that number, and first the part of the true class in it, rounds to 0 for a confident classifier (margins above 17 in
float32), which then seems robust. The gradient of m does not vanish.

N images, H W C of an image, K classes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxcl.adversarial import fgsm, pgd
from jaxcl.errors import UserError
from jaxcl.losses.common import widened
from jaxcl.losses.labels import as_array, class_numbers, flags


def fgsm_examples(
    logits_fn: Callable[[jax.Array], jax.Array],
    pixels: ArrayLike,
    labels: ArrayLike,
    *,
    epsilon: ArrayLike,
    mean: ArrayLike,
    std: ArrayLike,
    where: ArrayLike | None = None,
) -> jax.Array:
    """One step along the gradient sign of the loss: clip(pixels + epsilon * sign(grad), 0, 1).

    The loss is the log-odds against the true class, whose gradient has the direction of the cross-entropy's but does
    not vanish where the classifier is confident.

    Args:
      logits_fn: normalised images [N, H, W, C] -> logits [N, K]; in inference mode, so that the gradient of an image
        does not depend on the others.
      pixels: [N, H, W, C] in [0, 1].
      labels: [N] int, the true classes; rows with a negative label are not attacked. A traced label that is no class
        makes the image NaN.
      epsilon: a scalar or [C], in [0, 1] units, such as 4 / 255.
      mean, std: scalars or [C], in [0, 1] units: the normalisation that logits_fn expects.
      where: [N] bool, False for padded rows, which are not attacked.

    Returns:
      [N, H, W, C] adversarial pixels in [0, 1]; normalise them before classifying.

    Raises:
      UserError: epsilon negative or above 1, pixels outside [0, 1], or a label that is no class.

    References:
      Goodfellow et al. 2015, arXiv 1412.6572; as in ExCon (Zhang et al. 2021, arXiv 2111.14271).
    """
    pixels = jnp.asarray(pixels)
    return fgsm(_classification(logits_fn, pixels, labels, mean, std, where), pixels, epsilon=epsilon)


def pgd_examples(
    logits_fn: Callable[[jax.Array], jax.Array],
    pixels: ArrayLike,
    labels: ArrayLike,
    *,
    epsilon: ArrayLike,
    num_steps: int = 20,
    step_size: ArrayLike | None = None,
    mean: ArrayLike,
    std: ArrayLike,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Many steps along the gradient sign of the loss of `fgsm_examples`, within epsilon of every pixel's value.

    It starts at the image and ends at the last step, so it is deterministic. Other arguments, the result and errors are
    those of `fgsm_examples`.

    Args:
      num_steps: >= 0.
      step_size: in the units of epsilon; None: 2.5 * epsilon / num_steps.

    References:
      Madry et al. 2018, arXiv 1706.06083.
    """
    pixels = jnp.asarray(pixels)
    loss = _classification(logits_fn, pixels, labels, mean, std, where)
    return pgd(loss, pixels, epsilon=epsilon, num_steps=num_steps, step_size=step_size)


def _classification(logits_fn, pixels, labels, mean, std, where):
    mean, std = jnp.asarray(mean, pixels.dtype), jnp.asarray(std, pixels.dtype)
    labels, where = as_array(labels), flags(where)

    def loss(x):
        (logits_NxK,) = widened(logits_fn((x - mean) / std))
        return _log_odds_against(logits_NxK, labels, where)

    return loss


def _log_odds_against(logits_NxK, labels, where):
    """log sum_{c != y} exp(z_c) - z_y of each image [N]; 0 where `where` is False or the label negative."""
    num_classes = logits_NxK.shape[1]
    if labels.shape != logits_NxK.shape[:1]:
        raise UserError(f"attack: labels of shape {labels.shape}, expected one for each image, {logits_NxK.shape[:1]}")
    labels_N = class_numbers("attack", labels, num_classes, where)
    valid_N = labels_N >= 0 if where is None else (labels_N >= 0) & where.astype(bool)
    logits_NxK = jnp.where(valid_N[:, None], logits_NxK, 0)  # padding may be NaN
    own_NxK = jnp.where(valid_N, labels_N, 0)[:, None] == jnp.arange(num_classes)
    others_N = jax.nn.logsumexp(jnp.where(own_NxK, -jnp.inf, logits_NxK), axis=1)
    odds_N = others_N - jnp.sum(jnp.where(own_NxK, logits_NxK, 0), axis=1)
    odds_N *= jnp.where(labels_N >= num_classes, jnp.nan, 1)
    # Without another class that is possible there is nothing to attack.
    return jnp.where(valid_N & ~jnp.isneginf(others_N), odds_N, 0)
