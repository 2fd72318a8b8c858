"""Saliency maps (GradCAM, input gradients, integrated gradients) and the masks made from them.

Letters: N images, H W their height and width (S where square), C colours, h w M a layer's height, width and
channels, K classes. Maps are computed in float32 at least. Nothing here stops gradients: the caller decides.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxcl.errors import UserError

NORMALIZE_EPS = 1e-8


@functools.partial(jax.jit, static_argnames="relu")
def cam(activations: ArrayLike, gradients: ArrayLike, *, relu: bool = False) -> jax.Array:
    """Class activation map: channels summed with the spatial mean of their gradients as weights.

    Args:
      activations: [N, h, w, M], the output of one layer.
      gradients: [N, h, w, M], gradient of the explained logits with respect to it.
      relu: cut negative values off. GradCAM's paper does (eq. 2); ExCon's released code does not, and the
        region kept after normalising differs a lot between the two.

    Returns:
      [N, h, w].

    References:
      Selvaraju et al., "Grad-CAM", arXiv:1610.02391, eq. 1 and 2.
    """
    a_NxhxwxM, g_NxhxwxM = _at_least_float32(activations), _at_least_float32(gradients)
    if a_NxhxwxM.ndim != 4 or a_NxhxwxM.shape != g_NxhxwxM.shape:
        raise UserError(
            f"cam: activations of shape {a_NxhxwxM.shape} and gradients of shape {g_NxhxwxM.shape}, "
            "expected [images, height, width, channels] twice"
        )
    weight_NxM = jnp.mean(g_NxhxwxM, axis=(1, 2))
    map_Nxhxw = jnp.einsum("nhwm,nm->nhw", a_NxhxwxM, weight_NxM, precision=lax.Precision.HIGHEST)
    return jax.nn.relu(map_Nxhxw) if relu else map_Nxhxw


def grad_cam(
    tail_fn: Callable[[jax.Array], jax.Array],
    activations: jax.Array,
    targets: ArrayLike,
    *,
    relu: bool = False,
) -> jax.Array:
    """GradCAM of one layer, given the rest of the network from that layer on.

    One backward pass of the tail for the sum of the target logits. Where the tail's batch norm uses batch
    statistics, an image's gradient therefore holds the terms that reach it through the other images.

    Args:
      tail_fn: activations [N, h, w, M] -> logits [N, K].
      activations: [N, h, w, M], the layer's output.
      targets: [N] int, the class each map explains. Negative (unlabelled): the image explains nothing, its
        map is flat zero unless other images reach it through batch statistics.
      relu: see `cam`.

    Returns:
      [N, h, w]; `normalize_map` scales it to the image and to [0, 1].
    """
    gradients = jax.grad(lambda a: _target_sum(tail_fn(a), targets))(activations)
    return cam(activations, gradients, relu=relu)


@functools.partial(jax.jit, static_argnames="size")
def normalize_map(maps: ArrayLike, size: int | tuple[int, int] | None = None) -> jax.Array:
    """Resizes maps, then scales each to [0, 1]: e = e - min e, e / (max e + 1e-8).

    Args:
      maps: [N, h, w].
      size: side S or (H, W) to resize to, bilinearly with half-pixel centres and clamped edges; None keeps
        the size. The minimum and maximum are those of the resized map.

    Returns:
      [N, H, W]. A flat map becomes all zeros.
    """
    maps = _at_least_float32(maps)
    if maps.ndim != 3:
        raise UserError(f"normalize_map: maps of shape {maps.shape}, expected [images, height, width]")
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        maps = jax.image.resize(
            maps,
            (len(maps), height, width),
            "bilinear",
            antialias=False,
            precision=lax.Precision.HIGHEST,
        )
    maps = maps - jnp.min(maps, axis=(1, 2), keepdims=True)
    return maps / (jnp.max(maps, axis=(1, 2), keepdims=True) + NORMALIZE_EPS)


def keep_mask(maps: ArrayLike, threshold: float = 0.5) -> jax.Array:
    """Pixels strictly above the threshold, bool; a pixel exactly at it is removed.

    Args:
      maps: [N, H, W] in [0, 1], from `normalize_map`.
      threshold: in [0, 1]. At 0.5 a flat map keeps nothing.
    """
    return jnp.asarray(maps) > threshold


@functools.partial(jax.jit, static_argnames="q")
def top_fraction_mask(maps: ArrayLike, q: float) -> jax.Array:
    """The floor(q * H * W) largest pixels of each map, bool [N, H, W].

    Exactly that many are kept: among equal pixels the first in row order win.

    Args:
      maps: [N, H, W], any scale.
      q: fraction in [0, 1], a Python number.
    """
    maps = jnp.asarray(maps)
    if not 0 <= q <= 1:
        raise UserError(f"top_fraction_mask: q={q}, expected a fraction from 0 to 1")
    flat = maps.reshape(len(maps), -1)
    # A nudge, since 0.15 * 100 is 15.000000000000002 but 0.29 * 100 is 28.999999999999996.
    kept = int(q * flat.shape[1] + 1e-9)
    order = jnp.argsort(-flat, axis=1, stable=True)
    rank = jnp.argsort(order, axis=1, stable=True)
    return (rank < kept).reshape(maps.shape)


def apply_mask(images: ArrayLike, keep: ArrayLike, fill: ArrayLike = 0.0) -> jax.Array:
    """Replaces removed pixels, the same in every channel.

    Args:
      images: [N, H, W, C].
      keep: [N, H, W] bool.
      fill: scalar or [C]. 0 on normalised images is the dataset's mean colour.
    """
    images = jnp.asarray(images)
    return jnp.where(jnp.asarray(keep, bool)[..., None], images, jnp.asarray(fill, images.dtype))


def input_gradient(logits_fn: Callable[[jax.Array], jax.Array], images: jax.Array, targets: ArrayLike) -> jax.Array:
    """Gradient of the target logits with respect to the images, summed over colours.

    Args:
      logits_fn: images [N, H, W, C] -> logits [N, K].
      images: [N, H, W, C].
      targets: [N] int; negative: not explained, a map of zeros.

    Returns:
      [N, H, W], signed.
    """
    gradients = jax.grad(lambda x: _target_sum(logits_fn(x), targets))(jnp.asarray(images))
    return jnp.sum(_at_least_float32(gradients), axis=-1)


def integrated_gradients(
    logits_fn: Callable[[jax.Array], jax.Array],
    images: jax.Array,
    targets: ArrayLike,
    *,
    baseline: ArrayLike = 0.0,
    num_steps: int = 16,
) -> jax.Array:
    """Integrated gradients along the straight line from a baseline image, summed over colours.

    The integral is a midpoint sum, one gradient at a time, so memory does not grow with `num_steps`. The
    map's sum approaches logit(image) - logit(baseline) as `num_steps` grows (completeness).

    Args:
      logits_fn: images [N, H, W, C] -> logits [N, K].
      images: [N, H, W, C].
      targets: [N] int; negative: not explained, a map of zeros.
      baseline: anything that broadcasts to the images; 0 on normalised images is the mean colour.
      num_steps: points on the line, >= 1.

    Returns:
      [N, H, W], signed.

    References:
      Sundararajan et al., "Axiomatic Attribution for Deep Networks", arXiv:1703.01365, eq. 1 and 3.
    """
    if num_steps < 1:
        raise UserError(f"integrated_gradients: num_steps={num_steps}, expected at least 1")
    images = _at_least_float32(images)
    start = jnp.broadcast_to(jnp.asarray(baseline, images.dtype), images.shape)
    path = images - start
    gradient_at = jax.grad(lambda x: _target_sum(logits_fn(x), targets))

    def step(total, t):
        return total + gradient_at(start + t * path), None

    points = (jnp.arange(num_steps, dtype=images.dtype) + 0.5) / num_steps
    total, _ = lax.scan(step, jnp.zeros_like(images), points)
    return jnp.sum(path * total / num_steps, axis=-1)


def _target_sum(logits: jax.Array, targets: ArrayLike) -> jax.Array:
    targets = jnp.asarray(targets)
    picked = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], axis=-1)[:, 0]
    return jnp.sum(jnp.where(targets >= 0, picked, 0))


def _at_least_float32(x: ArrayLike) -> jax.Array:
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
