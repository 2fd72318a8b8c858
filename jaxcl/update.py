"""The one update: views -> stages -> passes -> terms -> gradients -> memory -> new TrainState, inside one jit.

A recipe fills the five slots; nothing else differs between methods. B batch, S side of a view, D features, E embedding.

Batch norm is global under `jit` (a sharded batch gives the statistics of one device). Views are stacked image by image
rather than one batch after the other, so that a pass over several views of a sharded batch moves no image. Terms run
under `shard_map` on a mesh of several devices: what embeddings and sums they exchange is then theirs to say.
"""

import functools
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxcl import grad_cache
from jaxcl.recipe import Pass, Phase, Recipe
from jaxcl.sharding import AXIS
from jaxcl.terms import Embedding
from jaxcl.train_state import TrainState
from jaxcl.views import Context, View, view_keys

Array = jax.Array
Batch = dict[str, Array]
Metrics = dict[str, Array]


def make_update(
    recipe: Recipe, phase: Phase, mesh: Mesh | None = None
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The pure update of one phase of the schedule; jit it with donation (see `compile_update`).

    mesh: the one over which the batch is sharded; None for a batch on one device.
    """
    return _probe_update(recipe) if phase.learns == "probe" else _encoder_update(recipe, phase, mesh)


def compile_update(recipe: Recipe, phase: Phase, state_sharding, batch_sharding):
    """`make_update` under jit: the state is donated, so on an accelerator it is updated in place."""
    return jax.jit(
        make_update(recipe, phase, batch_sharding.mesh),
        in_shardings=(state_sharding, batch_sharding),
        out_shardings=(state_sharding, state_sharding),
        donate_argnums=0,
    )


def init_state(recipe: Recipe, seed: Array | int | None = None) -> TrainState:
    """A fresh TrainState; a function of the seed alone (None: the recipe's).

    Under jit, pass the seed as an argument: from a constant the compiler draws every weight itself, slowly.
    """
    # Threefry, whatever the process's default: other generators draw an image's numbers together with its neighbours'.
    key = jax.random.key(recipe.seed if seed is None else seed, impl="threefry2x32")
    params, batch_stats = recipe.model.init(jax.random.fold_in(key, 1), recipe.image_shape)
    memory = {
        name: part.init(
            jax.random.fold_in(key, 2 + i), recipe.model.features, recipe.num_classes, recipe.memory_tx[name]
        )
        for i, (name, part) in enumerate(sorted(recipe.memory.items()))
    }
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=key,
        params=params,
        batch_stats=batch_stats,
        opt_state=recipe.tx.init(params),
        memory=memory,
    )


def to_pixels(image: Array) -> Array:
    """uint8 [B,H,W,C] -> float32 in [0, 1]."""
    return image.astype(jnp.float32) / 255


def make_views(recipe: Recipe, state: TrainState, batch: Batch, names: tuple[str, ...]) -> dict[str, View]:
    """The named views of a batch; every image draws from its own key."""
    pixels = to_pixels(batch["image"])
    return {n: _draw(recipe, state, batch["index"], n, n, pixels) for n in names}


def _draw(recipe: Recipe, state: TrainState, index: Array, pipeline: str, name: str, pixels: Array) -> View:
    image, params = recipe.views[pipeline](view_keys(state.key, state.step, index, name), pixels)
    return View(image, params)


def run_stages(
    recipe: Recipe, phase: Phase, state: TrainState, batch: Batch, views: dict[str, View], mesh: Mesh | None = None
) -> tuple[dict[str, View], dict, Metrics]:
    """-> (views with what the active stages made, batch statistics, figures). Nothing here is differentiated."""
    stats, metrics = state.batch_stats, {}

    def loss(term: str, embeddings: dict[str, Embedding]) -> Array:
        return _terms(recipe, mesh, (term,))(embeddings, batch["label"])[term]

    for i in phase.stages:
        stage = recipe.stages[i]
        part = recipe.memory.get(getattr(stage, "classifier", None))
        context = Context(
            model=recipe.model,
            params=state.params,
            batch_stats=stats,
            memory=state.memory,
            pixels=to_pixels(batch["image"]),
            mean=recipe.mean,
            std=recipe.std,
            label=batch["label"],
            classifier=(None if part is None else lambda m, h, p=part, n=stage.classifier: p.logits(m[n], h)),
            augment=lambda pipeline, name, x: _draw(recipe, state, batch["index"], pipeline, name, x),
            loss=loss,
            keys=lambda name: view_keys(state.key, state.step, batch["index"], name),
        )
        out = jax.lax.stop_gradient(stage(context, views))
        views = {**views, **out.views}
        stats = stats if out.batch_stats is None else out.batch_stats
        metrics.update(out.metrics)
    return views, stats, metrics


def run_pass(
    recipe: Recipe, params, stats, views: dict[str, View], spec: Pass, mesh: Mesh | None = None
) -> tuple[dict[str, Embedding], dict]:
    """Encode some views together, as one batch of the batch norm. -> (embeddings by name, new statistics)."""
    names = [n for n in spec.views if n in views]
    if not names:  # a stage that makes them has not begun
        return {}, stats
    images = [views[n].image for n in names]
    wheres = [views[n].where for n in names]
    sizes = [len(x) for x in images]
    chunks = recipe.grad_cache.chunks(recipe.batch_size)
    # Equal views: row r of each side by side, so that rows stay on the device that holds them. Unequal views: one
    # after the other, or each micro-batch would get rows of one view only; then in as many parts as all fall into.
    groups = math.gcd(*sizes) if chunks or len(set(sizes)) == 1 else 1
    if all(w is None for w in wheres):
        where = None
    else:
        wheres = [jnp.ones(len(x), bool) if w is None else w for w, x in zip(wheres, images, strict=True)]
        where = _merge(wheres, groups)
    rows = _merge(images, groups)
    if chunks:
        h, stats = grad_cache.encode(
            recipe.model,
            params,
            stats,
            rows,
            where=where,
            norm_set=spec.norm_set,
            chunks=chunks,
            groups=groups,
            mesh=mesh,
        )
    else:
        h, stats = recipe.model.encode(params, stats, rows, train=True, where=where, norm_set=spec.norm_set)
    z = recipe.model.project(params, h)
    return {
        n: Embedding(hh, zz, views[n].where)
        for n, hh, zz in zip(names, _split(h, sizes, groups), _split(z, sizes, groups), strict=True)
    }, stats


def _merge(arrays: list[Array], groups: int) -> Array:
    """Rows of all views, in groups that each hold an equal part of every view."""
    parts = [a.reshape(groups, len(a) // groups, *a.shape[1:]) for a in arrays]
    return jnp.concatenate(parts, axis=1).reshape(-1, *arrays[0].shape[1:])


def _split(array: Array, sizes: list[int], groups: int) -> list[Array]:
    """The rows of each view again, in their order."""
    array = array.reshape(groups, len(array) // groups, *array.shape[1:])
    if array.shape[1] == len(sizes):
        return [array[:, i] for i in range(len(sizes))]
    ends = [sum(sizes[: i + 1]) // groups for i in range(len(sizes) - 1)]
    return [a.reshape(-1, *array.shape[2:]) for a in jnp.split(array, ends, axis=1)]


def _terms(recipe: Recipe, mesh: Mesh | None, names: Iterable[str]) -> Callable[[dict[str, Embedding], Array], Metrics]:
    """(embeddings, labels [B]) -> the values of the named terms on the global batch."""

    def values(embeddings: dict[str, Embedding], label: Array, axis_name: str | None = None) -> Metrics:
        return {n: recipe.terms[n](embeddings, label, axis_name=axis_name) for n in names}

    if mesh is None or mesh.size == 1:
        return values
    return jax.shard_map(functools.partial(values, axis_name=AXIS), mesh=mesh, in_specs=P(AXIS), out_specs=P())


def _encoder_update(recipe: Recipe, phase: Phase, mesh: Mesh | None = None):
    names, active = recipe.view_names(phase), recipe.term_names(phase)
    term_values = _terms(recipe, mesh, active)

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        views = make_views(recipe, state, batch, names)
        views, stats_before, metrics = run_stages(recipe, phase, state, batch, views, mesh)

        def objective(params):
            embeddings, stats = {}, stats_before
            for spec in recipe.passes:
                encoded, stats = run_pass(recipe, params, stats, views, spec, mesh)
                embeddings.update(encoded)
            terms = term_values(embeddings, batch["label"])
            loss = sum(recipe.terms[n].weight * value for n, value in terms.items())
            return loss, (terms, embeddings, stats)

        (loss, (terms, embeddings, stats)), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
        updates, opt_state = recipe.tx.update(grads, state.opt_state, state.params)

        memory = dict(state.memory)
        for name, part in recipe.memory.items():
            if part.schedule == "online":
                e = [embeddings[v] for v in part.views]
                memory[name], figures = part.learn(memory[name], e, batch["label"], recipe.memory_tx[name])
                metrics.update(figures)
        metrics |= {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        if len(terms) > 1:
            metrics |= {f"loss/{n}": value for n, value in terms.items()}
        return state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=stats,
            opt_state=opt_state,
            memory=memory,
        ), metrics

    return update


def _probe_update(recipe: Recipe):
    """A step of the schedules that train the probe by itself: the encoder is frozen and normalises by running means."""
    learners = {n: part for n, part in recipe.memory.items() if part.schedule != "online"}

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        memory, metrics = dict(state.memory), {}
        for name, part in learners.items():
            view = make_views(recipe, state, batch, (part.view,))[part.view]
            h, _ = recipe.model.encode(state.params, state.batch_stats, view.image, train=False)
            e = [Embedding(h, h, view.where)]
            memory[name], figures = part.learn(memory[name], e, batch["label"], recipe.memory_tx[name])
            metrics.update(figures)
        return state.replace(step=state.step + 1, memory=memory), metrics

    return update
