"""The contract of a source: its defaults, arrays in memory, subsets, textured and coarse sources."""

import chex
import numpy as np
import pytest
from numbered_sources import OnDisk, numbered

from jaxcl.data import ArraySource, Source
from jaxcl.data.source import Subset, Wrapped
from jaxcl.errors import UserError

ATTRIBUTES = (
    "name", "split", "in_memory", "images", "image_shape", "labels", "labelled", "class_names", "num_classes", "mean",
    "std", "extras", "coarse_names", "fine_names", "group_names", "paths", "content", "fingerprint", "plain",
)  # fmt: skip


def test_what_a_source_must_define():
    with pytest.raises(TypeError, match="__len__|batch"):
        Source()
    with pytest.raises(TypeError, match="images"):
        ArraySource(labels=np.zeros(3, np.int32), class_names=(), mean=(0.5,), std=(0.5,))
    with pytest.raises(ValueError, match="uint8"):
        numbered_as(np.float32)
    with pytest.raises(ValueError, match="labels has 2 rows"):
        ArraySource(images=np.zeros((3, 2, 2, 3), np.uint8), labels=np.zeros(2), class_names=(), mean=(0,), std=(1,))


def numbered_as(dtype):
    source = numbered(3)
    return ArraySource(images=source.images.astype(dtype), labels=source.labels, class_names=(), mean=(0,), std=(1,))


def test_defaults():
    """They follow from `batch` alone, and agree with the arrays of the same images."""
    plain, memory = OnDisk(30), numbered(30)
    assert (plain.name, plain.split, plain.in_memory, plain.images, plain.paths) == (
        "source",
        "train",
        False,
        None,
        None,
    )
    assert plain.image_shape == memory.image_shape and plain.num_classes == 0 and plain.labelled
    np.testing.assert_array_equal(plain.labels, memory.labels)
    assert plain.labels.dtype == np.int32 and plain.plain is plain
    x = memory.images / 255
    np.testing.assert_allclose(plain.mean, x.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(plain.std, x.std((0, 1, 2)), rtol=1e-12)
    with pytest.raises(UserError, match="coarse"):
        plain.coarse()


def test_any_default_may_be_replaced_in_any_way():
    class Other(OnDisk):
        num_classes = 5
        name = property(lambda self: "other")

        def __init__(self):
            super().__init__(8)
            self.labels, self.image_shape, self.class_names = np.arange(8), (2, 2, 3), ("a",)

    source = Other()
    assert (source.num_classes, source.name, source.class_names) == (5, "other", ("a",))
    assert source.labels.tolist() == list(range(8))


@pytest.mark.parametrize("name", ["lables", "class_name", "image_shapes", "in_memmory"])
def test_a_misspelt_attribute_is_refused(name):
    with pytest.raises(UserError, match=f"'{name}'; did you mean"):
        type("Misspelt", (Source,), {name: 1})


@pytest.mark.parametrize("make", [numbered, OnDisk])
def test_rows_are_numbered_anew(make):
    whole, rows = make(30), np.array([7, 1, 20])
    some = whole.take(rows)
    chex.assert_trees_all_equal(some.batch(np.array([2, 0]))["image"], whole.batch(rows[[2, 0]])["image"])
    assert some.batch(np.array([2, 0]))["index"].tolist() == [2, 0] and len(some) == 3
    assert some.labels.tolist() == [0, 1, 6] and some.labelled
    assert some.take(np.array([1])).labels.tolist() == [1] and not some.take(np.array([], int)).labelled
    assert isinstance(some, Subset) == (make is OnDisk)


def test_a_wrapped_source_has_every_attribute_of_the_inner_one():
    inner = numbered(5)
    outer = Wrapped(inner)
    for name in ATTRIBUTES[:-1]:
        np.testing.assert_equal(getattr(outer, name), getattr(inner, name), name)
    public = {n for n in dir(Source) if not n.startswith("_")} - {"batch", "take", "coarse"}
    assert public == set(ATTRIBUTES)
    assert len(outer) == 5 and (outer.batch(np.arange(5))["image"] == inner.images).all()


def test_coarse_classes_of_arrays():
    source = numbered(14)
    source = ArraySource(
        images=source.images, labels=source.labels, class_names=source.class_names, mean=source.mean, std=source.std,
        extras={"coarse": source.labels // 4}, coarse_names=("low", "high"),
    )  # fmt: skip
    coarse = source.coarse()
    assert coarse.class_names == ("low", "high") and coarse.fine_names == source.class_names
    assert (coarse.extras["fine"] == source.labels).all() and coarse.labels.tolist() == [0, 0, 0, 0, 1, 1, 1] * 2
    some = Subset(source, np.array([6, 0])).coarse()
    assert some.labels.tolist() == [1, 0] and some.extras["fine"].tolist() == [6, 0] and some.num_classes == 2
    assert some.batch(np.array([0]))["label"].tolist() == [1]
