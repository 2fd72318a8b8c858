"""The one update: views -> stages -> passes -> terms -> gradients -> memory -> new TrainState, inside one jit.

A recipe fills the five slots; nothing else differs between methods. Batch norm is global under `jit`: a sharded batch
has the statistics of one device.

B batch, S side of a view, D features, E embedding.
"""

import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxcl.method import accumulate
from jaxcl.method.finetune import keep_statistics, merge
from jaxcl.method.forward import of_encoder, represent, run_heads, run_pass, with_targets
from jaxcl.method.init_state import replicate_params
from jaxcl.method.inputs import encoder_inputs, make_views
from jaxcl.method.memory import StepOutput
from jaxcl.method.recipe import Phase, Recipe
from jaxcl.method.run_terms import make_terms
from jaxcl.method.scopes import scope
from jaxcl.method.sharding import all_gather_params, replicated
from jaxcl.method.state import TrainState
from jaxcl.method.terms.base import Embedding, embedding_name, split_name
from jaxcl.method.terms.similarity import similarity_metrics
from jaxcl.models.trees import TARGETS

Array = jax.Array
Batch = dict[str, Array]
Metrics = dict[str, Array]
Update = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_update(
    recipe: Recipe, phase: Phase, mesh: Mesh | None = None, *, runs_here: bool = True, details: bool = False
) -> Update:
    """The pure update of one phase of the schedule; jit it with donation, as `compile_update` does.

    Args:
      recipe, phase: what to run.
      mesh: the mesh over which the batch is sharded; None for a batch on one device.
      runs_here: False if the update is only traced or compiled for other devices: forms that suit this process's
        devices are then not chosen.
      details: the metrics also have "details": {"terms": each term's value, "gradients": of all parameters}.
    """
    if phase.learns == "probe":
        return _probe_update(recipe, mesh, details)
    return _encoder_update(recipe, phase, mesh, runs_here, details)


def compile_update(recipe: Recipe, phase: Phase, state_sharding, batch_sharding) -> Update:
    """`make_update` under jit. The state is donated, so accelerators update it in place.

    state_sharding: one sharding for the whole state, or a TrainState of them (`init_state.state_shardings`).
    """
    return jax.jit(
        make_update(recipe, phase, batch_sharding.mesh),
        in_shardings=(state_sharding, batch_sharding),
        out_shardings=(state_sharding, replicated(batch_sharding.mesh)),
        donate_argnums=0,
    )


