"""make_source: specs, options, hold-out and cut-down, and good, wrong and damaged npz files."""

import numpy as np
import pytest
from source_checks import fails

from jaxcl.data import hashing, make_source, moments, selection
from jaxcl.data.kind import SourceKind
from jaxcl.data.source import ArraySource
from jaxcl.errors import UserError


def write(path, **arrays):
    np.savez(path, **arrays)
    return f"npz:{path}"


def pictures(n, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape)).astype(np.uint8)


@pytest.mark.parametrize(
    "spec, options, match",
    [
        ("garment", {}, "'garments'.*known: garments, fashion_mnist, npz:PATH, idx:PATH, cifar:PATH"),
        ("garments:x", {}, "must be written garments"),
        ("garments:", {}, "must be written garments"),
        ("npz", {}, "must be written npz:PATH"),
        ("npz:/no/such/file.npz", {}, "no file at /no/such/file.npz"),
        ("garments", {"split": "tset"}, "unknown split 'tset'.*train, test, validation, test_shifted"),
        ("fashion_mnist", {"split": "test_shifted"}, "known: train, test, validation$"),
        ("garments", {"spurius": 0.5}, "'spurius'; did you mean 'spurious'"),
        ("garments", {"spurious": 1.5}, "spurious is 1.5"),
        ("garments", {"spurious_on": "sky"}, "spurious_on is 'sky'.*background, fill"),
        ("fashion_mnist", {"anything": 1}, "'anything'"),
        ("garments", {"split": "validation"}, "set validation, for example 0.2"),
        ("garments", {"validation": 1.0}, "validation=1.0"),
        ("garments", {"limit": 0}, "limit=0"),
    ],
)
def test_mistakes_end_in_one_line(spec, options, match):
    fails(match, spec, **options)


def test_fashion_mnist_is_balanced_and_padded():
    train, test = make_source("fashion_mnist"), make_source("fashion_mnist", split="test")
    assert (len(train), len(test)) == (10_000, 2_000)
    assert np.bincount(train.labels).tolist() == [1000] * 10 and np.bincount(test.labels).tolist() == [200] * 10
    assert train.image_shape == (32, 32, 3) and train.num_classes == 10 and train.labelled and train.in_memory
    assert not train.images[:, :2].any() and not train.images[:, :, -2:].any()
    assert (train.images == train.images[..., :1]).all()
    x = train.images[..., 0] / 255.0
    np.testing.assert_allclose(train.mean, [x.mean()] * 3, rtol=1e-6)
    np.testing.assert_allclose(train.std, [x.std()] * 3, rtol=1e-6)
    assert test.mean == train.mean  # of the training images, for every split


def test_batch_gives_rows_with_their_numbers():
    source = make_source("fashion_mnist", split="test", limit=50)
    batch = source.batch(np.array([7, 3, 7]))
    assert {k: v.dtype.name for k, v in batch.items()} == {
        "image": "uint8",
        "label": "int32",
        "index": "int32",
    }
    assert batch["index"].tolist() == [7, 3, 7]
    assert (batch["image"] == source.images[[7, 3, 7]]).all() and (batch["label"] == source.labels[[7, 3, 7]]).all()


def test_validation_is_held_out_of_training_class_by_class():
    whole = make_source("fashion_mnist")
    kept = make_source("fashion_mnist", validation=0.2, seed=3)
    held = make_source("fashion_mnist", split="validation", validation=0.2, seed=3)
    assert np.bincount(kept.labels).tolist() == [800] * 10 and np.bincount(held.labels).tolist() == [200] * 10
    both = np.concatenate([kept.images, held.images]).reshape(10_000, -1)
    assert sorted(map(bytes, both)) == sorted(map(bytes, whole.images.reshape(10_000, -1)))
    again = make_source("fashion_mnist", split="validation", validation=0.2, seed=3)
    other = make_source("fashion_mnist", split="validation", validation=0.2, seed=4)
    assert (again.images == held.images).all() and (other.images != held.images).any()
    assert len(make_source("fashion_mnist", split="test", validation=0.2)) == 2000


