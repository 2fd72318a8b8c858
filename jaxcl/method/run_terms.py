"""Slot 4: the values of terms on the global batch, on one device or a mesh.

B batch.
"""

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxcl.errors import UserError
from jaxcl.losses.common import AxisName
from jaxcl.method.recipe import Recipe
from jaxcl.method.scopes import scope
from jaxcl.method.sharding import AXIS, varying_axes
from jaxcl.method.terms.base import Embedding

Array = jax.Array


def make_terms(recipe: Recipe, mesh: Mesh | None, names: Iterable[str]) -> Callable[..., dict[str, Array]]:
    """(embeddings, labels [B], memory) -> {term: its value on the global batch}, for the named terms.

    On a mesh of several devices they run under `jax.shard_map`: each device passes its rows of the batch and all of the
    memory, and each term exchanges the embeddings and sums it needs.
    """
    terms = {n: recipe.terms[n] for n in names}
    memories = {m for term in terms.values() for m in term.memories}

    def values(
        embeddings: dict[str, Embedding], label: Array, memory: dict, axis_name: AxisName = None
    ) -> dict[str, Array]:
        out = {}
        for n, term in terms.items():
            with scope(f"term {n}"):
                out[n] = _checked(n, term(embeddings, label, memory=memory, axis_name=axis_name))
        return out

    def global_values(embeddings: dict[str, Embedding], label: Array, memory: dict) -> dict[str, Array]:
        memory = {m: recipe.memory[m].exposed(memory[m]) for m in memories}
        if mesh is None or mesh.size == 1:
            return values(embeddings, label, memory)
        local = functools.partial(values, axis_name=AXIS)
        specs = (P(AXIS), P(AXIS), P())
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())(embeddings, label, memory)

    return global_values


def _checked(name: str, value: Array) -> Array:
    """Errors: UserError unless a term's value is a scalar that is the same on all devices.

    shard_map would refuse the second as well, but its report fails under differentiation in some versions of JAX.
    """
    value = jnp.asarray(value)
    if value.shape:
        raise UserError(f"terms.{name} returned an array of shape {value.shape}; expected a scalar")
    if varies := varying_axes(value):
        raise UserError(
            f"terms.{name} returned a value that differs between devices (over {', '.join(sorted(varies))}); sum over "
            "axis_name, for example with losses.common.total"
        )
    return value
