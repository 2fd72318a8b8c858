"""Frozen dense probe: how well the map of each stage tells where objects are, by a linear classifier on its cells.

The protocol is ours: a cheap substitute for the detection and segmentation tasks of papers such as Zhang and Ma 2022
(arXiv 2206.00227); its numbers are not comparable to theirs. The encoder is not tuned.

N images, S side of an image, h w of a map, M channels, K classes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.augment import ops, to_float
from jaxcl.evaluate.base import Evaluator, Metric, Metrics, NotApplicable, Panels
from jaxcl.evaluate.context import EvalContext
from jaxcl.evaluate.linear_probe import LinearFit, fit_linear_probe, probe_logits
from jaxcl.method.state import TrainState

Array = jax.Array
TRAIN_IMAGES, CELLS = 2000, 32  # the most training images for the probe, and random cells of each image


class Dense(Evaluator):
    """Intersection over union of pixel labels, by a linear probe on the cells of each stage's map.

    A cell has the most frequent label of its pixels. To predict, logits are enlarged (bilinear) to the size of the
    labels; a coarse map cannot draw a fine border. Labels are extras["segmentation"], int [N,S,S] with -1 for pixels
    that do not count, or extras["mask"], the object against the background.

    Metrics: for each stage "iou", the mean over the classes that occur (with masks: of the object alone), and
    "pixel_accuracy"; "iou" at the top is that of the best stage.
    """

    metrics = {
        "iou": Metric(
            "Object mask, frozen (IoU)",
            meaning="overlap of the true object with the area that a linear classifier on the best stage's map marks",
        )
    }

    def __call__(self, context: EvalContext) -> tuple[Metrics, Panels]:
        if not context.recipe.model.num_stages:
            raise NotApplicable("the network has no stages")
        source, seed = context.source("train"), context.recipe.seed
        (train, _), (test, first) = _labels(source), _labels(context.test)
        classes = max(int(max(train.max(), test.max())) + 1, 2)
        rows = np.sort(np.random.default_rng(seed).permutation(len(train))[:TRAIN_IMAGES])
        features, labels = _cells(context, source.take(rows), train[rows], classes)
        metrics: Metrics = {}
        for k, (x, y) in enumerate(zip(features, labels, strict=True)):
            probe = fit_linear_probe(x, y, num_classes=classes, max_steps=100)
            counted = _confusion(context, k, probe, test, classes)
            union = counted.sum(0) + counted.sum(1) - counted.diagonal()
            occur = np.flatnonzero(union[first:]) + first
            metrics[f"stage{k + 1}"] = {
                "iou": float((counted.diagonal()[occur] / union[occur]).mean()) if len(occur) else 0.0,
                "pixel_accuracy": float(counted.trace() / max(counted.sum(), 1)),
            }
        return {"iou": max(v["iou"] for v in metrics.values())} | metrics, {}


def _labels(source: Any) -> tuple[np.ndarray, int]:
    """Pixel labels, int [N,S,S] with -1 where a pixel does not count, and the first class that the overlap is of."""
    for name, first in (("segmentation", 0), ("mask", 1)):
        if (labels := source.extras.get(name)) is not None and len(labels):
            return np.asarray(labels, np.int32), first
    raise NotApplicable("the data has no labels of pixels (garments and voc:PATH have)")


def cell_labels(labels_NxSxS: np.ndarray, size: int, classes: int) -> np.ndarray:
    """The most frequent label among the pixels of each cell.

    Args:
      labels_NxSxS: int, -1 for pixels that do not count.
      size: cells a side. A pixel belongs to the cell that contains its centre.
      classes: K.

    Returns:
      int32 [N,size,size]; -1 where no pixel counts; the lowest of equally frequent labels.
    """
    N, S, _ = labels_NxSxS.shape
    cell = ((np.arange(S) + 0.5) * size / S).astype(int)
    counts = np.zeros((N, size * size, classes + 1), np.int32)
    where = (cell[:, None] * size + cell[None]).reshape(-1)
    flat = labels_NxSxS.reshape(N, -1)
    np.add.at(counts, (np.arange(N)[:, None], where[None], flat), 1)  # -1 is counted last
    counts = counts[..., :classes]
    return np.where(counts.sum(-1) > 0, counts.argmax(-1), -1).astype(np.int32).reshape(N, size, size)


def _cells(
    context: EvalContext, source: Any, labels: np.ndarray, classes: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Features [n,M] and labels [n] of random cells of each image, for each stage."""
    rng, features, cells, begin = np.random.default_rng(context.recipe.seed), [], [], 0
    for maps, where in context.run(source, "maps", _maps(context)):
        count = int(where.sum())
        rows = labels[begin : begin + count]
        begin += count
        xs, ys = [], []
        for m in maps:
            x = m[where].reshape(count, -1, m.shape[-1])
            y = cell_labels(rows, m.shape[1], classes).reshape(count, -1)
            chosen = rng.permuted(np.tile(np.arange(x.shape[1]), (count, 1)), axis=1)[:, :CELLS]
            xs.append(np.take_along_axis(x, chosen[..., None], 1).reshape(-1, m.shape[-1]))
            ys.append(np.take_along_axis(y, chosen, 1).reshape(-1))
        features.append(xs)
        cells.append(ys)
    return tuple([np.concatenate(x) for x in zip(*each, strict=True)] for each in (features, cells))


def _maps(context: EvalContext) -> Callable:
    def maps(state: TrainState, batch: dict[str, Array]) -> list[Array]:
        image = context.normalize(to_float(batch["image"]))
        return context.recipe.model.maps(state.params, state.batch_stats, image)

    return maps


def _confusion(context: EvalContext, stage: int, probe: LinearFit, labels: np.ndarray, classes: int) -> np.ndarray:
    """Numbers of pixels [K,K] by true and predicted class."""
    side = labels.shape[1]

    def predict(state: TrainState, batch: dict[str, Array], probe: LinearFit) -> Array:
        x = _maps(context)(state, batch)[stage]
        return ops.resize(probe_logits(probe, x), side).argmax(-1).astype(jnp.int32)

    counted, begin = np.zeros((classes, classes), np.int64), 0
    for predicted, where in context.run(context.test, f"dense {stage} {side} {classes}", predict, probe):
        rows = labels[begin : begin + int(where.sum())]
        begin += len(rows)
        known = rows >= 0
        np.add.at(counted, (rows[known], predicted[where][known]), 1)
    return counted
