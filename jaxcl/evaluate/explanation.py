"""How good an explanation is: the change of confidence it causes, and its agreement with the true object."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxcl.errors import UserError


@jax.jit
def drop_increase(
    p_original: ArrayLike, p_masked: ArrayLike, *, where: ArrayLike | None = None
) -> dict[str, jax.Array]:
    """Change of the predicted class's probability when only the explanation's pixels are kept.

    With o, p = p_original, p_masked, means over the images of::

        average_drop     = max(0, o - p) / o    lower is better, in [0, 1]
        rate_of_drop     = [p < o]              lower is better
        average_increase = max(0, p - o) / o    higher is better, unbounded
        rate_of_increase = [p > o]              higher is better

    Args:
      p_original: [N] soft-max probability of the class predicted on the whole image, in (0, 1].
      p_masked: [N] probability of the same class on the masked image.
      where: [N] bool, False for padded rows.

    Returns:
      A dict of four scalars, fractions (multiply by 100 for percent); 0 with no row to count.

    References:
      Chattopadhay et al., "Grad-CAM++", arXiv:1710.11063, section 4.1.
    """
    o, p = jnp.asarray(p_original), jnp.asarray(p_masked)
    if o.ndim != 1 or o.shape != p.shape:
        raise UserError(f"drop_increase: shapes {o.shape} and {p.shape}, expected the same [images] twice")
    dtype = jnp.promote_types(jnp.promote_types(o.dtype, p.dtype), jnp.float32)
    o, p = o.astype(dtype), p.astype(dtype)
    valid = jnp.ones(o.shape, bool) if where is None else jnp.asarray(where, bool)
    base = jnp.where(o > 0, o, 1)
    return {
        "average_drop": _mean(jnp.maximum(0, o - p) / base, valid, empty=0),
        "rate_of_drop": _mean(p < o, valid, empty=0),
        "average_increase": _mean(jnp.maximum(0, p - o) / base, valid, empty=0),
        "rate_of_increase": _mean(p > o, valid, empty=0),
    }


@jax.jit
def mask_agreement(
    keep: ArrayLike, maps: ArrayLike, true_mask: ArrayLike, *, where: ArrayLike | None = None
) -> dict[str, jax.Array]:
    """Agreement of an explanation with the object's true mask; means over the images that have an object.

    Args:
      keep: [N, H, W] bool, the pixels the explanation keeps.
      maps: [N, H, W] the map itself, >= 0 (negative values count as 0 energy).
      true_mask: [N, H, W] bool, the object. An image with an empty mask is ignored.
      where: [N] bool, False for padded rows.

    Returns:
      {"iou": intersection over union of keep and object,
       "pointing_hit": is the map's maximum (the first one in row order) in the object (Zhang et al.,
       arXiv:1608.00507),
       "energy_inside": share of the map's sum inside the object, 0 for a map of zeros},
      scalars in [0, 1]; NaN if no image has an object.
    """
    keep, maps, true_mask = jnp.asarray(keep, bool), jnp.asarray(maps), jnp.asarray(true_mask, bool)
    if keep.ndim != 3 or not keep.shape == maps.shape == true_mask.shape:
        raise UserError(
            f"mask_agreement: keep {keep.shape}, maps {maps.shape}, true_mask {true_mask.shape}, "
            "expected the same [images, height, width] three times"
        )
    n = len(keep)
    maps = maps.astype(jnp.promote_types(maps.dtype, jnp.float32)).reshape(n, -1)
    keep, inside = keep.reshape(n, -1), true_mask.reshape(n, -1)
    valid = jnp.any(inside, axis=1)
    if where is not None:
        valid &= jnp.asarray(where, bool)
    iou = jnp.sum(keep & inside, axis=1) / jnp.maximum(jnp.sum(keep | inside, axis=1), 1)
    hit = jnp.take_along_axis(inside, jnp.argmax(maps, axis=1)[:, None], axis=1)[:, 0]
    energy = jnp.maximum(maps, 0)
    total = jnp.sum(energy, axis=1)
    share = jnp.sum(jnp.where(inside, energy, 0), axis=1) / jnp.where(total > 0, total, 1)
    return {
        "iou": _mean(iou, valid, empty=jnp.nan),
        "pointing_hit": _mean(hit, valid, empty=jnp.nan),
        "energy_inside": _mean(share, valid, empty=jnp.nan),
    }


def _mean(values, valid, *, empty):
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    count = jnp.sum(valid, dtype=jnp.int32)
    mean = jnp.sum(jnp.where(valid, values, 0)) / jnp.maximum(count, 1)
    return jnp.where(count > 0, mean, empty)
