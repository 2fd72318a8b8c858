"""Images, keys and a statistic that the tests of augmentation share."""

import math

import jax
import jax.numpy as jnp
import numpy as np

BYTE = 1 / 255


def photo(count=4, height=24, width=20, seed=0) -> np.ndarray:
    """uint8 images with smooth areas, noise, pure colours, greys, black and white."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    base = np.stack([np.sin(y / 5 + i) * np.cos(x / 4 - i) for i in range(3)], -1) * 90 + 128
    images = base + rng.normal(0, 40, (count, height, width, 3))
    images[:, :3] = rng.integers(0, 2, (count, 3, width, 3)) * 255
    images[:, 3] = rng.integers(0, 256, (count, width, 1))
    return np.clip(images, 0, 255).astype(np.uint8)


def unit(images) -> jnp.ndarray:
    return jnp.asarray(images, jnp.float32) / 255


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def ks(sample, cdf) -> float:
    """Kolmogorov-Smirnov statistic in units of its 1% point for a large sample; below 1, the sample fits."""
    sample = np.sort(np.asarray(sample, np.float64))
    n = len(sample)
    theory = cdf(sample)
    gap = max(np.max(np.arange(1, n + 1) / n - theory), np.max(theory - np.arange(n) / n))
    return gap * math.sqrt(n) / 1.63
