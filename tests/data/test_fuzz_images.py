"""Five hundred broken and odd image files: each becomes an image or is named in one line; none hangs or crashes."""

import io
import logging
import os
import random
import re
import time

import numpy as np
import pytest
from PIL import Image

from jaxcl.data import files, images, make_source, paths
from jaxcl.errors import UserError

COUNT, SIDE = 500, 24
RNG = np.random.default_rng(0)
ODD_NAMES = [
    "a\nb", "<script>alert(1)<b>", "猫 ü", "' \" & $HOME", "%s{0}", "-rf", "tab\there", "\x1b[31mred", "x" * 200,
    "a..b.", " ", "🙂", "\u202egnp",
]  # fmt: skip


def encoded(pixels, kind, **options):
    stream = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(stream, kind, **options)
    return stream.getvalue()


def odd_ones():
    """name of the kind -> bytes of good but unusual images."""
    rgb = Image.fromarray(RNG.integers(0, 256, (31, 40, 3)).astype(np.uint8))
    grey, rgba, palette = rgb.convert("L"), rgb.convert("RGBA"), rgb.quantize(16)
    rgba.putalpha(grey)
    deep = Image.fromarray(RNG.integers(0, 2**16, (31, 40)).astype(np.uint16))
    frames = [rgb.rotate(90 * i) for i in range(3)]
    out = {
        "png": encoded(rgb, "PNG"),
        "grey.png": encoded(grey, "PNG"),
        "bits.png": encoded(rgb.convert("1"), "PNG"),
        "alpha.png": encoded(rgba, "PNG"),
        "greyalpha.png": encoded(rgba.convert("LA"), "PNG"),
        "palette.png": encoded(palette, "PNG"),
        "hole.png": encoded(palette, "PNG", transparency=3),
        "holes.png": encoded(palette, "PNG", transparency=bytes(range(0, 160, 10))),
        "deep.png": encoded(deep, "PNG"),
        "animated.png": encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "1x1.png": encoded(np.zeros((1, 1, 3), np.uint8), "PNG"),
        "strip.png": encoded(np.zeros((1, 900, 3), np.uint8), "PNG"),
        "jpg": encoded(rgb, "JPEG"),
        "grey.jpg": encoded(grey, "JPEG"),
        "cmyk.jpg": encoded(rgb.convert("CMYK"), "JPEG"),
        "progressive.jpg": encoded(rgb, "JPEG", progressive=True),
        "large.jpg": encoded(rgb.resize((800, 620)), "JPEG"),
        "1x1.jpg": encoded(np.zeros((1, 1, 3), np.uint8), "JPEG"),
        "gif": encoded(palette, "GIF"),
        "animated.gif": encoded(palette, "GIF", save_all=True, append_images=[f.quantize(8) for f in frames], loop=0),
        "hole.gif": encoded(palette, "GIF", transparency=3),
        "webp": encoded(rgb, "WEBP"),
        "alpha.webp": encoded(rgba, "WEBP", lossless=True),
        "animated.webp": encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "bmp": encoded(rgb, "BMP"),
        "tif": encoded(rgb, "TIFF"),
        "deflate.tif": encoded(rgb, "TIFF", compression="tiff_deflate"),
        "deep.tif": encoded(deep, "TIFF"),
        "cmyk.tif": encoded(rgb.convert("CMYK"), "TIFF", compression="tiff_lzw"),
        "float.tif": encoded(np.ones((5, 5), np.float32), "TIFF"),
        "pages.tif": encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:]),
        "lab.tif": encoded(Image.new("LAB", (9, 9)), "TIFF"),
        "ppm": encoded(rgb, "PPM"),
        "pgm": encoded(deep, "PPM"),
    }
    for orientation in range(10):  # 0 and 9 are no orientations
        exif = Image.Exif()
        exif[0x0112] = orientation
        out[f"exif{orientation}.jpg"] = encoded(rgb, "JPEG", exif=exif.tobytes())
    for kind, ending in (("AVIF", "avif"), ("JPEG2000", "jp2"), ("QOI", "qoi")):  # if this Pillow has them
        if kind in images.FORMATS and kind in Image.SAVE:
            out[ending] = encoded(rgb, kind)
    return out


def huge(png, width, height):
    """The same file with a larger size in its header."""
    return png[:16] + width.to_bytes(4, "big") + height.to_bytes(4, "big") + png[24:]


