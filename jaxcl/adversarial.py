"""Adversarial images by one or several steps along the sign of a loss's gradient."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxcl.errors import UserError


def pgd(
    loss_fn: Callable[[jax.Array], jax.Array],
    x: ArrayLike,
    *,
    epsilon: ArrayLike,
    step_size: ArrayLike | None = None,
    num_steps: int = 1,
    delta0: ArrayLike | None = None,
    bounds: tuple[float, float] | None = (0.0, 1.0),
) -> jax.Array:
    """Projected gradient ascent on a loss of the whole batch, in the box of half-width epsilon around x.

    x_0 = clip(x + delta0), then num_steps times
    x_{t+1} = clip(clip(x_t + step_size * sign(grad at x_t), x - epsilon, x + epsilon), *bounds), sign(0) = 0.

    Only the images are differentiated, and what the attack computes carries no gradient: under an outer
    gradient the result moves with x alone.

    Args:
      loss_fn: images like x -> scalar loss, to be increased. It may depend on the batch as a whole.
      x: [N, H, W, C] images (any floating array works).
      epsilon: largest change of a value, in the units of x: a scalar, or [C] for one a channel. May be
        traced, and is then not checked.
      step_size: as epsilon. None: epsilon for one step, else 2.5 * epsilon / num_steps, which can reach any
        point of the box (Madry et al.).
      num_steps: >= 1, or 0 for x + delta0 clipped.
      delta0: start offset like x, or None.
      bounds: (lowest, highest) value of an image; None: no clipping to a range, only to the box.

    Returns:
      The adversarial images, shape and type of x.

    Raises:
      UserError: epsilon negative, or above the width of the bounds (as when given in 0..255 units).

    References:
      Madry et al., arXiv:1706.06083; on a contrastive loss: Ho and Vasconcelos, "Contrastive Learning with
      Adversarial Examples", arXiv:2010.12050.
    """
    x = jnp.asarray(x)
    _check(x, epsilon, step_size, num_steps, bounds)
    epsilon = jnp.asarray(epsilon, x.dtype)
    if step_size is None:
        step_size = epsilon if num_steps <= 1 else 2.5 * epsilon / num_steps
    step_size = jnp.asarray(step_size, x.dtype)
    lowest, highest = x - epsilon, x + epsilon

    def clip(v):
        return v if bounds is None else jnp.clip(v, *bounds)

    def step(v, _):
        gradient = lax.stop_gradient(jax.grad(loss_fn)(lax.stop_gradient(v)))
        return clip(jnp.clip(v + step_size * jnp.sign(gradient), lowest, highest)), None

    start = x if delta0 is None else clip(x + jnp.asarray(delta0, x.dtype))
    if num_steps == 1:  # no loop to compile
        return step(start, None)[0]
    return lax.scan(step, start, length=num_steps)[0]


def fgsm(
    loss_fn: Callable[[jax.Array], jax.Array],
    x: ArrayLike,
    *,
    epsilon: ArrayLike,
    bounds: tuple[float, float] | None = (0.0, 1.0),
) -> jax.Array:
    """Fast gradient sign method: clip(x + epsilon * sign(grad loss_fn(x)), *bounds), sign(0) = 0.

    Arguments and errors as for `pgd`. Reference: Goodfellow et al., arXiv:1412.6572.
    """
    return pgd(loss_fn, x, epsilon=epsilon, bounds=bounds)


def _check(x, epsilon, step_size, num_steps, bounds):
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise UserError(f"attack: images of type {x.dtype}, expected floating point; divide uint8 by 255")
    if num_steps < 0:
        raise UserError(f"attack: num_steps={num_steps}, expected 0 or more")
    for name, value in (("epsilon", epsilon), ("step_size", step_size)):
        if value is None or isinstance(value, jax.core.Tracer):
            continue
        value = np.asarray(value)
        if value.size and not value.min() >= 0:
            raise UserError(f"attack: {name}={value}, expected 0 or more")
        if name == "epsilon" and bounds is not None and value.size and value.max() > bounds[1] - bounds[0]:
            raise UserError(
                f"attack: epsilon={value} with images in [{bounds[0]:g}, {bounds[1]:g}], expected the "
                "images' own units; divide a value in 0..255 units by 255"
            )
