"""One process of several: value and gradient of the losses over a ring of all their devices.

    python tests/ring_of_processes.py HOST:PORT,COUNT,ID OUT.npz

Run by test_distributed.py; with COUNT 0 it is one process alone, which computes the dense losses.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxcl import losses
from jaxcl.method import sharding

NAMES = ("supcon ring", "supcon tiled", "simclr ring", "one_way ring", "spread ring")
ROWS = 48


def values(z_NxVxD, labels, axis_name=None):
    ring, tiled = ("dense", "dense") if axis_name is None else ("ring", "tiled")
    how = functools.partial(dict, axis_name=axis_name)
    first, second = z_NxVxD[:, 0], z_NxVxD[:, 1]
    return jnp.stack(
        [
            losses.supcon(z_NxVxD, labels, **how(implementation=ring)),
            losses.supcon(z_NxVxD, labels, **how(implementation=tiled)),
            losses.supcon(z_NxVxD, **how(implementation=ring)),
            losses.one_way_infonce(first / 8, second / 8, **how(implementation=ring)),
            losses.spread(jnp.stack([first, second]), labels, **how(implementation=ring))[0],
        ]
    )


def main() -> None:
    address, count, index = sys.argv[1].split(",")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, ROWS)
    z = (rng.normal(size=(5, 128))[labels, None] + rng.normal(size=(ROWS, 2, 128))).astype(np.float32)
    if count == "0":
        out, grads = jax.jit(lambda *a: (values(*a), jax.jacrev(values)(*a)))(z, labels)
        np.savez(sys.argv[2], values=out, grads=grads)
        return
    jax.distributed.initialize(address, int(count), int(index))
    mesh = sharding.make_mesh()
    local = functools.partial(values, axis_name=sharding.AXIS)
    sharded = jax.shard_map(local, mesh=mesh, in_specs=P(sharding.AXIS), out_specs=P())
    arrays = sharding.device_put((z, labels), sharding.batch_sharding(mesh))
    with losses.limits(tile=7):
        everywhere = sharding.replicated(mesh)
        out, grads = jax.jit(lambda *a: (sharded(*a), jax.jacrev(sharded)(*a)), out_shardings=everywhere)(*arrays)
    if jax.process_index() == 0:
        np.savez(sys.argv[2], values=out, grads=grads)


if __name__ == "__main__":
    main()
