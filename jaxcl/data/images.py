"""Decoding: an encoded image of any format becomes RGB of one size, uint8 [H,W,3]. H height, W width."""

import contextlib
import io
import os
import struct
import threading
from collections.abc import Iterator, Sequence
from typing import IO, Literal, get_args

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

MAX_PIXELS = 2**30  # of an image, by default: far above a panorama, below what fills a machine's memory
SMALL = 2**20  # pixels; smaller images do not wait for others
Fit = Literal["crop", "squash", "letterbox"]
FITS: tuple[str, ...] = get_args(Fit)
# Of the bars of a letterbox: ImageNet's mean colour, a warm grey. It is about 0 once an image is normalised, so that
# the bars say little to an encoder, whereas black or white bars would be the strongest edges of most images.
BARS = (124, 116, 104)
AT_ONE_TIME = 2**27  # pixels that are decoded at one time: half a gigabyte as RGB with its copy for Pillow
_RAW_EXIF = b"Raw profile type exif"
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def shape(stream: IO[bytes], max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) of an upright image, from its header. Errors: those of `decode`."""
    with _open(stream, max_pixels) as image:
        width, height = image.size
        # Pillow would decode a PNG to find an orientation behind its pixels; few have one, and the list of its parts
        # tells. Pillow turns a TIFF itself.
        known = image.format != "TIFF" and (image.format != "PNG" or _png_has_exif(stream))
        return (width, height) if known and 5 <= _orientation(image) <= 8 else (height, width)


def decode(stream: IO[bytes], size: int | None = None, max_pixels: int = MAX_PIXELS, fit: Fit = "crop") -> np.ndarray:
    """The first frame as RGB, uint8 [H,W,3], or [size,size,3] by `fitted`.

    The EXIF orientation is applied. Greyscale is repeated, 16 bits are scaled to 8, CMYK is converted without colour
    profiles, and transparent pixels become white.

    Large images take turns, so that many threads need little more memory than the largest image.

    Errors: any error of Pillow; ValueError for pixels that are floating-point, beyond 16 bits or too many.
    """
    with _open(stream, max_pixels) as image, contextlib.ExitStack() as stack:
        # A JPEG may be decoded at 1/2, 1/4 or 1/8, so that at least twice the size remains.
        drafted = image.draft(None, (2 * size, 2 * size)) if size else None
        stack.enter_context(_turns.take(image.width * image.height))
        with _unlimited:
            image.load()
        rgb = _rgb(image)
        if size:
            rgb = fitted(rgb, size, fit, extent=drafted[1][2:] if drafted else None)
        turn = _TURNS.get(_orientation(image))
        return np.asarray(rgb if turn is None else rgb.transpose(turn))


def fitted(
    image: Image.Image, size: int, fit: Fit = "crop", *, extent: tuple[float, float] | None = None
) -> Image.Image:
    """Makes an RGB image a square of `size` (bilinear, antialiased).

    Args:
      fit: "crop": the shorter side becomes `size`, and of the longer one the middle remains. "squash": both sides
        become `size`; all of the image remains, its proportions do not. "letterbox": the longer side becomes `size`,
        and bars of the colour `BARS` fill the square; all of the image remains, smaller.
      extent: as of `resize_and_crop`.
    """
    if fit == "crop":
        return resize_and_crop(image, size, extent=extent)
    if fit not in FITS:
        raise ValueError(f"fit is {fit!r}; expected one of {', '.join(FITS)}")
    width, height = extent or image.size
    if fit == "squash" or width == height:
        return _whole(image, (size, size), (width, height))
    # The two bars are equally wide, so that an image that is turned later is as if it had been turned before.
    inner = [
        size - 2 * min((size - 1) // 2, round(size * (1 - side / max(width, height)) / 2)) for side in (width, height)
    ]
    square = Image.new("RGB", (size, size), BARS)
    square.paste(_whole(image, (inner[0], inner[1]), (width, height)), ((size - inner[0]) // 2, (size - inner[1]) // 2))
    return square


def _whole(image: Image.Image, to: tuple[int, int], extent: tuple[float, float]) -> Image.Image:
    """All of an image at another size, whatever its proportions."""
    if image.size == to:
        return image
    box = (0, 0, *extent)
    if extent[0] < to[0] and extent[1] > to[1]:
        # Pillow resizes rows first, which would fill the memory for a strip of 1 x 20,000,000 pixels.
        image = image.resize((image.width, to[1]), Image.Resampling.BILINEAR, box=(0, 0, image.width, extent[1]))
        box = (0, 0, extent[0], to[1])
    return image.resize(to, Image.Resampling.BILINEAR, box=box)


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


def open_image(stream: IO[bytes] | str | os.PathLike, formats: Sequence[str] | None = FORMATS) -> Image.Image:
    """`PIL.Image.open` without Pillow's own limit, which takes a panorama of 200 megapixels for an attack."""
    with _unlimited:
        return Image.open(stream, formats=formats)


class _Unlimited:
    """Lifts Pillow's limit, a variable of the whole process, while any thread opens an image."""

    def __init__(self):
        self._lock, self._inside, self._limit = threading.Lock(), 0, None

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                Image.MAX_IMAGE_PIXELS = self._limit


class _Turns:
    """At most `pixels` are decoded at one time, over all threads; a larger image is decoded alone."""

    def __init__(self, pixels: int):
        self._all, self._free, self._changed = pixels, pixels, threading.Condition()

    @contextlib.contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        if pixels < SMALL:
            yield
            return
        pixels = min(pixels, self._all)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


_unlimited, _turns = _Unlimited(), _Turns(AT_ONE_TIME)


def _open(stream: IO[bytes], max_pixels: int) -> Image.Image:
    image = open_image(stream)
    # The tiles of a TIFF are decoded as a whole, even if they are larger than the image.
    pixels = max(a * b for a, b in (image.size, getattr(image, "_tile_size", (0, 0))))
    if pixels > max_pixels:
        image.close()
        raise ValueError(f"{pixels:,} pixels, and data.files.max_pixels allows {max_pixels:,}")
    return image


def _png_has_exif(stream: IO[bytes]) -> bool:
    """Whether a PNG has a part with EXIF, by the names of its parts. The position in the stream stays."""
    before = stream.tell()
    try:
        stream.seek(8)
        while len(head := stream.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"eXIf":
                return True
            begin = stream.read(min(length, len(_RAW_EXIF))) if kind in (b"tEXt", b"zTXt", b"iTXt") else b""
            if begin == _RAW_EXIF:
                return True
            stream.seek(length + 4 - len(begin), io.SEEK_CUR)
        return False
    finally:
        stream.seek(before)


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
