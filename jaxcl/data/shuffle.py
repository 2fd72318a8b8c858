"""The order of the training rows: a new permutation each epoch, any step of it at hand."""

import functools

import numpy as np

from jaxcl.data import hashing

# Written to the run folder: a run continues only under the order it began with. Change it whenever the rows of a step
# change for the same seed.
ORDER = "hash-1"
STREAM = 5 << 32  # above the streams of `data.base`; the epoch is added


class Shuffled:
    """The rows of each batch, int64 [B]; call it with a step.

    Each epoch is a permutation of all rows, cut to whole batches, so no batch mixes two epochs. A step is found without
    the ones before it. It takes 8 bytes a row, for two epochs at most.

    Args:
      num_examples: rows of the set.
      batch_size: B, at most num_examples.
      seed: any integer; modulo 2^64.
    """

    def __init__(self, num_examples: int, *, batch_size: int, seed: int):
        self.steps_per_epoch, self._B = num_examples // batch_size, batch_size
        # Two epochs: threads that read ahead may be on both sides of an epoch's end.
        self._epoch = functools.lru_cache(maxsize=2)(lambda epoch: _permutation(num_examples, seed, epoch))

    def __call__(self, step: int, part: slice = slice(None)) -> np.ndarray:
        """The rows of a step, or of one part of its batch."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[batch * self._B : (batch + 1) * self._B][part]


def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    rows = hashing.order(seed, STREAM + epoch, count)
    rows.flags.writeable = False  # cached, and handed to several readers
    return rows
