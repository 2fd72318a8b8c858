"""The one update: views -> stages -> passes -> terms -> gradients -> memory -> new TrainState, inside one jit.

A recipe fills the five slots; nothing else differs between methods. B batch, S side of a view, D features, E embedding.

Batch norm is global under `jit` (a sharded batch gives the statistics of one device). Views are stacked image by image
rather than one batch after the other, so that a pass over several views of a sharded batch moves no image. Terms run
under `shard_map` on a mesh of several devices: what embeddings and sums they exchange is then theirs to say.
"""

import functools
import math
import zlib
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxcl import grad_cache
from jaxcl.memory import Done, Start
from jaxcl.recipe import Pass, Phase, Recipe
from jaxcl.sharding import AXIS
from jaxcl.terms import Embedding
from jaxcl.terms.base import embedding_name, split_name
from jaxcl.terms.similarity import similarity_figures
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

    def named(name: str) -> Array:
        return jax.random.fold_in(key, zlib.crc32(name.encode()))

    for name, model in recipe.encoders.items():
        of = model.init(named(f"encoders/{name}"), recipe.image_shape)
        params, batch_stats = (
            _put(tree, "encoders", name, x) for tree, x in zip((params, batch_stats), of, strict=True)
        )
    for name, head in recipe.heads.items():
        of = head.init(named(f"heads/{name}"), recipe.head_facts(name))
        params, batch_stats = (_put(tree, "heads", name, x) for tree, x in zip((params, batch_stats), of, strict=True))
    start = Start(
        features=recipe.features_of(recipe.representation),
        num_classes=recipe.num_classes,
        embedding_features=lambda e: recipe.encoder(split_name(e)[0]).embedding_features,
        encoder=lambda n: (_of_encoder(params, n), _of_encoder(batch_stats, n)),
        tx=None,
    )
    memory = {
        name: part.init(jax.random.fold_in(key, 2 + i), start._replace(tx=recipe.memory_tx.get(name)))
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


# Parameters and batch statistics: the main encoder's own at the top, those of the others and of heads by their names
# in these places beside it. Those of moving averages are in memory; they join the others only within an update.
_BESIDE = ("encoders", "heads", "targets")


def _put(tree: dict, place: str, name: str, value: dict) -> dict:
    return {**tree, place: {**tree.get(place, {}), name: value}}


def _of_encoder(tree: dict, name: str) -> dict:
    """The part of the parameters or statistics that belongs to one encoder."""
    return tree[_place(tree, name)][name] if name else {k: v for k, v in tree.items() if k not in _BESIDE}


def _with_encoder(tree: dict, name: str, value: dict) -> dict:
    return _put(tree, _place(tree, name), name, value) if name else {**tree, **value}


def _place(tree: dict, name: str) -> str:
    return "targets" if name in tree.get("targets", {}) else "encoders"


def _with_targets(recipe: Recipe, tree: dict, memory: dict, part: str) -> dict:
    """Parameters or statistics of the trained encoders and, of the moving averages, what memory holds."""
    return {**tree, "targets": {n: memory[n][part] for n in recipe.targets}} if recipe.targets else tree


def represent(
    recipe: Recipe, params: dict, stats: dict, images: Array, main: Array | None = None
) -> tuple[Array, Array]:
    """Normalised images [N,S,S,C] -> (h [N,D], z [N,E]) in inference mode: the encoders of the representation, joined.

    main: the features of the main encoder, where they are known already.
    """
    h, z = [], []
    for name in recipe.representation:
        model, own = recipe.encoder(name), _of_encoder(params, name)
        known = main is not None and not name
        h.append(main if known else model.encode(own, _of_encoder(stats, name), images, train=False)[0])
        z.append(model.project(own, _of_encoder(stats, name), h[-1]))
    return (h[0], z[0]) if len(h) == 1 else (jnp.concatenate(h, -1), jnp.concatenate(z, -1))


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
        return _terms(recipe, mesh, (term,))(embeddings, batch["label"], state.memory)[term]

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
            reads=lambda term: recipe.terms[term].reads,
            embed=lambda encoder, view, norm_set, s=stats: _embed(recipe, state, s, encoder, view, norm_set),
            keys=lambda name: view_keys(state.key, state.step, batch["index"], name),
            textures=to_pixels(batch["texture"]) if "texture" in batch else None,
        )
        out = jax.lax.stop_gradient(stage(context, views))
        views = {**views, **out.views}
        stats = stats if out.batch_stats is None else out.batch_stats
        metrics.update(out.metrics)
    return views, stats, metrics


