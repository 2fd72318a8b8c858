"""The order of the training rows: a new permutation each epoch. The rows of any step are found directly."""

import functools

import numpy as np

from jaxcl.data import hashing

# Written to the run folder: a run continues only with the order it began with. Change this name whenever the rows of a
# step change for the same seed.
ORDER = "hash-1"
STREAM = 5 << 32  # above the streams of `selection`; the epoch is added


class Shuffled:
    """The rows of each batch, int64 [B]; call it with a step.

    Each epoch is a permutation of all rows, cut to whole batches, so no batch mixes two epochs. A step does not need
    the steps before it. Memory: 8 bytes per row, for at most two epochs.

    Args:
      num_examples: rows of the set.
      batch_size: B, at most num_examples.
      seed: any integer, taken modulo 2^64.
    """

    def __init__(self, num_examples: int, *, batch_size: int, seed: int):
        self.steps_per_epoch, self._B = num_examples // batch_size, batch_size
        # Two epochs: threads that read ahead may be on both sides of the end of an epoch.
        self._epoch = functools.lru_cache(maxsize=2)(lambda epoch: _permutation(num_examples, seed, epoch))

    def __call__(self, step: int, share: slice = slice(None)) -> np.ndarray:
        """The rows of a step, or of a slice of its batch."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[batch * self._B : (batch + 1) * self._B][share]


def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    rows = hashing.order(seed, STREAM + epoch, count)
    rows.flags.writeable = False  # cached, and several readers share it
    return rows
