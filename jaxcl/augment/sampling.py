"""Textures by copying pixels: a parallel non-parametric sampler, slower and finer than quilting, for sets made offline.

B images, H W image, E side of an exemplar, h spacing of a level's lattice, s step of a sub-lattice, G points of a
sub-lattice, K neighbours of a pixel, R random candidates, C channels.

The sampler makes a map: the exemplar and the pixel in it that each pixel of the texture copies. The first level is
coarse, a lattice of every h-th pixel, which is compared on exemplars blurred over about h pixels. Each finer level
halves h and inherits the map; the last one compares the exemplars themselves. A level chooses every pixel several
times. The candidates are the continuations of its neighbours (coherence) and a few random places; the one with the most
similar neighbourhood wins. Pixels are visited in sub-lattices of points that do not see each other, and all points of a
sub-lattice are chosen at once.

Source: Lefebvre and Hoppe 2005, Parallel Controllable Texture Synthesis. It replaces the sequential Multiresolution
Stochastic Texture Synthesis of Ge et al. 2021, arXiv 2110.14189; its cost, candidates and two exemplars are kept.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.augment.patches import image_keys, whole
from jaxcl.augment.quilting import EXEMPLAR, exemplar_corners, look_up, pack
from jaxcl.errors import UserError

Array = jax.Array


class Search(NamedTuple):
    """Sizes of the search: side of exemplars and radius of neighbourhoods in pixels, random candidates, and passes."""

    exemplar: int
    radius: int
    randoms: int
    passes: int

    @property
    def spacings(self) -> tuple[int, ...]:
        """h of each level, from coarse to 1: powers of two with a neighbourhood that fits the exemplar."""
        levels = 1 + max(0, math.floor(math.log2(max(1, self.exemplar / (2 * self.radius)))))
        return tuple(2**i for i in reversed(range(levels)))

    @property
    def step(self) -> int:
        """s: at this distance, two points are not neighbours."""
        return self.radius + 1

    @property
    def neighbours(self) -> np.ndarray:
        """Offsets (row, column) int [K, 2] of the neighbours, in units of the lattice."""
        side = np.arange(-self.radius, self.radius + 1)
        offsets = np.stack(np.meshgrid(side, side, indexing="ij"), -1).reshape(-1, 2)
        return offsets[(offsets != 0).any(1)]


def sample_texture(
    key: Array,
    images: Array,
    *,
    exemplar: int | None = None,
    radius: int | None = None,
    randoms: int = 16,
    passes: int = 2,
) -> Array:
    """Textures of the size of the images, sampled pixel by pixel from two exemplars of each image.

    As in `quilt_texture`, the exemplars are the square at the centre and a square at a random place. A texture depends
    on the key and the pixels of its image only.

    Args:
      key: a typed threefry key, which is split over the images, or keys [B], one per image.
      images: uint8 [B,H,W,C], before augmentation.
      exemplar: side of the exemplars; None: 96/224 of the shorter side of the image.
      radius: radius of the compared neighbourhood of (2 radius + 1)^2 - 1 pixels; None: 3 for exemplars of at least
        64 pixels (48 pixels, close to the published 50), else 2.
      randoms: number of random candidates of a pixel, in addition to 9 coherent ones.
      passes: number of times that a level chooses every pixel.

    Returns:
      uint8 [B,H,W,C]. Every pixel is a copy of a pixel of an exemplar of its image.

    Raises:
      UserError: images or keys of another type or shape, sizes that do not fit each other.

    Source: Lefebvre and Hoppe 2005; Ge et al. 2021, arXiv 2110.14189.
    """
    images = jnp.asarray(images)
    if images.ndim != 4 or images.dtype != jnp.uint8:
        raise UserError(f"sample_texture takes uint8 images [B,H,W,C], got {images.dtype} {images.shape}")
    search = make_search("sample_texture", images.shape[1:], exemplar, radius, randoms, passes)
    return _sample_texture(image_keys("sample_texture", key, len(images)), images, search)


def make_search(
    what: str,
    shape: tuple[int, ...],
    exemplar: int | None = None,
    radius: int | None = None,
    randoms: int = 16,
    passes: int = 2,
) -> Search:
    """The search for images of shape [H,W,C]; None follows the rules of `sample_texture`. Errors: UserError."""
    side = min(shape[:2])
    exemplar = max(1, round(side * EXEMPLAR[0] / EXEMPLAR[1])) if exemplar is None else exemplar
    radius = (3 if exemplar >= 64 else 2) if radius is None else radius
    if not whole(exemplar, radius, randoms, passes) or not 1 <= exemplar <= side:
        raise UserError(f"{what}: exemplar is {exemplar}; expected whole numbers, an exemplar of 1 to {side} pixels")
    if not 1 <= radius <= exemplar // 2 or randoms < 0 or passes < 1:
        raise UserError(
            f"{what}: radius is {radius}, randoms {randoms} and passes {passes}; "
            f"expected a radius of 1 to {exemplar // 2}, half the exemplar, randoms from 0 and passes from 1"
        )
    return Search(exemplar, radius, randoms, passes)


@functools.partial(jax.jit, static_argnums=2)
def _sample_texture(keys_B: Array, images: Array, search: Search) -> Array:
    return jax.vmap(lambda key, image: _sampled(key, image, search)[0])(keys_B, images)


def _sampled(key: Array, image_HxWxC: Array, search: Search) -> tuple[Array, Array, Array]:
    """-> texture [H,W,C], its sources as indices int32 [H,W] into the exemplars, and the exemplars [2,E,E,C]."""
    (H, W, C), E = image_HxWxC.shape, search.exemplar
    of_corners, of_start, of_search = jax.random.split(key, 3)
    corners = exemplar_corners(H, W, E, jax.random.uniform(of_corners, (2,), jnp.float32))
    exemplars = jax.vmap(lambda corner: jax.lax.dynamic_slice(image_HxWxC, (*corner, 0), (E, E, C)))(corners)
    source = None
    for level, h in enumerate(search.spacings):
        rows, columns = -(-H // h), -(-W // h)
        if source is None:
            source = _tiled(of_start, rows, columns, h, E)
        else:
            source = _finer(source, h, E)[:rows, :columns]
        table = pack(_blurred(exemplars, h).reshape(2 * E, E, C))
        source = _level(jax.random.fold_in(of_search, level), source, table, h, search)
    return exemplars.reshape(-1, C).at[source].get(mode="promise_in_bounds"), source, exemplars


def _tiled(key: Array, rows: int, columns: int, h: int, E: int) -> Array:
    """A first map [rows, columns]: random squares of the exemplars, side by side, each half as wide as an exemplar."""
    # From single random pixels, the search would keep mostly the plain areas of the exemplars, which fit everywhere.
    side = max(1, E // (2 * h))
    tiles = -(-rows // side), -(-columns // side)
    of_which, of_corner = jax.random.split(key)
    which = jax.random.randint(of_which, tiles, 0, 2, jnp.int32)
    corner = jax.random.randint(of_corner, (2, *tiles), 0, E - h * (side - 1), jnp.int32)
    y, x = np.arange(rows)[:, None], np.arange(columns)
    tile = y // side, x // side
    row, column = (corner[i][tile] + h * (p % side) for i, p in enumerate((y, x)))
    return which[tile] * E**2 + row * E + column


def _blurred(exemplars: Array, h: int) -> Array:
    """Exemplars uint8 [2,E,E,C] without the detail that a lattice of every h-th pixel cannot represent."""
    if h == 1:
        return exemplars
    # Equals shrinking by h and enlarging again, each with a Gaussian of half a pixel of the small image.
    apart = np.subtract.outer(np.arange(exemplars.shape[1]), np.arange(exemplars.shape[1]))
    weights = np.exp(-0.5 * (apart / (h * 0.5**0.5)) ** 2)
    weights = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    soft = jnp.einsum("ij,kl,njlc->nikc", weights, weights, exemplars.astype(jnp.float32))
    return jnp.round(soft).astype(jnp.uint8)


def _finer(source: Array, h: int, E: int) -> Array:
    """Doubles the points of a map of spacing 2h in both directions: a new point continues the point before it."""
    twice = jnp.repeat(jnp.repeat(source, 2, 0), 2, 1)
    which, row, column = twice // E**2, twice // E % E, twice % E
    row = jnp.minimum(row + h * (jnp.arange(twice.shape[0]) % 2)[:, None], E - 1)
    column = jnp.minimum(column + h * (jnp.arange(twice.shape[1]) % 2), E - 1)
    return which * E**2 + row * E + column


def _level(key: Array, source: Array, table: list, h: int, search: Search) -> Array:
    """Chooses every point of a level `passes` times. source: indices int32 [rows, columns] into the exemplars."""
    s, E = search.step, search.exemplar

    def visit(n: Array, source: Array) -> Array:
        lattice = n % s**2
        shape = (search.randoms, -(-source.shape[0] // s) * -(-source.shape[1] // s))
        picks_RxG = jax.random.randint(jax.random.fold_in(key, n), shape, 0, 2 * E * E, jnp.int32)
        return choose(source, picks_RxG, lattice // s, lattice % s, table, h, search)

    return jax.lax.fori_loop(0, search.passes * s**2, visit, source)


def choose(source: Array, picks_RxG: Array, top: Array, left: Array, table: list, h: int, search: Search) -> Array:
    """The deterministic core: chooses all points (top + s i, left + s j) of a map at once.

    Among equal candidates the first wins: the present source, then coherent ones, then random ones.

    Args:
      source: int32 [rows, columns], linear indices into the exemplars [2, E, E].
      picks_RxG: random candidates of the points in raster order.
      top, left: the first point.
      table: the exemplars, packed by `quilting.pack`.
      h: spacing of the lattice.
      search: sizes.

    Returns:
      The new map, int32 [rows, columns].
    """
    (rows, columns), E, s = source.shape, search.exemplar, search.step
    row_G, column_G = jnp.divmod(jnp.arange(-(-rows // s) * -(-columns // s), dtype=jnp.int32), -(-columns // s))
    row_G, column_G = top + s * row_G, left + s * column_G  # points outside the map are dropped at the end

    def around(offsets: np.ndarray) -> tuple[Array, Array]:
        """-> the sources of the points at these offsets [G, ...], and whether such points exist."""
        r, c = row_G[:, None] + offsets[:, 0], column_G[:, None] + offsets[:, 1]
        there = (r >= 0) & (r < rows) & (c >= 0) & (c < columns)
        return source[jnp.clip(r, 0, rows - 1), jnp.clip(c, 0, columns - 1)], there

    def moved(index: Array, offsets: np.ndarray) -> tuple[Array, Array]:
        """-> the places at distance `h * offsets` in an exemplar, and whether they are in the same exemplar."""
        r, c = index // E % E + h * offsets[..., 0], index % E + h * offsets[..., 1]
        inside = (r >= 0) & (r < E) & (c >= 0) & (c < E)
        return index // E**2 * E**2 + jnp.clip(r, 0, E - 1) * E + jnp.clip(c, 0, E - 1), inside

    offsets_Kx2 = search.neighbours
    distance_K = (offsets_Kx2**2).sum(1)
    beside_GxK, there_GxK = around(offsets_Kx2)
    weight_GxK = jnp.where(there_GxK, np.exp(-distance_K / distance_K.mean()).astype(np.float32), 0)
    seen_GxK = look_up(table, beside_GxK)

    def cost(index_G: Array) -> Array:
        place_GxK, inside_GxK = moved(index_G[:, None], offsets_Kx2)
        likeness = 1.0
        for (x, channels), (y, _) in zip(seen_GxK, look_up(table, place_GxK), strict=True):
            y = jnp.where(inside_GxK, y, 0)  # pixels outside the exemplar are black
            for c in range(channels):
                difference = ((x >> 8 * c & 255).astype(jnp.float32) - (y >> 8 * c & 255).astype(jnp.float32)) / 255
                likeness = likeness * (1 + difference * difference)
        return jnp.sum(weight_GxK * jnp.log(likeness), axis=1)  # the sum over channels of log(1 + d^2)

    near_9x2 = np.array([(0, 0), *((a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if a or b)])
    copied_Gx9, there_Gx9 = around(near_9x2)
    continued_Gx9, inside_Gx9 = moved(copied_Gx9, -near_9x2)
    candidates = jnp.concatenate([continued_Gx9.T, picks_RxG])
    allowed = jnp.concatenate([(there_Gx9 & inside_Gx9).T, jnp.ones(picks_RxG.shape, bool)])

    def better(best: tuple[Array, Array], candidate: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        (least_G, chosen_G), (index_G, allowed_G) = best, candidate
        cost_G = jnp.where(allowed_G, cost(index_G), jnp.inf)
        return (jnp.minimum(least_G, cost_G), jnp.where(cost_G < least_G, index_G, chosen_G)), None

    start = (jnp.full(row_G.shape, jnp.inf), copied_Gx9[:, 0])
    (_, chosen_G), _ = jax.lax.scan(better, start, (candidates, allowed))
    return source.at[row_G, column_G].set(chosen_G, mode="drop")
