"""Decoding: an encoded image of any format becomes RGB of one size, uint8 [H,W,3]. H height, W width."""

from typing import IO

import numpy as np
from PIL import ExifTags, Image

# No other format is opened: Pillow also has some that run other programs (EPS) or that fit any bytes (TGA).
_KNOWN = "JPEG PNG WEBP BMP GIF TIFF PPM AVIF JPEG2000 QOI".split()
# Endings of files of these formats. `folder:PATH` ignores files with other endings.
_SUFFIXES = """
    .jpg .jpeg .jpe .jfif .png .apng .webp .bmp .dib .gif .tif .tiff .ppm .pgm .pbm .pnm .avif .jp2 .j2k .qoi
"""
SUFFIXES = frozenset(_SUFFIXES.split())
Image.init()  # here, since plugins would otherwise load in many threads at the same time
FORMATS = tuple(name for name in _KNOWN if name in Image.OPEN)

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def shape(stream: IO[bytes]) -> tuple[int, int]:
    """(height, width) of an upright image, from its header. Errors: any error of Pillow."""
    with _open(stream) as image:
        width, height = image.size
        # PNG and others store a rare orientation behind the pixels. `decode` reads it.
        turned = image.format in ("JPEG", "MPO") and 5 <= _orientation(image) <= 8
        return (width, height) if turned else (height, width)


def decode(stream: IO[bytes], size: int | None = None) -> np.ndarray:
    """The first frame as RGB, uint8 [H,W,3], or [size,size,3] by `resize_and_crop`.

    The EXIF orientation is applied. Greyscale is repeated, 16 bits are scaled to 8, CMYK is converted without colour
    profiles, and transparent pixels become white.

    Errors: any error of Pillow; ValueError for pixels that are floating-point or beyond 16 bits.
    """
    with _open(stream) as image:
        # A JPEG may be decoded at 1/2, 1/4 or 1/8, so that at least twice the size remains.
        drafted = image.draft(None, (2 * size, 2 * size)) if size else None
        image.load()
        rgb = _rgb(image)
        if size:
            rgb = resize_and_crop(rgb, size, extent=drafted[1][2:] if drafted else None)
        turn = _TURNS.get(_orientation(image))
        return np.asarray(rgb if turn is None else rgb.transpose(turn))


def resize_and_crop(
    image: Image.Image, size: int, *, extent: tuple[float, float] | None = None, nearest: bool = False
) -> Image.Image:
    """Resizes the shorter side to `size` (bilinear, antialiased) and crops the centre: RGB -> size x size.

    Args:
      extent: width and height of the picture, where the image is a fraction of a pixel larger (a JPEG decoded at 1/8).
      nearest: take the nearest pixel, for values that are numbers of classes.
    """
    if image.size == (size, size):
        return image
    width, height = extent or image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    # Only the centre is computed: resizing a strip of 1 x 20,000 pixels as a whole would fill the memory. Pillow widens
    # the bilinear filter when it shrinks an image, which is the antialiasing.
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.NEAREST if nearest else Image.Resampling.BILINEAR, box=box)


def _open(stream: IO[bytes]) -> Image.Image:
    return Image.open(stream, formats=FORMATS)


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata; the image may be good
        return 1
    return value if isinstance(value, int) else 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _eight_bits(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Greyscale of 16 or 32 bits, scaled to 8; Pillow would clip it at 255. The transparent value becomes white.

    A file of 32 bits does not say how many it uses: 8 if no value is above 255, otherwise 16.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels; expected 8 or 16 bits")
    values = np.asarray(image)
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    if not 0 <= low <= high < 2**16:
        raise ValueError(f"pixels from {low} to {high}; expected 8 or 16 bits")
    eight = image.format == "TIFF" and image.mode == "I" and high < 2**8
    grey = values if eight else (values.astype(np.uint32) * 255 + 32767) // 65535
    if isinstance(clear := image.info.get("transparency"), int):
        grey = np.where(values == clear, 255, grey)
    return Image.fromarray(grey.astype(np.uint8))
