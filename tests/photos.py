"""Generated photos: garments on their textured backgrounds, as JPEG files of mixed sizes."""

import pathlib

from PIL import Image

from jaxcl.data import make_source

SIDES = ((96, 72), (120, 90), (200, 150), (320, 240), (500, 375))


def write(folder: pathlib.Path, count: int, *, copies: int = 0, seed: int = 0) -> list[tuple[str, str]]:
    """`count` files, the last `copies` of them the first ones anew, in another size and quality -> pairs of names."""
    folder.mkdir(parents=True, exist_ok=True)
    if not count:
        return []
    originals = make_source("garments", limit=count - copies, seed=seed).images
    pairs = []
    for i in range(count):
        original = i if i < count - copies else i - (count - copies)
        wide = SIDES[i % len(SIDES)] if i == original else (260, 195)
        side = wide if original % 3 else wide[::-1]
        # The garment as it is, in the middle of a photo that is wider or higher than it.
        photo = Image.fromarray(originals[original]).resize((max(side),) * 2, Image.Resampling.BICUBIC)
        left, top = (max(side) - side[0]) // 2, (max(side) - side[1]) // 2
        name = f"{'photo' if i == original else 'again'}{original:05d}.jpg"
        photo.crop((left, top, left + side[0], top + side[1])).save(folder / name, quality=92 if i == original else 70)
        if i != original:
            pairs.append((f"photo{original:05d}.jpg", name))
    return pairs
