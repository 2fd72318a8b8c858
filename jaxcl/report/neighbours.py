"""Figures of similar images: nearest neighbours, groups, near-duplicates, and images that are like no other."""

from collections.abc import Sequence

import numpy as np

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
    short,
    styled,
)

_MARGIN, _GAP, _TEXT = 14, 8, 34  # dots; _TEXT: height of a line of text
_COLUMNS = 9
_WIDE = round(WIDTH * DPI)
_ROOM = (_WIDE - 2 * _MARGIN) // _COLUMNS - _GAP
_LIMIT, _BETWEEN = 160, 40


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


@styled
def cluster_grid(
    images: Sequence[np.ndarray], names: Sequence[Sequence[str]], sizes: Sequence[int], more: int
) -> Titled:
    """Draw one row per group of images.

    Args:
      images: [n,H,W,C] of each group, the most typical first; the first eight are shown.
      names: [n] of each group, in full.
      sizes: number of images of each group.
      more: number of groups that are not drawn.
    """
    columns, label = _COLUMNS - 1, 150
    groups = [as_rgb(group)[:columns] for group in images]
    size = cell_size(groups[0].shape[1:3], _ROOM, _LIMIT)
    step, high = max(size[0], 96) + _GAP, size[1] + 2 * _GAP
    sheet = Sheet(_WIDE, 2 * _MARGIN + len(groups) * high + (_TEXT if more else 0))
    for g, (group, called, count) in enumerate(zip(groups, names, sizes, strict=True)):
        y = _MARGIN + g * high
        sheet.text(_MARGIN, y + size[1] / 2 - 12, f"group {g + 1}", weight="bold", fontsize=9)
        sheet.text(_MARGIN, y + size[1] / 2 + 14, f"{count:,} images", color=MUTED, fontsize=8)
        for c, image in enumerate(group):
            sheet.image(image, _MARGIN + label + c * step, y, size, title=called[c])
    if more:
        sheet.text(_MARGIN, _MARGIN + len(groups) * high + _TEXT / 2, f"and {more:,} smaller groups", color=MUTED)
    return sheet.titled()


@styled
def odd_grid(images: np.ndarray, names: Sequence[str], odd: np.ndarray) -> Titled:
    """Draw images [n,H,W,C] with their names and how odd each is, [n]."""
    images = as_rgb(images)
    size = cell_size(images.shape[1:3], _ROOM, _LIMIT)
    step, high = max(size[0], 96) + _GAP, size[1] + _GAP + _TEXT
    columns = max(1, (_WIDE - 2 * _MARGIN) // step)
    sheet = Sheet(_WIDE, 2 * _MARGIN + -(-len(images) // columns) * high)
    for i, image in enumerate(images):
        x, y = _MARGIN + i % columns * step, _MARGIN + i // columns * high
        sheet.image(image, x, y, size, title=f"{names[i]}, {odd[i]:.3f}")
        sheet.text(x, y + size[1] + _TEXT // 2, shortened(names[i], step), color=MUTED, fontsize=7.5)
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
