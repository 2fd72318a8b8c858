"""White-box attacks on a classifier, in pixel units.

N images, H W C of an image, K classes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxcl.adversarial import fgsm, pgd
from jaxcl.losses import cross_entropy


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
    """One step along the gradient sign of the cross-entropy: clip(pixels + epsilon * sign(grad), 0, 1).

    Args:
      logits_fn: normalised images [N, H, W, C] -> logits [N, K]; in inference mode, so that the gradient of an image
        does not depend on the others.
      pixels: [N, H, W, C] in [0, 1].
      labels: [N] int, the true classes; rows with a negative label are not attacked.
      epsilon: a scalar or [C], in [0, 1] units, such as 4 / 255.
      mean, std: scalars or [C], in [0, 1] units: the normalisation that logits_fn expects.
      where: [N] bool, False for padded rows, which are not attacked.

    Returns:
      [N, H, W, C] adversarial pixels in [0, 1]; normalise them before classifying.

    Raises:
      UserError: epsilon negative or above 1.

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
    """Many steps along the gradient sign of the cross-entropy, within epsilon of every pixel's value.

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
    return lambda x: cross_entropy(logits_fn((x - mean) / std), labels, where=where)
