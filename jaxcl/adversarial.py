"""Adversarial images: one or several steps along the gradient of any loss, inside a ball around the image.

N images, C channels, K steps.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxcl.errors import UserError
from jaxcl.losses.common import concrete

Bounds = tuple[ArrayLike, ArrayLike] | None
Norm = Literal["linf", "l2"]


def pgd(
    loss_fn: Callable[[jax.Array], jax.Array],
    x: ArrayLike,
    *,
    epsilon: ArrayLike,
    step_size: ArrayLike | None = None,
    num_steps: int | jax.Array = 1,
    delta0: ArrayLike | None = None,
    bounds: Bounds = (0.0, 1.0),
    norm: Norm = "linf",
    key: jax.Array | None = None,
    restarts: int = 1,
) -> jax.Array:
    """Projected gradient ascent on a loss of the whole batch, in the ball of radius epsilon around x.

    x_0 = clip(x + delta0). Then, num_steps times for the norm "linf",
    x_{t+1} = clip(clip(x_t + step_size * sign(grad at x_t), x - epsilon, x + epsilon), *bounds), with sign(0) = 0.
    For "l2", a step goes along the gradient of each image, scaled to length 1 (a zero gradient stays zero). Then the
    whole change of the image is shortened to at most epsilon, before the clip to the bounds. If x lies in the bounds,
    the result lies in the ball and in the bounds: the attack is computed in float32 at least, and images of half
    precision are rounded towards x at the end (float32 itself rounds a value by 6e-8 of it at most).

    Only the images are differentiated, and the attack carries no gradient: under an outer gradient, the derivative of
    the result with respect to x is that of x itself, where nothing is clipped.

        adversarial = pgd(lambda u: nt_xent(encode(u), z), x, epsilon=8 / 255, num_steps=10)

    Args:
      loss_fn: images like x -> the loss to increase. A scalar may depend on the whole batch. If it is [N], one loss per
        image, then the sum is increased, and restarts are chosen per image.
      x: [N, H, W, C] images, floating point. Other shapes work too; the first axis counts the images.
      epsilon: the largest change in the units of x. "linf": of a value, a scalar or [C], one per channel. "l2": of the
        Euclidean norm of an image, a scalar. A traced epsilon is not checked.
      step_size: like epsilon; or a schedule with a leading axis of steps, [K, 1] or [K, C] ("l2": [K, 1]). An array of
        one axis always has one size per channel. None: epsilon for one step, else 2.5 * epsilon / num_steps, which can
        reach any point of the ball (Madry et al.).
      num_steps: at least 1, or 0 to return x_0. May be traced; steps after the end of a schedule repeat its last one.
      delta0: initial offset like x, or None.
      bounds: (lowest, highest) value of an image, scalars or [C]; None: images are clipped to the ball only.
      norm: "linf" or "l2".
      key: start uniformly in the ball instead of at x. One key; or keys [N], one per image, so that the start of an
        image does not depend on its position in the batch.
      restarts: number of random starts, which need a key. The end point with the highest loss is kept: for the whole
        batch if the loss is a scalar, and for each image if it is [N].

    Returns:
      The adversarial images, with the shape and type of x.

    Raises:
      UserError: images that are not floating point, or not within the bounds (traced ones are not looked at); epsilon
        negative, or larger than the bounds allow (as in 0..255
        units); an unknown norm; one epsilon per channel with "l2"; a schedule of another length; delta0 together with
        a key, or restarts without a key; a loss of another shape.

    Source: Madry et al. 2018, arXiv 1706.06083; on a contrastive loss: Ho and Vasconcelos 2020, arXiv 2010.12050.
    """
    x = jnp.asarray(x)
    traced = isinstance(num_steps, jax.core.Tracer)
    num_steps = num_steps if traced else int(num_steps)
    _check_attack(x, norm, num_steps, delta0, key, restarts)
    _check_sizes(x, epsilon, step_size, num_steps, bounds, norm)
    if bounds is not None and x.size and not any(isinstance(v, jax.core.Tracer) for v in (x, *bounds)):
        _check_images(x, *bounds)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    epsilon = jnp.asarray(epsilon, wide)
    if step_size is None:
        step_size = _usual_step(epsilon, num_steps)
    step_size = jnp.asarray(step_size, wide)
    # A loop of unknown length cannot be differentiated. It need not be: see the end of this function.
    origin = (lax.stop_gradient(x) if traced else x).astype(wide)
    if traced:
        epsilon, step_size = lax.stop_gradient((epsilon, step_size))
    if bounds is not None:
        bounds = tuple(lax.stop_gradient(jnp.asarray(b, wide)) for b in bounds)
    lowest, highest = origin - epsilon, origin + epsilon

    def clip(v):
        return v if bounds is None else jnp.clip(v, *bounds)

    def step(v, size):
        size = step_size if size is None else size
        gradient = jax.grad(lambda u: _summed(loss_fn(u), x))(lax.stop_gradient(_narrowed(v, origin, x.dtype)))
        gradient = lax.stop_gradient(gradient.astype(wide))
        if norm == "linf":
            return clip(jnp.clip(v + size * jnp.sign(gradient), lowest, highest)), None
        moved = v + size * _unit_images(gradient)
        return clip(origin + _shortened(lax.stop_gradient(moved - origin), epsilon)), None

    def attack(start):
        schedule = step_size if step_size.ndim == 2 else None
        if traced:
            size_at = lambda t: None if schedule is None else schedule[jnp.minimum(t, len(schedule) - 1)]  # noqa: E731
            return lax.fori_loop(0, num_steps, lambda t, v: step(v, size_at(t))[0], start)
        if num_steps == 1:  # no loop to compile
            return step(start, None if schedule is None else schedule[0])[0]
        return lax.scan(step, start, schedule, length=num_steps)[0]

    def end(start):
        return _narrowed(attack(start), origin, x.dtype)

    if key is None:
        start = origin if delta0 is None else clip(origin + lax.stop_gradient(jnp.asarray(delta0, wide)))
        adversarial = end(start)
    else:
        keys_N = _image_keys(key, len(x))

        def attempt(r):
            delta = _in_ball(jax.vmap(jax.random.fold_in, (0, None))(keys_N, r), origin, epsilon, norm)
            return end(clip(origin + lax.stop_gradient(delta)))

        adversarial = attempt(0) if restarts == 1 else _best(loss_fn, attempt, x, restarts)
    if traced:
        inside = True if bounds is None else (adversarial > bounds[0]) & (adversarial < bounds[1])
        adversarial += jnp.where(inside, x - lax.stop_gradient(x), 0)  # adds 0 with the gradient of x
    return adversarial


def fgsm(
    loss_fn: Callable[[jax.Array], jax.Array],
    x: ArrayLike,
    *,
    epsilon: ArrayLike,
    bounds: Bounds = (0.0, 1.0),
    norm: Norm = "linf",
) -> jax.Array:
    """Fast gradient sign method: clip(x + epsilon * sign(grad loss_fn(x)), *bounds), sign(0) = 0.

    With the norm "l2" the step has length epsilon along the gradient of each image. Arguments and errors are those of
    `pgd`. The default bounds are for images in [0, 1]; pass `bounds=None` for normalised images.

    Source: Goodfellow et al. 2015, arXiv 1412.6572.
    """
    return pgd(loss_fn, x, epsilon=epsilon, bounds=bounds, norm=norm)


def _narrowed(v, origin, dtype):
    """v in the type of the images, rounded towards the origin where rounding to nearest would leave the ball."""
    if v.dtype == dtype:
        return v
    near = v.astype(dtype)
    beyond = jnp.abs(near.astype(v.dtype) - origin) > jnp.abs(v - origin)
    back = lax.nextafter(lax.stop_gradient(near), lax.stop_gradient(origin.astype(dtype)))
    return near + jnp.where(beyond, back - lax.stop_gradient(near), 0)


def _usual_step(epsilon, num_steps):
    if isinstance(num_steps, jax.core.Tracer):
        return jnp.where(num_steps <= 1, epsilon, 2.5 * epsilon / jnp.maximum(num_steps, 1))
    return epsilon if num_steps <= 1 else 2.5 * epsilon / num_steps


def _summed(loss, x):
    if loss.ndim and loss.shape != x.shape[:1]:
        raise UserError(f"attack: loss of shape {loss.shape}, expected a scalar, or one per image, {x.shape[:1]}")
    return jnp.sum(loss) if loss.ndim else loss


def _best(loss_fn, attempt, x, restarts):
    """The end points with the highest loss of several attempts. A NaN loss wins, so that it does not stay hidden."""
    # This loss is never selected, so XLA removes it; it only has the right shape, type and sharding.
    none = jnp.where(False, lax.stop_gradient(loss_fn(lax.stop_gradient(x))), -jnp.inf)

    def more(best, r):
        v = attempt(r)
        loss = lax.stop_gradient(loss_fn(lax.stop_gradient(v)))
        better = ~(loss <= best[1]) & ~jnp.isnan(best[1])
        wide = better.reshape(better.shape + (1,) * (x.ndim - 1)) if better.ndim else better
        return (jnp.where(wide, v, best[0]), jnp.where(better, loss, best[1])), None

    return lax.scan(more, (x, none), jnp.arange(restarts))[0][0]


def _image_keys(key, n):
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.shape not in ((), (n,)):
        raise UserError(f"attack: keys of shape {key.shape}, expected one key, or one per image, ({n},)")
    return jax.random.split(key, n) if key.shape == () else key


def _in_ball(keys_N, x, epsilon, norm):
    """Offsets like x, uniform in the ball."""
    shape, dtype = x.shape[1:], x.dtype
    if norm == "linf":
        return epsilon * jax.vmap(lambda k: jax.random.uniform(k, shape, dtype, -1, 1))(keys_N)

    def draw(key):
        direction, radius = jax.random.split(key)
        # The volume of a ball grows with its radius to the power of the dimension.
        length = jax.random.uniform(radius) ** (1 / max(1, np.prod(shape, dtype=int)))
        return length * _unit_images(jax.random.normal(direction, (1, *shape)))[0]

    return epsilon * jax.vmap(draw)(keys_N).astype(dtype)


def _norms(v):
    """The Euclidean norm of each image of v, in float32 at least; all other axes have length 1."""
    v = v.astype(jnp.promote_types(v.dtype, jnp.float32))
    return jnp.sqrt(jnp.sum(v * v, axis=tuple(range(1, v.ndim)), keepdims=True))


def _unit_images(g):
    """Each image of g scaled to Euclidean norm 1; zeros stay zeros."""
    # First divide by the largest entry: the squares of a small gradient would underflow.
    largest = jnp.max(jnp.abs(g), axis=tuple(range(1, g.ndim)), keepdims=True)
    g = g / jnp.where(largest == 0, 1, largest)
    norm = _norms(g)
    return (g / jnp.where(norm == 0, 1, norm)).astype(g.dtype)


def _shortened(delta, radius):
    """Each image of delta shortened to a Euclidean norm of at most radius."""
    norm = _norms(delta)
    return (delta * jnp.where(norm > radius, radius / jnp.where(norm == 0, 1, norm), 1)).astype(delta.dtype)


def _check_attack(x, norm, num_steps, delta0, key, restarts):
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise UserError(f"attack: images of type {x.dtype}, expected floating point; divide uint8 by 255")
    if norm not in ("linf", "l2"):
        raise UserError(f"attack: norm={norm!r}, expected linf or l2")
    if isinstance(num_steps, int) and num_steps < 0:
        raise UserError(f"attack: num_steps={num_steps}, expected 0 or more")
    if restarts < 1:
        raise UserError(f"attack: restarts={restarts}, expected 1 or more")
    if restarts > 1 and key is None:
        raise UserError(f"attack: restarts={restarts} without a key would all be equal; pass key=jax.random.key(0)")
    if delta0 is not None and key is not None:
        raise UserError("attack: delta0 and key both choose the start; expected one of them")


def _check_sizes(x, epsilon, step_size, num_steps, bounds, norm):
    shapes = {"epsilon": np.shape(epsilon), "step_size": () if step_size is None else np.shape(step_size)}
    if len(shapes["step_size"]) == 2:
        steps, *shapes["step_size"] = shapes["step_size"]
        if isinstance(num_steps, int) and steps != num_steps:
            raise UserError(f"attack: a schedule of {steps} sizes for num_steps={num_steps}, expected one per step")
    for name, shape in shapes.items():
        if norm == "l2" and np.prod(shape, dtype=int) != 1:
            raise UserError(f"attack: {name} of shape {tuple(shape)} with norm l2, expected a number")
        if len(shape) == 1 and shape[0] not in (1, x.shape[-1] if x.ndim else 1):
            raise UserError(
                f"attack: {name} for {shape[0]} channels of images with {x.shape[-1]}, expected a number or one per "
                "channel; a schedule of step sizes has shape [num_steps, 1]"
            )
    width = None
    if bounds is not None and not any(isinstance(b, jax.core.Tracer) for b in bounds):
        low, high = (np.asarray(b, np.float64) for b in bounds)
        width = high - low
        if not np.all(width >= 0):
            raise UserError(f"attack: bounds {_in_words(low)} to {_in_words(high)}, expected the lowest value first")
        if norm == "l2":  # the diagonal of the box of all images
            width = np.sqrt(np.sum(np.broadcast_to(width, x.shape[1:]) ** 2))
    for name, value in (("epsilon", epsilon), ("step_size", step_size)):
        if value is None or isinstance(value, jax.core.Tracer):
            continue
        value = np.asarray(value)
        if value.size and not value.min() >= 0:
            raise UserError(f"attack: {name}={value}, expected 0 or more")
        # Bounds and epsilon may have been divided by the same standard deviation, and rounded.
        if name == "epsilon" and width is not None and np.any(value > width * (1 + 1e-6)):
            raise UserError(
                f"attack: epsilon={value} with images in [{_in_words(low)}, {_in_words(high)}], expected the "
                "units of the images; divide a value in 0..255 units by 255"
            )


def _check_images(x, low, high):
    with jax.ensure_compile_time_eval():  # they may be constants of a function that is being traced
        found = concrete(_range(x))
    if found is None:
        return
    (lowest, highest), low, high = found.astype(np.float64), np.asarray(low, np.float64), np.asarray(high, np.float64)
    # Images and bounds may have been normalised, each with its rounding.
    room = 4 * float(jnp.finfo(x.dtype).eps) * np.maximum(1, np.maximum(np.abs(low), np.abs(high)))
    if np.any(lowest < low - room) or np.any(highest > high + room):
        raise UserError(
            f"attack: x from {lowest.min():g} to {highest.max():g} with bounds {_in_words(low)} to {_in_words(high)}, "
            "expected images within the bounds; pass those of normalised images, (0 - mean) / std and (1 - mean) / std"
        )


@jax.jit
def _range(x):
    """The lowest and the highest value of each channel [2,C]."""
    axes = tuple(range(x.ndim - 1))
    return jnp.stack([jnp.min(x, axis=axes), jnp.max(x, axis=axes)])


def _in_words(value):
    """A bound for a message: a number, or one per channel."""
    return f"{value:g}" if value.ndim == 0 else " ".join(f"{v:g}" for v in value.ravel())
