"""Texture negatives: an image replaced by texture quilted from two square pieces of it.

B images, H W image, E side of an exemplar, P side of a patch, L overlap of neighbouring patches, N patches,
K candidates for a patch, Q pixels of a patch that overlap its neighbours, C channels.

An image is a table of its pixels by linear index, y * W + x. Its texture is a map of such indices until the last step,
so every pixel of the texture is a copy of a pixel of an exemplar. Differences are those of the 8-bit values, in whole
numbers, so that neither sums nor ties depend on the layout of the batch over devices.

Source: Efros and Freeman 2001, Image Quilting for Texture Synthesis and Transfer. As negatives of contrastive learning:
Ge et al. 2021, arXiv 2110.14189, who use a tool of the same family that copies pixel by pixel.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcl.augment.patches import image_keys, whole
from jaxcl.errors import UserError

Array = jax.Array
EXEMPLAR = (96, 224)  # published: the side of an exemplar, for images of this side
_LARGEST = 2**31 // 255**2  # number of squared differences that an int32 can sum


class Layout(NamedTuple):
    """Sizes of a quilt in pixels: the side of exemplars, the side of patches, and the overlap of neighbours."""

    exemplar: int
    patch: int
    overlap: int

    @property
    def step(self) -> int:
        """Distance of neighbouring patches, pixels."""
        return self.patch - self.overlap

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches that cover an image."""
        return tuple(max(1, math.ceil((side - self.overlap) / self.step)) for side in (height, width))


def quilt_texture(
    key: Array,
    images: Array,
    *,
    exemplar: int | None = None,
    patch: int | None = None,
    overlap: int | None = None,
    candidates: int = 32,
    tolerance: float = 0.1,
) -> Array:
    """Textures of the size of the images, quilted with minimum-error cuts from two exemplars of each image.

    The exemplars are the square at the centre and a square at a random place. Patches of them are laid in raster order,
    and each overlaps the patches before it. Among `candidates` random patches, one with a squared difference on the
    overlap within (1 + tolerance) of the smallest is chosen at random. It is cut to its neighbours along the path of
    least difference. A texture depends on the key and the pixels of its image only.

    Args:
      key: a typed threefry key, which is split over the images, or keys [B], one per image.
      images: [B,H,W,C], uint8 or float in [0,1]. The published method takes the image before augmentation.
      exemplar: side of the exemplars; None: 96/224 of the shorter side S of the image (14 at 32 pixels).
      patch: side of a patch; None: 4 + S/8 (8 at 32 pixels, 16 at 96, 32 at 224), at most 2/3 of the exemplar.
      overlap: overlap of neighbouring patches; None: the smallest from a quarter to a half of the patch that lets the
        patches fit S exactly, or a quarter if none does (2 at 32 pixels, 6 at 96, 8 at 224).
      candidates: K, the number of patches that are compared for a place.
      tolerance: 0 chooses the best candidate; Efros and Freeman published 0.1.

    Returns:
      [B,H,W,C] of images' dtype. Every pixel is a copy of a pixel of an exemplar of its image.

    Raises:
      UserError: images or keys of another type or shape, sizes that do not fit each other, candidates below 1,
        tolerance below 0.

    Source: Efros and Freeman 2001, section 2; Ge et al. 2021, arXiv 2110.14189.
    """
    images = jnp.asarray(images)
    if images.ndim != 4:
        raise UserError(f"quilt_texture takes images [B,H,W,C], got shape {images.shape}")
    if images.dtype != jnp.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(f"quilt_texture takes uint8 images or float in [0,1], got {images.dtype}")
    layout = make_layout("quilt_texture", images.shape[1:], exemplar, patch, overlap)
    _check_search("quilt_texture", candidates, tolerance)
    keys = image_keys("quilt_texture", key, len(images))
    return quilt(keys, images, layout, candidates, float(tolerance))


