"""The one update: views -> stages -> passes -> terms -> gradients -> memory -> new TrainState, inside one jit.

A recipe fills the five slots; nothing else differs between methods. B batch, S side of a view, D features, E embedding.

Batch norm is global under `jit` (a sharded batch gives the statistics of one device). Terms run under `shard_map` on a
mesh of several devices: what embeddings and sums they exchange is then theirs to say.
"""

import functools
import zlib
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxcl.augment import to_float as to_pixels
from jaxcl.losses.common import AxisName
from jaxcl.method import accumulate
from jaxcl.method.forward import of_encoder, represent, run_heads, run_pass, set_in, with_targets
from jaxcl.method.memory import InitContext, StepOutput
from jaxcl.method.recipe import Phase, Recipe
from jaxcl.method.scopes import scope
from jaxcl.method.sharding import AXIS, all_gather_params, replicated, state_sharding
from jaxcl.method.stages.base import StageContext
from jaxcl.method.state import TrainState
from jaxcl.method.terms import Embedding
from jaxcl.method.terms.base import embedding_name, split_name
from jaxcl.method.terms.similarity import similarity_metrics
from jaxcl.method.views import View, view_keys

Array = jax.Array
Batch = dict[str, Array]
Metrics = dict[str, Array]


def make_update(
    recipe: Recipe, phase: Phase, mesh: Mesh | None = None, *, runs_here: bool = True
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The pure update of one phase of the schedule; jit it with donation (see `compile_update`).

    mesh: the one over which the batch is sharded; None for a batch on one device.
    runs_here: False where it is only looked at: nothing is then in a form for this process's kind of device.
    """
    if phase.learns == "probe":
        return _probe_update(recipe, mesh)
    return _encoder_update(recipe, phase, mesh, runs_here)


def compile_update(recipe: Recipe, phase: Phase, state_sharding, batch_sharding):
    """`make_update` under jit: the state is donated, so on an accelerator it is updated in place.

    state_sharding: one for all of the state, or a TrainState of them (`state_shardings`).
    """
    return jax.jit(
        make_update(recipe, phase, batch_sharding.mesh),
        in_shardings=(state_sharding, batch_sharding),
        out_shardings=(state_sharding, replicated(batch_sharding.mesh)),
        donate_argnums=0,
    )


def state_shardings(recipe: Recipe, mesh: Mesh) -> TrainState:
    """The sharding of each array of a state, as the recipe's `sharding` wants it."""
    shapes = jax.eval_shape(lambda seed: init_state(recipe, seed), jax.ShapeDtypeStruct((), jnp.uint32))
    return state_sharding(mesh, shapes, recipe.sharding, recipe.targets)


def replicate_params(recipe: Recipe, mesh: Mesh | None, state: TrainState) -> TrainState:
    """The state with all parameters whole, for stages and whatever else looks at it without a gradient."""
    params, memory = all_gather_params(
        mesh, recipe.sharding, (state.params, {n: state.memory[n] for n in recipe.targets})
    )
    return state.replace(params=params, memory={**state.memory, **memory})


def init_state(
    recipe: Recipe, seed: Array | int | None = None, weights: Mapping[str, tuple[dict, dict]] | None = None
) -> TrainState:
    """A fresh TrainState; a function of the seed (None: the recipe's) and of weights alone.

    weights: (parameters, batch statistics) that encoders begin with, by name, "" the main one (`jaxcl.models.weights`).
    Under jit, pass the seed as an argument: from a constant the compiler draws every weight itself, slowly.
    """
    # Threefry, whatever the process's default: other generators draw an image's numbers together with its neighbours'.
    key = jax.random.key(recipe.seed if seed is None else seed, impl="threefry2x32")
    weights = weights or {}

    def begun(name: str, params: dict, stats: dict) -> tuple[dict, dict]:
        own_params, own_stats = weights.get(name, (params["encoder"], {}))
        return {**params, "encoder": own_params}, {**stats, **own_stats}

    params, batch_stats = begun("", *recipe.model.init(jax.random.fold_in(key, 1), recipe.image_shape))

    def named(name: str) -> Array:
        return jax.random.fold_in(key, zlib.crc32(name.encode()))

    for name, model in recipe.encoders.items():
        of = begun(name, *model.init(named(f"encoders/{name}"), recipe.image_shape))
        params, batch_stats = (
            set_in(tree, "encoders", name, x) for tree, x in zip((params, batch_stats), of, strict=True)
        )
    for name, head in recipe.heads.items():
        of = head.init(named(f"heads/{name}"), recipe.head_input(name))
        params, batch_stats = (
            set_in(tree, "heads", name, x) for tree, x in zip((params, batch_stats), of, strict=True)
        )
    context = InitContext(
        features=recipe.features_of(recipe.representation),
        num_classes=recipe.num_classes,
        embedding_features=lambda e: recipe.encoder(split_name(e)[0]).embedding_features,
        encoder=lambda n: (of_encoder(params, n), of_encoder(batch_stats, n)),
        tx=None,
    )
    memory = {
        name: part.init(named(f"memory/{name}"), context._replace(tx=recipe.memory_tx.get(name)))
        for name, part in recipe.memory.items()
    }
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=key,
        params=params,
        batch_stats=batch_stats,
        opt_state=recipe.tx.init(params),
        memory=memory,
    )


