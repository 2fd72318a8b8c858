"""Image files as a set: splits, sizes, unreadable files, memory and disk, paths in buckets."""

import io
import logging
import os
import pathlib
import shutil
import time

import numpy as np
import pytest
from PIL import Image
from source_checks import fails

from jaxcl import config as configs
from jaxcl.data import Loader, default_fit, files, images, listing, make_source, paths, source_of
from jaxcl.data.folder import listing_of
from jaxcl.errors import UserError


def save(path, level=0, size=(12, 12)):
    """A grey image; `level` is its identity."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, level, level)).save(path)


def levels(source):
    """The grey levels that identify the images of a source, in its order."""
    return source.batch(np.arange(len(source)))["image"][:, 5, 5, 0].tolist()


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Sixty images of mixed sizes in three classes; 100 + i of class i % 3."""
    root = tmp_path_factory.mktemp("classes")
    for i in range(60):
        save(root / "cat dog emu".split()[i % 3] / f"{i:02d}.png", 100 + i, (12 + i % 5, 12 + i % 7))
    return root


@pytest.fixture(autouse=True)
def nothing_looked_at():
    files._latest = None


def test_a_fixed_tenth_is_the_test_split(classes):
    train = make_source(f"folder:{classes}", image_size=8, seed=1)
    test = make_source(f"folder:{classes}", image_size=8, seed=2, split="test")
    assert train.class_names == ("cat", "dog", "emu") and train.labelled and train.in_memory
    assert np.bincount(train.labels).tolist() == [18] * 3 and np.bincount(test.labels).tolist() == [2] * 3
    assert sorted(levels(train) + levels(test)) == list(range(100, 160))
    assert all((level - 100) % 3 == label for level, label in zip(levels(train), train.labels, strict=True))
    held = make_source(f"folder:{classes}", image_size=8, split="validation", validation=0.5)
    kept = make_source(f"folder:{classes}", image_size=8, validation=0.5)
    assert np.bincount(held.labels).tolist() == [9] * 3 and sorted(levels(held) + levels(kept)) == sorted(levels(train))
    np.testing.assert_allclose(test.mean, [np.mean(levels(train)) / 255] * 3, rtol=1e-6)


def test_sets_too_large_for_memory_are_the_same_from_disk(classes, monkeypatch):
    spec, options = f"folder:{classes}", dict(image_size=8, validation=0.25)
    memory = {split: make_source(spec, split=split, **options) for split in ("train", "validation", "test")}
    files._latest = None
    monkeypatch.setattr("jaxcl.data.disk.IN_MEMORY_BYTES", 8 * 8 * 3 * 6)  # the six images of the test split fit
    for split, held in memory.items():
        disk = make_source(spec, split=split, **options)
        assert disk.in_memory == (split == "test") and len(disk) == len(held)
        for name in ("class_names", "num_classes", "labelled", "image_shape", "name", "split", "group_names"):
            assert getattr(disk, name) == getattr(held, name), name
        assert (disk.labels == held.labels).all() and disk.extras.keys() == held.extras.keys()
        np.testing.assert_allclose(disk.mean, held.mean, atol=1e-6)
        a, b = (s.batch(np.array([4, 0, 5])) for s in (disk, held))
        assert all((a[k] == b[k]).all() and a[k].dtype == b[k].dtype for k in a)
    few, rows = make_source(spec, image_size=8, limit=6), np.array([7, 1])
    assert few.in_memory and np.bincount(few.labels).tolist() == [2] * 3
    disk = make_source(spec, **options)
    assert (disk.take(rows).labels == disk.labels[rows]).all() and levels(disk.take(rows)) == [
        levels(disk)[i] for i in rows
    ]
    with Loader(memory["train"], batch_size=8, seed=1) as x, Loader(disk, batch_size=8, seed=1) as y:
        for _ in range(9):
            a, b = next(x), next(y)
            assert all((a[k] == b[k]).all() for k in a)


