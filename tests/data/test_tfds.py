"""tfds:NAME on small sets prepared here in ArrayRecord form, and the errors when something is missing."""

import subprocess
import sys
import time

import numpy as np
import pytest
from source_checks import fails
from tfds_sets import write

from jaxcl.data import Loader, make_source
from jaxcl.data import tfds as reader

tfds = pytest.importorskip("tensorflow_datasets")
pytest.importorskip("array_record")

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (32, 32, 32, 3)).astype(np.uint8)
LABELS = np.arange(32) % 10


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("tfds")
    rows = [{"image": x, "label": int(y)} for x, y in zip(IMAGES, LABELS, strict=True)]
    write(data_dir, "cifar10", train=rows[:24], test=rows[24:])
    coarse = [row | {"label": i + 50, "coarse_label": i % 20} for i, row in enumerate(rows)]
    write(data_dir, "cifar100", train=coarse[:24], test=coarse[24:])
    # Images of many sizes, and a training split only.
    flowers = [{"image": np.full((20 + i, 60 - i, 3), 5 * i, np.uint8), "label": i % 5} for i in range(40)]
    write(data_dir, "tf_flowers", train=flowers)
    # A test split without labels: the validation split replaces it.
    birds = [{"image": x, "label": int(y)} for x, y in zip(IMAGES, LABELS, strict=True)]
    hidden = [row | {"label": -1} for row in birds]
    write(data_dir, "imagenet2012", train=birds[:20], validation=birds[20:26], test=hidden[26:])
    write(data_dir, "imagenet_r", test=birds[:20])  # a test split only
    return str(data_dir)


def sort_rows(images, labels):
    order = np.argsort([x.tobytes() for x in images])
    return images[order], labels[order]


@pytest.mark.parametrize("split, part", [("train", slice(0, 24)), ("test", slice(24, 32))])
def test_cifar10_is_decoded_into_memory(prepared, split, part):
    source = make_source("tfds:cifar10", split=split, data_dir=prepared)
    assert source.in_memory and source.image_shape == (32, 32, 3) and source.num_classes == 10 and source.labelled
    # TFDS keeps examples in the order of a hash of their keys.
    images, labels = sort_rows(source.images, source.labels)
    expected_images, expected_labels = sort_rows(IMAGES[part], LABELS[part])
    assert (images == expected_images).all() and (labels == expected_labels).all()
    assert source.mean == (0.4914, 0.4822, 0.4465) and source.std == (0.2023, 0.1994, 0.2010)


def test_cifar10_is_the_same_from_tfds_and_as_published(tmp_path):
    """Pixels, labels and their order, so also hold-out, cut-down and the batches of a seed."""
    rng = np.random.default_rng(5)
    images, labels = rng.integers(0, 256, (300, 32, 32, 3)).astype(np.uint8), rng.integers(0, 10, 300)
    (tmp_path / "published").mkdir()
    for i, name in enumerate(
        ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"]
    ):
        part = slice(50 * i, 50 * i + 50)
        flat = images[part].transpose(0, 3, 1, 2).reshape(50, -1)
        record = np.concatenate([labels[part, None].astype(np.uint8), flat], 1)
        (tmp_path / "published" / f"{name}.bin").write_bytes(record.tobytes())
    rows = {
        split: [
            {"id": f"{split}_{i:05d}", "image": images[begin + i], "label": int(labels[begin + i])} for i in range(n)
        ]
        for split, begin, n in (("train", 0, 250), ("test", 250, 50))
    }
    write(tmp_path / "tfds", "cifar10", **rows)
    for options in ({}, {"split": "test"}, {"validation": 0.2}, {"limit": 60, "seed": 4}):
        a = make_source(f"cifar:{tmp_path / 'published'}", **options)
        b = make_source("tfds:cifar10", data_dir=str(tmp_path / "tfds"), **options)
        assert (a.images == b.images).all() and (a.labels == b.labels).all()
        assert (a.mean, a.std, a.coarse_names) == (b.mean, b.std, b.coarse_names)
        assert (a.extras["coarse"] == b.extras["coarse"]).all()
        if not options:
            assert (a.images == images[:250]).all()
        with Loader(a, batch_size=32, seed=3) as x, Loader(b, batch_size=32, seed=3) as y:
            for _ in range(10):
                one, two = next(x), next(y)
                assert all((one[k] == two[k]).all() for k in ("image", "label", "index"))


