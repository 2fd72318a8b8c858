"""Patch negatives: images made of random square patches of one image, which keep its texture and lose its meaning.

B images, M negatives per image, S image side, C channels, n tiles a side.

The cost is one gather of the view's pixels and a forward pass on them; see benchmarks/negatives.py.

Source: Ge et al. 2021, arXiv 2110.14189, and its released code.
"""

import functools
import numbers
from typing import Any

import jax
import jax.numpy as jnp

from jaxcl.errors import UserError

Array = jax.Array
PUBLISHED = (16, 72, 224)  # smallest and largest patch, for images of this side


def tile_patches(image: Array, size: Array | int, top: Array, left: Array) -> Array:
    """Lays square patches of an image side by side.

    out[y, x] = image[top[a, b] + y % size, left[a, b] + x % size] with a = y // size and b = x // size.

    Args:
      image: [S,S,C], any dtype.
      size: side of a patch in pixels, at least 1; may be traced.
      top, left: [n,n] integers, row and column of the upper left corner of the patch for tile (a, b), with n at least
        ceil(S / size). Further tiles are not used. For a traced size, choose n for the smallest possible size.

    Returns:
      [S,S,C] of image's dtype, exact copies. Corners are not checked: pixels outside the image are undefined.

    Raises:
      UserError: other shapes, or too few tiles for a size that is not traced.

    Source: Ge et al. 2021, arXiv 2110.14189, released code.
    """
    image, top, left = jnp.asarray(image), jnp.asarray(top), jnp.asarray(left)
    if image.ndim != 3 or image.shape[0] != image.shape[1]:
        raise UserError(f"tile_patches takes a square image [S,S,C], got shape {image.shape}")
    if top.shape != left.shape or top.ndim != 2 or top.shape[0] != top.shape[1]:
        raise UserError(f"tile_patches takes top and left [n,n] of one shape, got {top.shape} and {left.shape}")
    if not isinstance(size, jax.core.Tracer):
        S, n = image.shape[0], top.shape[0]
        if not 1 <= int(size) <= S:
            raise UserError(f"tile_patches: size is {size}; expected a patch of 1 to {S} pixels, the image's side")
        if n * int(size) < S:
            raise UserError(f"tile_patches: {n} tiles of {size} pixels do not cover {S}; give top and left for more")
    return _tile_patches(image, size, top, left)


def patch_negatives(
    key: Array,
    images: Array,
    *,
    min_patch: int,
    max_patch: int,
    count: int = 1,
    include_last_offset: bool = False,
    dihedral: bool = False,
) -> Array:
    """Images made of random patches of themselves: the patch-based negatives of Ge et al.

    Each negative draws its own patch size d, uniform over min_patch, ..., max_patch, both included, and independently
    the corners of its floor(S / d) + 1 tiles a side, with replacement. A negative depends on the key and the pixels of
    its image only, and not on the number of negatives.

    Args:
      key: a typed threefry key, which is split over the images, or keys [B], one per image.
      images: [B,S,S,C], any dtype. The published method takes the augmented, normalised query view.
      min_patch, max_patch: patch sides in pixels, 1 <= min_patch <= max_patch < S. Published: 16 and 72 for S = 224;
        `scaled_range` scales them to other S.
      count: M, negatives per image.
      include_last_offset: True draws corners from {0, ..., S-d}; False from {0, ..., S-d-1}, as the released code does.
      dihedral: mirror and turn every patch at random (the released code does not).

    Returns:
      [B,M,S,S,C] of images' dtype. Every pixel is a copy of a pixel of its image.

    Raises:
      UserError: images or keys of another shape, patch sizes out of range, count below 1.

    Source: Ge et al. 2021, arXiv 2110.14189.
    """
    images = jnp.asarray(images)
    if images.ndim != 4 or images.shape[1] != images.shape[2]:
        raise UserError(f"patch_negatives takes square images [B,S,S,C], got shape {images.shape}")
    check_patches("patch_negatives", images.shape[1], min_patch, max_patch, count)
    keys = image_keys("patch_negatives", key, len(images))
    return _patch_negatives(keys, images, int(min_patch), int(max_patch), int(count), include_last_offset, dihedral)


def scaled_range(side: int) -> tuple[int, int]:
    """The published patch range, 16 to 72 of 224 pixels, scaled to another side: 2 to 10 at 32, 7 to 31 at 96."""
    low, high, of = PUBLISHED
    return max(1, round(low * side / of)), max(1, round(high * side / of))


