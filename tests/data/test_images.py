"""Encoded images of every kind become upright RGB of one size."""

import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from jaxcl.data import images

QUARTERS = np.array([[[250, 0, 0], [0, 250, 0]], [[0, 0, 250], [250, 250, 0]]], np.uint8).repeat(16, 0).repeat(24, 1)
TURNS = {
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, 1),
    7: lambda x: np.rot90(x.transpose(1, 0, 2), 2),
    8: lambda x: np.rot90(x, -1),
}


def encoded(image, kind, **options):
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, kind, **options)
    return io.BytesIO(stream.getvalue())


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "GIF", "JPEG"])
def test_kinds(kind):
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}.get(kind, {})
    out = images.decode(encoded(QUARTERS, kind, **options))
    assert out.dtype == np.uint8 and np.abs(out.astype(int) - QUARTERS).max() <= (6 if kind == "JPEG" else 0)
    assert images.shape(encoded(QUARTERS, kind)) == (32, 48)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
def test_exif_orientation_is_applied(kind, orientation):
    """Cases B.6: also to the shape that the header tells."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    # A viewer undoes the turn with which the camera stored the image.
    stored = Image.fromarray(np.ascontiguousarray(TURNS[orientation](QUARTERS)))
    given = {
        "exif": exif.tobytes(),
        **({"quality": 95} if kind in ("JPEG", "AVIF") else {}),
        **({"lossless": True} if kind == "WEBP" else {}),
    }
    out = images.decode(encoded(stored, kind, **given))
    assert out.shape == QUARTERS.shape
    middles = (slice(8, None, 16), slice(12, None, 24))
    assert np.abs(out[middles].astype(int) - QUARTERS[middles]).max() <= 6
    assert images.shape(encoded(stored, kind, **given)) == (32, 48)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("value", [b"\xff\xd8Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"])
def test_damaged_exif_is_no_reason_to_lose_an_image(value):
    assert images.decode(encoded(QUARTERS, "JPEG", exif=value)).shape == (32, 48, 3)


def test_modes_become_rgb():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert (images.decode(encoded(grey, "PNG")) == grey[..., None]).all()
    assert set(np.unique(images.decode(encoded(Image.fromarray(grey > 99), "PNG")))) == {0, 255}
    deep = grey.astype(np.uint16) * 257
    assert (images.decode(encoded(deep, "PNG")) == grey[..., None]).all()
    assert (images.decode(encoded(Image.fromarray(deep.astype(np.int32)), "TIFF")) == grey[..., None]).all()
    cmyk = Image.fromarray(QUARTERS).convert("CMYK")
    assert np.abs(images.decode(encoded(cmyk, "TIFF")).astype(int) - QUARTERS).max() <= 1
    assert np.abs(images.decode(encoded(cmyk, "JPEG", quality=95)).astype(int) - QUARTERS)[8, 12].max() <= 8
    palette = Image.fromarray(QUARTERS).quantize(8)
    assert (images.decode(encoded(palette, "PNG")) == np.asarray(palette.convert("RGB"))).all()
    for pixels in (np.ones((4, 4), np.float32), np.full((4, 4), 70_000, np.int32)):
        with pytest.raises(ValueError, match="expected 8 or 16 bits"):
            images.decode(encoded(pixels, "TIFF"))


def test_what_is_transparent_is_white():
    rgba = np.dstack([QUARTERS, np.full(QUARTERS.shape[:2], 255, np.uint8)])
    rgba[:16, :24, 3], rgba[16:, :24, 3] = 0, 128
    expected = QUARTERS.astype(float)
    expected[:16, :24] = 255
    expected[16:, :24] = expected[16:, :24] * 128 / 255 + 255 * 127 / 255
    for kind in ("PNG", "TIFF"):
        assert np.abs(images.decode(encoded(rgba, kind)) - expected).max() <= 1
    assert (images.decode(encoded(np.zeros((4, 4, 2), np.uint8), "PNG")) == 255).all()  # grey with alpha
    palette = Image.fromarray(QUARTERS).quantize(8)
    hole = palette.getpixel((0, 0))
    out = images.decode(encoded(palette, "PNG", transparency=hole))
    assert (out[:16, :24] == 255).all() and out[0, 40, 0] < 50
    out = images.decode(encoded(QUARTERS, "PNG", transparency=(0, 0, 250)))  # one colour is transparent
    assert (out[16:, :24] == 255).all() and (out[:16] == QUARTERS[:16]).all()


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (9, 7), color) for color in ("red", "lime", "blue")]
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("PNG", {})):
        out = images.decode(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
        assert out.shape == (7, 9, 3) and (out == [255, 0, 0]).all(), kind


def test_resize_takes_the_shorter_side_and_the_centre():
    def resized(x, size):
        return np.asarray(images.resize_and_crop(Image.fromarray(x), size))

    x = np.zeros((40, 80, 3), np.uint8)
    x[:, 20:60] = 200  # exactly the central square
    assert resized(x, 10).shape == (10, 10, 3) and (resized(x, 10)[:, 1:-1] == 200).all()
    assert (resized(x.transpose(1, 0, 2), 10)[1:-1] == 200).all()
    # Antialiased: a fine checkerboard becomes an even grey, not a coarse checkerboard.
    board = np.repeat((np.indices((64, 64)).sum(0) % 2 * 255)[..., None], 3, -1).astype(np.uint8)
    assert np.ptp(resized(board, 16)[2:-2, 2:-2].astype(int)) < 12
    assert (resized(board, 64) == board).all()
    assert resized(np.zeros((3, 500, 3), np.uint8), 8).shape == (8, 8, 3)
    assert resized(np.zeros((2, 60_000, 3), np.uint8), 512).shape == (
        512,
        512,
        3,
    )  # 512 x 15 million as a whole


def fitted(x, size, fit):
    return np.asarray(images.fitted(Image.fromarray(x), size, fit))


def test_whole_images_as_squares():
    x = np.zeros((40, 80, 3), np.uint8)
    x[:, :8], x[:, 72:] = (240, 0, 0), (0, 240, 0)  # what a crop cuts off
    wide, boxed = fitted(x, 20, "squash"), fitted(x, 20, "letterbox")
    assert (fitted(x, 20, "crop") == 0).all()
    for out in (wide, boxed[5:15]):
        assert (out[:, 0] == (240, 0, 0)).all() and (out[:, -1] == (0, 240, 0)).all()
    assert (boxed[:5] == images.BARS).all() and (boxed[15:] == images.BARS).all() and (boxed[5:15, 3:-3] == 0).all()
    assert (fitted(x.transpose(1, 0, 2), 20, "letterbox") == boxed.transpose(1, 0, 2)).all()
    for fit in images.FITS:  # a square is a square, a constant image constant
        square = np.random.default_rng(0).integers(0, 256, (30, 30, 3)).astype(np.uint8)
        assert (fitted(square, 30, fit) == square).all() and (
            fitted(square, 12, fit) == fitted(square, 12, "crop")
        ).all()
    with pytest.raises(ValueError, match="fit is 'cut'"):
        fitted(x, 8, "cut")


@pytest.mark.parametrize("fit", images.FITS)
def test_every_shape_is_fitted(fit):
    for height, width in ((1, 1), (1, 2), (3, 500), (500, 3), (7, 12), (64, 63), (2, 60_000), (60_000, 2)):
        for size in (1, 2, 7, 32):
            out = fitted(np.full((height, width, 3), 200, np.uint8), size, fit)
            assert out.shape == (size, size, 3) and (out == 200).all(-1).any()
            assert fit == "letterbox" or (out == 200).all()
    assert fitted(np.zeros((2, 60_000, 3), np.uint8), 512, fit).shape == (512, 512, 3)


@pytest.mark.parametrize("fit", images.FITS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_fitted_as_it_stands_upright(fit, orientation):
    tag = Image.Exif()
    tag[0x0112] = orientation
    upright = np.random.default_rng(0).integers(0, 256, (21, 34, 3)).astype(np.uint8)
    stored = np.ascontiguousarray(TURNS[orientation](upright))
    out = images.decode(encoded(stored, "PNG", exif=tag.tobytes()), 16, fit=fit).astype(int)
    # Pillow rounds between rows and columns, so which of them come first may change a value by one.
    assert np.abs(out - fitted(upright, 16, fit)).max() <= 1


def test_a_large_jpeg_decoded_in_part_is_the_same_picture():
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (9, 12, 3)).astype(np.uint8)).resize(
        (900, 700), Image.Resampling.BICUBIC
    )
    whole = np.asarray(images.resize_and_crop(smooth, 40), int)
    mirrored = Image.Exif()
    mirrored[0x0112] = 2
    for turn, options in ((lambda x: x, {}), (np.fliplr, {"exif": mirrored.tobytes()})):
        apart = np.abs(turn(images.decode(encoded(smooth, "JPEG", quality=95, **options), 40)) - whole)
        assert apart.mean() < 2 and apart.max() < 12  # of 256; neighbours are up to 60 apart
    for fit in ("squash", "letterbox"):
        whole = np.asarray(images.fitted(smooth, 40, fit), int)
        apart = np.abs(images.decode(encoded(smooth, "JPEG", quality=95), 40, fit=fit) - whole)
        assert apart.mean() < 2 and apart.max() < 12


def test_only_images_are_opened():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    for bad in (eps, b"", b"GIF89a", b"\xff\xd8\xff", b"<svg/>"):
        with pytest.raises(Exception):  # noqa: B017 - Pillow raises all kinds
            images.decode(io.BytesIO(bad))
    assert "EPS" not in images.FORMATS


def test_integers_of_32_bits_with_small_values():
    """cases A.14: values up to 255 are 8 bits, not nearly black 16 bits."""
    grey = np.arange(256, dtype=np.int32).reshape(16, 16)
    assert (images.decode(encoded(Image.fromarray(grey), "TIFF")) == grey[..., None]).all()
    dark = grey.astype(np.uint16)  # a file that says 16 bits means them
    for kind in ("PNG", "TIFF"):
        assert images.decode(encoded(Image.fromarray(dark), kind)).max() == 1


def test_a_transparent_value_of_16_bits_is_white():
    """cases A.14"""
    deep = np.full((4, 6), 30_000, np.uint16)
    deep[:, :2], deep[:, 2] = 0, 1
    out = images.decode(encoded(Image.fromarray(deep), "PNG", transparency=0))
    assert (out[:, :2] == 255).all() and (out[:, 2] == 0).all() and (out[:, 3:] == 117).all()


def test_exif_behind_the_pixels_of_a_png():
    """Cases B.6: the names of the parts are read, not the pixels; without EXIF nothing is decoded."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(Image.fromarray(np.rot90(QUARTERS, 1).copy()), "PNG", exif=exif.tobytes()).getvalue()
    place = turned.index(b"eXIf") - 4
    length = 12 + int.from_bytes(turned[place : place + 4], "big")
    part, end = turned[place : place + length], turned.index(b"IEND") - 4
    moved = turned[:place] + turned[place + length : end] + part + turned[end:]
    assert images.shape(io.BytesIO(moved)) == (32, 48) == images.decode(io.BytesIO(moved)).shape[:2]
    plain = encoded(QUARTERS, "PNG").getvalue()
    damaged = plain[: plain.index(b"IDAT") + 8] + bytes(20) + plain[plain.index(b"IDAT") + 28 :]
    assert images.shape(io.BytesIO(damaged)) == (32, 48)


