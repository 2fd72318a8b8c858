"""What lies near what by the features, and images that are there more than once; needs no labels.

N images, Q queries, D features, P = 3 x 8 x 8 values of a thumbnail, k neighbours.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.data import Source
from jaxcl.data.selection import cut_down
from jaxcl.errors import UserError
from jaxcl.evaluate.base import Metrics
from jaxcl.evaluate.knn import nearest_neighbours

if TYPE_CHECKING:
    from jaxcl.evaluate.suite import EvalContext, Evaluation

THUMBNAIL = 8  # side of what stands for an image while all pairs are compared
TILE = 1024  # rows and columns of the pairs that are held at once
COMPARED = 20_000  # pairs whose whole images are read
LISTED = 100  # near-duplicates in results.json
PICTURED, MAPPED = 8, 1000  # queries in the report; images on its map
GROUPS, OF_GROUP = 12, 8  # near-duplicates in the report


def neighbours(f: "EvalContext") -> tuple[Metrics, dict]:
    """The nearest training images of each test image, and near-duplicates among all of them."""
    kind = f.options.knn_features or f.options.features
    train, test = f.source("train"), f.test
    bank_NxD, queries_QxD = f.features("train", kind), f.features("test", kind)
    cosine_Qxk, rows_Qxk = map(np.asarray, nearest_neighbours(bank_NxD, queries_QxD, k=f.options.neighbours))
    figures = {
        "k": cosine_Qxk.shape[1],
        "cosine": float(cosine_Qxk[:, 0].mean()),
        "any_cosine": float(_unit(bank_NxD).mean(0) @ _unit(queries_QxD).mean(0)),  # the mean over all pairs
    }
    known_Qxk = (test.labels >= 0)[:, None] & (train.labels[rows_Qxk] >= 0)
    agree_Qxk = test.labels[:, None] == train.labels[rows_Qxk]
    if known_Qxk.any():
        figures["agreement"] = float(agree_Qxk[known_Qxk].mean())

    both = _Both(train, test)
    thumbnails = np.concatenate([f.features("train", "thumbnail"), f.features("test", "thumbnail")])
    features = np.concatenate([bank_NxD, queries_QxD])
    found = near_duplicates(
        features, thumbnails, both.images, cosine=f.options.duplicate_cosine, pixels=f.options.duplicate_pixels
    )
    figures |= {
        "copies": len(found.pairs),  # what could go: each pair joins one more image to those it is like
        "all_compared": found.complete,
        "near_duplicates": [
            {"images": [both.name(p.first), both.name(p.second)], "cosine": p.cosine, "pixels": p.pixels}
            for p in found.pairs[:LISTED]
        ],
    }

    shown = cut_down(test.labels, PICTURED, seed=0)
    panels = {
        "neighbours": {
            "queries": test.batch(shown)["image"],
            "found": np.stack([train.batch(rows)["image"] for rows in rows_Qxk[shown]]),
            "cosine": cosine_Qxk[shown],
            "agree": np.where(known_Qxk, agree_Qxk, np.nan)[shown] if known_Qxk.any() else None,
            "names": [both.name(len(train) + q) for q in shown],
            "found_names": [[both.name(row) for row in rows] for rows in rows_Qxk[shown]],
        },
        "map": both.some(MAPPED, features),
    }
    if groups := _groups(found.pairs)[:GROUPS]:
        panels["near_duplicates"] = {
            "images": [both.images(np.array(group[:OF_GROUP])) for group in groups],
            "names": [[both.name(i) for i in group] for group in groups],
        }
    return figures, panels


def check_neighbours(evaluation: "Evaluation") -> None:
    """UserError for options that no search can use."""
    options = evaluation.options
    if options.neighbours < 1:
        raise UserError(f"eval.neighbours is {options.neighbours}; expected at least 1")
    if not -1 <= options.duplicate_cosine <= 1:
        raise UserError(f"eval.duplicate_cosine is {options.duplicate_cosine}; expected a cosine, such as 0.95")
    if not 0 <= options.duplicate_pixels <= 1:
        raise UserError(f"eval.duplicate_pixels is {options.duplicate_pixels}; expected a share of the range, 0 to 1")


def thumbnail(pixels: jax.Array) -> jax.Array:
    """Images [B,H,W,C] -> [B,P] of the mean colours of their parts."""
    small = jax.image.resize(pixels, (len(pixels), THUMBNAIL, THUMBNAIL, pixels.shape[-1]), "linear", antialias=True)
    return small.reshape(len(pixels), -1).astype(jnp.float32)


# ---- near-duplicates


class Pair(NamedTuple):
    first: int
    second: int
    cosine: float
    pixels: float  # root of the mean squared difference, a share of the range


class Found(NamedTuple):
    """pairs: joined to groups, they say which images are near-duplicates of each other; complete: none was left out."""

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
    """Pairs that are alike both by their features and pixel by pixel.

    Tile by tile, sorted by brightness: two images can only be alike if their means are, so most tiles are never made.
    Of a group of n near-duplicates n - 1 pairs are given, by which all of them hang together.

    Args:
      features_NxD: of any length.
      thumbnails_NxP: in [0, 1].
      images: rows [n] -> uint8 [n,H,W,C].
      cosine: of the features, at least.
      pixels: root of the mean squared difference in [0, 1] units, at most.

    Returns:
      The pairs (first < second), most alike first; not complete where more than `COMPARED` pairs had to be looked at.
    """
    if len(features_NxD) < 2:
        return Found([], True)
    unit_NxD = _unit(features_NxD)
    order = np.argsort(thumbnails_NxP.mean(1), kind="stable")
    bright = thumbnails_NxP.mean(1)[order]
    values, count = thumbnails_NxP.shape[1], len(order)
    # Differences of float32 sums are as exact as they are small: from the common mean.
    x = (thumbnails_NxP - thumbnails_NxP.mean(0)).astype(np.float32)
    square = (x**2).sum(1)
    group, pairs, compared = np.arange(count), [], 0
    limit = values * (pixels + 1 / 255) ** 2  # a thumbnail is an average: it differs hardly more than the image does

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
    rows, place = np.unique(pairs, return_inverse=True)
    x, place = images(rows), place.reshape(pairs.shape)
    return np.array([np.sqrt(np.mean((x[i].astype(np.float32) - x[j]) ** 2)) / 255 for i, j in place])


def _groups(pairs: list[Pair]) -> list[list[int]]:
    """Images that hang together by pairs; the largest group first."""
    of: dict[int, list[int]] = {}
    for pair in pairs:
        one, other = of.setdefault(pair.first, [pair.first]), of.setdefault(pair.second, [pair.second])
        if one is not other:
            one += other
            of |= dict.fromkeys(other, one)
    distinct = {id(group): group for group in of.values()}
    return sorted((sorted(group) for group in distinct.values()), key=lambda g: (-len(g), g))


# ---- images of both parts


class _Both:
    """Training and test images by one number: those of the test part follow the others."""

    def __init__(self, train: Source, test: Source):
        self._train, self._test = train, test
        self._names = [source.extras.get("name") for source in (train, test)]

    def images(self, rows: np.ndarray) -> np.ndarray:
        """uint8 [n,H,W,C]"""
        n, out = len(self._train), np.empty((len(rows), *self._train.image_shape), np.uint8)
        out[rows < n] = self._train.batch(rows[rows < n])["image"]
        out[rows >= n] = self._test.batch(rows[rows >= n] - n)["image"]
        return out

    def name(self, row: int) -> str:
        """The file's, or its place in the part."""
        of_test = int(row >= len(self._train))
        row = int(row) - of_test * len(self._train)
        names = self._names[of_test]
        return f"{'test' if of_test else 'training'} image {row}" if names is None else str(names[row])

    def some(self, count: int, features: np.ndarray) -> dict[str, Any]:
        """A seeded choice, for a picture of the whole."""
        rows = np.sort(np.random.default_rng(0).permutation(len(features))[:count])
        return {"features": features[rows], "images": self.images(rows), "names": [self.name(row) for row in rows]}


def _unit(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