def test_sizes(tmp_path, classes, caplog):
    caplog.set_level(logging.INFO, "jaxcl")
    for i in range(6):
        save(tmp_path / f"{i}.jpg", i, (20, 14))
    alike = make_source(f"folder:{tmp_path}")
    assert alike.image_shape == (14, 20, 3) and "each 20x14" in caplog.text
    caplog.clear()
    assert make_source(f"folder:{classes}").image_shape == (64, 64, 3)
    assert (
        "each 64x64 (of 12x12 to 16x18 by squash; data.files.image_size and data.files.fit set others)" in caplog.text
    )
    assert caplog.text.count("60 images, 3 classes") == 1
    make_source(f"folder:{classes}", split="test")
    assert caplog.text.count("60 images, 3 classes") == 1  # not for every split
    for i in range(6):
        save(tmp_path / f"{i}.jpg", i, (300, 300))
    assert make_source(f"folder:{tmp_path}").image_shape == (64, 64, 3)  # the files have changed
    assert make_source(f"folder:{tmp_path}", image_size=300).image_shape == (300, 300, 3)
    fails("image_size is -1", f"folder:{tmp_path}", image_size=-1)


def test_few_images(tmp_path):
    fails("holds no images", f"folder:{tmp_path}")
    save(tmp_path / "0.png", 0)
    fails("has one image, which leaves nothing to test on", f"folder:{tmp_path}", split="test")
    assert len(make_source(f"folder:{tmp_path}")) == 1  # for its features
    save(tmp_path / "1.png", 1)
    save(tmp_path / "2.png", 2)
    train, test = (make_source(f"folder:{tmp_path}", split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (2, 1) and sorted(levels(train) + levels(test)) == [0, 1, 2]
    with pytest.raises(UserError, match="batch_size=256 is larger than folder:.* with 2 images; use at most 2"):
        Loader(train, batch_size=256, seed=0)
    # Classes too small for a tenth of each: a tenth of all images.
    for i in range(12):
        save(tmp_path / f"class{i % 6}" / f"{i}.png", i)
        (tmp_path / f"{i}.png").unlink(missing_ok=True)
    assert len(make_source(f"folder:{tmp_path}", split="test")) == 1


@pytest.mark.slow
def test_two_hundred_thousand_files(tmp_path):
    """Listing, checking and reading take minutes."""
    for c in range(10):
        save(tmp_path / f"class{c}" / "0.png", c, (8, 8))
        for i in range(1, 20_000):
            os.link(tmp_path / f"class{c}" / "0.png", tmp_path / f"class{c}" / f"{i}.png")
    begun = time.perf_counter()
    found = listing_of(str(tmp_path))
    assert len(found.paths) == 200_000 and time.perf_counter() - begun < 60
    source = make_source(f"folder:{tmp_path}")
    assert len(source) == 180_000 and np.bincount(source.labels).tolist() == [18_000] * 10
    assert (source.images[:, 5, 5, 0] == source.labels).all()
    assert len(set(source.extras["name"])) == 180_000 and time.perf_counter() - begun < 600


def test_splits_and_the_published_validation_split(tmp_path):
    for part, many in (("train", 6), ("val", 4), ("test", 2)):
        for i in range(many):
            save(tmp_path / part / "ab"[i % 2] / f"{i}.png", {"train": 0, "val": 50, "test": 90}[part] + i)
    spec = f"folder:{tmp_path}"
    got = {split: levels(make_source(spec, split=split)) for split in ("train", "validation", "test")}
    assert {k: sorted(v) for k, v in got.items()} == {
        "train": [0, 1, 2, 3, 4, 5],
        "validation": [50, 51, 52, 53],
        "test": [90, 91],
    }
    # A hold-out is part of the training images; the published validation split is then not used.
    held = make_source(spec, split="validation", validation=0.34)
    assert max(levels(held)) < 50 and len(held) == 2 and held.split == "validation"
    assert sorted(levels(make_source(spec, split="test", validation=0.34))) == [90, 91]
    # A test split without labels measures nothing.
    for i in range(2):
        shutil.move(tmp_path / "test" / "ab"[i] / f"{i}.png", tmp_path / "test" / f"{i}.png")
    assert sorted(levels(make_source(spec, split="test"))) == [50, 51, 52, 53]
    fails("has no validation split", spec, split="validation")
    shutil.rmtree(tmp_path / "test")
    assert sorted(levels(make_source(spec, split="test"))) == [50, 51, 52, 53]
    shutil.rmtree(tmp_path / "train")
    fails("has no training images; it has 4 of other splits", spec)


# ---- files that cannot be read


def broken(good_png: bytes, good_jpeg: bytes):
    """name -> bytes of files that no decoder can read."""
    rng = np.random.default_rng(0)
    out = {"empty.png": b"", "text.jpg": b"hello world" * 50, "html.png": b"<html></html>", "zeros.bmp": bytes(500)}
    for at in (1, 8, 20, 33, 50, len(good_png) // 2, len(good_png) - 30):
        out[f"cut{at}.png"] = good_png[:at]
    for at in (1, 3, 10, 100, 300, len(good_jpeg) // 2):
        out[f"cut{at}.jpg"] = good_jpeg[:at]
    for i in range(10):
        out[f"noise{i}.jpg"] = rng.bytes(50 * i + 10)
    for i, magic in enumerate(
        (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"RIFF")
    ):
        out[f"magic{i}.png"] = magic + rng.bytes(300)
    for i in range(4):  # a checksum catches these
        at = len(good_png) // 2 + i
        out[f"flipped{i}.png"] = good_png[:at] + bytes([good_png[at] ^ 255]) + good_png[at + 1 :]
    huge = bytearray(good_png)
    huge[16:24] = (2**31 - 1).to_bytes(4, "big") * 2
    out["huge.png"] = bytes(huge)
    return out


@pytest.fixture
def damaged(tmp_path):
    """Twenty good images and a few dozen bad files in two classes. -> (folder, names of the bad)."""
    pixels = np.random.default_rng(1).integers(0, 256, (24, 24, 3)).astype(np.uint8)
    streams = {kind: io.BytesIO() for kind in ("PNG", "JPEG")}
    for kind, stream in streams.items():
        Image.fromarray(pixels).save(stream, kind)
    bad = broken(*(s.getvalue() for s in streams.values()))
    for i in range(20):
        save(tmp_path / "ab"[i % 2] / f"good{i:02d}.png", 10 * i, (24, 24))
    for i, (name, content) in enumerate(bad.items()):
        (tmp_path / "ab"[i % 2] / name).write_bytes(content)
    (tmp_path / "a" / "nowhere.png").symlink_to(tmp_path / "missing.png")
    os.mkfifo(tmp_path / "a" / "pipe.png")
    (tmp_path / "b" / "folder.png").mkdir()
    return tmp_path, [*bad, "nowhere.png", "pipe.png"]


@pytest.mark.parametrize("memory", [2**30, 0])
def test_bad_images_are_left_out_named_and_counted(damaged, caplog, monkeypatch, memory):
    folder, bad = damaged
    monkeypatch.setattr("jaxcl.data.disk.IN_MEMORY_BYTES", memory)
    caplog.set_level(logging.INFO, "jaxcl")
    begin = time.perf_counter()
    train, test = (make_source(f"folder:{folder}", split=s, on_bad_image="skip") for s in ("train", "test"))
    assert time.perf_counter() - begin < 10
    assert train.in_memory == bool(memory) and (len(train), len(test)) == (18, 2) and test.labels.tolist() == [0, 1]
    assert sorted(levels(train) + levels(test)) == [10 * i for i in range(20)]
    assert f"20 images, 2 classes, each 24x24, {len(bad)} left out that cannot be read" in caplog.text
    named = [line for line in caplog.messages if "left out: " in line]
    assert len(named) == len(bad) and all(any(name in line for line in named) for name in bad)
    assert all("\n" not in line for line in caplog.messages)
    said = "\n".join(named)
    assert "empty.png left out: empty file" in said and "nowhere.png left out: no such file" in said
    assert "pipe.png left out: no regular file" in said and "text.jpg left out: no image of a known format" in said
    many = len(bad) if memory else r"\d\d"  # for a set on disk only headers are read
    fails(f"{many} of {len(bad) + 20} images cannot be read: a/.*set data.on_bad_image", f"folder:{folder}")
    fails("on_bad_image is 'drop'.*raise, skip", f"folder:{folder}", on_bad_image="drop")


def test_damage_behind_the_header_of_a_set_on_disk(damaged, monkeypatch):
    folder, bad = damaged
    for name in bad:
        for c in "ab":
            if not name.startswith("flipped"):
                (folder / c / name).unlink(missing_ok=True)
    monkeypatch.setattr("jaxcl.data.disk.IN_MEMORY_BYTES", 0)
    monkeypatch.setattr("jaxcl.data.disk.SAMPLE", 0)
    monkeypatch.setattr(files.Files, "moments_of_training", lambda self: ((0.5,) * 3, (0.5,) * 3))
    source = make_source(f"folder:{folder}")  # headers only
    assert len(source) + len(make_source(f"folder:{folder}", split="test")) == 24
    with pytest.raises(
        UserError, match=r"[ab]/flipped\d.png cannot be read .*set data.on_bad_image to 'skip'"
    ) as caught:
        levels(source)
    assert "\n" not in str(caught.value)
    assert len(make_source(f"folder:{folder}", on_bad_image="skip")) == 18


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_an_image_that_is_lost_later(tmp_path, monkeypatch, policy):
    """Cases C.11: the advice is never an option that is set already."""
    for i in range(6):
        save(tmp_path / f"{i}.png")
    monkeypatch.setattr("jaxcl.data.disk.IN_MEMORY_BYTES", 0)
    source = make_source(f"folder:{tmp_path}", on_bad_image=policy)
    for path in source.paths:
        pathlib.Path(path).write_bytes(b"x")
    with pytest.raises(UserError) as error:
        source.batch(np.arange(len(source)))
    text = str(error.value)
    assert ".png cannot be read (" in text and "\n" not in text
    assert ("on_bad_image" in text) == (policy == "raise")


def test_nothing_but_bad_images(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    for policy in ("raise", "skip"):
        fails(r"1 of 1 images cannot be read: a.png \(no image of a known format\); mend or remove them$",
              f"folder:{tmp_path}", on_bad_image=policy)  # fmt: skip


def test_permission_is_named(tmp_path, monkeypatch):
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    real = files.open_file

    def refused(path):  # root may read everything
        if path.endswith("b.png"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(files, "open_file", refused)
    fails(r"1 of 2 images cannot be read: b.png \(permission denied\)", f"folder:{tmp_path}")


# ---- columns, configs, buckets


@pytest.mark.parametrize(
    "words, codes, names",
    [
        ("b a  b", [1, 0, -1, 1], ("a", "b")),
        ("10 9  9", [1, 0, -1, 0], ("9", "10")),
        ("10.0 9.0  9.0", [1, 0, -1, 0], ("9", "10")),
        ("3 -1 7 ", [0, -1, 1, -1], ("3", "7")),
        ("3 x 10 03", [2, 3, 1, 0], ("03", "10", "3", "x")),
        ("12345678901234567 12345678901234568", [0, 1], ("12345678901234567", "12345678901234568")),
        ("nan inf", [1, 0], ("inf", "nan")),
        ("", [-1], ()),
    ],
)
def test_numbered(words, codes, names):
    got = listing.numbered(words.split(" "))
    assert (got[0].tolist(), got[1]) == (codes, names) and got[0].dtype == np.int32


def test_names_are_shown_in_one_line():
    assert paths.shown("ünï 猫.png") == "ünï 猫.png"
    assert paths.shown("a\nb\x1b[31m") == r"a\nb\x1b[31m"
    assert paths.shown(os.fsdecode(b"caf\xe9")) == r"caf\xe9"


def test_options_come_from_the_config(classes):
    config = configs.default()
    config.data.source = f"folder:{classes}"
    assert source_of(config, "train").image_shape == (64, 64, 3)
    config.data.files.image_size = 10
    config.data.on_bad_image = "skip"
    assert source_of(config, "test").image_shape == (10, 10, 3)
    config.data.on_bad_image = "ask"
    with pytest.raises(UserError, match="^data.on_bad_image is 'ask'"):
        source_of(config, "train")
    with config.unlocked():
        config.data.files.size = 3
    with pytest.raises(UserError, match="unknown config key data.files.size"):
        configs.check(config)


class Bucket:
    """A bucket's file system in a local folder; like gcsfs, it walks without the "gs://"."""

    def __init__(self, root):
        self.root = str(root)

    def _local(self, path):
        return str(path).replace("gs://bucket", self.root)

    def open(self, path, mode):
        return open(self._local(path), mode)

    def exists(self, path):
        return os.path.exists(self._local(path))

    def walk(self, path, **options):
        for folder, folders, names in os.walk(self._local(path)):
            yield folder.replace(self.root, "bucket"), folders, names


def test_paths_in_a_bucket(classes, tmp_path, monkeypatch):
    from etils.epath import backend

    local = make_source(f"folder:{classes}", image_size=8)
    for name in os.listdir(classes):
        shutil.copytree(classes / name, tmp_path / "set" / name)
    rows = [f"{c}/{i:02d}.png,{c}" for i in range(60) for c in ["cat dog emu".split()[i % 3]]]
    (tmp_path / "set" / "list.csv").write_text("\n".join(["path,label", *rows]))
    monkeypatch.setattr(type(backend.fsspec_backend), "fs", lambda self, path: Bucket(tmp_path))
    monkeypatch.setattr("etils.epath.gpath._is_tf_installed", lambda: False)
    remote = make_source("folder:gs://bucket/set", image_size=8)
    assert (remote.images == local.images).all() and (remote.labels == local.labels).all()
    table = make_source("csv:gs://bucket/set/list.csv", image_size=8, split="test")
    assert table.class_names == ("cat", "dog", "emu") and len(table) == 6
    fails("holds no images", "folder:gs://bucket/nothing")
    fails("gs://bucket/none.csv cannot be read .no such file", "csv:gs://bucket/none.csv")


@pytest.mark.parametrize("kind", ["png", "webp", "avif", "tiff", "jpg"])
@pytest.mark.parametrize("bad", ["raise", "skip"])
def test_turned_images_stored_at_one_size(kind, bad, tmp_path):
    """Cases B.6: photos of a camera held both ways, all stored as 48 x 32: none is refused, none is lost."""
    for i in range(6):
        exif = Image.Exif()
        exif[0x0112] = 6 if i % 2 else 1
        Image.new("RGB", (48, 32), (40 * i, 100, 50)).save(tmp_path / f"{i}.{kind}", exif=exif.tobytes())
    train, test = (make_source(f"folder:{tmp_path}", split=s, on_bad_image=bad) for s in ("train", "test"))
    assert len(train) + len(test) == 6 and train.image_shape == (64, 64, 3)
    for i in range(6):  # all turned alike: they keep their shape, upright
        exif[0x0112] = 6
        Image.new("RGB", (48, 32), (40 * i, 100, 50)).save(tmp_path / f"{i}.{kind}", exif=exif.tobytes())
    assert make_source(f"folder:{tmp_path}", on_bad_image=bad).image_shape == (48, 32, 3)


def test_the_limit_of_pixels_by_its_name(tmp_path):
    """Cases B.8: refused in one line that names the option, or left out."""
    for i in range(5):
        Image.new("RGB", (20, 20 + 20 * (i == 4)), (i, 0, 0)).save(tmp_path / f"{i}.png")
    with pytest.raises(UserError, match=r"4\.png .*data\.files\.max_pixels") as error:
        make_source(f"folder:{tmp_path}", max_pixels=500)
    assert "\n" not in str(error.value)
    options = dict(max_pixels=500, on_bad_image="skip")
    assert sum(len(make_source(f"folder:{tmp_path}", split=s, **options)) for s in ("train", "test")) == 4


def test_whole_images_unless_a_crop_is_asked_for(tmp_path):
    """The same files by each `fit`, in memory; a set that was read one way is read anew for another one."""
    picture = np.zeros((10, 30, 3), np.uint8)
    picture[:, :6] = 255
    for i in range(6):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    (tmp_path / "list.csv").write_text("path,label\n" + "".join(f"{i}.png,a\n" for i in range(6)))
    for spec in (f"folder:{tmp_path}", f"csv:{tmp_path}/list.csv"):
        found = {
            fit: make_source(spec, image_size=10, fit=fit).images[0] for fit in ("", "crop", "squash", "letterbox")
        }
        assert (found[""] == found["squash"]).all() and (found["squash"][:, :2] > 200).all()
        assert found["crop"].max() == 0 and found["letterbox"][0, 0].tolist() == list(images.BARS)
    fails("fit is 'stretch'", f"folder:{tmp_path}", fit="stretch")


def test_sets_with_a_protocol_crop():
    assert [default_fit(f"{kind}:a") for kind in ("folder", "csv", "waterbirds", "celeb_a", "npz")] == [
        *("squash", "squash", "crop", "crop", "")
    ]
