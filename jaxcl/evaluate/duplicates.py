"""Near-duplicates: images that are there more than once. No labels are needed.

N images, D features, P = 3 x 8 x 8 values of a thumbnail.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

THUMBNAIL = 8  # side of the thumbnails, by which all pairs are compared first
TILE = 1024  # rows and columns of the pairs in memory at one time
COMPARED = 20_000  # pairs whose whole images are read, at most


def thumbnail(pixels: jax.Array) -> jax.Array:
    """Images [B,H,W,C] in [0,1] -> the mean colours of their parts, float32 [B,P]."""
    small = jax.image.resize(pixels, (len(pixels), THUMBNAIL, THUMBNAIL, pixels.shape[-1]), "linear", antialias=True)
    return small.reshape(len(pixels), -1).astype(jnp.float32)


def normalized(x: np.ndarray) -> np.ndarray:
    """Rows [N,D] at unit length, float32; rows of zeros stay zero."""
    x = np.asarray(x, np.float32)
    largest = np.abs(x).max(1, keepdims=True, initial=0)
    x = np.ldexp(x, -np.frexp(largest)[1])  # squares of the result neither overflow nor vanish
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


class Pair(NamedTuple):
    """Two rows of images that are nearly the same."""

    first: int
    second: int
    cosine: float
    pixels: float  # root mean squared difference of pixels in [0, 1]


class Found(NamedTuple):
    """The near-duplicates. Pairs that share an image form a group; complete: no pair was skipped."""

    pairs: list[Pair]
    complete: bool


def near_duplicates(
    features_NxD: np.ndarray,
    thumbnails_NxP: np.ndarray,
    images: Callable[[np.ndarray], np.ndarray],
    *,
    cosine: float,
    pixels: float,
) -> Found:
    """Pairs of images that are alike both by their features and pixel by pixel.

    Images are sorted by brightness and compared in tiles: two images can only be alike if their brightness is, so most
    tiles are skipped. A group of n near-duplicates gives n - 1 pairs, which connect all its images.

    Args:
      features_NxD: features; their lengths do not matter.
      thumbnails_NxP: from `thumbnail`, in [0, 1].
      images: rows [n] -> uint8 [n,H,W,C].
      cosine: the least cosine of the features.
      pixels: the largest root mean squared difference of pixels in [0, 1].

    Returns:
      The pairs (first < second), largest cosine first; not complete if more than `COMPARED` pairs had to be compared.
    """
    if len(features_NxD) < 2:
        return Found([], True)
    unit_NxD = normalized(features_NxD)
    order = np.argsort(thumbnails_NxP.mean(1), kind="stable")
    bright = thumbnails_NxP.mean(1)[order]
    values, count = thumbnails_NxP.shape[1], len(order)
    # Centred, so that the values are small: float32 sums then lose fewer digits.
    x = (thumbnails_NxP - thumbnails_NxP.mean(0)).astype(np.float32)
    square = (x**2).sum(1)
    group, pairs, compared = np.arange(count), [], 0
    limit = values * (pixels + 1 / 255) ** 2  # thumbnails are averages: they hardly differ more than images

    for begin in range(0, count, TILE):
        a = order[begin : begin + TILE]
        end = np.searchsorted(bright, bright[min(begin + TILE, count) - 1] + pixels + 1 / 255, "right")
        for other in range(begin, end, TILE):
            b = order[other : min(other + TILE, end)]
            apart = square[a, None] + square[b] - 2 * x[a] @ x[b].T
            near = np.argwhere((apart <= limit) & (group[a, None] != group[b]))
            if other == begin:
                near = near[near[:, 0] < near[:, 1]]
            near = near[np.argsort(apart[tuple(near.T)], kind="stable")]
            near = np.stack([a[near[:, 0]], b[near[:, 1]]], 1)
            for block in np.array_split(near, max(1, len(near) // 256)):
                block = block[group[block[:, 0]] != group[block[:, 1]]]
                alike = (unit_NxD[block[:, 0]] * unit_NxD[block[:, 1]]).sum(1)
                block, alike = block[alike >= cosine], alike[alike >= cosine]
                if not len(block):
                    continue
                compared += len(block)
                if compared > COMPARED:
                    return Found(sorted(pairs, key=lambda p: -p.cosine), False)
                difference = _difference(images, block)
                for (i, j), c, d in zip(block.tolist(), alike, difference, strict=True):
                    if d <= pixels and group[i] != group[j]:
                        group[group == group[j]] = group[i]
                        pairs.append(Pair(min(i, j), max(i, j), min(1.0, float(c)), float(d)))
    return Found(sorted(pairs, key=lambda p: -p.cosine), True)


def _difference(images: Callable[[np.ndarray], np.ndarray], pairs: np.ndarray) -> np.ndarray:
    """Root mean squared differences [n] of the images of pairs [n,2]."""
    rows, place = np.unique(pairs, return_inverse=True)
    x, place = images(rows), place.reshape(pairs.shape)
    return np.array([np.sqrt(np.mean((x[i].astype(np.float32) - x[j]) ** 2)) / 255 for i, j in place])


def connected_groups(pairs: list[Pair]) -> list[list[int]]:
    """The images that pairs connect, the largest group first."""
    group_of: dict[int, list[int]] = {}
    for pair in pairs:
        one, other = group_of.setdefault(pair.first, [pair.first]), group_of.setdefault(pair.second, [pair.second])
        if one is not other:
            one += other
            group_of |= dict.fromkeys(other, one)
    distinct = {id(group): group for group in group_of.values()}
    return sorted((sorted(group) for group in distinct.values()), key=lambda g: (-len(g), g))
