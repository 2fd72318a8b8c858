"""The map of the images: an interactive picture inside of the page, which loads nothing. n images, D features."""

import base64
import io
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxcl.report.figures import to_plane
from jaxcl.report.style import as_rgb

CELL = 64  # pixels of the longer side of an image on the map, at most
NEAREST = 8  # images beside a chosen one
_SCRIPT = pathlib.Path(__file__).with_suffix(".js")


def explorer(
    features: Mapping[str, np.ndarray],
    images: np.ndarray,
    names: Sequence[str],
    classes: Sequence[str] | None = None,
    groups: Sequence[int] | None = None,
    total: int = 0,
    *,
    seed: int = 0,
) -> str:
    """The map as HTML: the images where t-SNE places their features, to zoom, to search, and to choose from.

    Args:
      features: [n,D] by the name of the encoder, the main one first; one that has no picture, since its features are
        all the same, is left out.
      images: [n,H,W,C].
      names: [n], in full.
      classes: [n] names, "" for unknown ones; None: no classes.
      groups: [n] numbers; None: no groups.
      total: number of images of which these were chosen.
      seed: of t-SNE.

    Returns:
      HTML with its data and its script.

    Raises:
      ValueError: there are too few images for a map, or the main features are all the same; the message says which.
    """
    content: dict[str, Any] = {"encoders": []}
    main = next(iter(features))
    rows, _ = places = to_plane(features[main], seed, limit=None)
    for name, values in features.items():
        try:
            kept, points = places if name == main else to_plane(values, seed, limit=None)
        except ValueError:
            continue
        if not np.isin(rows, kept).all():
            continue
        points = points[np.searchsorted(kept, rows)]
        low, extent = points.min(0), np.maximum(np.ptp(points, axis=0), 1e-9)
        cosine, near = _nearest(np.asarray(values, np.float32)[rows])
        content["encoders"].append(
            {
                "name": name,
                "points": np.round((points - low) / extent, 4).tolist(),
                "near": near.tolist(),
                "cosine": np.round(cosine, 3).tolist(),
            }
        )
    content |= _sprite(np.asarray(images), rows)
    for key, values in (("names", names), ("classes", classes), ("groups", groups)):
        content[key] = None if values is None else [values[i] for i in rows]
    chosen = f", {len(rows):,} of {total:,} images, chosen at random" if total > len(rows) else ""
    # "<" could end the element early: names of files may contain anything.
    data = json.dumps(content, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<div id="map-root" class="explorer" data-images="{len(rows)}"></div>'
        f"<p class=hint>Drag to move; zoom with the buttons, two fingers, or the wheel after a click{chosen}.</p>"
        "<noscript><p class=missing>The map needs JavaScript, which is switched off here.</p></noscript>"
        f'<script type="application/json" id="map-data">{data}</script><script>{_SCRIPT.read_text("utf-8")}</script>'
    )


def _nearest(features_nxD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(cosines [n,k], rows [n,k]) of the nearest other images."""
    unit = features_nxD / np.maximum(np.linalg.norm(features_nxD, axis=1, keepdims=True), 1e-12)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -np.inf)
    near = np.argsort(-cosine, axis=1, kind="stable")[:, : min(NEAREST, len(unit) - 1)]
    return np.take_along_axis(cosine, near, 1), near


def _sprite(images: np.ndarray, rows: np.ndarray) -> dict[str, Any]:
    """These images of [n,H,W,C] in one picture, row by row: JPEG, or PNG of those so small that JPEG blurs them."""
    from PIL import Image

    n, (H, W) = len(rows), as_rgb(images[rows[0]]).shape[:2]
    scale = min(1.0, CELL / max(H, W))
    h, w = max(1, round(H * scale)), max(1, round(W * scale))
    columns = math.ceil(math.sqrt(n * h / w)) or 1
    sheet = Image.new("RGB", (columns * w, math.ceil(n / columns) * h))
    for i, row in enumerate(rows):  # one by one: as floats, all of them would take four times as much memory
        picture = Image.fromarray((255 * as_rgb(images[row])).round().astype(np.uint8))
        picture = picture if (w, h) == (W, H) else picture.resize((w, h), Image.Resampling.BOX, reducing_gap=None)
        sheet.paste(picture, (i % columns * w, i // columns * h))
    kind = "PNG" if max(h, w) < 32 else "JPEG"
    out = io.BytesIO()
    sheet.save(out, kind, **({"quality": 85} if kind == "JPEG" else {}))
    text = base64.b64encode(out.getvalue()).decode("ascii")
    return {"sprite": f"data:image/{kind.lower()};base64,{text}", "cell": [w, h], "columns": columns, "size": [W, H]}