def test_limit_is_balanced_and_within_the_hold_out():
    labels = np.repeat(np.arange(4), [50, 50, 50, 5]).astype(np.int32)
    rows = selection.cut_down(labels, 42, seed=0)
    assert np.bincount(labels[rows]).tolist() in ([13, 12, 12, 5], [12, 13, 12, 5], [12, 12, 13, 5])
    assert (np.diff(rows) > 0).all() and len(selection.cut_down(labels, 1000, seed=0)) == 155
    assert (rows != selection.cut_down(labels, 42, seed=1)).any()
    held = make_source("fashion_mnist", split="validation", validation=0.2)
    few = make_source("fashion_mnist", split="validation", validation=0.2, limit=30)
    assert np.bincount(few.labels).tolist() == [3] * 10
    assert set(map(bytes, few.images)) <= set(map(bytes, held.images))


def test_hash_is_splitmix64_and_uniform():
    # The first outputs of the reference generator from state 0 and from state 1234567.
    assert hashing.splitmix64(np.array([0], np.uint64))[0] == 0xE220A8397B1DCDAF
    assert hashing.splitmix64(np.array([1234567], np.uint64))[0] == 6457827717110365317
    u = hashing.uniforms(0, 1, np.arange(20_000), 4)
    assert u.min() >= 0 and u.max() < 1
    assert np.abs(np.corrcoef(np.concatenate([u[:-1].T, u[1:].T])) - np.eye(8)).max() < 0.04
    assert np.abs(np.histogram(u, 10, (0, 1))[0] / 8000 - 1).max() < 0.06
    assert (hashing.uniforms(0, 1, np.array([17, 3]), 4) == u[[17, 3]]).all()  # depends on the index, not on the order
    assert (hashing.uniforms(0, 2, np.arange(9), 4) != u[:9]).all()


def test_npz_with_both_splits(tmp_path):
    x, y = pictures(20, 9, 7, 3), np.arange(20) % 4
    spec = write(
        tmp_path / "a.npz", train_images=x, train_labels=y, test_images=x[:5, ::-1], test_labels=y[:5],
        class_names=np.array(["a", "b", "c", "d<i>"]),
    )  # fmt: skip
    train, test = make_source(spec), make_source(spec, split="test")
    assert (train.images == x).all() and (train.labels == y).all() and train.image_shape == (9, 7, 3)
    assert (test.images == x[:5, ::-1]).all() and test.class_names == ("a", "b", "c", "d<i>")
    np.testing.assert_allclose(test.mean, (x / 255).mean((0, 1, 2)), rtol=1e-6)


def test_npz_without_a_test_split_holds_out_the_same_tenth_for_every_seed(tmp_path):
    x, y = pictures(100, 4, 4, 3), np.repeat(np.arange(5), 20)
    spec = write(tmp_path / "a.npz", images=x, labels=y)
    train, test = make_source(spec, seed=1), make_source(spec, split="test", seed=2)
    assert np.bincount(test.labels).tolist() == [2] * 5 and np.bincount(train.labels).tolist() == [18] * 5
    assert set(map(bytes, train.images)) | set(map(bytes, test.images)) == set(map(bytes, x))
    assert len(make_source(spec, validation=0.5)) + len(make_source(spec, split="validation", validation=0.5)) == 90


def test_npz_unlabelled_greyscale_and_tiny(tmp_path):
    x = pictures(3, 6, 5)
    spec = write(tmp_path / "a.npz", images=x)
    source = make_source(spec)
    assert len(source) == 3 and not source.labelled and source.num_classes == 0
    assert source.labels.tolist() == [-1, -1, -1] and source.image_shape == (6, 5, 3)
    assert (source.images == x[..., None]).all() and len(source.mean) == len(source.std) == 3
    fails("leaves none to test on", spec, split="test")
    fails("leaves validation empty", spec, split="validation", validation=0.1)
    assert len(make_source(spec, split="validation", validation=0.3)) == 1


def test_constant_images_can_still_be_normalised(tmp_path):
    source = make_source(write(tmp_path / "a.npz", images=np.full((4, 2, 2, 3), 255, np.uint8)))
    assert source.mean == (1.0, 1.0, 1.0) and min(source.std) > 0


