"""The dense probe on maps that know where things are, and on maps that do not."""

from types import SimpleNamespace

import numpy as np
import pytest

from jaxcl.data import ArraySource
from jaxcl.evaluate.base import NotApplicable
from jaxcl.evaluate.dense import Dense, cell_labels

SIDE = 8


def source(n, seed, extra="mask", classes=2):
    """Squares of one class on a background of class 0; the class is the image's brightness there."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((n, SIDE, SIDE), np.int32)
    for i, (top, left) in enumerate(2 * rng.integers(0, 3, (n, 2))):
        labels[i, top : top + 4, left : left + 4] = rng.integers(1, classes)
    images = np.repeat((labels * 60 + rng.integers(0, 9, labels.shape))[..., None], 3, -1).astype(np.uint8)
    if extra == "segmentation":
        labels[:, -1] = -1  # does not count
    return ArraySource(
        images=images,
        labels=np.zeros(n, np.int32),
        class_names=("a",),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        extras={extra: labels.astype(bool) if extra == "mask" else labels} if extra else {},
    )


def pooled(x, size):
    N, S, _, C = x.shape
    return x.reshape(N, size, S // size, size, S // size, C).mean((2, 4))


def context(train, test, maps):
    def run(source, name, fn, *args):
        for begin in range(0, len(source), 10):
            rows = np.arange(begin, begin + 10)
            where = rows < len(source)
            batch = source.batch(np.minimum(rows, len(source) - 1))
            yield fn(SimpleNamespace(params=None, batch_stats=None), batch, *args), where

    def tree(source, name, fn, *args):
        for out, where in run(source, name, fn, *args):
            yield [np.asarray(x) for x in out] if isinstance(out, list) else np.asarray(out), where

    model = SimpleNamespace(
        num_stages=len(maps), maps=lambda params, stats, x: [np.asarray(m(np.asarray(x))) for m in maps]
    )
    recipe = SimpleNamespace(model=model, seed=0)
    sources = {"train": train, "test": test}
    return SimpleNamespace(recipe=recipe, source=sources.get, test=test, run=tree, normalize=lambda x: x)


def blurred(x):
    """As coarse as 2 x 2."""
    return pooled(x, 2).repeat(2, axis=1).repeat(2, axis=2)


# Of one shape, for which the probe is compiled once.
MAPS = (lambda x: pooled(x, 4), blurred, lambda x: np.zeros((len(x), 4, 4, 3), np.float32))


def test_maps_that_know():
    metrics, panels = Dense()(context(source(60, 0), source(23, 1), MAPS))
    assert panels == {} and list(metrics) == ["iou", "stage1", "stage2", "stage3"]
    fine, coarse, blind = (metrics[f"stage{i}"] for i in (1, 2, 3))
    assert fine["pixel_accuracy"] > 0.9 and fine["iou"] > 0.75
    assert coarse["iou"] < fine["iou"] == metrics["iou"]
    assert blind == {"iou": 0.0, "pixel_accuracy": 0.75}  # nothing but background


def test_classes_of_pixels():
    metrics, _ = Dense()(context(source(60, 0, "segmentation", 4), source(23, 1, "segmentation", 4), MAPS))
    blind = metrics["stage3"]
    assert blind["iou"] == pytest.approx(blind["pixel_accuracy"] / 4)  # of four classes one is found
    assert metrics["stage1"]["iou"] > 0.6


def test_left_out():
    with pytest.raises(NotApplicable, match="the data has no labels of pixels"):
        Dense()(context(source(9, 0, ""), source(9, 1, ""), MAPS))
    with pytest.raises(NotApplicable, match="the network has no stages"):
        Dense()(context(source(9, 0), source(9, 1), ()))


@pytest.mark.parametrize("size", [1, 2, 3, 8, 16])
def test_cell_labels(size):
    labels = np.random.default_rng(0).integers(-1, 3, (3, SIDE, SIDE))
    labels[0, :4, :4] = -1
    got = cell_labels(labels, size, 3)
    for n in range(3):
        for i in range(size):
            for j in range(size):
                pixels = [
                    labels[n, y, x] for y in range(SIDE) for x in range(SIDE)
                    if int((y + 0.5) * size / SIDE) == i and int((x + 0.5) * size / SIDE) == j
                ]  # fmt: skip
                counts = [pixels.count(k) for k in range(3)]
                assert got[n, i, j] == (int(np.argmax(counts)) if sum(counts) else -1)