def make_views(recipe: Recipe, state: TrainState, batch: Batch, names: tuple[str, ...]) -> dict[str, View]:
    """The named views of a batch; every image draws from its own key.

    Views of equal pipelines are drawn as one batch, row by row side by side, so that rows stay on their devices: half
    the program for two views, and large enough for all cores.
    """
    pixels, alike, views = to_pixels(batch["image"]), {}, {}
    for n in names:
        alike.setdefault(_known(recipe.views[n]), []).append(n)
    for group in alike.values():
        pipeline, V = recipe.views[group[0]], len(group)
        keys = jnp.stack([view_keys(state.key, state.step, batch["index"], n) for n in group], axis=1).reshape(-1)
        drawn = View(*pipeline(keys, pixels))
        # Cut along an axis of their own, for `_together` puts them side by side again: the compiler sees that nothing
        # moves, where it would copy x[i::V] value by value.
        side_by_side = jax.tree.map(lambda x, V=V: x.reshape(-1, V, *x.shape[1:]), drawn)
        views |= {n: jax.tree.map(lambda x, i=i: x[:, i], side_by_side) for i, n in enumerate(group)}
    return {n: views[n] for n in names}


def _known(pipeline: Callable) -> object:
    """The same for pipelines that do the same; of one that holds arrays nothing is known, and it is like no other."""
    try:
        hash(pipeline)
        return pipeline
    except TypeError:
        return object()


def _draw(recipe: Recipe, state: TrainState, index: Array, pipeline: str, name: str, pixels: Array) -> View:
    image, params = recipe.views[pipeline](view_keys(state.key, state.step, index, name), pixels)
    return View(image, params)


def run_stages(
    recipe: Recipe, phase: Phase, state: TrainState, batch: Batch, views: dict[str, View], mesh: Mesh | None = None
) -> tuple[dict[str, View], dict, Metrics]:
    """-> (views with what the active stages made, batch statistics, figures). Nothing here is differentiated."""
    stats, metrics = state.batch_stats, {}

    def loss(term: str, embeddings: dict[str, Embedding]) -> Array:
        return make_terms(recipe, mesh, (term,))(embeddings, batch["label"], state.memory)[term]

    for i in phase.stages:
        stage = recipe.stages[i]
        probe = recipe.memory.get(stage.classifier)
        context = StageContext(
            model=recipe.model,
            params=state.params,
            batch_stats=stats,
            memory=state.memory,
            pixels=to_pixels(batch["image"]),
            mean=recipe.mean,
            std=recipe.std,
            label=batch["label"],
            classifier=(None if probe is None else lambda m, h, p=probe, n=stage.classifier: p.logits(m[n], h)),
            augment=lambda pipeline, name, x: _draw(recipe, state, batch["index"], pipeline, name, x),
            loss=loss,
            reads=lambda term: recipe.terms[term].reads,
            embed=lambda encoder, view, norm_set, s=stats: _embed(recipe, state, s, encoder, view, norm_set),
            keys=lambda name: view_keys(state.key, state.step, batch["index"], name),
            textures=to_pixels(batch["texture"]) if "texture" in batch else None,
        )
        with scope(recipe.stage_name(i)):
            out = jax.lax.stop_gradient(stage(context, views))
        views = {**views, **out.views}
        stats = stats if out.batch_stats is None else out.batch_stats
        metrics.update(out.metrics)
    return views, stats, metrics