def check_patches(what: str, side: int, min_patch: int, max_patch: int, count: int) -> None:
    """Errors: UserError, which begins with `what`, unless patches of these sizes fit images of this side."""
    if not whole(min_patch, max_patch, count):
        raise UserError(
            f"{what}: min_patch, max_patch and count are {min_patch}, {max_patch} and {count}; expected whole numbers"
        )
    if not 1 <= min_patch <= max_patch:
        raise UserError(
            f"{what}: min_patch is {min_patch} and max_patch {max_patch}; expected 1 <= min_patch <= max_patch"
        )
    if max_patch >= side:
        raise UserError(
            f"{what}: max_patch is {max_patch}, the images have a side of {side}; use a patch of {side - 1} or less"
        )
    if count < 1:
        raise UserError(f"{what}: count is {count}; expected at least 1")


def whole(*values: Any) -> bool:
    """Whether all values are whole numbers of Python or NumPy."""
    return all(isinstance(v, numbers.Integral) for v in values)


def image_keys(what: str, key: Array, count: int) -> Array:
    """One key per image, [count]: several keys are returned unchanged, a single key is split. Errors: UserError."""
    if not jnp.issubdtype(getattr(key, "dtype", None), jax.dtypes.prng_key):
        raise UserError(f"{what} takes typed keys (jax.random.key), got {getattr(key, 'dtype', type(key).__name__)}")
    if "fry" not in str(key.dtype):
        # Under vmap, rbg generators draw from the first key of the batch.
        raise UserError(f"{what} takes threefry keys, got {key.dtype}; use jax.random.key(seed, impl='threefry2x32')")
    if key.shape not in ((), (count,)):
        raise UserError(f"{what} takes one key, or one per image: got keys of shape {key.shape} for {count} images")
    return key if key.ndim else jax.random.split(key, count)


@jax.jit
def _tile_patches(
    image_SxSxC: Array, size: Array, top_nxn: Array, left_nxn: Array, turn_nxn: Array | None = None
) -> Array:
    """turn: bit 0 swaps the rows and columns of a patch; then bit 1 mirrors its rows and bit 2 its columns."""
    S, n = image_SxSxC.shape[0], top_nxn.shape[0]
    tile_S, offset_S = jnp.arange(S) // size, jnp.arange(S) % size

    def of_tile(table_nxn: Array) -> Array:
        return table_nxn[jnp.minimum(tile_S, n - 1)][:, jnp.minimum(tile_S, n - 1)]

    row, column = offset_S[:, None], offset_S[None, :]
    if turn_nxn is not None:
        turn_SxS = of_tile(turn_nxn)
        swap, mirror_rows, mirror_columns = (turn_SxS >> bit & 1 == 1 for bit in range(3))
        row, column = jnp.where(swap, column, row), jnp.where(swap, row, column)
        row = jnp.where(mirror_rows, size - 1 - row, row)
        column = jnp.where(mirror_columns, size - 1 - column, column)
    # One index per pixel, so that a single gather reads all channels of a pixel together.
    source_SxS = of_tile(top_nxn * S + left_nxn) + row * S + column
    return jnp.take(image_SxSxC.reshape(S * S, -1), source_SxS, axis=0, mode="clip")


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5, 6))
def _patch_negatives(keys_B, images, min_patch, max_patch, count, include_last_offset, dihedral) -> Array:
    S = images.shape[1]
    n = S // min_patch + 1

    def one(key: Array, image_SxSxC: Array) -> Array:
        size, corners_2xnxn, turn_nxn = _draw(key, S, n, min_patch, max_patch, include_last_offset, dihedral)
        return _tile_patches(image_SxSxC, size, *corners_2xnxn, turn_nxn)

    def of_image(key: Array, image_SxSxC: Array) -> Array:
        # Folded instead of split: the first negative does not depend on the number of negatives.
        keys_M = jax.vmap(lambda m: jax.random.fold_in(key, m))(jnp.arange(count))
        return jax.vmap(one, in_axes=(0, None))(keys_M, image_SxSxC)

    return jax.vmap(of_image)(keys_B, images)


def _draw(
    key: Array, side: int, n: int, min_patch: int, max_patch: int, include_last_offset: bool, dihedral: bool
) -> tuple[Array, Array, Array | None]:
    """-> patch size, corners (top, left) [2,n,n], and the turn of every patch [n,n] or None."""
    of_size, of_corners, of_turn = jax.random.split(key, 3)
    size = jax.random.randint(of_size, (), min_patch, max_patch + 1, jnp.int32)
    corners = jax.random.randint(of_corners, (2, n, n), 0, side - size + include_last_offset, jnp.int32)
    return size, corners, jax.random.randint(of_turn, (n, n), 0, 8, jnp.int32) if dihedral else None
