"""EvalContext dense probe: what each stage's map says about where things are, by a linear classifier on its cells.

Ours: a cheap stand-in for the detection and segmentation by which papers judge features (papers/
hierarchical_augmentation.md 8.2), whose figures it does not reproduce. Nothing of the encoder is tuned.

N images, S side of an image, h w of a map, M channels, K classes.
"""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.augment import ops
from jaxcl.evaluate.base import Metrics, NotApplicable
from jaxcl.evaluate.linear_probe import LinearProbe, fit_linear_probe, probe_logits
from jaxcl.method.state import TrainState
from jaxcl.method.update import to_pixels

if TYPE_CHECKING:
    from jaxcl.evaluate.suite import EvalContext

Array = jax.Array
TRAIN_IMAGES, CELLS = 2000, 32  # images the probe is fitted on, at most, and cells of each, drawn at random


def dense(f: "EvalContext") -> tuple[Metrics, dict]:
    """Intersection over union of the labels of pixels, per stage, by a linear probe on the cells of the stage's map.

    A cell's label is the commonest of its pixels'. To predict, logits are enlarged (bilinear) to the size of the
    labels; a coarse map cannot draw a fine border, whatever it knows. Labels are extras["segmentation"], int [N,S,S]
    with -1 for pixels that do not count, or extras["mask"], the object against the rest.

    Metrics, for each stage: "iou", the mean over the classes that occur (of masks: of the object alone), and
    "pixel_accuracy"; "iou" at the top is the best stage's.
    """
    model = f.recipe.model
    if not model.num_stages:
        raise NotApplicable("the network has no stages")
    (train, _), (test, first) = _labels(f.source("train")), _labels(f.test)
    classes = max(int(max(train.max(), test.max())) + 1, 2)
    rows = np.sort(np.random.default_rng(f.recipe.seed).permutation(len(train))[:TRAIN_IMAGES])
    features, labels = _cells(f, f.source("train").take(rows), train[rows], classes)
    figures: Metrics = {}
    for k, (x, y) in enumerate(zip(features, labels, strict=True)):
        probe = fit_linear_probe(x, y, num_classes=classes, max_steps=100)
        counted = _confusion(f, k, probe, test, classes)
        union = counted.sum(0) + counted.sum(1) - counted.diagonal()
        occur = np.flatnonzero(union[first:]) + first
        figures[f"stage{k + 1}"] = {
            "iou": float((counted.diagonal()[occur] / union[occur]).mean()) if len(occur) else 0.0,
            "pixel_accuracy": float(counted.trace() / max(counted.sum(), 1)),
        }
    return {"iou": max(v["iou"] for v in figures.values())} | figures, {}


def _labels(source: Any) -> tuple[np.ndarray, int]:
    """int [N,S,S], -1 where a pixel does not count, and the first class whose overlap counts."""
    for name, first in (("segmentation", 0), ("mask", 1)):
        if (labels := source.extras.get(name)) is not None and len(labels):
            return np.asarray(labels, np.int32), first
    raise NotApplicable("the data has no labels of pixels (garments and voc:PATH have)")


def cell_labels(labels_NxSxS: np.ndarray, size: int, classes: int) -> np.ndarray:
    """The commonest label of the pixels of each of size x size cells, int32 [N,size,size]; -1 where none counts.

    Where two are equally common, the lower; a pixel belongs to the cell that its middle lies in.
    """
    N, S, _ = labels_NxSxS.shape
    cell = ((np.arange(S) + 0.5) * size / S).astype(int)
    counts = np.zeros((N, size * size, classes + 1), np.int32)
    where = (cell[:, None] * size + cell[None]).reshape(-1)
    flat = labels_NxSxS.reshape(N, -1)
    np.add.at(counts, (np.arange(N)[:, None], where[None], flat), 1)  # -1 counts in the last place
    counts = counts[..., :classes]
    return np.where(counts.sum(-1) > 0, counts.argmax(-1), -1).astype(np.int32).reshape(N, size, size)


def _cells(
    f: "EvalContext", source: Any, labels: np.ndarray, classes: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Features [n,M] and labels [n] of some cells of each image, for each stage."""
    rng, features, of_cells, begin = np.random.default_rng(f.recipe.seed), [], [], 0
    for maps, where in f.run(source, "maps", _maps(f)):
        count = int(where.sum())
        part = labels[begin : begin + count]
        begin += count
        xs, ys = [], []
        for m in maps:
            x = m[where].reshape(count, -1, m.shape[-1])
            y = cell_labels(part, m.shape[1], classes).reshape(count, -1)
            chosen = rng.permuted(np.tile(np.arange(x.shape[1]), (count, 1)), axis=1)[:, :CELLS]
            xs.append(np.take_along_axis(x, chosen[..., None], 1).reshape(-1, m.shape[-1]))
            ys.append(np.take_along_axis(y, chosen, 1).reshape(-1))
        features.append(xs)
        of_cells.append(ys)
    return [np.concatenate(x) for x in zip(*features, strict=True)], [
        np.concatenate(y) for y in zip(*of_cells, strict=True)
    ]


def _maps(f: "EvalContext"):
    def maps(state: TrainState, batch: dict[str, Array]) -> list[Array]:
        return f.recipe.model.maps(state.params, state.batch_stats, f.normalize(to_pixels(batch["image"])))

    return maps


def _confusion(f: "EvalContext", stage: int, probe: LinearProbe, labels: np.ndarray, classes: int) -> np.ndarray:
    """Pixels [K,K] by true and predicted class."""
    side = labels.shape[1]

    def predict(state: TrainState, batch: dict[str, Array], probe: LinearProbe) -> Array:
        x = _maps(f)(state, batch)[stage]
        return ops.resize(probe_logits(probe, x), side).argmax(-1).astype(jnp.int32)

    counted, begin = np.zeros((classes, classes), np.int64), 0
    for predicted, where in f.run(f.test, f"dense {stage} {side} {classes}", predict, probe):
        part = labels[begin : begin + int(where.sum())]
        begin += len(part)
        known = part >= 0
        np.add.at(counted, (part[known], predicted[where][known]), 1)
    return counted
