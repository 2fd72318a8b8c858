"""The mesh, and the shardings of batches and states on it.

The mesh has two axes: hosts, and the devices of a host. Rows of a batch are sharded over both. "data": every device
holds the whole state. "zero1": optimiser state and moving averages are sharded over the devices of a host, parameters
are replicated. "fsdp": parameters are sharded too; the update gathers them where it uses them, and each device keeps
its share of the gradient. All three learn the same.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxcl.errors import UserError
from jaxcl.method.state import TrainState

Tree = Any
AXIS = ("host", "device")  # rows are sharded over both, so losses sum over both
WITHIN = "device"  # the axis that state is sharded over
KINDS = ("data", "zero1", "fsdp")
SMALLEST = 2**14  # elements; smaller arrays stay whole, since a gather costs more than it saves


def make_mesh(devices: int | None = None, hosts: int = 0) -> Mesh:
    """Hosts x devices, over the first `devices` devices (None: all of them, over all processes).

    hosts: rows of the mesh; 0: one a process. State is sharded within a row, so 1 shards it over all devices.
    Errors: UserError if hosts do not divide the devices.
    """
    chosen = jax.devices()[:devices]
    processes = len({d.process_index for d in chosen})
    hosts = hosts or processes
    if hosts < 1 or len(chosen) % hosts:
        raise UserError(f"hosts is {hosts}, which does not divide {len(chosen)} devices; use 0 for one a process")
    shape = (hosts, len(chosen) // hosts)
    # Auto explicitly: make_mesh defaults to Explicit, which rejects z @ z.T on sharded rows.
    kinds = (AxisType.Auto,) * 2
    if processes == 1:
        return jax.make_mesh(shape, AXIS, axis_types=kinds, devices=chosen)
    # A process's devices are neighbours, so the rows that it loads are neighbours in the batch.
    chosen = sorted(chosen, key=lambda d: (d.process_index, d.id))
    return Mesh(np.array(chosen).reshape(shape), AXIS, axis_types=kinds)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding under which every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: the leading axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def split_sharding(mesh: Mesh, tree: Tree) -> Tree:
    """Shard each array along its longest axis that divides over a host's devices; small arrays stay whole."""
    count = mesh.shape[WITHIN]

    def one(x: Any) -> NamedSharding:
        shape = () if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x.shape
        axes = [i for i, n in enumerate(shape) if n % count == 0]
        if count == 1 or np.prod(shape) < SMALLEST or not axes:
            return replicated(mesh)
        axis = max(axes, key=lambda i: (shape[i], i))
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, WITHIN))

    return jax.tree.map(one, tree)


def state_sharding(mesh: Mesh, state: TrainState, kind: str = "data", averages: Iterable[str] = ()) -> TrainState:
    """The sharding of each array of a state (or of its shapes). averages: memory parts that hold parameters."""
    whole = jax.tree.map(lambda _: replicated(mesh), state)
    if kind == "data":
        return whole
    memory = {n: {**whole.memory[n], "params": split_sharding(mesh, state.memory[n]["params"])} for n in averages}
    return whole.replace(
        params=split_sharding(mesh, state.params) if kind == "fsdp" else whole.params,
        opt_state=split_sharding(mesh, state.opt_state),
        memory={**whole.memory, **memory},
    )


def all_gather_params(mesh: Mesh | None, kind: str, tree: Tree) -> Tree:
    """All-gather sharded parameters for use; their gradient is sharded again, as the optimiser expects it.

    The constraint is explicit because XLA may otherwise partition the computation like the parameters, and gather
    activations instead.
    """
    if mesh is None or mesh.size == 1 or kind == "data":
        return tree
    return jax.tree.map(functools.partial(_all_gather, mesh), tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _all_gather(mesh: Mesh, x: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, replicated(mesh))


_all_gather.defvjp(
    lambda mesh, x: (_all_gather(mesh, x), None),
    lambda mesh, _, g: (jax.lax.with_sharding_constraint(g, split_sharding(mesh, g)),),
)


def device_put(tree: Tree, sharding: NamedSharding) -> Tree:
    """`jax.device_put` of host arrays that also works on several processes (each holds the same full values)."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def place(x: Any) -> jax.Array:
        if jax.dtypes.issubdtype(getattr(x, "dtype", np.float32), jax.dtypes.prng_key):
            data = place(jax.random.key_data(x))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, tree)


def varying_axes(x: jax.Array) -> frozenset[str]:
    """The mesh axes over which a value inside `jax.shard_map` may differ between devices; empty outside."""
    kind = jax.typeof(x)
    # JAX 0.10 and later keep it in `manual_axis_type`, earlier and later previews in `vma`.
    found = kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else getattr(kind, "vma", ())
    return frozenset(found)
