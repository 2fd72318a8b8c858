"""Small sources whose images encode their row, in memory and on disk, for tests of the loader."""

import threading
import time

import jax
import numpy as np

from jaxcl.data import ArraySource, Source


def numbered(n, *, labelled=True):
    """Image i holds i in every pixel (modulo 256), and label i % 7."""
    images = np.broadcast_to(np.arange(n)[:, None, None, None] % 256, (n, 2, 2, 3)).astype(np.uint8)
    labels = np.arange(n) % 7 if labelled else np.full(n, -1)
    names = tuple("abcdefg")
    half = (0.5, 0.5, 0.5)
    return ArraySource(images=images, labels=labels.astype(np.int32), class_names=names, mean=half, std=half)


class OnDisk(Source):
    """The same examples as `numbered`, read one at a time."""

    def __init__(self, n, fail_at=None, delay=0.0):
        self._memory, self._fail_at, self._delay = numbered(n), fail_at, delay
        self.threads = set()

    def __len__(self):
        return len(self._memory)

    def batch(self, indices):
        self.threads.add(threading.get_ident())
        time.sleep(self._delay)
        if self._fail_at in indices:
            raise OSError("disk on fire")
        return self._memory.batch(indices)


def mesh_sharding(devices):
    mesh = jax.make_mesh(
        (devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices]
    )
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
