"""The hash by which a run notices that its data is not the data it began with."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from jaxcl.data import make_source
from jaxcl.data.fingerprint import digest
from jaxcl.data.source import Subset
from jaxcl.data.texture_set import TextureSet, begin, write_shard


@pytest.fixture
def photos(tmp_path):
    """Four classes of ten one-coloured PNG files, all equally large."""
    for i in range(40):
        file = tmp_path / "photos" / f"class{i // 10}" / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i * 6, 100, 200)).save(file)
    return tmp_path / "photos"


def rename(photos):
    (photos / "class0" / "00.png").rename(photos / "class0" / "zz.png")


def move(photos):
    for i in range(10):
        (photos / "class1" / f"{10 + i}.png").rename(photos / "class2" / f"{10 + i}.png")


def swap_classes(photos):
    (photos / "class0").rename(photos / "spare")
    (photos / "class1").rename(photos / "class0")
    (photos / "spare").rename(photos / "class1")


def swap_contents(photos):
    a, b = photos / "class0" / "00.png", photos / "class3" / "39.png"
    first = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(first)


def replace(photos):
    Image.new("RGB", (8, 8), (1, 2, 3)).save(photos / "class3" / "39.png")


CHANGES = [rename, move, swap_classes, swap_contents, replace]


@pytest.mark.parametrize("change", CHANGES, ids=[c.__name__ for c in CHANGES])
def test_files_that_changed(change, photos):
    """Cases B.4: as many files of the same classes, but a row now means something else."""
    before = make_source(f"folder:{photos}")
    change(photos)
    after = make_source(f"folder:{photos}")
    assert before.fingerprint != after.fingerprint
    assert len(after) == len(before) or change is move


def test_a_copy_elsewhere_is_the_same(photos, tmp_path, monkeypatch):
    """Cases B.4: what a copy of the files changes, their folder and times, does not count; nor how they are held."""
    before = make_source(f"folder:{photos}").fingerprint
    shutil.copytree(photos, tmp_path / "copy", copy_function=shutil.copyfile)
    for file in (tmp_path / "copy").rglob("*.png"):
        os.utime(file, (1, 1))
    assert make_source(f"folder:{tmp_path}/copy").fingerprint == before
    assert make_source(f"folder:{photos}", image_size=4).fingerprint == before


def test_files_that_stay_on_disk(photos, monkeypatch):
    """Cases B.4: nothing is decoded for the hash of a set that does not fit into memory."""
    monkeypatch.setattr("jaxcl.data.disk.IN_MEMORY_BYTES", 100)
    before = make_source(f"folder:{photos}")
    assert not before.in_memory and before.fingerprint
    swap_classes(photos)
    assert make_source(f"folder:{photos}").fingerprint != before.fingerprint


def arrays(labels, images=None, **more):
    images = np.random.default_rng(0).integers(0, 255, (40, 4, 4, 3)).astype(np.uint8) if images is None else images
    return dict(train_images=images, test_images=images, train_labels=labels, test_labels=labels) | more


def test_arrays_that_changed(tmp_path):
    """Cases B.4: one npz label array rolled, two classes swapped, groups changed, images in another order."""
    labels = np.arange(40) % 4
    images = arrays(labels)["train_images"]
    found = []
    for i, changed in enumerate(
        (
            arrays(labels),
            arrays(labels) | dict(train_labels=np.roll(labels, 1)),
            arrays(np.array([1, 0, 2, 3])[labels]),
            arrays(labels, np.roll(images, 1, axis=0)),
            arrays(labels, train_groups=labels // 2, test_groups=labels // 2),
            arrays(labels, train_groups=labels % 2, test_groups=labels % 2),
        )
    ):
        np.savez(tmp_path / f"{i}.npz", **changed)
        found.append(make_source(f"npz:{tmp_path}/{i}.npz").fingerprint)
    assert len(set(found)) == len(found)
    np.savez_compressed(tmp_path / "again.npz", **arrays(labels))
    assert make_source(f"npz:{tmp_path}/again.npz").fingerprint == found[0]


def test_rows_of_a_source():
    """Cases B.4: other rows of the same set have another hash."""
    source = make_source("garments", limit=64)
    rows = [Subset(source, np.arange(begin, begin + 30)).fingerprint for begin in (0, 1, 0)]
    assert rows[0] == rows[2] != rows[1] and source.fingerprint != rows[0]
    assert make_source("garments", limit=64).fingerprint == source.fingerprint


def test_textures_count(tmp_path):
    """Cases B.4: textures made with other options are other data."""
    images = np.zeros((3, 4, 4, 3), np.uint8)
    found = []
    for name, seed in (("a", 0), ("b", 1), ("c", 0)):
        begin(tmp_path / name, {"parts": 1, "part_size": 3, "seed": seed})
        write_shard(tmp_path / name, 0, images, images)
        found.append(TextureSet(tmp_path / name).fingerprint)
    assert found[0] == found[2] != found[1]


def test_parts_do_not_run_together():
    """Cases B.4: where one part ends and the next begins is part of the hash, and so is the type."""
    several = [
        digest("ab", "c"),
        digest("a", "bc"),
        digest(["a", "b"]),
        digest(["a"], ["b"]),
        digest(np.arange(3)),
        digest(np.arange(3, dtype=np.int32)),
        digest({"a": np.arange(3)}),
        digest({"b": np.arange(3)}),
    ]
    assert len(set(several)) == len(several)
    assert digest(np.arange(3, dtype=">i4")) == digest(np.arange(3, dtype="<i4"))