@pytest.mark.parametrize(
    "arrays, match",
    [
        ({"images": np.zeros((3, 4, 4, 3))}, "images is float64; expected uint8"),
        ({"images": pictures(3, 4, 4, 4)}, r"shape \(3, 4, 4, 4\)"),
        ({"images": pictures(0, 4, 4, 3)}, "N > 0"),
        ({"images": pictures(3, 4, 4), "labels": np.arange(4)}, "one integer for each of the 3 images"),
        ({"images": pictures(3, 4, 4), "labels": np.arange(3.0)}, "float64"),
        ({"images": pictures(3, 4, 4), "labels": np.array([0, 1, -2])}, "from -2 to 1"),
        ({"pictures": pictures(3, 4, 4)}, "holds pictures; expected images"),
        ({"train_images": pictures(3, 4, 4), "test_images": pictures(3, 5, 4)}, "must agree"),
        (
            {"images": pictures(3, 4, 4), "labels": np.arange(3), "class_names": np.array(["a"])},
            "class_names",
        ),
        ({"images": np.array([{"a": 1}], object)}, "pickled objects"),
    ],
)
def test_npz_mistakes(tmp_path, arrays, match):
    fails(match, write(tmp_path / "a.npz", **arrays))


def test_damaged_npz_is_refused_in_one_line(tmp_path):
    path = tmp_path / "a.npz"
    spec = write(path, images=pictures(50, 8, 8, 3))
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    fails("a.npz", spec)
    path.write_bytes(good[:300] + bytes(200) + good[500:])
    fails("truncated or damaged", spec)
    path.write_bytes(b"")
    fails("a.npz", spec)
    path.write_bytes(b"not a zip file at all")
    fails("a.npz", spec)
    np.save(tmp_path / "one.npy", pictures(3, 4, 4))
    fails("single array", f"npz:{tmp_path / 'one.npy'}")


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (5, 7, 9, 3), (1500, 5, 5, 3), (3, 70, 64, 3)])
def test_moments_by_numpy(shape):
    images = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    for x in (images, np.full(shape, 255, np.uint8)):
        values = x.reshape(-1, shape[-1]) / 255
        mean, std = moments.moments(x)
        np.testing.assert_allclose(mean, values.mean(0), rtol=1e-12)
        np.testing.assert_allclose(std, np.maximum(values.std(0), 1 / 255), rtol=1e-12)
        each = np.array([moments.channel_sums(image) for image in x])
        assert moments.moments_of_sums(x.size // shape[-1], each.sum(0)) == (mean, std)


def test_a_class_of_an_npz_file_without_training_images_is_named(tmp_path, caplog):
    """Cases B.5: as for folders and tables."""
    images = np.zeros((4, 2, 2, 3), np.uint8)
    labels = dict(train_labels=np.array([0, 1, 0, 1]), test_labels=np.array([0, 1, 2, -1]))
    np.savez(tmp_path / "a.npz", train_images=images, test_images=images, class_names=["a", "b", "zebra"], **labels)
    with caplog.at_level("INFO", logger="jaxcl"):
        make_source(f"npz:{tmp_path}/a.npz")
    assert "zebra" in caplog.text and len(caplog.records) == 1


class Odd(SourceKind):
    """A set of somebody's own, whose coarse classes or groups have a value that cannot be meant."""

    argument = "KEY"

    def load(self, argument, *, split, base_split, select):
        values = np.where(np.arange(8) == 5, 2**31 - 1, 0).astype(np.int32)
        return ArraySource(
            images=np.zeros((8, 4, 4, 3), np.uint8), labels=np.zeros(8, np.int32), class_names=("a",),
            mean=(0.5,) * 3, std=(0.5,) * 3, extras={argument: values}, coarse_names=("b",), group_names=("c",),
        )  # fmt: skip


@pytest.mark.parametrize("key", ["coarse", "group"])
def test_one_large_value_of_a_set_of_ones_own(key):
    """Cases C.4."""
    with pytest.raises(UserError) as error:
        make_source(f"{__name__}:Odd:{key}")
    assert key in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["labels", "coarse_labels", "groups"])
@pytest.mark.parametrize("largest", [2**20, 2**31 - 1])
def test_one_large_label(tmp_path, key, largest):
    """Cases C.4: a label that asks for millions of classes for 64 images is refused before any of them is made."""
    arrays = {"images": np.zeros((64, 8, 8, 3), np.uint8), "labels": np.arange(64) % 4}
    arrays[key] = np.where(np.arange(64) == 5, largest, arrays["labels"])
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError) as error:
        make_source(f"npz:{tmp_path / 'x.npz'}")
    assert str(error.value).startswith(f"{tmp_path / 'x.npz'}: {key}")
    arrays[key] = np.where(np.arange(64) == 5, 21_840, arrays["labels"])  # ImageNet-21k, cut to few images
    np.savez(tmp_path / "x.npz", **arrays)
    assert len(make_source(f"npz:{tmp_path / 'x.npz'}")) > 50
