"""White-box attacks on a classifier, in pixel units."""

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
      logits_fn: normalised images [N, H, W, C] -> logits [N, K]; in inference mode, so that an image's
        gradient is its own.
      pixels: [N, H, W, C] in [0, 1].
      labels: [N] int, the true classes; negative rows are not attacked.
      epsilon: in [0, 1] units, e.g. 4 / 255; a scalar or [C].
      mean, std: [C] (or scalar) of the normalisation logits_fn expects, in [0, 1] units.
      where: [N] bool, False for padded rows: not in the mean, returned as they came (clipped).

    Returns:
      [N, H, W, C] adversarial pixels in [0, 1]; normalise them before classifying.

    Raises:
      UserError: epsilon negative or above 1.

    References:
      Goodfellow et al., arXiv:1412.6572; as used by ExCon, arXiv:2111.14271.
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
    """Many steps along the gradient sign of the cross-entropy, never further than epsilon from a pixel's value.

    Starts at the image itself and ends at the last step, so it is deterministic. Arguments, returns and errors as for
    `fgsm_examples`, and:

    Args:
      num_steps: >= 0.
      step_size: as epsilon; None: 2.5 * epsilon / num_steps.

    References:
      Madry et al., arXiv:1706.06083.
    """
    pixels = jnp.asarray(pixels)
    loss = _classification(logits_fn, pixels, labels, mean, std, where)
    return pgd(loss, pixels, epsilon=epsilon, num_steps=num_steps, step_size=step_size)


def _classification(logits_fn, pixels, labels, mean, std, where):
    mean, std = jnp.asarray(mean, pixels.dtype), jnp.asarray(std, pixels.dtype)
    return lambda x: cross_entropy(logits_fn((x - mean) / std), labels, where=where)