def _embed(recipe: Recipe, state: TrainState, stats: dict, encoder: str, view: View, norm_set: str) -> Embedding:
    """A view by one encoder, as a batch of its own (a moving average as it was before this update); for a stage."""
    params = _of_encoder(_with_targets(recipe, state.params, state.memory, "params"), encoder)
    stats = _of_encoder(_with_targets(recipe, stats, state.memory, "batch_stats"), encoder)
    model, mode = recipe.encoder(encoder), dict(train=True, where=view.where, norm_set=norm_set)
    h, _ = model.encode(params, stats, view.image, **mode)
    return Embedding(h, model.embed(params, stats, h, **mode)[0], view.where)


def run_pass(
    recipe: Recipe,
    params,
    stats,
    views: dict[str, View],
    spec: Pass,
    mesh: Mesh | None = None,
    key: Array | None = None,
) -> tuple[dict[str, Embedding], dict]:
    """Encode some views together, as one batch of the batch norm. -> (embeddings by name, new statistics).

    key: of what is dropped at random, in encoders that do so; None: nothing is.
    """
    names = [n for n in spec.views if n in views]
    if not names:  # a stage that makes them has not begun
        return {}, stats
    model, own = recipe.encoder(spec.encoder), _of_encoder(params, spec.encoder)
    rows, where, sizes, groups = _together([views[n] for n in names], always=bool(recipe.grad_cache.micro_batch))
    if chunks := recipe.grad_cache.chunks(recipe.batch_size):
        encode = functools.partial(grad_cache.encode, model, chunks=chunks, groups=groups, mesh=mesh)
    else:
        encode = functools.partial(model.encode, train=True)
    if spec.bn_groups > 1:
        encode = functools.partial(_by_groups, encode, spec)
    h, new = encode(own, _of_encoder(stats, spec.encoder), rows, where=where, norm_set=spec.norm_set, key=key)
    z, new = model.embed(own, new, h, train=True, where=where, norm_set=spec.norm_set)
    return {
        embedding_name(spec.encoder, n): Embedding(hh, zz, views[n].where)
        for n, hh, zz in zip(names, _split(h, sizes, groups), _split(z, sizes, groups), strict=True)
    }, _with_encoder(stats, spec.encoder, new)


def _by_groups(encode, spec: Pass, params, stats, rows, *, where, norm_set, key):
    """`encode` on equal parts of the rows, each with batch norms of its own, as so many devices would; -> the same.

    Running statistics move to the mean of what the parts make of them.
    """
    order = jax.random.permutation(jax.random.fold_in(key, 1), len(rows)) if spec.shuffle else None

    def parts(x: Array) -> Array:
        x = x if order is None else x[order]
        return x.reshape(spec.bn_groups, -1, *x.shape[1:])

    def one(x: Array, exists: Array | None) -> tuple[Array, dict]:
        return encode(params, stats, x, where=exists, norm_set=norm_set, key=key)

    h, new = jax.vmap(one)(parts(rows), None if where is None else parts(where))
    h = h.reshape(-1, *h.shape[2:])
    return h if order is None else h[jnp.argsort(order)], jax.tree.map(lambda x: x.mean(0), new)


def _together(parts: list, *, always: bool = False) -> tuple[Array, Array | None, list[int], int]:
    """Several batches, each with .image and .where, as one -> (rows, which exist, sizes, groups for `_split`)."""
    images, wheres = [p.image for p in parts], [p.where for p in parts]
    sizes = [len(x) for x in images]
    # Equal views: row r of each side by side, so that rows stay on the device that holds them. Unequal views: one
    # after the other, or each micro-batch would get rows of one view only; then in as many parts as all fall into.
    groups = math.gcd(*sizes) if always or len(set(sizes)) == 1 else 1
    where = None
    if any(w is not None for w in wheres):
        wheres = [jnp.ones(len(x), bool) if w is None else w for w, x in zip(wheres, images, strict=True)]
        where = _merge(wheres, groups)
    return _merge(images, groups), where, sizes, groups


def run_heads(
    recipe: Recipe, params, stats, embeddings: dict[str, Embedding], views: dict[str, tuple[str, ...]]
) -> tuple[dict[str, Embedding], dict]:
    """Apply heads, each to the views named for it. -> (embeddings with the outputs, new statistics).

    An output goes with the embedding by the first of the head's encoders.
    """
    embeddings = dict(embeddings)
    for name, of in views.items():
        head, facts = recipe.heads[name], recipe.head_facts(name)
        inputs = []
        for view in of:
            e = [embeddings[embedding_name(encoder, view)] for encoder in head.encoders]
            inputs.append(View(jnp.concatenate([getattr(x, head.reads) for x in e], -1), {}, e[0].where))
        for begin in range(0, len(of), len(of) if head.together else 1):
            part = slice(begin, len(of) if head.together else begin + 1)
            rows, where, sizes, groups = _together(inputs[part])
            own = stats.get("heads", {}).get(name, {})
            out, new = head.apply(facts, params["heads"][name], own, rows, train=True, where=where)
            stats = _put(stats, "heads", name, new)
            for view, y in zip(of[part], _split(out, sizes, groups), strict=True):
                to = embedding_name(head.encoders[0], view)
                embeddings[to] = embeddings[to]._replace(out={**embeddings[to].out, name: y})
    return embeddings, stats


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


