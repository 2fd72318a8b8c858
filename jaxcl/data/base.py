"""`Source`, the in-memory image set every part of jaxcl reads, and the choice of its rows."""

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np

from jaxcl.data import hashing
from jaxcl.errors import UserError

HOLD_OUT, CUT_DOWN, TEST_PART, IMBALANCE = 1, 2, 3, 4  # hash streams, so that the draws are independent
RELEASED_SEED = 42  # of the split into training and validation part in Thanos's released code

Select = Callable[[np.ndarray], np.ndarray]  # labels [N] -> the rows to keep, ascending


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """An image set held in memory.

    Attributes:
      images: uint8 [N, H, W, C].
      labels: int32 [N], -1 where unlabelled.
      class_names: one name a class.
      mean, std: per channel, in [0, 1] units, of the training images.
      extras: side information, each array with N rows ("mask" bool [N, H, W], "coarse" int32 [N], ...; of image
        files "name", how they are called below their folder, in one printable line).
      coarse_names: names of the values of extras["coarse"], empty without it.
      fine_names: names of the values of extras["fine"], which is there where the labels are the coarse ones.
      group_names: names of the values of extras["group"] (int32 [N], -1 where unknown), for worst-group accuracy.
      paths: of sets of image files, which file each image is, local or remote; None for others.
      name, split: where it came from, for messages and reports.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    extras: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    coarse_names: tuple[str, ...] = ()
    fine_names: tuple[str, ...] = ()
    group_names: tuple[str, ...] = ()
    paths: tuple[str, ...] | None = None
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
        paths = None if self.paths is None else tuple(self.paths[i] for i in rows)
        return dataclasses.replace(self, images=self.images[rows], labels=self.labels[rows], extras=extras, paths=paths)


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


def torch_permutation(count: int, seed: int) -> np.ndarray:
    """The order int64 [count] that torch.randperm draws on a CPU from a generator of this seed.

    A Fisher-Yates shuffle on the raw 32-bit words of the Mersenne twister, which NumPy's legacy generator, frozen by
    its authors, seeds and runs in the same way.
    """
    words = np.frombuffer(np.random.RandomState(seed).bytes(4 * count), "<u4").astype(np.int64)
    places = (np.arange(count) + words % np.arange(count, 0, -1)).tolist()
    order = list(range(count))
    for i, place in enumerate(places):
        order[i], order[place] = order[place], order[i]
    return np.array(order, np.int64)


def hold_out_released(count: int, fraction: float) -> np.ndarray:
    """bool [count]: the hold-out of Thanos's released code, whatever the class and the seed of the run."""
    held = np.zeros(count, bool)
    held[torch_permutation(count, RELEASED_SEED)[count - round(fraction * count) :]] = True
    return held


def unbalanced(labels: np.ndarray, count_of_class: np.ndarray, *, seed: int) -> np.ndarray:
    """Ascending rows of a seeded choice without replacement of at most `count_of_class[k]` rows of each class k."""
    return np.flatnonzero(rank_within_class(labels, seed=seed, stream=IMBALANCE) < count_of_class[labels])


def selector(
    *,
    split: str,
    validation: float,
    limit: int | None,
    seed: int,
    spec: str,
    released: bool = False,
    counts: np.ndarray | None = None,
) -> Select:
    """The rows of a base set that belong to `split`.

    Args:
      split, validation, limit, seed: of `make_source`.
      spec: for messages.
      released: the hold-out is `hold_out_released`, not class by class.
      counts: at most so many training images of each class; the other splits stay as they are.
    """

    def select(labels: np.ndarray) -> np.ndarray:
        rows = np.arange(len(labels))
        if validation and split in ("train", "validation"):
            if released:
                held = hold_out_released(len(labels), validation)
            else:
                held = hold_out(labels, validation, seed=seed)
            rows = rows[held if split == "validation" else ~held]
        if counts is not None and split == "train":
            if not len(labels) or labels.min() < 0 or labels.max() >= len(counts):
                raise UserError(f"{spec}: the imbalance is one of {len(counts)} classes, and its labels are others")
            rows = rows[unbalanced(labels[rows], counts, seed=seed)]
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
    return moments_of_sums(images.size // images.shape[-1], sum(channel_sums(block) for block in chunks(images)))


def channel_sums(images: np.ndarray) -> np.ndarray:
    """Sums of the values and of their squares in each channel, uint8 [...,C] -> int64 [2,C]; exact."""
    C = images.shape[-1]
    values = images.reshape(-1)
    sums = np.zeros((2, C), np.int64)
    # Long rows, which NumPy sums fast, and few enough that their squares fit 32 bits and the processor's cache.
    whole = len(values) // (64 * C) * (64 * C)
    for row in (*chunks(values[:whole].reshape(-1, 64 * C), 2048), values[whole:].reshape(-1, C)):
        for of, power in zip(sums, (row, np.multiply(row, row, dtype=np.uint16)), strict=True):
            of += power.sum(0, dtype=np.uint32).reshape(-1, C).sum(0, dtype=np.int64)
    return sums


def moments_of_sums(count: int, sums: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """As `moments`, of `count` pixels whose `channel_sums` are given, int64 [2,C]."""
    mean, std = [], []
    for s, q in zip(*sums.tolist(), strict=True):  # whole numbers: nothing is lost in the difference
        mean.append(s / count / 255)
        std.append(math.sqrt(count * q - s * s) / count / 255)
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
