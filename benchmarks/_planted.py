"""Real images with planted copies, for `benchmarks.duplicates`: how copies are made, and what was found of them."""

import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

KINDS = {  # copies of each kind among 100
    **dict.fromkeys(("half", "jpeg50", "jpeg20", "mirror", "border", "recoloured"), 12),
    **dict.fromkeys(("crop5", "crop10", "crop15", "crop20"), 7),
}
Pairs = set[frozenset[str]]


class Planted(NamedTuple):
    """A folder with copies. `copies`: (name of the original, name of the copy, kind)."""

    folder: pathlib.Path
    names: list[str]
    copies: list[tuple[str, str, str]]


def plant(images: Sequence[np.ndarray], rows: Sequence[int], into: pathlib.Path, *, side: int, seed: int) -> Planted:
    """Write images as PNG files, named by their rows, and 100 copies of some of them.

    Args:
      images: uint8 [H,W,3] each.
      side: of the files; smaller images are enlarged (bicubic), so that a crop of 5 % is a crop.
      seed: of the choice of what is copied, and of where and how much.
    """
    rng = np.random.default_rng(seed)
    into.mkdir(parents=True, exist_ok=True)
    names = [f"{row:06d}.png" for row in rows]
    kinds = [kind for kind, count in KINDS.items() for _ in range(count)]
    chosen = dict(zip(rng.permutation(len(names))[: len(kinds)].tolist(), kinds, strict=True))
    copies = []
    for i, (name, pixels) in enumerate(zip(names, images, strict=True)):
        image = Image.fromarray(pixels)
        if min(image.size) < side:
            scale = side / min(image.size)
            image = image.resize([round(scale * n) for n in image.size], Image.Resampling.BICUBIC)
        image.save(into / name)
        if kind := chosen.get(i):
            copy, options = altered(image, kind, rng)
            target = f"copy_{len(copies):03d}_{kind}{'.jpg' if options else '.png'}"
            copy.save(into / target, **options)
            copies.append((name, target, kind))
    return Planted(into, names + [copy for _, copy, _ in copies], copies)


def altered(image: Image.Image, kind: str, rng: np.random.Generator) -> tuple[Image.Image, dict[str, int]]:
    """(A copy of an RGB image, options of its JPEG or {} for a PNG)."""
    width, height = image.size
    if kind == "half":
        return image.resize((max(1, width // 2), max(1, height // 2)), Image.Resampling.BICUBIC), {"quality": 92}
    if kind.startswith("jpeg"):
        return image, {"quality": int(kind[4:])}
    if kind.startswith("crop"):  # so many percent of each side are cut off, anywhere
        cut = int(kind[4:]) / 100
        w, h = round(width * (1 - cut)), round(height * (1 - cut))
        left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
        return image.crop((left, top, left + w, top + h)), {"quality": 92}
    if kind == "mirror":
        return ImageOps.mirror(image), {"quality": 92}
    if kind == "border":  # 2 to 8 percent of the longer side, in any colour
        colour = tuple(int(c) for c in rng.integers(0, 256, 3))
        return ImageOps.expand(image, max(1, round(max(image.size) * rng.uniform(0.02, 0.08))), colour), {}
    if kind == "recoloured":  # grey; or hues turned, colours and contrast stronger or weaker, brighter or darker
        if rng.random() < 0.25:
            return ImageOps.grayscale(image).convert("RGB"), {"quality": 92}
        hue, saturation, value = image.convert("HSV").split()
        turn = int(rng.integers(20, 236))
        image = Image.merge("HSV", (hue.point(lambda v: (v + turn) % 256), saturation, value)).convert("RGB")
        image = ImageEnhance.Color(image).enhance(rng.uniform(0.5, 1.5))
        image = ImageEnhance.Contrast(image).enhance(rng.uniform(0.7, 1.2))
        return ImageEnhance.Brightness(image).enhance(rng.uniform(0.75, 1.25)), {"quality": 92}
    raise ValueError(kind)


def judged(planted: Planted, found: Iterable[frozenset[str]], natural: Iterable[Sequence[int]]) -> dict[str, Any]:
    """What a method found.

    Args:
      found: pairs of names.
      natural: pairs of rows of the set that are near-duplicates by eye. Pairs of these, or of copies of these, count
        neither as right nor as wrong.

    Returns:
      precision, recall, recall of each kind, and the pairs that are wrong ("false").
    """
    origin = {name: name for name in planted.names} | {copy: original for original, copy, _ in planted.copies}
    known = {frozenset(f"{row:06d}.png" for row in pair) for pair in natural}
    right = {pair for pair in found if len({origin[name] for name in pair}) == 1}
    wrong = [pair for pair in found if pair not in right and frozenset(origin[name] for name in pair) not in known]
    kinds = {kind: [] for kind in KINDS}
    for original, copy, kind in planted.copies:
        kinds[kind].append(frozenset((original, copy)) in right)
    hits = sum(map(sum, kinds.values()))
    return {
        "precision": len(right) / max(1, len(right) + len(wrong)),
        "recall": hits / len(planted.copies),
        "kinds": {kind: sum(values) / len(values) for kind, values in kinds.items()},
        "right": len(right),
        "false": sorted(tuple(sorted(pair)) for pair in wrong),
    }