def corpus():
    """[(name, bytes)]: odd images with right and wrong endings, and broken ones."""
    good, rng = odd_ones(), random.Random(0)
    out = [(f"{name}.{name.split('.')[-1]}" if "." in name else f"plain.{name}", data) for name, data in good.items()]
    png = good["png"]
    sides = ((2**31 - 1, 2**31 - 1), (60_000, 60_000), (10**7, 1), (0, 9))
    out += [(f"huge{w}x{h}.png", huge(png, w, h)) for w, h in sides]
    bmp = bytearray(good["bmp"])
    bmp[18:26] = (2**30).to_bytes(4, "little") * 2
    out += [("huge.bmp", bytes(bmp)), ("huge.ppm", b"P6 99999999 99999999 255\n" + bytes(99))]
    out += [("zeros.jpg", bytes(9999))]
    out += [("empty.png", b""), ("text.jpg", b"no image at all\n" * 99), ("page.png", b"<!doctype html><p>404</p>")]
    out += [("svg.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>"), ("eps.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n")]
    out += [(f"zip{i}.webp", b"PK\3\4" + rng.randbytes(400)) for i in range(2)]
    out += [(f"noise{i}.{e}", rng.randbytes(3**i)) for i in range(1, 8) for e in ("jpg", "png", "gif", "tif", "bmp")]
    names = list(good)
    while len(out) < COUNT:
        name, other = rng.choice(names), rng.choice(names)
        data = bytearray(good[name])
        how = rng.choice(["cut", "flip", "zero", "insert", "swap", "join", "renamed", "head"])
        at = rng.randrange(len(data))
        if how == "cut":
            del data[at:]
        elif how == "flip":
            for _ in range(rng.randint(1, 20)):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif how == "zero":
            data[at : at + rng.randint(1, 200)] = bytes(min(rng.randint(1, 200), len(data) - at))
        elif how == "insert":
            data[at:at] = rng.randbytes(rng.randint(1, 50))
        elif how == "swap":
            data[at:] = good[other][at:]
        elif how == "join":
            data += good[other]
        elif how == "head":
            for i in range(min(len(data), 40)):
                data[i] = rng.choice((data[i], data[i], data[i], 0, 255))
        ending = (other if how == "renamed" else name).split(".")[-1]
        out.append((f"{rng.choice(ODD_NAMES)}-{len(out)}-{how}.{ending}", bytes(data)))
    return out


def as_one_line(text):
    assert text.isprintable() and len(text) < 5000, repr(text)
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """-> (folder of all of them and ten good images, names of the files that can be decoded, as shown)"""
    root, decoded = tmp_path_factory.mktemp("fuzz"), set()
    for name, data in corpus():
        (root / name).write_bytes(data)
        begun = time.perf_counter()
        try:
            image = images.decode(io.BytesIO(data), SIDE)
        except Exception:  # noqa: BLE001 - any error, but no crash
            pass
        else:
            assert image.shape == (SIDE, SIDE, 3) and image.dtype == np.uint8
            decoded.add(paths.shown(name))
        assert time.perf_counter() - begun < 20, name
    for i in range(10):
        Image.new("RGB", (30, 30), (i, i, i)).save(root / f"good{i}.png")
        decoded.add(f"good{i}.png")
    (root / "itself.png").symlink_to(root / "itself.png")
    (root / "one.png").symlink_to(root / "two.png")
    (root / "two.png").symlink_to(root / "one.png")
    (root / "zero.png").symlink_to("/dev/zero")
    (root / "round").symlink_to(root)
    os.mkfifo(root / "pipe.jpg")
    with open(root / "sparse.jpg", "wb") as sparse:  # must not be read as a whole
        sparse.truncate(2**38)
    (root / "locked.png").write_bytes(b"x")
    (root / "locked.png").chmod(0)
    os.mkdir(os.path.join(os.fsencode(root), b"caf\xe9"))
    return root, decoded


@pytest.fixture(autouse=True)
def nothing_looked_at():
    files._latest = None


@pytest.mark.filterwarnings("ignore")  # Pillow's warnings
@pytest.mark.parametrize("memory", [2**30, 0])
def test_all_of_them_in_one_folder(folder, memory, monkeypatch, caplog):
    root, decoded = folder
    caplog.set_level(logging.INFO, "jaxcl")
    monkeypatch.setattr("jaxcl.data.disk.IN_MEMORY_BYTES", memory)
    before, begun = sorted(os.listdir(root)), time.perf_counter()
    with pytest.raises(UserError, match=r"images cannot be read: .* and [\d,]+ more; mend or remove them") as caught:
        make_source(f"folder:{root}", image_size=SIDE)
    as_one_line(str(caught.value))
    parts = [make_source(f"folder:{root}", split=s, image_size=SIDE, on_bad_image="skip") for s in ("train", "test")]
    assert time.perf_counter() - begun < 60
    assert {name for source in parts for name in source.extras["name"]} == decoded
    for source in parts:
        batch = source.batch(np.arange(len(source)))
        assert batch["image"].shape == (len(source), SIDE, SIDE, 3) and source.in_memory == bool(memory)
    total, left_out = re.search(r"([\d,]+) images, no labels.*, ([\d,]+) left out", caplog.text).groups()
    assert int(total) == len(decoded) and int(total) + int(left_out) == COUNT + 10 + 7
    for message in caplog.messages:
        as_one_line(message)
    assert sorted(os.listdir(root)) == before


@pytest.mark.filterwarnings("ignore")
def test_each_by_itself(folder, tmp_path):
    """Headers alone: files that fail later are named too, and sizes agree where both can be read."""
    root, decoded = folder
    for name, data in corpus():
        stream = io.BytesIO(data)
        try:
            height, width = images.shape(stream)
        except Exception:  # noqa: BLE001
            assert paths.shown(name) not in decoded, name
            continue
        if paths.shown(name) in decoded and height * width < 10**6:
            try:
                shape = images.decode(io.BytesIO(data)).shape
            except OSError:  # damage in the details of a JPEG, which decoding at 1/8 does not read
                assert name.endswith(".jpg"), name
                continue
            turned_late = name.endswith((".png", ".tif", ".webp"))  # their orientation is stored behind the pixels
            assert shape == (height, width, 3) or (turned_late and shape == (width, height, 3)), name
