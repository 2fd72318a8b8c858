"""Sheets of images: views, saliency masks and adversarial images."""

from collections.abc import Mapping, Sequence

import matplotlib.figure
import numpy as np
from matplotlib import colormaps

from jaxcl.report.style import (
    BAD,
    BLUE,
    DPI,
    GOOD,
    INK,
    MUTED,
    ORANGE,
    WIDTH,
    Sheet,
    as_rgb,
    cell_size,
    short,
    styled,
)

_MARGIN, _GAP = 14, 8  # dots
_LABEL = 226  # dots, width of the row names
MAX_COLUMNS = 8


@styled
def view_grid(views: Mapping[str, np.ndarray], labels: Sequence[str] | None = None) -> matplotlib.figure.Figure:
    """Draw one row per view and one column per example; each pixel is a sharp square.

    Args:
      views: name -> images [n,H,W,C], C 1 or 3, float in [0,1] or uint8. Sizes may differ between views; the
        first eight examples are shown.
      labels: names of the examples, [n].
    """
    rows = [(str(name), as_rgb(images)[:MAX_COLUMNS]) for name, images in views.items()]
    if not rows or not max(len(images) for _, images in rows):
        raise ValueError("view_grid needs at least one view with at least one image")
    columns = max(len(images) for _, images in rows)
    room = (round(WIDTH * DPI) - _LABEL - 2 * _MARGIN) // max(columns, 6) - _GAP
    sizes = [cell_size(images.shape[1:3], room) for _, images in rows]
    step = max(w for w, _ in sizes) + _GAP
    top = _MARGIN + (40 if labels is not None else 0)
    height = top + sum(h + _GAP for _, h in sizes) - _GAP + _MARGIN
    sheet = Sheet(_LABEL + columns * step - _GAP + _MARGIN, height)
    for c in range(min(columns, len(labels)) if labels is not None else 0):
        sheet.text(
            _LABEL + c * step + (step - _GAP) / 2,
            _MARGIN + 16,
            short(labels[c], max(6, step // 13)),
            ha="center",
            color=MUTED,
            fontsize=8.5,
        )
    y = top
    for (name, images), size in zip(rows, sizes, strict=True):
        sheet.text(_LABEL - 16, y + size[1] / 2, _wrap(name), ha="right", fontsize=9, weight="bold")
        for c, image in enumerate(images):
            sheet.image(image, _LABEL + c * step + (step - _GAP - size[0]) // 2, y, size)
        y += size[1] + _GAP
    return sheet.figure


@styled
def saliency_grid(
    image: np.ndarray,
    map: np.ndarray,
    keep: np.ndarray,
    masked: np.ndarray,
    accepted: np.ndarray,
    true_mask: np.ndarray | None = None,
    names: Sequence[str] | None = None,
) -> matplotlib.figure.Figure:
    """Draw accepted and rejected masks in two blocks: columns are examples, rows lead from image to masked view.

    Shows up to eight of each, without counts: the caller may have chosen equally many of both kinds.

    Args:
      image: [n,H,W,C] the explained images, float in [0,1] or uint8.
      map: [n,H,W] saliency in [0,1].
      keep: [n,H,W] bool, the pixels that the mask keeps.
      masked: [n,H,W,C] the masked image, in the range of `image`.
      accepted: [n] bool, the classifier still predicts the class on the masked image.
      true_mask: [n,H,W] bool, the object; None: unknown.
      names: [n] class names.
    """
    image, masked = as_rgb(image), as_rgb(masked)
    heat, keep = np.clip(np.nan_to_num(np.asarray(map, np.float32)), 0, 1), np.asarray(keep, bool)
    accepted = np.asarray(accepted, bool)
    true = None if true_mask is None else np.asarray(true_mask, bool)
    blocks = [(flag, np.flatnonzero(accepted == flag)) for flag in (True, False)]
    columns = min(MAX_COLUMNS, max(len(chosen) for _, chosen in blocks))
    if columns == 0:
        raise ValueError("saliency_grid needs at least one example")
    room = (round(WIDTH * DPI) - _LABEL - 2 * _MARGIN) // max(columns, 6) - _GAP
    size = cell_size(image.shape[1:3], room)
    step = max(size[0] + _GAP, 120)
    head, foot = 100, 66
    block = head + 4 * (size[1] + _GAP) + foot
    heights = [block if len(chosen) else 64 for _, chosen in blocks]
    sheet = Sheet(max(_LABEL + columns * step + _MARGIN, 1120), sum(heights) + _MARGIN)

    y0 = 0
    for (flag, chosen), height in zip(blocks, heights, strict=True):
        color, word = (GOOD, "Accepted") if flag else (BAD, "Rejected")
        why = "the kept pixels alone still get the right class" if flag else "the kept pixels alone get a wrong class"
        if len(chosen):
            sheet.axes.fill_between([_MARGIN, sheet.figure.bbox.width - _MARGIN], y0 + 14, y0 + 52, color=color, lw=0)
        sheet.text(
            _MARGIN + 14,
            y0 + 33,
            f"{word}: {why}" if len(chosen) else f"{word}: none of these examples",
            color="white" if len(chosen) else MUTED,
            weight="bold",
            fontsize=9.5,
        )
        if len(chosen):
            _row_names(sheet, y0 + head, size, true is not None)
        for c, i in enumerate(chosen[:columns]):
            x, y = _LABEL + c * step + (step - _GAP - size[0]) // 2, y0 + head
            middle = x + size[0] / 2
            if names is not None:
                sheet.text(middle, y - 20, short(names[i], max(6, step // 13)), ha="center", color=INK, fontsize=8.5)
            panels = (image[i], _overlay(image[i], heat[i]), _dimmed(image[i]), masked[i])
            for panel in panels:
                sheet.image(panel, x, y, size)
                y += size[1] + _GAP
            outlines_y = y0 + head + 2 * (size[1] + _GAP)
            if true is not None:
                sheet.outline(true[i], x, outlines_y, size, BLUE, 2.2)
            sheet.outline(keep[i], x, outlines_y, size, ORANGE, 1.2)  # thin over thick: both show where they meet
            sheet.frame(x, y - size[1] - _GAP, size, color, 2.4)
            note = f"keeps {100 * keep[i].mean():.0f}%"
            if true is not None:
                union = (keep[i] | true[i]).sum()
                note += f"\nIoU {(keep[i] & true[i]).sum() / union if union else 0.0:.2f}"
            sheet.text(middle, y + 8, note, ha="center", va="top", color=MUTED, fontsize=8, linespacing=1.3)
        y0 += height
    return sheet.figure


@styled
def adversary_grid(
    clean: np.ndarray,
    perturbation: np.ndarray,
    adversarial: np.ndarray,
    partner: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    names: Sequence[str] | None = None,
    partner_names: Sequence[str] | None = None,
) -> matplotlib.figure.Figure:
    """Draw one column per example: clean view, perturbation, adversarial view, and the image that it came closer to.

    The perturbation is shown around grey, scaled so that its largest value spans the range.

    Args:
      clean, adversarial, partner: [n,H,W,C], float in [0,1] (other values are clipped in the figure only).
      perturbation: [n,H,W,C], in the same units.
      before, after: [n] cosines of the embeddings of the image and its partner.
      names, partner_names: [n] class names.
    """
    n = min(len(clean), MAX_COLUMNS)
    if not n:
        raise ValueError("adversary_grid needs at least one example")
    largest = float(np.abs(perturbation).max())
    rows = (
        ("clean view", "", np.clip(clean, 0, 1)),
        (
            "perturbation",
            f"{0.5 / largest:.0f} times" if largest else "none",
            0.5 + 0.5 * perturbation / (largest or 1),
        ),
        ("adversarial", f"within {255 * largest:.3g}/255", np.clip(adversarial, 0, 1)),
        ("came closest to", "its gain was largest", np.clip(partner, 0, 1)),
    )
    rows = [(name, note, as_rgb(np.asarray(images, np.float32))[:n]) for name, note, images in rows]
    room = (round(WIDTH * DPI) - _LABEL - 2 * _MARGIN) // max(n, 6) - _GAP
    size = cell_size(rows[0][2].shape[1:3], room)
    step, head, foot = max(size[0] + _GAP, 120), 46, 76
    sheet = Sheet(_LABEL + n * step + _MARGIN, _MARGIN + head + len(rows) * (size[1] + _GAP) + foot)
    width = max(6, step // 13)
    for c in range(n):
        x = _LABEL + c * step + (step - _GAP - size[0]) // 2
        middle, y = x + size[0] / 2, _MARGIN + head
        if names is not None:
            sheet.text(middle, y - 22, short(names[c], width), ha="center", color=INK, fontsize=8.5)
        for _, _, images in rows:
            sheet.image(images[c], x, y, size)
            y += size[1] + _GAP
        other = "" if partner_names is None else f"{short(partner_names[c], width)}\n"
        said = f"{other}{before[c]:.2f} → {after[c]:.2f}"
        sheet.text(middle, y + 4, said, ha="center", va="top", color=MUTED, fontsize=8, linespacing=1.3)
    for r, (name, note, _) in enumerate(rows):
        y = _MARGIN + head + r * (size[1] + _GAP) + size[1] / 2
        sheet.text(_LABEL - 16, y - (12 if note else 0), name, ha="right", fontsize=9, weight="bold")
        if note:
            sheet.text(_LABEL - 16, y + 14, note, ha="right", color=MUTED, fontsize=8)
    foot_y = _MARGIN + head + len(rows) * (size[1] + _GAP) + 4
    sheet.text(_LABEL - 16, foot_y, "similarity", ha="right", va="top", color=MUTED, fontsize=8)
    return sheet.figure


def _row_names(sheet: Sheet, y: int, size: tuple[int, int], has_truth: bool) -> None:
    middle = size[1] / 2
    step = size[1] + _GAP
    right = {"ha": "right", "fontsize": 9, "weight": "bold"}
    small = {"ha": "right", "fontsize": 8}
    x = _LABEL - 16
    sheet.text(x, y + middle, "image", **right)
    sheet.text(x, y + step + middle - 12, "saliency", **right)
    sheet.text(x, y + step + middle + 14, "bright = mattered", color=MUTED, **small)
    sheet.text(x, y + 2 * step + middle - (12 if has_truth else 0), "kept", **{**right, "color": "#b57d00"})
    if has_truth:
        sheet.text(x, y + 2 * step + middle + 14, "true object", **{**right, "color": BLUE})
    sheet.text(x, y + 3 * step + middle - 12, "masked image", **right)
    sheet.text(x, y + 3 * step + middle + 14, "rest: mean colour", color=MUTED, **small)


def _overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """The map over the grey image: the colour shows the value, and low values are more transparent."""
    grey = image.mean(-1, keepdims=True)
    alpha = 0.35 + 0.45 * heat[..., None]
    return (1 - alpha) * grey + alpha * colormaps["inferno"](heat)[..., :3]


def _dimmed(image: np.ndarray) -> np.ndarray:
    """The image in light grey, on which outlines are easy to see."""
    return np.repeat(0.45 + 0.5 * image.mean(-1, keepdims=True), 3, axis=-1)


def _wrap(name: str) -> str:
    words = name.replace("_", " ").split(" ")
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + 1 + len(word) > 12:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(short(line, 14) for line in lines)