def _terms(recipe: Recipe, mesh: Mesh | None, names: Iterable[str]) -> Callable[..., Metrics]:
    """(embeddings, labels [B], memory) -> the values of the named terms on the global batch."""
    terms = {n: recipe.terms[n] for n in names}
    wanted = {n: getattr(term, "memories", ()) for n, term in terms.items()}

    def values(embeddings: dict[str, Embedding], label: Array, memory: dict, axis_name: str | None = None) -> Metrics:
        def carried(n: str) -> dict:
            return {"memory": {m: memory[m] for m in wanted[n]}} if wanted[n] else {}

        return {n: term(embeddings, label, axis_name=axis_name, **carried(n)) for n, term in terms.items()}

    def of_the_batch(embeddings: dict[str, Embedding], label: Array, memory: dict) -> Metrics:
        memory = {m: memory[m] for ms in wanted.values() for m in ms}
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


def _encoder_update(recipe: Recipe, phase: Phase, mesh: Mesh | None = None):
    names, active = recipe.view_names(phase), recipe.term_names(phase)
    term_values, head_views = _terms(recipe, mesh, active), recipe.head_views(active)
    shown = {e for n in active for e in getattr(recipe.terms[n], "images", ())}

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        views = make_views(recipe, state, batch, names)
        views, stats_before, metrics = run_stages(recipe, phase, state, batch, views, mesh)
        progress = state.step / jnp.float32(recipe.total_steps)
        memory = {
            n: part.before(state.memory[n], lambda e: _of_encoder(state.params, e), progress)
            for n, part in recipe.memory.items()
        }

        def objective(params):
            embeddings, stats = {}, _with_targets(recipe, stats_before, memory, "batch_stats")
            params = _with_targets(recipe, params, memory, "params")
            for i, spec in enumerate(recipe.passes):
                key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), zlib.crc32(f"pass {i}".encode()))
                encoded, stats = run_pass(recipe, params, stats, views, spec, mesh, key)
                embeddings.update(encoded)
            for name in shown:
                embeddings[name] = embeddings[name]._replace(image=views[split_name(name)[1]].image)
            embeddings, stats = run_heads(recipe, params, stats, embeddings, head_views)
            terms = term_values(embeddings, batch["label"], memory)
            loss = sum(recipe.terms[n].weight * value for n, value in terms.items())
            return loss, (terms, embeddings, stats)

        (loss, (terms, embeddings, stats)), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
        updates, opt_state = recipe.tx.update(grads, state.opt_state, state.params)

        metrics |= similarity_figures({n: recipe.terms[n] for n in active}, embeddings, len(batch["label"]), memory)
        params = optax.apply_updates(state.params, updates)
        for name, own in stats.pop("targets", {}).items():
            memory[name] = {**memory[name], "batch_stats": own}
        done = Done(
            represented=lambda v: _represented(recipe, embeddings, v),
            embeddings=embeddings,
            label=batch["label"],
            encoder=lambda n: _of_encoder(params, n),
            progress=progress,
            tx=None,
        )
        for name, part in recipe.memory.items():
            if part.schedule == "online":
                own = done._replace(tx=recipe.memory_tx.get(name))
                memory[name], figures = part.after(memory[name], own)
                metrics.update(figures)
        metrics |= {"loss": loss, "grad_norm": optax.tree.norm(grads)}
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


def _probe_update(recipe: Recipe):
    """A step of the schedules that train the probe by itself: the encoder is frozen and normalises by running means."""
    learners = {n: part for n, part in recipe.memory.items() if part.schedule != "online"}

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        memory, metrics = dict(state.memory), {}
        for name, part in learners.items():
            view = make_views(recipe, state, batch, (part.view,))[part.view]
            h, z = represent(recipe, state.params, state.batch_stats, view.image)
            e = [Embedding(h, z, view.where)]
            memory[name], figures = part.learn(memory[name], e, batch["label"], recipe.memory_tx[name])
            metrics.update(figures)
        return state.replace(step=state.step + 1, memory=memory), metrics

    return update
