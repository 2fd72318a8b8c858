"""Colour operations: grayscale, and the jitter of brightness, contrast, saturation and hue in random order.

The semantics are those of torchvision's `ColorJitter` on float images: factors multiply, the hue turns on the HSV
circle, and every step is clipped to [0,1]. Images are float32 [N,H,W,3] in [0,1].

Letters: N images, H height, W width.
"""

import itertools

import jax
import jax.numpy as jnp

from jaxcl.augment import ops
from jaxcl.errors import UserError

PROPERTIES = ("brightness", "contrast", "saturation", "hue")  # the meaning of 0..3 in an order
IDENTITY = (1.0, 1.0, 1.0, 0.0)
_ORDERS = tuple(itertools.permutations(range(4)))
_LUMA = (0.299, 0.587, 0.114)

Planes = tuple[jax.Array, jax.Array, jax.Array]  # red, green, blue, each [N,H,W]


def draw_color_jitter(
    keys: jax.Array, *, strength: tuple[float, float, float, float], p: float = 1.0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws the factors, the order and the application of a colour jitter, one row per image.

    Args:
      keys: [N] typed keys.
      strength: (brightness, contrast, saturation, hue). For strength s, a factor is uniform in [max(0, 1 - s), 1 + s]
        and the hue shift in [-s, s] turns.
      p: probability that an image is jittered at all.

    Returns:
      factors float32 [N,4], (1, 1, 1, 0) where not applied; order int32 [N,4], a permutation of 0..3 in which
      order[n, t] is the property (`PROPERTIES`) that is changed t-th; applied bool [N].
    """
    u_Nx6 = ops.draw_uniform(keys, 6)
    applied = u_Nx6[:, 4] < p
    low = jnp.array([max(0.0, 1.0 - s) for s in strength[:3]] + [-strength[3]], jnp.float32)
    high = jnp.array([1.0 + s for s in strength[:3]] + [strength[3]], jnp.float32)
    factors = jnp.where(applied[:, None], low + (high - low) * u_Nx6[:, :4], jnp.array(IDENTITY, jnp.float32))
    which = jnp.minimum((u_Nx6[:, 5] * len(_ORDERS)).astype(jnp.int32), len(_ORDERS) - 1)
    order = jnp.array(_ORDERS, jnp.int32)[which]
    return factors, order, applied


def grayscale(images: jax.Array, mask: jax.Array) -> jax.Array:
    """Replaces all three channels by the grey value where mask, bool [N], is set."""
    grey = _grey(_split(images, "grayscale"))
    return jnp.where(_image(mask)[..., None], grey[..., None], images)


def adjust_brightness(images: jax.Array, factor: jax.Array) -> jax.Array:
    """clip(factor * x), factor [N] >= 0."""
    return ops.join(_blend(_split(images, "brightness"), factor, 0.0))


def adjust_contrast(images: jax.Array, factor: jax.Array) -> jax.Array:
    """clip(factor * x + (1 - factor) * m), where m is the mean of the grey image; factor [N] >= 0."""
    planes = _split(images, "contrast")
    return ops.join(_blend(planes, factor, _image((1.0 - factor) * jnp.mean(_grey(planes), axis=(1, 2)))))


def adjust_saturation(images: jax.Array, factor: jax.Array) -> jax.Array:
    """clip(factor * x + (1 - factor) * grey), factor [N] >= 0."""
    planes = _split(images, "saturation")
    return ops.join(_blend(planes, factor, _image(1.0 - factor) * _grey(planes)))


def adjust_hue(images: jax.Array, shift: jax.Array) -> jax.Array:
    """Shifts the hue by shift [N] turns on the HSV circle; a shift of exactly 0 changes no bit."""
    planes = _split(images, "hue")
    return ops.join(_hue(planes, shift))


def color_jitter(
    images: jax.Array | Planes, factors: jax.Array, order: jax.Array, *, properties: tuple[str, ...] = PROPERTIES
) -> jax.Array:
    """Changes brightness, contrast, saturation and hue, each once, in the order drawn for each image.

    The result is that of the sequential definition, without a branch per image and without trying every property at
    every place. Contrast and saturation are one form of blend, clip(a x + b grey + c), and the hue is the expensive
    step. Every order of these three is a subsequence of

        blend  blend  hue  blend  blend

    and brightness, a product and a minimum, has a place before the first step and one after each. A step that an image
    does not take runs with factors that change nothing. This costs one hue rotation, four blends and four means;
    choosing among the four properties in each of four rounds would cost four hues, twelve blends and four means.

    Args:
      images: [N,H,W,3] in [0,1], or a tuple of the three channels, each [N,H,W].
      factors: [N,4] brightness, contrast and saturation factor, and hue shift in turns; (1, 1, 1, 0) changes no bit.
      order: int [N,4]; order[n, t] is the property that is changed t-th (`PROPERTIES`).
      properties: the properties in the program, static; the others are left unchanged.

    Returns:
      [N,H,W,3].

    Raises:
      UserError: images without three channels.
    """
    planes = images if isinstance(images, tuple) else _split(images, "colour jitter")
    bright, contrast, saturation, hue = (
        factors[:, i] if name in properties else jnp.full_like(factors[:, i], IDENTITY[i])
        for i, name in enumerate(PROPERTIES)
    )
    turns, blends = "hue" in properties, "contrast" in properties or "saturation" in properties
    # The inverse permutation: the time of each property.
    t_bright, t_contrast, t_saturation, t_hue = (jnp.sum(jnp.arange(4) * (order == i), axis=1) for i in range(4))

    def step_of(time, other):
        """The step of a blend in the program: 0 or 1 before the hue, which is step 2, else 3 or 4."""
        late, other_late = ((t > t_hue) if turns else jnp.zeros_like(t, bool) for t in (time, other))
        return 3 * late + ((late == other_late) & (time > other))

    contrast_step, saturation_step = step_of(t_contrast, t_saturation), step_of(t_saturation, t_contrast)
    # Brightness comes after the last step that precedes it in the image's order; -1 is the place before all steps.
    bright_step = jnp.full_like(t_bright, -1)
    steps = [(t_contrast, contrast_step), (t_saturation, saturation_step)] if blends else []
    for t, step in steps + ([(t_hue, 2)] if turns else []):
        bright_step = jnp.maximum(bright_step, jnp.where(t < t_bright, step, -1))

    def brighten(planes, now):
        if "brightness" not in properties:
            return planes
        factor = _image(jnp.where(now, bright, 1.0))
        return tuple(jnp.minimum(factor * plane, 1.0) for plane in planes)

    def blend(planes, step):
        planes = brighten(planes, (step == 0) & (bright_step == -1))
        is_contrast, is_saturation = contrast_step == step, saturation_step == step
        factor = jnp.where(is_contrast, contrast, jnp.where(is_saturation, saturation, 1.0))
        grey = _grey(planes)
        offset = jnp.where(is_contrast, (1.0 - contrast) * jnp.mean(grey, axis=(1, 2)), 0.0)
        planes = _blend(planes, factor, _image(jnp.where(is_saturation, 1.0 - saturation, 0.0)) * grey + _image(offset))
        return brighten(planes, bright_step == step), None

    # Loops instead of unrolled calls: XLA's CPU compiler would fuse unrolled steps and recompute each one wherever it
    # is read, which is far slower (optimization_barrier does not prevent it). Each step computes its planes inside the
    # loop: products left after the loop would be recomputed for every channel that reads them.
    if blends:
        planes, _ = jax.lax.scan(blend, planes, jnp.arange(2))
    else:
        planes = brighten(planes, bright_step == -1)
    if turns:
        planes = brighten(_hue(planes, hue), bright_step == 2)
    if turns and blends:
        planes, _ = jax.lax.scan(blend, planes, jnp.arange(3, 5))
    return ops.join(planes)


# ---- on planes, one array [N,H,W] per channel: vector units would idle or shuffle with three channels innermost


def _split(images: jax.Array, what: str) -> Planes:
    if images.ndim != 4 or images.shape[-1] != 3:
        raise UserError(
            f"{what} needs images [N,H,W,3], got shape {tuple(images.shape)}: "
            "leave colour operations out or repeat the channel three times"
        )
    return images[..., 0], images[..., 1], images[..., 2]


def _image(value) -> jax.Array:
    """[N] -> [N,1,1]."""
    return jnp.asarray(value)[..., None, None]


def _grey(planes: Planes) -> jax.Array:
    return sum(weight * plane for weight, plane in zip(_LUMA, planes, strict=True))


def _select(mask: jax.Array, yes: Planes, no: Planes) -> Planes:
    return tuple(jnp.where(_image(mask), a, b) for a, b in zip(yes, no, strict=True))


def _blend(planes: Planes, factor: jax.Array, added) -> Planes:
    """clip(factor * x + added), factor [N]."""
    return tuple(jnp.clip(_image(factor) * plane + added, 0.0, 1.0) for plane in planes)


def _hue(planes: Planes, shift: jax.Array) -> Planes:
    """Converts to HSV, adds shift to the hue and converts back, without a branch.

    On the hexagon a channel is v - (v - min) * clip(min(k, 4 - k), 0, 1), where k = (n + 6 h) mod 6 and n = 5, 3, 1 for
    red, green, blue. This one line replaces the usual six cases.
    """
    red, green, blue = planes
    top = jnp.maximum(jnp.maximum(red, green), blue)
    spread = top - jnp.minimum(jnp.minimum(red, green), blue)
    # The division comes last because XLA's CPU compiler stores a quotient, but recomputes cheaper results per channel.
    safe = jnp.where(spread > 0, spread, 1.0)
    sextant = jnp.where(
        top == red,
        green - blue,
        jnp.where(top == green, 2.0 * safe + (blue - red), 4.0 * safe + (red - green)),
    )
    sextant = sextant / safe + _image(6.0 * shift)
    turned = []
    for n in (5.0, 3.0, 1.0):
        k = sextant + n
        k = k - 6.0 * jnp.floor(k * (1.0 / 6.0))
        turned.append(top - spread * jnp.clip(jnp.minimum(k, 4.0 - k), 0.0, 1.0))
    return _select(shift != 0, tuple(turned), planes)