def _embed(recipe: Recipe, state: TrainState, stats: dict, encoder: str, view: View, norm_set: str) -> Embedding:
    """A view by one encoder, as a batch of its own (a moving average as it was before this update); for a stage."""
    params = of_encoder(with_targets(recipe, state.params, state.memory, "params"), encoder)
    stats = of_encoder(with_targets(recipe, stats, state.memory, "batch_stats"), encoder)
    model, mode = recipe.encoder(encoder), dict(train=True, where=view.where, norm_set=norm_set)
    h, _ = model.encode(params, stats, view.image, **mode)
    return Embedding(h, model.embed(params, stats, h, aug_params=view.params, **mode)[0], view.where)


def make_terms(recipe: Recipe, mesh: Mesh | None, names: Iterable[str]) -> Callable[..., Metrics]:
    """(embeddings, labels [B], memory) -> the values of the named terms on the global batch."""
    terms = {n: recipe.terms[n] for n in names}
    wanted = {m for term in terms.values() for m in term.memories}

    def values(embeddings: dict[str, Embedding], label: Array, memory: dict, axis_name: AxisName = None) -> Metrics:
        def value(n: str) -> Array:
            with scope(f"term {n}"):
                return terms[n](embeddings, label, memory=memory, axis_name=axis_name)

        return {n: value(n) for n in terms}

    def of_the_batch(embeddings: dict[str, Embedding], label: Array, memory: dict) -> Metrics:
        memory = {m: recipe.memory[m].exposed(memory[m]) for m in wanted}
        if mesh is None or mesh.size == 1:
            return values(embeddings, label, memory)
        # Every device has its rows of the batch and all of memory.
        local = functools.partial(values, axis_name=AXIS)
        specs = (P(AXIS), P(AXIS), P())
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())(embeddings, label, memory)

    return of_the_batch


def _represented(recipe: Recipe, embeddings: dict[str, Embedding], view: str) -> Embedding:
    """A view as the encoders of the representation see it, their features side by side."""
    e = [embeddings[embedding_name(n, view)] for n in recipe.representation]
    if len(e) == 1:
        return e[0]
    return Embedding(jnp.concatenate([x.h for x in e], -1), jnp.concatenate([x.z for x in e], -1), e[0].where)


