"""Saliency maps (GradCAM, input gradients, integrated gradients) and the masks made from them.

These are functions of arrays and functions. Maps are computed in float32 at least. No function stops gradients; the
caller decides.

Letters: N images, H W height and width of images (S if square), C colours, h w M height, width and channels of a layer,
K classes.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxcl.errors import UserError
from jaxcl.losses.labels import class_numbers, flags

NORMALIZE_EPS, SMALL_MAP = 1e-8, 1e-5


@functools.partial(jax.jit, static_argnames="relu")
def cam(activations: ArrayLike, gradients: ArrayLike, *, relu: bool = False) -> jax.Array:
    """Class activation map: the sum of channels, weighted by the spatial mean of their gradients.

    Args:
      activations: [N, h, w, M], the output of one layer.
      gradients: [N, h, w, M], gradient of the explained logits with respect to the activations.
      relu: set negative values to 0. GradCAM's paper does (eq. 2); ExCon's released code does not. The regions kept
        after normalising differ a lot between the two.

    Returns:
      [N, h, w].

    Raises:
      UserError: other shapes.

    Source: Selvaraju et al. 2017, Grad-CAM, arXiv 1610.02391, equations 1 and 2.
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
    """GradCAM of one layer, given the rest of the network after that layer.

    It runs one backward pass of the tail for the sum of the target logits. So if batch norms of the tail use batch
    statistics, the gradient of an image includes terms from the other images.

        maps = grad_cam(lambda a: a.mean((1, 2)) @ weights, activations, labels)   # [N,h,w]
        masks = keep_mask(normalize_map(maps, size=32))

    Args:
      tail_fn: activations [N, h, w, M] -> logits [N, K].
      activations: [N, h, w, M], the layer's output.
      targets: [N] int, the class that each map explains. For a negative target (an unlabelled image) the map is all
        zeros, except for terms from other images through batch statistics. A traced target that is no class gives NaN.
      relu: see `cam`.

    Returns:
      [N, h, w]; `normalize_map` resizes it to the image and scales it to [0, 1].

    Source: Selvaraju et al. 2017, Grad-CAM, arXiv 1610.02391.
    """
    gradients = jax.grad(lambda a: _target_sum(tail_fn(a), targets))(activations)
    return cam(activations, gradients, relu=relu)


@functools.partial(jax.jit, static_argnames="size")
def normalize_map(maps: ArrayLike, size: int | tuple[int, int] | None = None) -> jax.Array:
    """Resizes maps, then scales each to [0, 1]: e = e - min e, e / (max e + 1e-8).

    Where max e is below 1e-5, which 1e-8 would change by more than a thousandth, it is e / max e.

    Args:
      maps: [N, h, w].
      size: side S or (H, W) of the result, resized bilinearly with half-pixel centres and clamped edges. None keeps the
        size. The minimum and maximum are taken after resizing.

    Returns:
      [N, H, W] in [0, 1]. A constant map becomes all zeros.

    Raises:
      UserError: maps of another shape.
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
    largest = jnp.max(maps, axis=(1, 2), keepdims=True)
    return maps / jnp.where((largest > 0) & (largest < SMALL_MAP), largest, largest + NORMALIZE_EPS)


def keep_mask(maps: ArrayLike, threshold: float = 0.5) -> jax.Array:
    """The pixels strictly above the threshold, bool; a pixel equal to it is removed.

    Args:
      maps: [N, H, W] in [0, 1], from `normalize_map`.
      threshold: in [0, 1]. A constant map keeps nothing, because `normalize_map` makes it all zeros.
    """
    return jnp.asarray(maps) > threshold


@functools.partial(jax.jit, static_argnames="q")
def top_fraction_mask(maps: ArrayLike, q: float) -> jax.Array:
    """The floor(q * H * W) largest pixels of each map, bool [N, H, W].

    Exactly this number is kept: among equal pixels, the first in row order.

    Args:
      maps: [N, H, W], any scale.
      q: fraction in [0, 1], a Python number.

    Raises:
      UserError: q out of range.
    """
    maps = jnp.asarray(maps)
    if not 0 <= q <= 1:
        raise UserError(f"top_fraction_mask: q={q}, expected a fraction from 0 to 1")
    flat = maps.reshape(len(maps), -1)
    # The small number corrects rounding: 0.29 * 100 is 28.999999999999996.
    kept = int(q * flat.shape[1] + 1e-9)
    order = jnp.argsort(-flat, axis=1, stable=True)
    rank = jnp.argsort(order, axis=1, stable=True)
    return (rank < kept).reshape(maps.shape)


def apply_mask(images: ArrayLike, keep: ArrayLike, fill: ArrayLike = 0.0) -> jax.Array:
    """Replaces the removed pixels in every channel.

    Args:
      images: [N, H, W, C].
      keep: [N, H, W] bool; False removes a pixel.
      fill: the value of removed pixels, a scalar or [C]. 0 on normalised images is the mean colour of the data.
    """
    images = jnp.asarray(images)
    return jnp.where(flags(keep).astype(bool)[..., None], images, jnp.asarray(fill, images.dtype))


def input_gradient(logits_fn: Callable[[jax.Array], jax.Array], images: jax.Array, targets: ArrayLike) -> jax.Array:
    """The gradient of the target logits with respect to the images, summed over colours.

    Args:
      logits_fn: images [N, H, W, C] -> logits [N, K].
      images: [N, H, W, C].
      targets: [N] int, the class that each map explains; a negative target gives a map of zeros, and a traced one that
        is no class a map of NaN.

    Returns:
      [N, H, W], signed.

    Source: Simonyan et al. 2014, arXiv 1312.6034.
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

    The integral is a midpoint sum of one gradient at a time, so memory does not grow with `num_steps`. With more steps,
    the sum of a map approaches logit(image) - logit(baseline) (completeness).

    Args:
      logits_fn: images [N, H, W, C] -> logits [N, K].
      images: [N, H, W, C].
      targets: [N] int, the class that each map explains; a negative target gives a map of zeros, and a traced one that
        is no class a map of NaN.
      baseline: broadcasts to the images; 0 on normalised images is the mean colour.
      num_steps: number of points on the line, at least 1.

    Returns:
      [N, H, W], signed.

    Raises:
      UserError: num_steps below 1.

    Source: Sundararajan et al. 2017, Axiomatic Attribution for Deep Networks, arXiv 1703.01365, equations 1 and 3.
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
    num_classes = logits.shape[-1]
    targets = class_numbers("saliency: targets", targets, num_classes)
    picked = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], axis=-1, mode="clip")[:, 0]
    picked *= jnp.where(targets >= num_classes, jnp.nan, 1).astype(picked.dtype)  # a map of NaN, not of zeros
    return jnp.sum(jnp.where(targets >= 0, picked, 0))


def _at_least_float32(x: ArrayLike) -> jax.Array:
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
