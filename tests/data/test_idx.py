"""Folders of idx files, as MNIST is published."""

import gzip
import struct

import numpy as np
import pytest

from jaxcl.data import make_source
from jaxcl.errors import UserError

RNG = np.random.default_rng(0)
IMAGES = {"train": RNG.integers(0, 256, (40, 5, 6), np.uint8), "t10k": RNG.integers(0, 256, (8, 5, 6), np.uint8)}
LABELS = {"train": np.arange(40, dtype=np.uint8) % 4, "t10k": np.arange(8, dtype=np.uint8) % 4}


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write(folder, parts=("train", "t10k"), labels=True, front="", back="", dot="-"):
    for part in parts:
        files = {f"{front}{part}-images{dot}idx3-ubyte": IMAGES[part]}
        files |= {f"{front}{part}-labels{dot}idx1-ubyte": LABELS[part]} if labels else {}
        for name, array in files.items():
            content = idx(array)
            (folder / f"{name}{back}").write_bytes(gzip.compress(content) if back else content)
    return f"idx:{folder}"


@pytest.mark.parametrize("names", [{}, dict(back=".gz"), dict(front="emnist-letters-"), dict(dot=".")])
def test_both_parts_are_read(tmp_path, names):
    spec = write(tmp_path, **names)
    for split, part in (("train", "train"), ("test", "t10k")):
        source = make_source(spec, split=split)
        np.testing.assert_array_equal(source.images, np.repeat(IMAGES[part][..., None], 3, -1))
        np.testing.assert_array_equal(source.labels, LABELS[part])
        assert source.num_classes == 4


def test_without_a_test_part_a_tenth_is_held_out(tmp_path):
    spec = write(tmp_path, parts=("train",))
    assert (len(make_source(spec, split="train")), len(make_source(spec, split="test"))) == (36, 4)


def test_labels_are_optional(tmp_path):
    assert (make_source(write(tmp_path, labels=False), split="train").labels == -1).all()


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f.write_bytes(f.read_bytes()[:-1]),
        lambda f: f.write_bytes(b""),
        lambda f: f.write_bytes(b"\0\0\x0d\x03" + f.read_bytes()[4:]),  # floats
        lambda f: f.write_bytes(gzip.compress(f.read_bytes())[:-9]),
        lambda f: f.rename(f.with_name("other")),
        lambda f: f.with_name(f"a-{f.name}").write_bytes(f.read_bytes()),
    ],
)
def test_damage_is_refused_in_one_line(tmp_path, change):
    spec = write(tmp_path)
    change(tmp_path / "train-images-idx3-ubyte")
    with pytest.raises(UserError) as error:
        make_source(spec, split="train")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
