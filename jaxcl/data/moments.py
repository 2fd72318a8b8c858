"""Mean and standard deviation of images, from exact sums, and greyscale as RGB.

N images, H height, W width, C channels.
"""

import math
from collections.abc import Iterator

import numpy as np

Moments = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of each channel


def moments(images: np.ndarray) -> Moments:
    """Mean and standard deviation per channel, in [0, 1] units, of uint8 [N,H,W,C]; exact."""
    return moments_of_sums(images.size // images.shape[-1], sum(channel_sums(block) for block in chunks(images)))


def channel_sums(images: np.ndarray) -> np.ndarray:
    """Sums of the values and of their squares in each channel, uint8 [...,C] -> int64 [2,C]; exact."""
    C = images.shape[-1]
    values = images.reshape(-1)
    sums = np.zeros((2, C), np.int64)
    # NumPy sums long rows fast. The blocks are small enough that squares fit into 32 bits and into the cache.
    whole = len(values) // (64 * C) * (64 * C)
    for row in (*chunks(values[:whole].reshape(-1, 64 * C), 2048), values[whole:].reshape(-1, C)):
        for out, power in zip(sums, (row, np.multiply(row, row, dtype=np.uint16)), strict=True):
            out += power.sum(0, dtype=np.uint32).reshape(-1, C).sum(0, dtype=np.int64)
    return sums


def moments_of_sums(count: int, sums: np.ndarray) -> Moments:
    """`moments` of `count` pixels from their `channel_sums`, int64 [2,C]."""
    mean, std = [], []
    for s, q in zip(*sums.tolist(), strict=True):  # integers: the difference is exact
        mean.append(s / count / 255)
        std.append(math.sqrt(count * q - s * s) / count / 255)
    # A constant channel would divide by zero when it is normalised. One grey level is the smallest sensible scale.
    return tuple(mean), tuple(max(s, 1 / 255) for s in std)


def chunks(array: np.ndarray, size: int = 1024) -> Iterator[np.ndarray]:
    """Consecutive blocks of rows, so that temporary arrays stay small."""
    return (array[i : i + size] for i in range(0, len(array), size))


def as_rgb(images: np.ndarray) -> np.ndarray:
    """uint8 [N,H,W] or [N,H,W,1 or 3] -> [N,H,W,3]. Greyscale is repeated, so that any encoder takes it."""
    if images.ndim == 3:
        images = images[..., None]
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images
