"""Metrics of the embeddings during training, to see a collapse early: one small program beside the update.

B batch, V views, D features.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxcl.evaluate.collapse import collapse_metrics
from jaxcl.method.forward import represent
from jaxcl.method.init_state import replicate_params
from jaxcl.method.inputs import make_views
from jaxcl.method.recipe import Phase, Recipe
from jaxcl.method.sharding import replicated
from jaxcl.method.state import TrainState

Array = jax.Array
VIEWS = 2  # alignment is measured between two views of an image


def compile_monitor(
    recipe: Recipe, state_sharding, batch_sharding
) -> Callable[[TrainState, dict[str, Array]], dict[str, Array]]:
    """Compile `evaluate.collapse.collapse_metrics` of the first two views of a batch, in inference mode.

    Returns:
      (state, batch) -> {"collapse/within_class_cosine": ..., ...}, without the metrics for which labels or a second
      view are missing.
    """
    names = recipe.whole_view_names(Phase("encoder"))[:VIEWS]

    def monitor(state: TrainState, batch: dict[str, Array]) -> dict[str, Array]:
        state = replicate_params(recipe, batch_sharding.mesh, state)
        views = make_views(recipe, state, batch, names)
        h_BxVxD = jnp.stack(
            [represent(recipe, state.params, state.batch_stats, views[n].image)[0] for n in names], axis=1
        )
        return {f"collapse/{k}": v for k, v in collapse_metrics(h_BxVxD, batch["label"]).items()}

    everywhere = replicated(batch_sharding.mesh)
    return jax.jit(monitor, in_shardings=(state_sharding, batch_sharding), out_shardings=everywhere)
