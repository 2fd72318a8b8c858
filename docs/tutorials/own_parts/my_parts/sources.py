"""An image set of one's own. N images, S side."""

import dataclasses
from typing import Annotated

import numpy as np

from jaxcl.data import ArraySource, SourceKind
from jaxcl.errors import UserError
from jaxcl.runtime.options import Range

NAMES = ("square", "disc", "cross")


@dataclasses.dataclass(frozen=True)
class Shapes(SourceKind):
    """Coloured shapes on noise, drawn from a fixed seed; written "my_parts.sources:Shapes:COUNT" in data.source."""

    argument = "COUNT"

    side: Annotated[int, Range(8)] = 16  # pixels; config.data.options.side

    def load(self, argument, *, split, base_split, select):
        if not argument.isdigit() or int(argument) < 10:
            raise UserError(f"data.source: Shapes is followed by {argument!r}; expected a number of images from 10 up")
        count = int(argument) if base_split == "train" else max(10, int(argument) // 5)
        images, labels = self._draw(count, seed={"train": 0, "test": 1}[base_split])
        rows = select(labels)
        return ArraySource(
            images=images[rows],
            labels=labels[rows],
            class_names=NAMES,
            mean=(0.4,) * 3,
            std=(0.25,) * 3,
            name="shapes",
            split=split,
        )

    def _draw(self, count, seed):
        rng, S = np.random.default_rng(seed), self.side
        labels = (np.arange(count) % len(NAMES)).astype(np.int32)
        y, x = np.mgrid[:S, :S]
        images = rng.integers(0, 120, (count, S, S, 3)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            cy, cx, r = *rng.integers(S // 3, S - S // 3, 2), rng.integers(S // 5, S // 3 + 1)
            dy, dx = np.abs(y - cy), np.abs(x - cx)
            shape = (np.maximum(dy, dx) < r, dy**2 + dx**2 < r**2, (np.minimum(dy, dx) < 2) & (np.maximum(dy, dx) < r))
            image[shape[label]] = rng.integers(120, 256, 3)
        return images, labels