def test_a_set_to_be_tested_on(prepared):
    source = make_source("tfds:imagenet_r", split="test", data_dir=prepared, image_size=32)
    assert len(source) == 20 and source.class_names[0] == "n01440764"
    fails("imagenet_r has no train split; it has test", "tfds:imagenet_r", data_dir=prepared, image_size=32)


def test_data_dir_from_the_environment(prepared, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", prepared)
    assert len(make_source("tfds:cifar10")) == 24
    assert len(make_source("tfds:cifar10:3.0.2")) == 24


def test_coarse_labels_of_cifar100(prepared):
    source = make_source("tfds:cifar100", data_dir=prepared)
    assert (source.extras["coarse"] == (source.labels - 50) % 20).all() and len(source.coarse_names) == 20
    assert source.mean == (0.5071, 0.4867, 0.4408)


def test_a_set_too_large_for_memory_is_read_as_it_is_asked_for(prepared, monkeypatch):
    memory = make_source("tfds:cifar10", data_dir=prepared)
    monkeypatch.setattr("jaxcl.data.disk.IN_MEMORY_BYTES", 0)
    disk = make_source("tfds:cifar10", data_dir=prepared)
    assert not disk.in_memory and len(disk) == 24 and disk.image_shape == memory.image_shape
    for name in ("class_names", "num_classes", "mean", "std", "labelled", "name", "split", "coarse_names"):
        assert getattr(disk, name) == getattr(memory, name), name
    rows = np.array([5, 0, 23, 5])
    a, b = memory.batch(rows), disk.batch(rows)
    assert all((a[k] == b[k]).all() and a[k].dtype == b[k].dtype for k in a)
    with Loader(memory, batch_size=6, seed=1) as x, Loader(disk, batch_size=6, seed=1) as y:
        for _ in range(9):
            a, b = next(x), next(y)
            assert all((a[k] == b[k]).all() for k in a)
    held = make_source("tfds:cifar10", data_dir=prepared, split="validation", validation=0.25)
    kept = make_source("tfds:cifar10", data_dir=prepared, validation=0.25)
    assert (len(held), len(kept)) == (6, 18)
    a, b = (s.batch(np.arange(len(s)))["image"] for s in (held, kept))
    assert len({x.tobytes() for x in np.concatenate([a, b])}) == 24
    assert len(make_source("tfds:cifar10", data_dir=prepared, limit=5)) == 5


@pytest.mark.parametrize("memory", [2**30, 0])
def test_images_of_many_sizes_are_resized_and_a_lone_training_split_is_divided(prepared, monkeypatch, memory):
    monkeypatch.setattr("jaxcl.data.disk.IN_MEMORY_BYTES", memory)
    fails("differ in size; set image_size", "tfds:tf_flowers", data_dir=prepared)
    fails("image_size is -1", "tfds:tf_flowers", data_dir=prepared, image_size=-1)
    train = make_source("tfds:tf_flowers", data_dir=prepared, image_size=16)
    test = make_source("tfds:tf_flowers", data_dir=prepared, image_size=16, split="test", seed=9)
    assert train.image_shape == (16, 16, 3) and len(train) + len(test) == 40 and len(test) in (4, 5)
    grey = [s.batch(np.arange(len(s)))["image"][:, 8, 8, 0] for s in (train, test)]
    assert sorted(np.concatenate(grey).tolist()) == [5 * i for i in range(40)]
    np.testing.assert_allclose(train.mean, np.arange(40).mean() * 5 / 255, rtol=1e-6)


def test_validation_replaces_an_unlabelled_test_split(prepared):
    source = make_source("tfds:imagenet2012", data_dir=prepared, split="test", image_size=32)
    images, labels = sort_rows(source.images, source.labels)
    expected_images, expected_labels = sort_rows(IMAGES[20:26], LABELS[20:26])
    assert (images == expected_images).all() and (labels == expected_labels).all()


@pytest.mark.parametrize("memory", [2**30, 0])
def test_attributes_label_and_group(tmp_path, monkeypatch, memory):
    monkeypatch.setattr("jaxcl.data.disk.IN_MEMORY_BYTES", memory)
    features = tfds.builder_cls("celeb_a")(data_dir=str(tmp_path)).info.features

    def face(i):
        flags = {name: False for name in features["attributes"]} | {"Blond_Hair": i % 2 == 1, "Male": i % 4 >= 2}
        numbers = {key: {name: 0 for name in features[key]} for key in ("landmarks", "identity")}
        return {"image": np.full((218, 178, 3), 10 * i, np.uint8), "attributes": flags, **numbers}

    faces = [face(i) for i in range(20)]
    write(str(tmp_path), "celeb_a", train=faces[:12], validation=faces[12:16], test=faces[16:])
    options = dict(data_dir=str(tmp_path), image_size=8)
    for split, part in (("train", range(12)), ("validation", range(12, 16)), ("test", range(16, 20))):
        source = make_source("tfds:celeb_a", split=split, label="Blond_Hair", group="Male", **options)
        assert source.in_memory == bool(memory) and source.labelled
        assert source.class_names == ("not Blond_Hair", "Blond_Hair")
        batch = source.batch(np.arange(len(source)))
        i = batch["image"][:, 4, 4, 0].astype(int) // 10
        assert sorted(i) == list(part) and (batch["label"] == i % 2).all() and (source.labels == i % 2).all()
        assert (source.extras["group"] == 2 * (i % 2) + (i % 4 >= 2)).all()
        assert source.group_names[3] == "Blond_Hair, Male"
    assert not make_source("tfds:celeb_a", **options).labelled
    fails("has no feature 'Blond' for label; its features are image, .*Bald", "tfds:celeb_a", label="Blond", **options)
    fails("label='landmarks' is FeaturesDict; expected classes", "tfds:celeb_a", label="landmarks", **options)
    fails("has no classes to divide into groups; set label", "tfds:celeb_a", group="Male", **options)


def test_the_sets_own_validation_split(prepared):
    fails("has no validation split", "tfds:cifar10", data_dir=prepared, split="validation")
    options = dict(data_dir=prepared, split="validation", image_size=32)
    fails("has no validation split", "tfds:imagenet2012", **options)  # it is the test split


def test_an_unprepared_set_fails_at_once_with_the_command(tmp_path):
    begin = time.perf_counter()
    fails(
        rf"not prepared in .*cifar10.*python -m jaxcl prepare cifar10 --data_dir={tmp_path}",
        "tfds:cifar10",
        data_dir=str(tmp_path),
    )
    assert time.perf_counter() - begin < 5


def test_unknown_names_and_options(prepared):
    fails("tfds:cifarr10 cannot be opened", "tfds:cifarr10", data_dir=prepared)
    fails("must be written tfds:NAME", "tfds:")
    fails("'datadir'; did you mean 'data_dir'", "tfds:cifar10", datadir=prepared)


def test_damaged_example_is_named(prepared, monkeypatch):
    class Broken:
        def __len__(self):
            return 24

        def __getitem__(self, row):
            if row == 17:
                raise OSError("bad\nblock")
            return intact[row]

        def __getitems__(self, rows):
            return [self[row] for row in rows]

    intact = tfds.builder("cifar10", data_dir=prepared).as_data_source(
        split="train", decoders={"image": tfds.decode.SkipDecoding()}
    )
    given = reader.Records.__init__

    def broken(self, *args):
        given(self, *args)
        self._records = Broken()

    monkeypatch.setattr(reader.Records, "__init__", broken)
    fails(r"example 17 cannot be read .OSError: bad block", "tfds:cifar10", data_dir=prepared)


def test_without_tfds_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    fails(r"pip install 'jaxcl\[tfds\]'", "tfds:cifar10")


def test_a_half_installed_tfds_is_named(monkeypatch):
    monkeypatch.delattr(tfds, "builder")  # as when one of its modules is missing
    fails(r"pip install 'jaxcl\[tfds\]'", "tfds:cifar10")


def test_reading_needs_no_tensorflow(prepared):
    code = (
        "import sys\n"
        "from jaxcl.data import make_source\n"
        f"print(len(make_source('tfds:cifar10', data_dir={prepared!r})), 'tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "24 False\n", done.stderr
