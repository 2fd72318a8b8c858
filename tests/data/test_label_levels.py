"""Labels of two levels: the tables, every kind of source at either level, groups, the released split, CIFAR100-U."""

import numpy as np
import pytest
from source_checks import fails
from tfds_sets import write

from jaxcl.data import make_source, selection
from jaxcl.data.garments import COARSE_OF_CLASS, TEXTURE_OF_CLASS
from jaxcl.data.label_levels import LEVELS, coarse_of_fine, known_level
from jaxcl.data.sources import cifar100u


def write_cifar(folder, classes, rows):
    """The binary version: `rows` training and test images whose pixels encode their fine label and number."""
    fine = np.arange(rows) % classes
    pixels = np.zeros((rows, 3072), np.uint8)
    pixels[:, 0], pixels[:, 1:3] = fine, np.arange(rows, dtype="<u2").view(np.uint8).reshape(-1, 2)
    head = [fine] if classes == 10 else [LEVELS["cifar100"].of_class[fine], fine]
    records = np.concatenate([np.stack(head, 1).astype(np.uint8), pixels], 1)
    if classes == 10:
        for i, part in enumerate(np.array_split(records, 5)):
            part.tofile(folder / f"data_batch_{i + 1}.bin")
    else:
        records.tofile(folder / "train.bin")
    records.tofile(folder / ("test_batch.bin" if classes == 10 else "test.bin"))
    return f"cifar:{folder}"


# ---- tables


def test_tables_are_the_released_ones(golden):
    d = golden("thanos", "coarse_labels")
    for name, key in (("cifar10",) * 2, ("cifar100",) * 2, ("mnist",) * 2, ("tiny_imagenet", "tinyimagenet")):
        of_class = LEVELS[name].of_class
        np.testing.assert_array_equal(of_class, d[key])
        assert of_class.dtype == np.int32 and of_class.max() < len(LEVELS[name].names)
    assert [len(LEVELS[n].names) for n in ("cifar10", "cifar100", "mnist", "tiny_imagenet", "fashion_mnist")] == [
        2, 20, 2, 67, 4,
    ]  # fmt: skip
    counts = cifar100u()
    for subclasses in d["cifar100_subclasses"]:
        np.testing.assert_array_equal(counts[subclasses], d["cifar100u_counts"])


def test_tables_say_what_belongs_together():
    assert LEVELS["cifar10"].names[1] == "vehicles" and LEVELS["cifar10"].of_class[[0, 1, 8, 9]].all()
    people = LEVELS["cifar100"].of_class == LEVELS["cifar100"].names.index("people")
    assert np.flatnonzero(people).tolist() == [2, 11, 35, 46, 98]  # baby, boy, girl, man, woman
    trees = LEVELS["cifar100"].of_class == LEVELS["cifar100"].names.index("trees")
    assert np.flatnonzero(trees).tolist() == [47, 52, 56, 59, 96]  # maple, oak, palm, pine, willow


def test_a_table_is_of_its_own_classes():
    assert known_level("mnist", "0123456789").names == ("digits 0-4", "digits 5-9")
    assert known_level("mnist", "01234") is None and known_level("svhn_cropped", "0123456789") is None
    ids = [f"n{i:08d}" for i in range(200)]
    assert known_level("tiny_imagenet", ids) is not None
    assert known_level("tiny_imagenet", ids[::-1]) is None  # another order, another table


def test_coarse_of_fine_is_that_of_most_images():
    fine = np.array([0, 0, 0, 2, 2, -1, 2, 4])
    coarse = np.array([1, 1, 0, 3, 3, 2, -1, -1])
    assert coarse_of_fine(fine, coarse, 5).tolist() == [1, -1, 3, -1, -1]
    assert coarse_of_fine(fine[:0], coarse[:0], 2).tolist() == [-1, -1]


# ---- sources at either level


def _check_levels(spec, *, limit=40, **options):
    """The same images at both levels, and nothing else differs."""
    for split in ("train", "test"):
        fine = make_source(spec, split=split, limit=limit, **options)
        coarse = make_source(spec, split=split, limit=limit, labels="coarse", **options)
        np.testing.assert_array_equal(coarse.images, fine.images)
        assert coarse.labels.dtype == np.int32
        np.testing.assert_array_equal(coarse.labels, fine.extras["coarse"])
        np.testing.assert_array_equal(coarse.extras["fine"], fine.labels)
        assert coarse.class_names == coarse.coarse_names == fine.coarse_names
        assert coarse.fine_names == fine.class_names and fine.fine_names == () and "fine" not in fine.extras
        assert coarse.num_classes == len(coarse.class_names) and coarse.mean == fine.mean
        np.testing.assert_array_equal(coarse.batch(np.arange(5))["label"], coarse.labels[:5])
    return coarse


