"""What the encoders see: the views of a batch (slot 1), and the views that stages make from them (slot 2).

B batch, H W image, S side of a view, V views, E embedding.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxcl.augment import to_float
from jaxcl.method.forward import of_encoder, with_targets
from jaxcl.method.init_state import replicate_params
from jaxcl.method.recipe import Phase, Recipe
from jaxcl.method.run_terms import make_terms
from jaxcl.method.scopes import scope
from jaxcl.method.stages.base import StageContext
from jaxcl.method.state import TrainState
from jaxcl.method.terms.base import Embedding
from jaxcl.method.views import View, view_keys

Array = jax.Array
Batch = dict[str, Array]


def make_views(recipe: Recipe, state: TrainState, batch: Batch, names: tuple[str, ...]) -> dict[str, View]:
    """The named views of a batch; every image draws from its own key.

    Views of equal pipelines are drawn as one batch, with the V views of an image side by side, so that rows stay on
    their devices. The program for two views is then half as long, and large enough to use all cores.
    """
    pixels, groups, views = to_float(batch["image"]), {}, {}
    for n in names:
        groups.setdefault(_group_key(recipe.views[n]), []).append(n)
    for group in groups.values():
        pipeline, V = recipe.views[group[0]], len(group)
        keys = jnp.stack([view_keys(state.key, state.step, batch["index"], n) for n in group], axis=1).reshape(-1)
        drawn = View(*pipeline(keys, pixels))
        # Views are cut along an axis of their own because the forward pass joins them along the same axis again: XLA
        # sees that nothing moves, whereas it would copy x[i::V] element by element.
        side_by_side = jax.tree.map(lambda x, V=V: x.reshape(-1, V, *x.shape[1:]), drawn)
        views |= {n: jax.tree.map(lambda x, i=i: x[:, i], side_by_side) for i, n in enumerate(group)}
    return {n: views[n] for n in names}


def _group_key(pipeline: Callable) -> object:
    """Equal pipelines share a key; an unhashable pipeline (one that holds arrays) gets a unique key."""
    try:
        hash(pipeline)
        return pipeline
    except TypeError:
        return object()


def run_stages(
    recipe: Recipe, phase: Phase, state: TrainState, batch: Batch, views: dict[str, View], mesh: Mesh | None = None
) -> tuple[dict[str, View], dict, dict[str, Array]]:
    """Run the active stages in order, under stop-gradient. -> (all views, batch statistics, metrics)."""
    stats, metrics = state.batch_stats, {}
    for i in phase.stages:
        stage = recipe.stages[i]
        context = _stage_context(recipe, state, stats, batch, stage.classifier, mesh)
        with scope(recipe.stage_name(i)):
            out = jax.lax.stop_gradient(stage(context, views))
        views = {**views, **out.views}
        stats = stats if out.batch_stats is None else out.batch_stats
        metrics.update(out.metrics)
    return views, stats, metrics


def _stage_context(
    recipe: Recipe, state: TrainState, stats: dict, batch: Batch, classifier: str, mesh: Mesh | None
) -> StageContext:
    def classify(memory: dict, h: Array) -> Array:
        return recipe.memory[classifier].logits(memory[classifier], h)

    def augment(pipeline: str, name: str, pixels: Array) -> View:
        return View(*recipe.views[pipeline](view_keys(state.key, state.step, batch["index"], name), pixels))

    def loss(term: str, embeddings: dict[str, Embedding]) -> Array:
        return make_terms(recipe, mesh, (term,))(embeddings, batch["label"], state.memory)[term]

    def embed(encoder: str, view: View, norm_set: str) -> Embedding:
        # By itself, as one batch; a moving average as it was before this update.
        params = of_encoder(with_targets(recipe, state.params, state.memory, "params"), encoder)
        encoder_stats = of_encoder(with_targets(recipe, stats, state.memory, "batch_stats"), encoder)
        model, mode = recipe.encoder(encoder), dict(train=True, where=view.where, norm_set=norm_set)
        h, _ = model.encode(params, encoder_stats, view.image, **mode)
        z, _ = model.embed(params, encoder_stats, h, aug_params=view.params, **mode)
        return Embedding(h, z, view.where)

    return StageContext(
        model=recipe.model,
        params=state.params,
        batch_stats=stats,
        memory=state.memory,
        pixels=to_float(batch["image"]),
        mean=recipe.mean,
        std=recipe.std,
        label=batch["label"],
        classifier=classify if classifier in recipe.memory else None,
        augment=augment,
        loss=loss,
        reads=lambda term: recipe.terms[term].reads,
        embed=embed,
        keys=lambda name: view_keys(state.key, state.step, batch["index"], name),
        textures=to_float(batch["texture"]) if "texture" in batch else None,
    )


def encoder_inputs(
    recipe: Recipe, phase: Phase, state: TrainState, batch: Batch, mesh: Mesh | None
) -> tuple[dict[str, View], dict, dict[str, Array]]:
    """Slots 1 and 2 of one update. -> (views, batch statistics, metrics)."""
    with scope("augment"):
        views = make_views(recipe, state, batch, recipe.view_names(phase))
    return run_stages(recipe, phase, replicate_params(recipe, mesh, state), batch, views, mesh)