def _encoder_update(recipe: Recipe, phase: Phase, mesh: Mesh | None, runs_here: bool, details: bool) -> Update:
    if phase.warms:
        recipe = recipe.warming()
    active = recipe.term_names(phase)
    term_values, head_views = make_terms(recipe, mesh, active), recipe.head_views(active)
    views_in_terms = {e for n in active for e in recipe.terms[n].images}
    micro_batches = recipe.batch_size // recipe.accumulate.micro_batch if recipe.accumulate.micro_batch else 1
    encoding = recipe
    if micro_batches > 1:
        encoding = recipe.for_loops()
    elif runs_here and (mesh is None or mesh.size == 1):
        encoding = recipe.for_one_device()

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        views, stage_stats, metrics = encoder_inputs(recipe, phase, state, batch, mesh)
        progress = state.step / jnp.float32(recipe.total_steps)
        memory = _memory_before(recipe, state, progress)

        def counts(rows):
            """Of the terms whose means are over some rows only, for micro-batches."""
            views, label = rows
            where = {name: view.where for name, view in views.items()}
            found = {n: recipe.terms[n].count(label, where) for n in active}
            return {n: count for n, count in found.items() if count is not None}

        learns, others = recipe.finetune.split(state.params, phase.warms)

        def loss_fn(learns, rows, stats, key, shares=None):
            (views, label), embeddings = rows, {}
            params = merge(learns, others)  # the others are constants: no backward pass runs through frozen layers
            params = all_gather_params(mesh, recipe.sharding, with_targets(recipe, params, memory, "params"))
            for spec in recipe.passes:
                # Keyed by the first embedding, not by position: adding a pass changes nothing in the others.
                pass_key = jax.random.fold_in(key, zlib.crc32(f"pass {spec.embeddings[0]}".encode()))
                with scope(f"encode {' + '.join(n for n in spec.embeddings if split_name(n)[1] in views)}"):
                    encoded, stats = run_pass(encoding, params, stats, views, spec, mesh, pass_key)
                embeddings.update(encoded)
            for name in views_in_terms:
                embeddings[name] = embeddings[name]._replace(image=views[split_name(name)[1]].image)
            with scope("heads"):
                embeddings, stats = run_heads(recipe, params, stats, embeddings, head_views)
            terms = term_values(embeddings, label, memory)
            terms |= {n: terms[n] * share for n, share in (shares or {}).items()}
            loss = sum(recipe.terms[n].weight * value for n, value in terms.items())
            return loss, (terms, {n: e._replace(image=None) for n, e in embeddings.items()}, stats)

        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        stats = with_targets(recipe, stage_stats, memory, "batch_stats")
        args = (learns, (views, batch["label"]), stats, jax.random.fold_in(state.key, state.step))
        if micro_batches > 1:
            loss, terms, embeddings, stats, grads = accumulate.gradients(
                grad_fn, *args, micro_batches=micro_batches, mesh=mesh, counts=counts
            )
        else:
            (loss, (terms, embeddings, stats)), grads = grad_fn(*args)
        with scope("optimizer"):
            params, opt_state = _step(recipe, phase, state, grads)

        with scope("metrics"):
            metrics |= _similarities(recipe, active, embeddings, len(batch["label"]), memory)
            metrics |= {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        stats = keep_statistics(recipe.model, state.batch_stats, stats)
        for name, target_stats in stats.pop(TARGETS, {}).items():
            target_stats = keep_statistics(recipe.encoder(name), memory[name]["batch_stats"], target_stats)
            memory[name] = {**memory[name], "batch_stats": target_stats}
        out = StepOutput(
            represented=lambda v: _represented(recipe, embeddings, v),
            embeddings=embeddings,
            label=batch["label"],
            encoder=lambda n: of_encoder(params, n),
            progress=progress,
            tx=None,
        )
        memory, memory_metrics = _memory_after(recipe, memory, out)
        metrics |= memory_metrics
        if len(terms) > 1:
            metrics |= {f"loss/{n}": value for n, value in terms.items()}
        if details:
            metrics["details"] = {"terms": terms, "gradients": grads}
        return state.replace(
            step=state.step + 1,
            params=params,
            batch_stats=stats,
            opt_state=opt_state,
            memory=memory,
        ), metrics

    return update


def _step(recipe: Recipe, phase: Phase, state: TrainState, grads: dict) -> tuple[dict, dict]:
    """The optimiser's step. grads: of the parameters that learn in this phase. -> (parameters, optimiser's state)"""
    learns, others = recipe.finetune.split(state.params)
    if phase.warms:  # the optimiser's state is that of all that will learn
        grads = merge(grads, recipe.finetune.split(jax.tree.map(jnp.zeros_like, learns), warms=True)[1])
    options = {"warms": True} if phase.warms else {}
    updates, opt_state = recipe.tx.update(grads, state.opt_state, learns, **options)
    return merge(optax.apply_updates(learns, updates), others), opt_state


def _memory_before(recipe: Recipe, state: TrainState, progress: Array) -> dict:
    """Slot 5, before the views are encoded."""
    memory = {}
    for name, part in recipe.memory.items():
        with scope(f"memory {name}"):
            memory[name] = part.before(state.memory[name], lambda e: of_encoder(state.params, e), progress)
    return memory


def _memory_after(recipe: Recipe, memory: dict, out: StepOutput) -> tuple[dict, Metrics]:
    """Slot 5, after the optimiser's step, for the parts that act within encoder updates."""
    metrics = {}
    for name, part in recipe.memory.items():
        if part.schedule == "online":
            with scope(f"memory {name}"):
                memory[name], part_metrics = part.after(memory[name], out._replace(tx=recipe.memory_tx.get(name)))
            metrics |= part_metrics
    return memory, metrics


def _similarities(
    recipe: Recipe, active: tuple[str, ...], embeddings: dict[str, Embedding], count: int, memory: dict
) -> Metrics:
    terms = {n: recipe.terms[n] for n in active}
    exposed = {m: recipe.memory[m].exposed(memory[m]) for term in terms.values() for m in term.memories}
    return similarity_metrics(terms, embeddings, count, exposed)


def _represented(recipe: Recipe, embeddings: dict[str, Embedding], view: str) -> Embedding:
    """A view's features (and embeddings) by the encoders of the representation, side by side."""
    e = [embeddings[embedding_name(n, view)] for n in recipe.representation]
    if len(e) == 1:
        return e[0]
    return Embedding(jnp.concatenate([x.h for x in e], -1), jnp.concatenate([x.z for x in e], -1), e[0].where)


def _probe_update(recipe: Recipe, mesh: Mesh | None, details: bool) -> Update:
    """A step in which only memory parts learn: the encoder is frozen and normalises by its running statistics."""
    learners = {name: part for name, part in recipe.memory.items() if part.schedule != "online"}

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        memory, metrics, params = dict(state.memory), {}, replicate_params(recipe, mesh, state).params
        for name, part in learners.items():
            with scope("augment"):
                view = make_views(recipe, state, batch, (part.own_view,))[part.own_view]
            with scope(f"encode {part.own_view}"):
                h, z = represent(recipe, params, state.batch_stats, view.image)
            e = [Embedding(h, z, view.where)]
            with scope(f"memory {name}"):
                memory[name], part_metrics = part.learn(memory[name], e, batch["label"], recipe.memory_tx.get(name))
            metrics |= part_metrics
        if details:
            metrics["details"] = {"terms": {}, "gradients": {}}
        return state.replace(step=state.step + 1, memory=memory), metrics

    return update
