"""Which rows of a set belong to a split: hold-outs, cut-downs and imbalance, seeded and independent of each other."""

from collections.abc import Callable

import numpy as np

from jaxcl.data import hashing
from jaxcl.errors import UserError

HOLD_OUT, CUT_DOWN, TEST_SPLIT, IMBALANCE = 1, 2, 3, 4  # hash streams: the draws are independent
RELEASED_SEED = 42  # of the split into training and validation images in Thanos's released code

Select = Callable[[np.ndarray], np.ndarray]  # labels [N] -> the rows to keep, ascending


def rank_within_class(labels: np.ndarray, *, seed: int, stream: int) -> np.ndarray:
    """The rank of each row in a seeded order of the rows of its class, int64 [N]."""
    order = hashing.order(seed, stream, len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    _, counts = np.unique(labels, return_counts=True)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    rank = np.empty(len(labels), np.int64)
    rank[by_class] = np.arange(len(labels)) - starts
    return rank


def hold_out(labels: np.ndarray, fraction: float, *, seed: int, stream: int = HOLD_OUT) -> np.ndarray:
    """bool [N]: a seeded hold-out of `fraction` of every class, to the nearest row."""
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
    """The order, int64 [count], that torch.randperm draws on a CPU with a generator of this seed.

    It is a Fisher-Yates shuffle on the raw 32-bit words of the Mersenne twister. NumPy's legacy generator, which its
    authors have frozen, seeds and runs that twister in the same way.
    """
    words = np.frombuffer(np.random.RandomState(seed).bytes(4 * count), "<u4").astype(np.int64)
    places = (np.arange(count) + words % np.arange(count, 0, -1)).tolist()
    order = list(range(count))
    for i, place in enumerate(places):
        order[i], order[place] = order[place], order[i]
    return np.array(order, np.int64)


def hold_out_released(count: int, fraction: float) -> np.ndarray:
    """bool [count]: the hold-out of Thanos's released code. It depends on neither the classes nor the run's seed."""
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
    """A function that chooses the rows of `split` among those of the base split.

    Args:
      split, validation, limit, seed: as of `make_source`.
      spec: names the source in messages.
      released: hold out by `hold_out_released`, not class by class.
      counts: the largest number of training images of each class; the other splits keep all of theirs.
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
                raise UserError(f"{spec}: imbalance needs labels of {len(counts)} classes, but its labels are others")
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