@pytest.mark.parametrize("spec", ["garments", "fashion_mnist"])
def test_garments(spec):
    source = _check_levels(spec)
    assert source.class_names == ("upper body", "trousers", "footwear", "bag")
    assert (source.labels == COARSE_OF_CLASS[source.extras["fine"]]).all()
    assert np.bincount(source.extras["fine"]).tolist() == [4] * 10  # balanced over the fine classes at both levels
    held = [make_source(spec, split="validation", validation=0.1, limit=30, labels=w) for w in ("fine", "coarse")]
    np.testing.assert_array_equal(held[0].images, held[1].images)


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar(tmp_path, classes):
    source = _check_levels(write_cifar(tmp_path, classes, 100), limit=None)
    level = LEVELS[f"cifar{classes}"]
    assert (source.labels == level.of_class[source.images[:, 0, 0, 0]]).all() and source.class_names == level.names


def test_npz(tmp_path):
    rng = np.random.default_rng(0)
    x, fine, group = rng.integers(0, 256, (60, 4, 4, 3)).astype(np.uint8), np.arange(60) % 6, np.arange(60) % 4
    path, arrays = tmp_path / "a.npz", dict(images=x, labels=fine, coarse_labels=fine // 2, groups=group)
    np.savez(path, **arrays)
    source = _check_levels(f"npz:{path}", limit=None)
    assert source.class_names == ("coarse 0", "coarse 1", "coarse 2") and source.group_names[3] == "group 3"
    number = [next(i for i in range(60) if (x[i] == image).all()) for image in source.images]
    np.testing.assert_array_equal(source.extras["group"], group[number])

    parts = dict(train_images=x[:40], train_labels=fine[:40], train_coarse_labels=fine[:40] // 2)
    np.savez(path, **parts, test_images=x[40:], coarse_names=np.array(["a", "b", "c"]))
    test = make_source(f"npz:{path}", split="test", labels="coarse")
    assert test.class_names == ("a", "b", "c") and (test.labels == -1).all() and not test.labelled
    assert make_source(f"npz:{path}", labels="coarse").labelled

    np.savez(path, **{**arrays, "coarse_labels": fine[:7]})
    fails("coarse_labels is int64 .7.; expected one integer for each of the 60 images", f"npz:{path}")
    np.savez(path, **arrays, coarse_names=np.array(["a", "b"]))
    fails("coarse_names must be an array of at least 3 strings", f"npz:{path}")


def test_tfds(tmp_path, monkeypatch):
    """A set whose coarse labels come from a table, not from a feature, in memory and on disk."""
    pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")
    digits = np.arange(30) % 10
    rows = [{"image": np.full((28, 28, 1), 8 * i, np.uint8)[..., 0], "label": int(y)} for i, y in enumerate(digits)]
    write(str(tmp_path), "mnist", train=rows[:20], test=rows[20:])
    options = dict(data_dir=str(tmp_path))
    memory = _check_levels("tfds:mnist", limit=None, **options)
    assert memory.class_names == ("digits 0-4", "digits 5-9")
    assert (memory.labels == (memory.extras["fine"] >= 5)).all()

    monkeypatch.setattr("jaxcl.data.disk.IN_MEMORY_BYTES", 0)
    disk = {w: make_source("tfds:mnist", split="test", labels=w, **options) for w in ("fine", "coarse")}
    assert not disk["coarse"].in_memory and disk["coarse"].num_classes == 2 and disk["fine"].num_classes == 10
    assert disk["coarse"].class_names == memory.class_names and disk["coarse"].fine_names == disk["fine"].class_names
    batches = {w: s.batch(np.arange(10)) for w, s in disk.items()}
    np.testing.assert_array_equal(batches["coarse"]["label"], batches["fine"]["label"] >= 5)
    np.testing.assert_array_equal(batches["coarse"]["image"], memory.batch(np.arange(10))["image"])


# ---- no second level


def test_one_level_only(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((20, 4, 4), np.uint8), labels=np.arange(20) % 2)
    fails("has no second level of labels; use labels='fine', or an npz", f"npz:{tmp_path / 'a.npz'}", labels="coarse")
    fails("labels='rough' must be 'fine' or 'coarse'", "fashion_mnist", labels="rough", limit=10)
    fails("validation_split='thanos' must be 'balanced' or 'released'", "fashion_mnist", validation_split="thanos")
    fails("imbalance='u' must be 'cifar100u', or '' for none", "fashion_mnist", imbalance="u")


# ---- groups


@pytest.mark.parametrize("where, spurious", [("background", 0.9), ("fill", 1.0)])
def test_groups_of_garments(where, spurious):
    for split in ("train", "test"):
        fine, coarse = (
            make_source("garments", split=split, limit=600, spurious=spurious, spurious_on=where, labels=labels)
            for labels in ("fine", "coarse")
        )
        texture = fine.extras[where]
        own = texture == TEXTURE_OF_CLASS[fine.labels]
        np.testing.assert_array_equal(fine.extras["group"], 2 * fine.labels + ~own)
        assert fine.extras["group"].dtype == np.int32 and len(fine.group_names) == 20
        assert fine.group_names[12] == "Shirt, its own cue" and fine.group_names[13] == "Shirt, another cue"

        # At the coarse level the cue is right when it indicates any class of the same coarse class.
        speaks_for = [set(TEXTURE_OF_CLASS[COARSE_OF_CLASS == c].tolist()) for c in range(4)]
        own = np.array([t in speaks_for[c] for t, c in zip(texture, coarse.labels, strict=True)])
        np.testing.assert_array_equal(coarse.extras["group"], 2 * coarse.labels + ~own)
        assert len(coarse.group_names) == 8 and coarse.group_names[7] == "bag, another cue"

        share = np.mean(fine.extras["group"] % 2 == 0)
        assert share > 0.85 if split == "train" else share < 0.2
    assert "group" not in make_source("garments", limit=10).extras
    shifted = make_source("garments", split="test_shifted", limit=50, spurious=0.5)
    assert (shifted.extras["group"] == 2 * shifted.labels + 1).all()  # textures that indicate no class


# ---- the released split


def test_the_released_permutation(golden):
    d = golden("thanos", "split_indices")
    for name, count in (("cifar", 50_000), ("mnist", 60_000)):
        order = selection.torch_permutation(count, 42)
        np.testing.assert_array_equal(order[:2000], d[f"{name}_train_first"])
        np.testing.assert_array_equal(order[count - count // 10 :], d[f"{name}_val"])
        held = selection.hold_out_released(count, 0.1)
        np.testing.assert_array_equal(np.flatnonzero(held), np.sort(d[f"{name}_val"]))


def test_permutations_of_any_length():
    for count in (0, 1, 2, 1000):
        assert sorted(selection.torch_permutation(count, 7)) == list(range(count))
    assert (selection.torch_permutation(100, 7) != selection.torch_permutation(100, 8)).any()


def test_the_released_split_is_the_same_for_every_seed(tmp_path):
    spec = write_cifar(tmp_path, 10, 200)
    options = dict(validation=0.1, validation_split="released")
    held = [make_source(spec, split="validation", seed=s, **options) for s in (1, 2)]
    kept = make_source(spec, **options)
    numbers = [s.images[:, 0, 1:3, 0].astype(int) @ [1, 256] for s in (*held, kept)]
    np.testing.assert_array_equal(numbers[0], numbers[1])
    np.testing.assert_array_equal(numbers[0], np.sort(selection.torch_permutation(200, 42)[180:]))
    np.testing.assert_array_equal(np.sort(np.concatenate(numbers[1:])), np.arange(200))
    balanced = make_source(spec, split="validation", validation=0.1)
    assert np.bincount(balanced.labels).tolist() == [2] * 10 and np.bincount(held[0].labels).tolist() != [2] * 10


# ---- CIFAR100-U


def test_cifar100u(tmp_path):
    spec = write_cifar(tmp_path, 100, 100 * 120)
    options = dict(imbalance="cifar100u", validation=0.1, labels="coarse")
    train, again, other = (make_source(spec, seed=s, **options) for s in (0, 0, 1))
    expected = np.minimum(cifar100u(), 108)  # the hold-out leaves at most 108
    np.testing.assert_array_equal(np.bincount(train.extras["fine"], minlength=100), expected)
    assert sorted(set(expected.tolist())) == [50, 100, 108]
    number = [s.images[:, 0, 1:3, 0].astype(int) @ [1, 256] for s in (train, again, other)]
    assert len(set(number[0].tolist())) == len(train)  # without replacement
    np.testing.assert_array_equal(number[0], number[1])
    assert not np.array_equal(number[0], number[2])
    for split, count in (("validation", 12), ("test", 120)):
        natural = make_source(spec, split=split, **options)
        assert np.bincount(natural.extras["fine"]).tolist() == [count] * 100
    assert np.bincount(make_source(spec, limit=300, **options).extras["fine"]).tolist() == [3] * 100


def test_cifar100u_is_of_cifar100(tmp_path):
    fails("is for CIFAR-100, and this has 10 classes", "fashion_mnist", imbalance="cifar100u")
    np.savez(tmp_path / "a.npz", images=np.zeros((220, 4, 4), np.uint8), labels=np.arange(220) % 110)
    fails("imbalance needs labels of 100 classes", f"npz:{tmp_path / 'a.npz'}", imbalance="cifar100u")
    np.savez(tmp_path / "b.npz", images=np.zeros((20, 4, 4), np.uint8))
    fails("imbalance needs labels of 100 classes", f"npz:{tmp_path / 'b.npz'}", imbalance="cifar100u")