def _encoder_update(recipe: Recipe, phase: Phase, mesh: Mesh | None, runs_here: bool):
    names, active = recipe.view_names(phase), recipe.term_names(phase)
    term_values, head_views = make_terms(recipe, mesh, active), recipe.head_views(active)
    shown = {e for n in active for e in recipe.terms[n].images}
    parts = recipe.batch_size // recipe.accumulate.micro_batch if recipe.accumulate.micro_batch else 1
    encoding = recipe
    if parts > 1:
        encoding = recipe.for_loops()
    elif runs_here and (mesh is None or mesh.size == 1):
        encoding = recipe.for_one_device()

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with scope("augment"):
            views = make_views(recipe, state, batch, names)
        seen = replicate_params(recipe, mesh, state)
        views, stats_before, metrics = run_stages(recipe, phase, seen, batch, views, mesh)
        progress = state.step / jnp.float32(recipe.total_steps)
        memory = {}
        for n, own in recipe.memory.items():
            with scope(f"memory {n}"):
                memory[n] = own.before(state.memory[n], lambda e: of_encoder(state.params, e), progress)

        def objective(params, rows, stats, key):
            (views, label), embeddings = rows, {}
            params = all_gather_params(mesh, recipe.sharding, with_targets(recipe, params, memory, "params"))
            for spec in recipe.passes:
                # Known by what it encodes first, not by its place: a pass more changes nothing in the others.
                own = jax.random.fold_in(key, zlib.crc32(f"pass {spec.embeddings[0]}".encode()))
                with scope(f"encode {' + '.join(n for n in spec.embeddings if split_name(n)[1] in views)}"):
                    encoded, stats = run_pass(encoding, params, stats, views, spec, mesh, own)
                embeddings.update(encoded)
            for name in shown:
                embeddings[name] = embeddings[name]._replace(image=views[split_name(name)[1]].image)
            with scope("heads"):
                embeddings, stats = run_heads(recipe, params, stats, embeddings, head_views)
            terms = term_values(embeddings, label, memory)
            loss = sum(recipe.terms[n].weight * value for n, value in terms.items())
            return loss, (terms, {n: e._replace(image=None) for n, e in embeddings.items()}, stats)

        differentiate = jax.value_and_grad(objective, has_aux=True)
        stats = with_targets(recipe, stats_before, memory, "batch_stats")
        given = (state.params, (views, batch["label"]), stats, jax.random.fold_in(state.key, state.step))
        if parts > 1:
            loss, terms, embeddings, stats, grads = accumulate.gradients(differentiate, *given, parts=parts, mesh=mesh)
        else:
            (loss, (terms, embeddings, stats)), grads = differentiate(*given)
        with scope("optimizer"):
            updates, opt_state = recipe.tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)

        with scope("metrics"):
            shown_to_terms = {m: recipe.memory[m].exposed(memory[m]) for n in active for m in recipe.terms[n].memories}
            terms_by_name = {n: recipe.terms[n] for n in active}
            metrics |= similarity_metrics(terms_by_name, embeddings, len(batch["label"]), shown_to_terms)
            metrics |= {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        for name, own in stats.pop("targets", {}).items():
            memory[name] = {**memory[name], "batch_stats": own}
        out = StepOutput(
            represented=lambda v: _represented(recipe, embeddings, v),
            embeddings=embeddings,
            label=batch["label"],
            encoder=lambda n: of_encoder(params, n),
            progress=progress,
            tx=None,
        )
        for name, own in recipe.memory.items():
            if own.schedule == "online":
                with scope(f"memory {name}"):
                    memory[name], figures = own.after(memory[name], out._replace(tx=recipe.memory_tx.get(name)))
                metrics.update(figures)
        if len(terms) > 1:
            metrics |= {f"loss/{n}": value for n, value in terms.items()}
        return state.replace(
            step=state.step + 1,
            params=params,
            batch_stats=stats,
            opt_state=opt_state,
            memory=memory,
        ), metrics

    return update


def _probe_update(recipe: Recipe, mesh: Mesh | None = None):
    """A step of the schedules that train the probe by itself: the encoder is frozen and normalises by running means."""
    learners = {n: own for n, own in recipe.memory.items() if own.schedule != "online"}

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        memory, metrics, params = dict(state.memory), {}, replicate_params(recipe, mesh, state).params
        for name, own in learners.items():
            with scope("augment"):
                view = make_views(recipe, state, batch, (own.own_view,))[own.own_view]
            with scope(f"encode {own.own_view}"):
                h, z = represent(recipe, params, state.batch_stats, view.image)
            e = [Embedding(h, z, view.where)]
            with scope(f"memory {name}"):
                memory[name], figures = own.learn(memory[name], e, batch["label"], recipe.memory_tx[name])
            metrics.update(figures)
        return state.replace(step=state.step + 1, memory=memory), metrics

    return update
