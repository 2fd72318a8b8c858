"""The order of the training rows: shuffled anew each epoch, and any part of it at hand."""

import functools

import numpy as np
from grain.experimental import index_shuffle

BLOCK = 16384  # rows found at once: one at a time each would cost more than reading its image
FEW = 64


class Shuffled:
    """The rows of each batch, int64 [B], in an order shuffled anew each epoch; call it with a step.

    Each epoch is cut to whole batches, so no batch mixes two epochs. Any step is at hand: each place is found by
    itself, and only the last few thousand are kept. The order is that of `grain.MapDataset.range(num_examples)
    .seed(seed).shuffle()`, which gives ids one at a time, at many times the cost.
    """

    def __init__(self, num_examples: int, *, batch_size: int, seed: int):
        self.steps_per_epoch, self._B, self._last = num_examples // batch_size, batch_size, num_examples - 1
        # Epoch e has seed + e; so seeds are scattered first, as grain does (1: it shuffles one link after the seed), or
        # a run would be its neighbouring seed's run one epoch later. Negative numbers have no place there.
        self._seed = int(np.random.SeedSequence([seed % 2**32, 1]).generate_state(1, np.uint32)[0])
        # Two: threads that read ahead may be on both sides of a block's end.
        self._block = functools.lru_cache(maxsize=2)(self._rows)

    def __call__(self, step: int, part: slice = slice(None)) -> np.ndarray:
        """The rows of a step, or a part of them, which then is all that is looked for."""
        first, end, _ = part.indices(self._B)
        steps = max(1, BLOCK // (end - first))
        epoch, batch = divmod(step, self.steps_per_epoch)
        block, nth = divmod(batch, steps)
        return self._block(epoch, block * steps, steps, first, end)[nth]

    def _rows(self, epoch: int, batch: int, steps: int, first: int, end: int) -> np.ndarray:
        batches = np.arange(batch, min(batch + steps, self.steps_per_epoch))
        places = batches[:, None] * self._B + np.arange(first, end)
        rows = permuted(places.reshape(-1), last=self._last, seed=(self._seed + epoch) % 2**32)
        rows.flags.writeable = False  # kept, and given to more than one
        return rows.reshape(places.shape)


def permuted(places: np.ndarray, *, last: int, seed: int, rounds: int = 4) -> np.ndarray:
    """Where each of the places int64 [P] comes to lie in a seeded permutation of 0..last.

    grain's `index_shuffle` of each place, many at once: a block cipher permutes the numbers of an even count of bits,
    and is repeated where it leaves 0..last. Source: Black and Rogaway 2002, Ciphers with arbitrary finite domains;
    Beaulieu et al. 2013, The Simon and Speck families of lightweight block ciphers, IACR eprint 2013/404, of which
    grain takes the round and not the key schedule.
    """
    bits = max((last - 1).bit_length(), 16)  # of numbers below `last`; grain counts so
    word = (bits + bits % 2) // 2
    keys = [key & (2**word - 1) for key in _seed_words(seed, rounds)]
    moved = places.astype(np.uint32 if word <= 16 else np.uint64)
    outside = np.arange(len(places))
    # Each round costs as much for few numbers as for many: the last ones, and sets so small beside the numbers that it
    # takes many rounds to come back to them, are left to grain.
    while len(outside) > FEW and last >= 2 ** (2 * word - 4):
        moved[outside] = _encrypted(moved[outside], keys, word)
        outside = outside[moved[outside] > last]
    for i in outside:
        moved[i] = index_shuffle(int(places[i]), last, seed, rounds)
    return moved.astype(np.int64)


def _encrypted(value: np.ndarray, keys: list[int], word: int) -> np.ndarray:
    mask = 2**word - 1

    def turned(x, by: int):
        return (x << by | x >> (word - by)) & mask

    def mixed(x):
        return turned(x, 1) & turned(x, 8) ^ turned(x, 2)

    left, right = value >> word & mask, value & mask
    for first, second in zip(keys[::2], keys[1::2], strict=True):
        left = left ^ mixed(right) ^ first
        right = right ^ mixed(left) ^ second
    return left << word | right


def _seed_words(seed: int, count: int) -> list[int]:
    """`count` words of 32 bits from a seed, as C++'s std::seed_seq fills them; count at most 6."""

    def scrambled(x: int) -> int:
        return (x ^ x >> 27) % 2**32

    words, t = [0x8B8B8B8B] * count, (count - 1) // 2
    p, steps = (count - t) // 2, max(2, count)
    for k in range(steps + count):
        at, after, later, before = (i % count for i in (k, k + p, k + p + t, k - 1))
        if k < steps:
            first = 1664525 * scrambled(words[at] ^ words[after] ^ words[before]) % 2**32
            second = first + (1 if k == 0 else at + (seed if k == 1 else 0))
            words[after] = (words[after] + first) % 2**32
            words[later] = (words[later] + second) % 2**32
        else:
            first = 1566083941 * scrambled((words[at] + words[after] + words[before]) % 2**32) % 2**32
            second = first - at
            words[after] ^= first
            words[later] ^= second % 2**32
        words[at] = second % 2**32
    return words
