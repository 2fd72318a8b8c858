"""Batches of P classes with M images each, as a function of (seed, step) alone.

N images, C classes that are drawn from, n images in a class, B batch, M images per class in a batch, P = B / M classes
in a batch, S steps in an epoch, Q = P S draws of M images of one class in an epoch.

A class is drawn in proportion to its number of images, but at most once per batch; the other classes get the remaining
draws. So all images are seen equally often, except in classes with more than N / P images. Classes with fewer than M
images are left out. A pass over a class draws every image once, in the order of that pass, except the n mod M images
that whole draws do not reach: each pass leaves out others, in turn.
"""

import logging
import math
import threading

import numpy as np

from jaxcl.data import hashing
from jaxcl.data.selection import rank_within_class
from jaxcl.errors import UserError

logger = logging.getLogger("jaxcl")

# Hash streams, different from those of `selection`.
CLASSES, ORDER, DEAL, PASS, LEFT_OUT, WITHIN = range(11, 17)


class PerClass:
    """The rows of each batch, int64 [B], in random order; call it with a step.

    Steps may be asked for in any order. The plan of an epoch is made once and kept. Threads may call it at the same
    time.
    """

    name = "per_class"  # of this order, in the run folder

    def __init__(self, labels: np.ndarray, *, batch_size: int, per_class: int, seed: int):
        """
        Args:
          labels: int [N], of every image.
          batch_size: B, over all hosts.
          per_class: M, at least 1.
          seed: of all draws.

        Raises:
          UserError: an image has no label, M does not divide B, or too few classes have M images.
        """
        labels, where = np.asarray(labels), f"data.per_class={per_class}"
        if per_class < 1 or batch_size % per_class:
            raise UserError(f"{where} does not divide batch_size {batch_size}; use a divisor of it, or 0 for none")
        if not len(labels) or labels.min() < 0:
            without = int((labels < 0).sum())
            raise UserError(
                f"{where} needs a label on every training image, and {without:,} of {len(labels):,} have none; use 0"
            )
        self._B, self.per_class, self._seed = batch_size, per_class, seed
        self._P, self.steps_per_epoch = batch_size // per_class, len(labels) // batch_size
        counts = np.bincount(labels)
        classes = np.flatnonzero(counts >= per_class)
        if few := int(((counts > 0) & (counts < per_class)).sum()):
            logger.info("%s: %s classes have fewer images and are left out", where, f"{few:,}")
        if len(classes) < self._P:
            raise UserError(
                f"{where} makes batches of {self._P} classes (batch_size {batch_size}), but only {len(classes)} have "
                "that many images; use a smaller batch_size, or a larger data.per_class"
            )
        self._n = counts[classes]
        self._draws_of_pass = self._n // per_class
        # All rows, sorted by class.
        number = np.full(len(counts), -1)
        number[classes] = np.arange(len(classes))
        own = number[labels]
        rows = np.flatnonzero(own >= 0)
        self._rows = rows[np.argsort(own[rows], kind="stable")]
        self._class = own[self._rows]
        self._starts = np.cumsum(self._n) - self._n
        self._turn = rank_within_class(self._class, seed=seed, stream=LEFT_OUT)
        self._share_out(len(classes))
        self._lock, self._plans = threading.Lock(), {}

    def _share_out(self, C: int) -> None:
        """Draws of each class in an epoch: x = base + rest / size; the sum of all x is Q."""
        P, S = self._P, self.steps_per_epoch
        full = np.zeros(C, bool)  # in every batch
        while True:
            draws, size = S * (P - int(full.sum())), int(self._n[~full].sum())
            more = ~full & (draws * self._n > S * size)
            if not more.any():
                break
            full |= more
        weight = np.where(full, 0, draws * self._n)
        self._size = max(size, 1)
        self._base = np.where(full, S, weight // self._size)
        # The rests are laid end to end on a line, with points at regular intervals. A class gets one more draw where a
        # point falls on its rest. The points start elsewhere in each epoch, so in the long run draws match rests.
        self._in_line = hashing.order(self._seed, CLASSES, C)
        ends = np.cumsum((weight % self._size)[self._in_line])
        self._line = np.concatenate([[0], ends])
        stride = max(1, round(self._size * (math.sqrt(5) - 1) / 2))
        while math.gcd(stride, self._size) > 1:
            stride += 1
        self._stride = stride % self._size

    def _extra(self, epochs: np.ndarray) -> np.ndarray:
        """Draws besides base, 0 or 1, int64 [len(epochs),C]."""
        begin = epochs % self._size * self._stride % self._size
        met = (self._line + begin[:, None]) // self._size
        out = np.empty((len(epochs), len(self._n)), np.int64)
        out[:, self._in_line] = np.diff(met, axis=1)
        return out

    def _draws_before(self, epoch: int) -> np.ndarray:
        """Draws of each class in all epochs before this one, int64 [C]."""
        cycles, rest = divmod(epoch, self._size)  # in a cycle the points start at every place once
        total = epoch * self._base
        if cycles:
            weight = np.empty(len(self._n), np.int64)
            weight[self._in_line] = np.diff(self._line)
            total = total + cycles * weight
        block = max(1, 2**20 // len(self._n))
        for begin in range(0, rest, block):
            total = total + self._extra(np.arange(begin, min(begin + block, rest))).sum(0)
        return total

    def __call__(self, step: int) -> np.ndarray:
        epoch, place = divmod(int(step), self.steps_per_epoch)
        with self._lock:
            if epoch not in self._plans:
                while len(self._plans) > 1:  # threads that read ahead are in at most two epochs
                    self._plans.pop(min(self._plans))
                self._plans[epoch] = self._plan(epoch)
            rows = self._plans[epoch][place]
        key = hashing.words(self._seed, WITHIN, np.arange(self._B) + int(step) * self._B, 1)[:, 0]
        return rows[np.argsort(key, kind="stable")]

    def _plan(self, epoch: int) -> np.ndarray:
        """Rows of every batch of an epoch, int64 [S,B]."""
        S, P, M = self.steps_per_epoch, self._P, self.per_class
        count = self._base + self._extra(np.array([epoch]))[0]
        classes_SxP = self._deal(epoch, count)
        # The draws of each class are numbered over the whole run, in the order of steps.
        flat = classes_SxP.reshape(-1)
        by_class = np.argsort(flat, kind="stable")
        number = np.empty(S * P, np.int64)
        number[by_class] = np.arange(S * P) - np.repeat(np.cumsum(count) - count, count)
        before = self._draws_before(epoch)
        number += before[flat]
        which, within = np.divmod(number, self._draws_of_pass[flat])

        rows_QxM = np.empty((S * P, M), np.int64)
        first, last = before // self._draws_of_pass, (before + count - 1) // self._draws_of_pass
        for more in range(int((last - first).max()) + 1):
            ordered = self._pass(first + more, (first + more <= last) & (count > 0))
            now = np.flatnonzero(which == first[flat] + more)
            begin = self._starts[flat[now]] + within[now] * M
            rows_QxM[now] = ordered[begin[:, None] + np.arange(M)]
        return rows_QxM.reshape(S, P * M)

    def _pass(self, number: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """All rows sorted by class; each `wanted` class [C] is in the order of its pass `number` [C]."""
        chosen = np.flatnonzero(wanted[self._class])
        of = self._class[chosen]
        n, left = self._n[of], (self._n % self.per_class)[of]
        key = hashing.words(self._seed, PASS, number[of] * len(self._rows) + chosen, 1)[:, 0]
        last = (self._turn[chosen] - number[of] * left) % n < left
        # Sorted by class, then by whether it is left out, then at random. Sorting one combined number is faster.
        bits = np.uint64(63 - len(self._n).bit_length())
        key = (of.astype(np.uint64) << (bits + np.uint64(1))) | (last.astype(np.uint64) << bits) | (key >> (64 - bits))
        out = self._rows.copy()
        out[chosen] = self._rows[chosen[np.argsort(key, kind="stable")]]
        return out

    def _deal(self, epoch: int, count: np.ndarray) -> np.ndarray:
        """Classes of every batch of an epoch, int64 [S,P], none twice in a batch, each `count` times in total."""
        S, P, C = self.steps_per_epoch, self._P, len(self._n)
        line = hashing.order(self._seed, ORDER + (epoch << 8), C)
        # A class fills at most S consecutive places, and every S-th place belongs to the same batch.
        table = np.repeat(line, count[line]).reshape(P, S).T.copy()
        if P == C or S == 1:
            return table
        # Then batches are mixed in pairs: the classes that only one of the two has are dealt again.
        for deal in range(2 + S.bit_length()):
            pairs = hashing.order(self._seed, DEAL + ((epoch * 64 + deal) << 8), S)[: S // 2 * 2].reshape(-1, 2)
            both = np.sort(table[pairs].reshape(len(pairs), 2 * P), axis=1)
            same = both[:, 1:] == both[:, :-1]
            twice = np.zeros(both.shape, bool)
            twice[:, 1:] |= same
            twice[:, :-1] |= same
            place = (np.arange(both.size) + (epoch * 64 + deal) * both.size).reshape(both.shape)
            key = hashing.words(self._seed, DEAL, place.reshape(-1), 1)[:, 0].reshape(both.shape) >> np.uint64(1)
            # Classes that both have come first, side by side, one for each; the others follow in random order.
            key = np.where(twice, both.astype(np.int64) - C, key.astype(np.int64))
            both = np.take_along_axis(both, np.argsort(key, axis=1, kind="stable"), axis=1)
            table[pairs[:, 0]], table[pairs[:, 1]] = both[:, ::2], both[:, 1::2]
        return table
