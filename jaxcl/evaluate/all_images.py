"""The training and the test images of a set, numbered together, for results about the set itself.

N images, D features, n chosen rows.
"""

import numpy as np

from jaxcl.data.originals import Originals, originals
from jaxcl.evaluate.context import EvalContext

MAPPED = 1500  # images that the report places on its map


class AllImages:
    """The training images, followed by the test images."""

    def __init__(self, context: EvalContext):
        self._train, self._test = context.source("train"), context.test
        self._names = [source.extras.get("name") for source in (self._train, self._test)]

    def __len__(self) -> int:
        return len(self._train) + len(self._test)

    def images(self, rows: np.ndarray) -> np.ndarray:
        """uint8 [n,H,W,C]"""
        n, out = len(self._train), np.empty((len(rows), *self._train.image_shape), np.uint8)
        out[rows < n] = self._train.batch(rows[rows < n])["image"]
        out[rows >= n] = self._test.batch(rows[rows >= n] - n)["image"]
        return out

    def originals(self) -> Originals:
        """What the files of the images are like."""
        return Originals(*map(np.concatenate, zip(originals(self._train), originals(self._test), strict=True)))

    def features(self, context: EvalContext) -> np.ndarray:
        """float32 [N,D], of the kind by which images are compared."""
        kind = context.options.knn_features or context.options.features
        return np.concatenate([context.features(split, kind) for split in ("train", "test")])

    def features_of(self, context: EvalContext, rows: np.ndarray) -> np.ndarray:
        """float32 [n,D]: the same for some ascending rows; of many images, the others are not encoded."""
        if len(self) <= 2 * len(rows):  # other evaluators may want all of them
            return self.features(context)[rows]
        n = len(self._train)
        parts = ((self._train, rows[rows < n]), (self._test, rows[rows >= n] - n))
        kind = context.options.knn_features or context.options.features
        return np.concatenate([context.features_of(s.take(r), kind) for s, r in parts if len(r)])

    @property
    def labels(self) -> np.ndarray:
        """int32 [N], -1 for unknown."""
        return np.concatenate([self._train.labels, self._test.labels])

    def class_name(self, label: int) -> str:
        """The name of a class; "" for an unknown one."""
        names = self._train.class_names
        return str(names[label]) if 0 <= label < len(names) else ""

    def name(self, row: int) -> str:
        """The name of the file, or the split and the row in it."""
        in_test = int(row >= len(self._train))
        row = int(row) - in_test * len(self._train)
        names = self._names[in_test]
        return f"{'test' if in_test else 'training'} image {row}" if names is None else str(names[row])

    def split(self, row: int) -> str:
        return "training" if row < len(self._train) else "test"

    def mapped(self) -> np.ndarray:
        """Ascending rows: a seeded random choice of at most `MAPPED` of all images, the same for every evaluator."""
        return np.sort(np.random.default_rng(0).permutation(len(self))[:MAPPED])