def test_a_panorama_is_read():
    """Cases B.8: 200 megapixels are no attack; a JPEG is decoded at an eighth. Pillow's own limit stays what it was."""
    limit = Image.MAX_IMAGE_PIXELS
    ramp = np.linspace(0, 255, 12_500).astype(np.uint8)[:, None].repeat(16_000, 1)
    stream = encoded(Image.fromarray(ramp), "JPEG", quality=60)
    assert images.shape(stream) == (12_500, 16_000)
    out = images.decode(stream, 64)
    assert out.shape == (64, 64, 3) and abs(int(out[32, 32, 0]) - 127) <= 3
    assert Image.MAX_IMAGE_PIXELS == limit


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "GIF", "BMP"])
def test_the_limit_of_pixels(kind, monkeypatch):
    """Cases B.8: it has a name, and Pillow's does not count in any format."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 48 // 4)
    stream = encoded(QUARTERS, kind)
    assert images.decode(stream, 8).shape == (8, 8, 3) and images.shape(encoded(QUARTERS, kind)) == (32, 48)
    for read in (images.shape, lambda s, limit: images.decode(s, 8, limit)):
        with pytest.raises(ValueError, match="data.files.max_pixels"):
            read(encoded(QUARTERS, kind), 32 * 48 - 1)
        read(encoded(QUARTERS, kind), 32 * 48)


def test_large_images_take_turns():
    """Cases B.8: what is decoded at one time has a bound, whatever the number of threads; small images do not wait."""
    turns, inside, most = images._Turns(4 * images.SMALL), [0], [0]
    lock = threading.Lock()

    def work(pixels):
        with turns.take(pixels):
            with lock:
                inside[0] += pixels
                most[0] = max(most[0], inside[0])
            time.sleep(0.005)
            with lock:
                inside[0] -= pixels

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, [images.SMALL, 2 * images.SMALL, 3 * images.SMALL] * 8))
    assert 3 * images.SMALL <= most[0] <= 4 * images.SMALL
    with turns.take(100 * images.SMALL), turns.take(10):  # larger than all: alone
        pass
