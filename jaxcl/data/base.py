"""`Source`, the in-memory image set every part of jaxcl reads, and the choice of its rows."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from jaxcl.data import hashing
from jaxcl.errors import UserError

HOLD_OUT, CUT_DOWN, TEST_PART = 1, 2, 3  # hash streams, so that the three draws are independent

Select = Callable[[np.ndarray], np.ndarray]  # labels [N] -> the rows to keep, ascending


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """An image set held in memory.

    Attributes:
      images: uint8 [N, H, W, C].
      labels: int32 [N], -1 where unlabelled.
      class_names: one name a class.
      mean, std: per channel, in [0, 1] units, of the training images.
      extras: side information, each array with N rows ("mask" bool [N, H, W], "coarse" int32 [N], ...).
      coarse_names: names of the values of extras["coarse"], empty without it.
      name, split: where it came from, for messages and reports.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    extras: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    coarse_names: tuple[str, ...] = ()
    name: str = "arrays"
    split: str = "train"
    in_memory: bool = True

    def __post_init__(self):
        n = len(self.images)
        if self.images.dtype != np.uint8 or self.images.ndim != 4:
            raise ValueError(f"images must be uint8 [N,H,W,C], got {self.images.dtype} {self.images.shape}")
        for key, array in {"labels": self.labels, **self.extras}.items():
            if len(array) != n:
                raise ValueError(f"{key} has {len(array)} rows, images have {n}")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.images.shape[1:]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def labelled(self) -> bool:
        return len(self.labels) > 0 and bool((self.labels >= 0).all())

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The rows `indices` [B] as {"image" uint8 [B,H,W,C], "label" int32 [B], "index" int32 [B]}.

        "index" is the row in this source, so extras[key][index] is the side information of an example.
        """
        indices = np.asarray(indices)
        return {
            "image": self.images[indices],
            "label": self.labels[indices],
            "index": indices.astype(np.int32),
        }

    def take(self, rows: np.ndarray) -> "Source":
        """The set of these rows, numbered anew from 0."""
        if len(rows) == len(self) and (rows == np.arange(len(self))).all():
            return self
        extras = {k: v[rows] for k, v in self.extras.items()}
        return dataclasses.replace(self, images=self.images[rows], labels=self.labels[rows], extras=extras)


def rank_within_class(labels: np.ndarray, *, seed: int, stream: int) -> np.ndarray:
    """Each row's place, int64 [N], in a seeded order of the rows of its own class."""
    order = hashing.order(seed, stream, len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    _, counts = np.unique(labels, return_counts=True)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    rank = np.empty(len(labels), np.int64)
    rank[by_class] = np.arange(len(labels)) - starts
    return rank


def hold_out(labels: np.ndarray, fraction: float, *, seed: int, stream: int = HOLD_OUT) -> np.ndarray:
    """bool [N]: a seeded hold-out of `fraction` of every class (to the nearest row)."""
    values, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    held = np.rint(fraction * counts).astype(np.int64)
    return rank_within_class(labels, seed=seed, stream=stream) < held[inverse]


def cut_down(labels: np.ndarray, limit: int, *, seed: int) -> np.ndarray:
    """Ascending rows of a seeded, class-balanced choice of at most `limit` examples."""
    rank = rank_within_class(labels, seed=seed, stream=CUT_DOWN)
    place = np.empty(len(labels), np.int64)
    place[hashing.order(seed, CUT_DOWN, len(labels))] = np.arange(len(labels))
    return np.sort(np.lexsort((place, rank))[:limit])


def selector(*, split: str, validation: float, limit: int | None, seed: int, spec: str) -> Select:
    """The rows of a base set that belong to `split` under `validation` and `limit`."""

    def select(labels: np.ndarray) -> np.ndarray:
        rows = np.arange(len(labels))
        if validation and split in ("train", "validation"):
            held = hold_out(labels, validation, seed=seed)
            rows = rows[held if split == "validation" else ~held]
        if limit is not None:
            rows = rows[cut_down(labels[rows], limit, seed=seed)]
        if not len(rows):
            raise UserError(
                f"{spec}: validation={validation} of {len(labels)} images leaves {split} empty;"
                " choose a fraction that leaves images on both sides"
            )
        return rows

    return select


def moments(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel mean and standard deviation, in [0, 1] units, of uint8 [N,H,W,C]; exact."""
    levels = np.arange(256) / 255.0
    mean, std = [], []
    for c in range(images.shape[-1]):
        share = sum(np.bincount(block[..., c].reshape(-1), minlength=256) for block in chunks(images))
        share = share / share.sum()
        mean.append(float(share @ levels))
        std.append(float(np.sqrt(share @ (levels - mean[-1]) ** 2)))
    # A constant channel would divide by zero when normalised; one grey level is the smallest honest scale.
    return tuple(mean), tuple(max(s, 1 / 255) for s in std)


def chunks(array: np.ndarray, size: int = 1024):
    """Consecutive blocks of rows, so that temporaries stay small."""
    return (array[i : i + size] for i in range(0, len(array), size))


def as_rgb(images: np.ndarray) -> np.ndarray:
    """uint8 [N,H,W] or [N,H,W,1 or 3] -> [N,H,W,3], greyscale repeated so that any encoder takes it."""
    if images.ndim == 3:
        images = images[..., None]
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images
