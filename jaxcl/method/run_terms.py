"""Slot 4: the values of terms on the global batch, on one device or a mesh.

B batch.
"""

import functools
from collections.abc import Callable, Iterable

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxcl.losses.common import AxisName
from jaxcl.method.recipe import Recipe
from jaxcl.method.scopes import scope
from jaxcl.method.sharding import AXIS
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
                out[n] = term(embeddings, label, memory=memory, axis_name=axis_name)
        return out

    def global_values(embeddings: dict[str, Embedding], label: Array, memory: dict) -> dict[str, Array]:
        memory = {m: recipe.memory[m].exposed(memory[m]) for m in memories}
        if mesh is None or mesh.size == 1:
            return values(embeddings, label, memory)
        local = functools.partial(values, axis_name=AXIS)
        specs = (P(AXIS), P(AXIS), P())
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())(embeddings, label, memory)

    return global_values
