"""Counter-based random numbers: every draw is a function of (seed, stream, index), not of earlier draws.

NumPy may change the output of its generators between versions, and with a sequential generator an example's pixels
would depend on the order in which examples are made. A hash has neither problem.
"""

import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(x: np.ndarray) -> np.ndarray:
    """The splitmix64 step (Steele, Lea and Flood 2014) on a uint64 array; arithmetic modulo 2^64."""
    z = np.atleast_1d(np.asarray(x, np.uint64)) + _GAMMA  # NumPy warns of overflow for scalars only
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def words(seed: int, stream: int, index: np.ndarray, count: int) -> np.ndarray:
    """uint64 [N, count]: random words for the examples `index` [N] in one `stream` of `seed`."""
    key = splitmix64(splitmix64(np.array([seed & 0xFFFFFFFFFFFFFFFF], np.uint64)) ^ np.uint64(stream))
    row = splitmix64(key ^ np.asarray(index).astype(np.uint64))
    return splitmix64(row[:, None] + np.arange(count, dtype=np.uint64) * _GAMMA)


def uniforms(seed: int, stream: int, index: np.ndarray, count: int) -> np.ndarray:
    """float32 [N, count] in [0, 1), from the top 24 bits of each word so that 1.0 never occurs."""
    return (words(seed, stream, index, count) >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def order(seed: int, stream: int, count: int) -> np.ndarray:
    """A random permutation of `count` rows, int64 [count]."""
    return np.argsort(words(seed, stream, np.arange(count), 1)[:, 0], kind="stable")
