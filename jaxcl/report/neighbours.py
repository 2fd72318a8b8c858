"""Figures of similar images: nearest neighbours, a map of thumbnails, and near-duplicates."""

from collections.abc import Sequence

import matplotlib.figure
import numpy as np

from jaxcl.report.figures import to_plane
from jaxcl.report.style import (
    BAD,
    DPI,
    GOOD,
    INK,
    MUTED,
    WIDTH,
    Sheet,
    Titled,
    as_rgb,
    cell_size,
    message,
    short,
    styled,
)

_MARGIN, _GAP, _TEXT = 14, 8, 34  # dots; _TEXT: height of a line of text
_COLUMNS = 9
_WIDE = round(WIDTH * DPI)
_ROOM = (_WIDE - 2 * _MARGIN) // _COLUMNS - _GAP
_LIMIT, _BETWEEN = 160, 40
_THUMBNAIL, _MAP_HEIGHT = 54, 1300


@styled
def neighbour_grid(
    queries: np.ndarray,
    found: np.ndarray,
    cosine: np.ndarray,
    agree: np.ndarray | None,
    names: Sequence[str],
    found_names: Sequence[Sequence[str]],
) -> Titled:
    """Draw one row per image: the image, then its nearest ones, the nearest first.

    Args:
      queries: [n,H,W,C].
      found: [n,k,H,W,C]; the first eight are shown.
      cosine: [n,k] of the features.
      agree: [n,k] 1 for the class of the query, 0 for another one, NaN if one is unknown; None: no classes.
      names, found_names: full names of the images.
    """
    n, k = len(queries), min(found.shape[1], _COLUMNS - 1)
    queries, found = as_rgb(queries), as_rgb(found)
    size = cell_size(queries.shape[1:3], _ROOM, _LIMIT)
    step, high, aside = max(size[0], 96) + _GAP, size[1] + _GAP + _TEXT, 24
    head = 40
    sheet = Sheet(2 * _MARGIN + (k + 1) * step + aside, _MARGIN + head + n * high)
    sheet.text(_MARGIN, _MARGIN + 14, "image", weight="bold")
    sheet.text(_MARGIN + step + aside, _MARGIN + 14, "nearest by features, with their cosine", weight="bold")
    for r in range(n):
        y = _MARGIN + head + r * high
        sheet.image(queries[r], _MARGIN, y, size, title=names[r])
        sheet.text(_MARGIN, y + size[1] + _TEXT // 2, shortened(names[r], step), color=MUTED, fontsize=7.5)
        for c in range(k):
            x = _MARGIN + (c + 1) * step + aside
            sheet.image(found[r, c], x, y, size, title=f"{found_names[r][c]}, cosine {cosine[r, c]:.3f}")
            color = INK
            if agree is not None and np.isfinite(agree[r, c]):
                color = GOOD if agree[r, c] else BAD
                sheet.frame(x, y, size, color, 2.2)
            sheet.text(x, y + size[1] + _TEXT // 2, f"{cosine[r, c]:.2f}", color=color, fontsize=8)
    return sheet.titled()


@styled
def thumbnail_map(
    features: np.ndarray, images: np.ndarray, names: Sequence[str], *, seed: int = 0
) -> Titled | matplotlib.figure.Figure:
    """Draw a t-SNE picture of the features with the images at their positions; images without room are dots.

    Args:
      features: [n,D].
      images: [n,H,W,C].
      names: [n], in full.
      seed: of t-SNE and of the order in which images are placed.
    """
    try:
        rows, points = to_plane(features, seed)
    except ValueError as reason:
        return message(str(reason))
    sheet = Sheet(_WIDE, _MAP_HEIGHT)
    size = cell_size(as_rgb(images[:1]).shape[1:3], _THUMBNAIL, _THUMBNAIL)
    low, extent = points.min(0), np.maximum(np.ptp(points, axis=0), 1e-9)
    inside = np.array([_WIDE, _MAP_HEIGHT]) - 2 * _MARGIN - size
    places = _MARGIN + (points - low) / extent * inside  # of the upper left corners
    sheet.axes.scatter(*(places + np.array(size) / 2).T, s=5, color="#b6bec7", linewidths=0, zorder=-1)
    drawn = np.zeros((0, 2))
    for i in np.random.default_rng(seed).permutation(len(rows)):
        if (np.abs(drawn - places[i]) < np.array(size) + 2).all(1).any():
            continue
        drawn = np.concatenate([drawn, places[i : i + 1]])
        x, y = (round(v) for v in places[i])
        sheet.image(as_rgb(images[rows[i]]), x, y, size, title=names[rows[i]])
    return sheet.titled()


@styled
def duplicate_grid(images: Sequence[np.ndarray], names: Sequence[Sequence[str]]) -> Titled:
    """Draw groups of near-duplicates, one after another.

    Args:
      images: [n,H,W,C] of each group; the first eight are shown.
      names: of all images of each group.
    """
    columns = _COLUMNS - 1
    groups = [as_rgb(group)[:columns] for group in images]
    size = cell_size(groups[0].shape[1:3], _ROOM, _LIMIT)
    step, high = max(size[0], 96) + _GAP, size[1] + _GAP + _TEXT
    places, x, y = [], _MARGIN, _MARGIN
    for group, called in zip(groups, names, strict=True):
        wide = (len(group) + (len(called) > len(group))) * step
        if x + wide > _WIDE - _MARGIN and x > _MARGIN:
            x, y = _MARGIN, y + high
        places.append((x, y))
        x += wide + _BETWEEN
    sheet = Sheet(_WIDE, y + high + _MARGIN)
    for group, called, (x, y) in zip(groups, names, places, strict=True):
        for c, image in enumerate(group):
            sheet.image(image, x + c * step, y, size, title=called[c])
            sheet.text(x + c * step, y + size[1] + _TEXT // 2, shortened(called[c], step), color=MUTED, fontsize=7.5)
        if more := len(called) - len(group):
            sheet.text(x + len(group) * step, y + size[1] / 2, f"and {more:,} more", color=MUTED, fontsize=8)
    return sheet.titled()


def shortened(name: str, room: int) -> str:
    """A file name shortened to `room` dots; it keeps both ends, as names often differ in one of them."""
    name, length = short(name.rsplit("/", 1)[-1], 200), room // 13
    if len(name) <= length:
        return name
    stem = name.rpartition(".")[0] or name
    if len(stem) <= length:
        return stem
    head = length // 3
    return f"{stem[:head]}…{stem[head + 1 - length :]}"
