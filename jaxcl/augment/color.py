"""Colour operations: grayscale, and the jitter of brightness, contrast, saturation and hue in random order.

Semantics are torchvision's `ColorJitter` on floating images: factors multiply, the hue turns on the HSV
circle, every step ends in [0,1]. Images are float32 [N,H,W,3] in [0,1].

Letters: N images.
"""

import itertools

import jax
import jax.numpy as jnp

from jaxcl.augment import ops
from jaxcl.errors import UserError

PARTS = ("brightness", "contrast", "saturation", "hue")  # the meaning of 0..3 in an order
IDENTITY = (1.0, 1.0, 1.0, 0.0)
_ORDERS = tuple(itertools.permutations(range(4)))
_LUMA = (0.299, 0.587, 0.114)

Planes = tuple[jax.Array, jax.Array, jax.Array]  # red, green, blue, each [N,H,W]


def draw_color_jitter(
    keys: jax.Array, *, strength: tuple[float, float, float, float], p: float = 1.0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Factors, order and coin of a colour jitter, one row an image.

    Args:
      keys: [N] typed keys.
      strength: (brightness, contrast, saturation, hue). A factor is uniform in [max(0, 1 - s), 1 + s], the
        hue shift uniform in [-s, s] turns.
      p: probability that an image is jittered at all.

    Returns:
      factors float32 [N,4], (1, 1, 1, 0) where not applied; order int32 [N,4], a permutation of 0..3:
      order[n, t] is the part (`PARTS`) that comes t-th; applied bool [N].
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
    """clip(factor * x + (1 - factor) * m), m the mean of the grey image; factor [N] >= 0."""
    return ops.join(_contrast(_split(images, "contrast"), factor))


def adjust_saturation(images: jax.Array, factor: jax.Array) -> jax.Array:
    """clip(factor * x + (1 - factor) * grey), factor [N] >= 0."""
    return ops.join(_blend(_split(images, "saturation"), factor, 1.0 - factor))


def adjust_hue(images: jax.Array, shift: jax.Array) -> jax.Array:
    """Turns the hue by shift [N] turns on the HSV circle; a shift of exactly 0 changes no bit."""
    planes = _split(images, "hue")
    return ops.join(_hue(planes, shift))


def color_jitter(
    images: jax.Array, factors: jax.Array, order: jax.Array, *, parts: tuple[str, ...] = PARTS
) -> jax.Array:
    """Applies brightness, contrast, saturation and hue, each once, in each image's own order.

    Exactly the sequential definition, without a branch an image and without trying every part in every place.
    Brightness and saturation are pointwise blends clip(a x + b grey); contrast waits for the image's mean, and the hue
    is the dear one. Every order is a subsequence of

        P P  contrast  P P  hue  P P  contrast  P P

    with P P the earlier, then the later of brightness and saturation; what is not an image's turn runs with its
    identity factors. One hue rotation and two means, where choosing among four parts in each of four rounds takes
    four of each.

    Args:
      images: [N,H,W,3] in [0,1].
      factors: [N,4] brightness, contrast, saturation factor and hue shift in turns; (1, 1, 1, 0) changes no
        bit.
      order: int [N,4], order[n, t] is the part that comes t-th (`PARTS`).
      parts: the parts in the program, static; a part left out is the identity.

    Raises:
      UserError: not three channels.
    """
    planes = _split(images, "colour jitter")
    bright, contrast, sat, hue = (
        factors[:, i] if part in parts else jnp.full_like(factors[:, i], IDENTITY[i]) for i, part in enumerate(PARTS)
    )
    # The inverse permutation: when each part comes.
    t_bright, t_contrast, t_sat, t_hue = (jnp.sum(jnp.arange(4) * (order == i), axis=1) for i in range(4))

    special_times = [t for part, t in (("contrast", t_contrast), ("hue", t_hue)) if part in parts]
    both = len(special_times) == 2
    hue_first = t_hue < t_contrast
    bright_first = t_bright < t_sat

    def gap(t):
        """How many of the special steps of the program come before the part at time t."""
        count = sum((special < t).astype(jnp.int32) for special in special_times)
        return count + hue_first if both else count  # hue first: the first contrast is not this image's

    earlier = gap(jnp.minimum(t_bright, t_sat)), bright_first
    later = gap(jnp.maximum(t_bright, t_sat)), ~bright_first

    def pointwise(planes, here):
        if "brightness" not in parts and "saturation" not in parts:
            return planes
        for own_gap, is_bright in (earlier, later):
            now = own_gap == here
            factor = jnp.where(now, jnp.where(is_bright, bright, sat), 1.0)
            planes = _blend(planes, factor, jnp.where(now & ~is_bright, 1.0 - sat, 0.0))
        return planes

    planes = pointwise(planes, 0)
    if not both:
        if special_times:
            planes = _contrast(planes, contrast) if "contrast" in parts else _hue(planes, hue)
            planes = pointwise(planes, 1)
        return ops.join(planes)

    def special_step(planes, here):
        contrast_here = jnp.where((here == 2) == hue_first, contrast, 1.0)
        planes = jax.lax.cond(here == 1, lambda: _hue(planes, hue), lambda: _contrast(planes, contrast_here))
        return pointwise(planes, here + 1), None

    # A loop with a condition and not three calls: XLA's CPU compiler would fuse the unrolled steps and recompute each
    # in every place that reads it, a hundred times as slow (optimization_barrier does not stop it). Each step ends in
    # planes: left after the loop, its last blends would be worked out anew for every channel of what reads them.
    planes, _ = jax.lax.scan(special_step, planes, jnp.arange(3))
    return ops.join(planes)


# -------------------------------------------------------------------------------------------- on planes
# One array a channel: with three channels innermost, vector units would idle or shuffle.


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


def _blend(planes: Planes, factor, grey_share) -> Planes:
    """clip(factor * x + grey_share * grey)."""
    grey = _image(grey_share) * _grey(planes)
    return tuple(jnp.clip(_image(factor) * plane + grey, 0.0, 1.0) for plane in planes)


def _contrast(planes: Planes, factor: jax.Array) -> Planes:
    grey = _grey(planes)
    mean = jnp.mean(grey, axis=(1, 2))
    offset = _image((1.0 - factor) * mean)
    return tuple(jnp.clip(_image(factor) * plane + offset, 0.0, 1.0) for plane in planes)


def _hue(planes: Planes, shift: jax.Array) -> Planes:
    """HSV with hue + shift, back to RGB, without a branch.

    On the hexagon a channel is v - (v - min) * clip(min(k, 4 - k), 0, 1) with k = (n + 6 h) mod 6 and n = 5,
    3, 1
    for red, green, blue: the textbook's six cases in one line.
    """
    red, green, blue = planes
    top = jnp.maximum(jnp.maximum(red, green), blue)
    spread = top - jnp.minimum(jnp.minimum(red, green), blue)
    scale = 1.0 / jnp.where(spread > 0, spread, 1.0)
    sextant = jnp.where(
        top == red,
        (green - blue) * scale,
        jnp.where(top == green, 2.0 + (blue - red) * scale, 4.0 + (red - green) * scale),
    )
    sextant = sextant + _image(6.0 * shift)
    turned = []
    for n in (5.0, 3.0, 1.0):
        k = sextant + n
        k = k - 6.0 * jnp.floor(k * (1.0 / 6.0))
        turned.append(top - spread * jnp.clip(jnp.minimum(k, 4.0 - k), 0.0, 1.0))
    return _select(shift != 0, tuple(turned), planes)