def make_layout(
    what: str,
    shape: tuple[int, ...],
    exemplar: int | None = None,
    patch: int | None = None,
    overlap: int | None = None,
) -> Layout:
    """Sizes for images of shape [H,W,C]; None follows the rules of `quilt_texture`. Errors: UserError."""
    side = min(shape[:2])
    given = {"exemplar": exemplar, "patch": patch, "overlap": overlap}
    for name, value in given.items():
        if value is not None and not whole(value):
            raise UserError(f"{what}: {name} is {value!r}; expected a whole number of pixels")
    if exemplar is None:
        exemplar = max(1, round(side * EXEMPLAR[0] / EXEMPLAR[1]))
    if not 1 <= exemplar <= side:
        raise UserError(
            f"{what}: exemplar is {exemplar}, the images have a side of {side}; use a square of {side} pixels or less"
        )
    if patch is None:
        patch = max(2, min(round(4 + side / 8), 2 * exemplar // 3))
    if not 2 <= patch <= exemplar:
        raise UserError(
            f"{what}: patch is {patch}, the exemplar has a side of {exemplar}; expected 2 to {exemplar} pixels"
            if exemplar > 1
            else f"{what}: an exemplar of 1 pixel has no patches; use larger images or a larger exemplar"
        )
    if overlap is None:
        least = max(1, patch // 4)
        fits = (o for o in range(least, patch // 2 + 1) if (side - o) % (patch - o) == 0)
        overlap = next(fits, least)
    if not 1 <= overlap <= patch // 2:
        raise UserError(f"{what}: overlap is {overlap}, the patch has a side of {patch}; expected 1 to {patch // 2}")
    if (2 * patch - overlap) * overlap * shape[2] > _LARGEST:
        raise UserError(f"{what}: patch {patch} with overlap {overlap} is too large to compare; use smaller ones")
    return Layout(exemplar, patch, overlap)


def _check_search(what: str, candidates: int, tolerance: float) -> None:
    if not whole(candidates) or candidates < 1 or not 0 <= tolerance < math.inf:
        raise UserError(
            f"{what}: candidates is {candidates} and tolerance {tolerance}; "
            "expected a whole number of at least 1, and a number of at least 0"
        )


def exemplar_corners(height: int, width: int, exemplar: int, u: Array) -> Array:
    """Upper left corners (top, left) of the exemplar at the centre and of the random one, int32 [2,2].

    u: [2] uniform in [0, 1). The random corner is floor(u * (side - exemplar)), as published; so the last corner is
    never drawn.
    """
    centre = jnp.array([height // 2 - exemplar // 2, width // 2 - exemplar // 2], jnp.int32)
    room = jnp.array([height - exemplar, width - exemplar])
    return jnp.stack([centre, jnp.floor(u * room).astype(jnp.int32)])


def minimum_error_path(errors: Array) -> Array:
    """The path down a strip with the least sum of errors: [...,R,L] -> columns int32 [...,R], in steps of at most 1.

    Among equal paths, it starts furthest left in the last row and goes straight up where possible.
    """
    largest = jnp.array(
        jnp.iinfo(errors.dtype).max // 2 if jnp.issubdtype(errors.dtype, jnp.integer) else jnp.inf, errors.dtype
    )
    edge = jnp.broadcast_to(largest, (*errors.shape[:-2], 1))
    columns = jnp.arange(errors.shape[-1])

    def down(total: Array, error: Array) -> tuple[Array, Array]:
        left = jnp.concatenate([edge, total[..., :-1]], -1)
        right = jnp.concatenate([total[..., 1:], edge], -1)
        best = jnp.minimum(total, jnp.minimum(left, right))
        move = jnp.where(total == best, 0, jnp.where(left == best, -1, 1)).astype(jnp.int32)
        return best + error, move

    def up(path: Array, move: Array) -> tuple[Array, Array]:
        above = path + jnp.sum(jnp.where(columns == path[..., None], move, 0), -1, dtype=jnp.int32)
        return above, above

    rows = jnp.moveaxis(errors, -2, 0)
    total, moves = jax.lax.scan(down, rows[0], rows[1:])
    last = jnp.argmin(total, -1).astype(jnp.int32)
    _, before = jax.lax.scan(up, last, moves, reverse=True)
    return jnp.moveaxis(jnp.concatenate([before, last[None]]), 0, -1)


def quilt_sources(
    image: Array, corners: Array, picks: Array, *, layout: Layout, tolerance: float
) -> tuple[Array, Array]:
    """The deterministic core: the source of every pixel of the texture.

    Args:
      image: [H,W,C].
      corners: [2,2] from `exemplar_corners`.
      picks: [N,K] integers below 2 * (E-P+1)**2, the candidates of each patch in raster order. A number encodes the
        exemplar and the row and column in it.
      layout, tolerance: static; see `quilt_texture`.

    Returns:
      Linear indices y * W + x, int32 [H,W], and the candidate chosen for each patch, int32 [N].
    """
    H, W, _ = image.shape
    P, L, step = layout.patch, layout.overlap, layout.step
    rows, cols = layout.grid(H, W)
    places = layout.exemplar - P + 1
    which, place = picks // places**2, picks % places**2
    # Linear index of each candidate's upper left corner in the image.
    corner_2 = corners[:, 0] * W + corners[:, 1]
    base_NxK = (corner_2[which] + (place // places) * W + place % places).astype(jnp.int32)

    table = pack(image)  # one or more words [H*W] per pixel
    offset_PxP = jnp.arange(P, dtype=jnp.int32)[:, None] * W + jnp.arange(P, dtype=jnp.int32)

    def strips(x_PxP: Array) -> Array:
        """The overlap as one row [Q]: the left strip, then the rest of the top strip."""
        return jnp.concatenate([x_PxP[:, :L].reshape(-1), x_PxP[:L, L:].reshape(-1)])

    offset_Q = strips(offset_PxP)
    in_corner = jnp.arange(P)[:, None] < L  # rows of the left strip that are in the top strip too

    def place_patch(n: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        source, taken = carry
        i, j = n // cols, n % cols
        old_PxP = jax.lax.dynamic_slice(source, (i * step, j * step), (P, P))
        old_Q = look_up(table, strips(old_PxP))
        base_K = base_NxK[n]
        error_KxQ = _squared_difference(look_up(table, base_K[:, None] + offset_Q), old_Q)
        counts_left = jnp.broadcast_to((j > 0) | (i > 0) & in_corner, (P, L)).reshape(-1)
        counts_Q = jnp.concatenate([counts_left, jnp.broadcast_to(i > 0, (L * (P - L),))])
        total_K = jnp.sum(jnp.where(counts_Q, error_KxQ, 0), -1).astype(jnp.float32)
        # Candidates are in random order, so the first that is good enough is a random one of them.
        k = jnp.argmax(total_K <= total_K.min() * (1 + tolerance)).astype(jnp.int32)

        error_Q = _squared_difference(look_up(table, base_K[k] + offset_Q), old_Q)
        left_PxL = error_Q[: P * L].reshape(P, L)
        top_LxP = jnp.concatenate([left_PxL[:L], error_Q[P * L :].reshape(L, P - L)], 1)
        left_P, top_P = minimum_error_path(jnp.stack([left_PxL, top_LxP.T]))
        side = jnp.arange(P)
        keep = (j > 0) & (side < left_P[:, None]) | (i > 0) & (side[:, None] < top_P)
        new_PxP = jnp.where(keep, old_PxP, base_K[k] + offset_PxP)
        return jax.lax.dynamic_update_slice(source, new_PxP, (i * step, j * step)), taken.at[n].set(k)

    canvas = jnp.zeros((rows * step + L, cols * step + L), jnp.int32)
    source, taken = jax.lax.fori_loop(0, rows * cols, place_patch, (canvas, jnp.zeros(rows * cols, jnp.int32)))
    return source[:H, :W], taken


def pack(image_HxWxC: Array) -> list[tuple[Array, int]]:
    """Packs 8-bit values, four channels to a word, which one look-up reads: [(words uint32 [H*W], channels)]."""
    if image_HxWxC.dtype != jnp.uint8:
        if not jnp.issubdtype(image_HxWxC.dtype, jnp.floating):
            raise UserError(f"images are {image_HxWxC.dtype}; expected uint8, or floats in [0, 1]")
        image_HxWxC = jnp.round(jnp.clip(image_HxWxC.astype(jnp.float32), 0, 1) * 255)
    pixels = image_HxWxC.astype(jnp.uint32).reshape(-1, image_HxWxC.shape[-1])
    words = []
    for begin in range(0, pixels.shape[-1], 4):
        values = pixels[:, begin : begin + 4]
        words.append((sum(values[:, c] << 8 * c for c in range(values.shape[-1])), values.shape[-1]))
    return words


def look_up(table: list[tuple[Array, int]], index: Array) -> list[tuple[Array, int]]:
    """The packed pixels at these linear indices; an index must be in bounds."""
    return [(words.at[index].get(mode="promise_in_bounds"), channels) for words, channels in table]


def _squared_difference(a: list[tuple[Array, int]], b: list[tuple[Array, int]]) -> Array:
    """Sum of the squared differences of the channels of packed pixels, int32."""
    total = 0
    for (x, channels), (y, _) in zip(a, b, strict=True):
        for c in range(channels):
            difference = (x >> 8 * c & 255).astype(jnp.int32) - (y >> 8 * c & 255).astype(jnp.int32)
            total += difference * difference
    return total


def _draw(key: Array, shape: tuple[int, ...], layout: Layout, candidates: int) -> tuple[Array, Array]:
    """-> corners of the exemplars [2,2], candidates of every patch [N,K]."""
    of_exemplar, of_picks = jax.random.split(key)
    corners = exemplar_corners(*shape[:2], layout.exemplar, jax.random.uniform(of_exemplar, (2,), jnp.float32))
    places = layout.exemplar - layout.patch + 1
    patches = math.prod(layout.grid(*shape[:2]))
    return corners, jax.random.randint(of_picks, (patches, candidates), 0, 2 * places**2, jnp.int32)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def quilt(keys_B: Array, images: Array, layout: Layout, candidates: int, tolerance: float) -> Array:
    """`quilt_texture` with one key per image and checked options."""

    def one(key: Array, image_HxWxC: Array) -> Array:
        corners, picks = _draw(key, image_HxWxC.shape, layout, candidates)
        source_HxW, _ = quilt_sources(image_HxWxC, corners, picks, layout=layout, tolerance=tolerance)
        H, W, C = image_HxWxC.shape
        return image_HxWxC.reshape(H * W, C).at[source_HxW].get(mode="promise_in_bounds")

    return jax.vmap(one)(keys_B, images)
