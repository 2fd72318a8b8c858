"""The state at step 0, and how each of its arrays is sharded."""

import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxcl.method.forward import of_encoder, set_in
from jaxcl.method.memory import InitContext
from jaxcl.method.recipe import Recipe
from jaxcl.method.sharding import all_gather_params, state_sharding
from jaxcl.method.state import TrainState
from jaxcl.method.terms.base import split_name
from jaxcl.models.trees import ENCODER, ENCODERS, HEADS

Array = jax.Array


def init_state(
    recipe: Recipe, seed: Array | int | None = None, weights: Mapping[str, tuple[dict, dict]] | None = None
) -> TrainState:
    """A fresh TrainState, a function of the seed and the given weights alone.

    Under jit, pass the seed as an argument: XLA folds constants, and would draw every weight while compiling.

    Args:
      recipe: the method.
      seed: None means the recipe's.
      weights: {encoder: (params, batch statistics)} that encoders start from; "" is the main encoder.
    """
    # Threefry, whatever the process's default: the rbg generators draw one image's numbers together with others'.
    key = jax.random.key(recipe.seed if seed is None else seed, impl="threefry2x32")
    weights = weights or {}

    def key_of(name: str) -> Array:
        return jax.random.fold_in(key, zlib.crc32(name.encode()))

    def with_weights(name: str, params: dict, stats: dict) -> tuple[dict, dict]:
        given_params, given_stats = weights.get(name, (params[ENCODER], {}))
        return {**params, ENCODER: given_params}, {**stats, **given_stats}

    params, stats = with_weights("", *recipe.model.init(jax.random.fold_in(key, 1), recipe.image_shape))
    for name, model in recipe.encoders.items():
        new_params, new_stats = with_weights(name, *model.init(key_of(f"encoders/{name}"), recipe.image_shape))
        params, stats = set_in(params, ENCODERS, name, new_params), set_in(stats, ENCODERS, name, new_stats)
    for name, head in recipe.heads.items():
        new_params, new_stats = head.init(key_of(f"heads/{name}"), recipe.head_input(name))
        params, stats = set_in(params, HEADS, name, new_params), set_in(stats, HEADS, name, new_stats)
    context = InitContext(
        features=recipe.features_of(recipe.representation),
        num_classes=recipe.num_classes,
        embedding_features=lambda e: recipe.encoder(split_name(e)[0]).embedding_features,
        encoder=lambda n: (of_encoder(params, n), of_encoder(stats, n)),
        tx=None,
    )
    memory = {
        name: part.init(key_of(f"memory/{name}"), context._replace(tx=recipe.memory_tx.get(name)))
        for name, part in recipe.memory.items()
    }
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=key,
        params=params,
        batch_stats=stats,
        opt_state=recipe.tx.init(recipe.finetune.split(params)[0]),
        memory=memory,
    )


def state_shardings(recipe: Recipe, mesh: Mesh) -> TrainState:
    """The sharding of each array of the state, by the recipe's `sharding`."""
    shapes = jax.eval_shape(lambda seed: init_state(recipe, seed), jax.ShapeDtypeStruct((), jnp.uint32))
    return state_sharding(mesh, shapes, recipe.sharding, recipe.targets)


def replicate_params(recipe: Recipe, mesh: Mesh | None, state: TrainState) -> TrainState:
    """The state with all parameters replicated, for stages and other code that takes no gradient through them."""
    targets = {n: state.memory[n] for n in recipe.targets}
    params, targets = all_gather_params(mesh, recipe.sharding, (state.params, targets))
    return state.replace(params=params, memory={**state.memory, **targets})
