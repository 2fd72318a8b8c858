"""The numbers of a plan: what is counted from programs, and what is assumed about chips.

b images per device, n devices, B = b n images per step.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxcl.commands.plan.chips import CHIPS, Chip
from jaxcl.commands.plan.collectives import collectives, totals
from jaxcl.commands.plan.program_costs import cost
from jaxcl.losses.plan import Limits
from jaxcl.method import sharding
from jaxcl.method.build import build_recipe
from jaxcl.method.forward import run_heads
from jaxcl.method.init_state import init_state, state_shardings
from jaxcl.method.inputs import make_views, run_stages
from jaxcl.method.recipe import Phase, Recipe
from jaxcl.method.run_terms import make_terms
from jaxcl.method.terms import Embedding
from jaxcl.method.update import make_update

Tree = Any
Plan = dict[str, Any]


def make_plan(
    config: ConfigDict, facts: dict[str, Any], *, devices: int, kind: str, hosts: int = 0, most: int = 1024
) -> Plan:
    """Everything that the text, the file and the figure show.

    JAX must have started with at least max(devices, most) devices.

    Args:
      config: of the run.
      facts: of its data, as from `method.build.data_facts`.
      devices: of the run.
      kind: of CHIPS.
      hosts: processes of the run; 0: as many as the chip's servers.
      most: devices in the last row of the weak-scaling table.

    Raises:
      UserError: a config that cannot run on this number of devices.
    """
    chip = CHIPS[kind]
    recipe = build_recipe(config, **facts, num_devices=devices)
    hosts = hosts or max(1, devices // chip.per_host)
    mesh = sharding.make_mesh(devices, config.hosts or hosts)
    phase = Phase("encoder", tuple(range(len(recipe.stages))))  # all stages are active
    b = recipe.batch_size // devices

    state = jax.eval_shape(lambda seed: init_state(recipe, seed), jax.ShapeDtypeStruct((), jnp.uint32))
    memory = _state_bytes(state, state_shardings(recipe, mesh))
    local = _of_one_device(config, facts, devices)
    batch = _batch(facts, b)
    step = cost(jax.make_jaxpr(make_update(local, phase, runs_here=False))(state, batch))
    memory["batch"] = sum(x.size * x.dtype.itemsize for x in batch.values())
    memory["activations and gradients"] = step.temporaries
    other = _traffic(recipe, phase, state)

    shapes = _embeddings(local, phase, state, batch)
    rows = []
    for n in sorted({2**i for i in range(most.bit_length()) if 2**i <= most} | {devices}):
        temporaries, sent = _loss(recipe, phase, shapes, state, n, b)
        sent = {
            "loss": sent,
            "gradients": other["gradients"],
            "norms": other["norms"],
            "parameters": other["parameters"],
        }
        times = _times(chip, step, sent, n)
        form = "ring" if sent["loss"].get("collective-permute") else ("gathered" if n > 1 else "whole")
        rows.append(dict(devices=n, batch=n * b, loss=form, loss_memory=temporaries, **times))
    mine = next(r for r in rows if r["devices"] == devices)
    memory["loss"] = mine["loss_memory"]
    ring = next((r["devices"] for r in rows if r["loss"] == "ring"), None)
    needed = sum(v for k, v in memory.items() if k != "loss")
    return dict(
        config=config.name,
        devices=devices,
        hosts=hosts,
        kind=kind,
        sharding=recipe.sharding if mesh.size > 1 else "data",
        images_per_device=b,
        dtype=str(getattr(recipe.model.encoder, "dtype", jnp.float32).__name__),
        memory={k: float(v) for k, v in memory.items()},
        memory_needed=float(needed),
        memory_of_chip=chip.memory,
        fits=bool(needed <= chip.memory),
        flops=step.flops,
        moved=step.moved,
        peak_flops=chip.flops,
        bandwidth=chip.bandwidth,
        ring_from=ring,
        dense_logits=Limits().dense_logits,
        steps=recipe.total_steps,
        table=rows,
    )


def _of_one_device(config: ConfigDict, facts: dict[str, Any], devices: int) -> Recipe:
    """The recipe for one device's share of the batch: what each device computes, except the loss."""
    own = ConfigDict(config.to_dict())
    for name in ("grad_cache", "accumulate"):
        own[name].micro_batch //= devices
    own.batch_size //= devices
    for p in own.passes:
        p.bn_groups, p.shuffle = 1, False
    return build_recipe(own, **facts)


def _batch(facts: dict[str, Any], b: int) -> dict[str, jax.ShapeDtypeStruct]:
    one = jax.ShapeDtypeStruct((b,), jnp.int32)
    return {"image": jax.ShapeDtypeStruct((b, *facts["image_shape"]), jnp.uint8), "label": one, "index": one}


def _bytes(tree: Tree) -> int:
    return sum(int(np.prod(x.shape)) * 4 for x in jax.tree.leaves(tree))


def _state_bytes(state: Any, placed: Any) -> dict[str, float]:
    """Bytes on one device, by field of the state."""
    out = {}
    for name in ("params", "opt_state", "memory", "batch_stats"):
        pairs = zip(jax.tree.leaves(getattr(state, name)), jax.tree.leaves(getattr(placed, name)), strict=True)
        out[name] = sum(int(np.prod(s.shard_shape(x.shape))) * x.dtype.itemsize for x, s in pairs)
    return out


def _traffic(recipe: Recipe, phase: Phase, state: Any) -> dict[str, dict[str, float]]:
    """Bytes of the arrays that a step reduces and gathers outside the loss, the same for any number of devices.

    These are the gradient of every parameter, once; two sums per channel of each batch norm in the forward pass and
    two in the backward pass; and the parameters where they are sharded. tests/commands/test_plan.py compares this with
    compiled programs.
    """
    params, learned = _bytes(state.params), _bytes(recipe.finetune.split(state.params)[0])
    probe = sum(_bytes(m["params"]) for n, m in state.memory.items() if "opt_state" in m)
    targets = sum(_bytes(state.memory[n]["params"]) for n in recipe.targets)
    norms = 0
    for p in recipe.passes:
        trained = p.encoder not in recipe.targets
        tree = state.batch_stats if not p.encoder else state.memory.get(p.encoder, state.batch_stats.get("encoders"))
        tree = tree.get("batch_stats", tree.get(p.encoder, tree)) if p.encoder else tree
        own = {k: v for k, v in tree.items() if k not in ("encoders", "heads")}
        norms += _bytes(own) * (2 if trained else 1)
    if recipe.sharding == "data":
        return {"gradients": {"all-reduce": learned + probe}, "norms": {"all-reduce": norms}, "parameters": {}}
    # fsdp gathers for the forward pass and again for the backward pass; zero1 gathers the updated parameters.
    gathered = 2 * params + targets if recipe.sharding == "fsdp" else learned + targets
    return {
        "gradients": {"reduce-scatter": learned, "all-reduce": probe},
        "norms": {"all-reduce": norms},
        "parameters": {"all-gather": gathered},
    }


def _embeddings(local: Recipe, phase: Phase, state: Any, batch: Any) -> dict[str, Embedding]:
    """Shapes of the embeddings that the terms read, on one device."""

    def views(state, batch):
        drawn = make_views(local, state, batch, local.view_names(phase))
        return run_stages(local, phase, state, batch, drawn)[0]

    b = len(batch["label"])
    counts = {n: (b, None) for n in local.view_names(phase)}
    if phase.stages:
        made = jax.eval_shape(views, state, batch)
        counts = {n: (len(v.image), v.where) for n, v in made.items()}
    out = {}
    for p in local.passes:
        model = local.encoder(p.encoder)
        for view, name in zip(p.views, p.embeddings, strict=True):
            if view in counts:
                n, where = counts[view]
                image = jax.ShapeDtypeStruct((n, *local.image_shape), jnp.float32)
                shape = lambda d, n=n: jax.ShapeDtypeStruct((n, d), jnp.float32)  # noqa: E731
                out[name] = Embedding(shape(model.features), shape(model.embedding_features), where, image)
    names = local.term_names(phase)
    heads = local.head_views(names)
    if heads:
        out = jax.eval_shape(lambda s, e: run_heads(local, s.params, s.batch_stats, e, heads)[0], state, out)
    shown = {e for n in names for e in local.terms[n].images}
    return {n: e if n in shown else e._replace(image=None) for n, e in out.items()}


def _loss(recipe: Recipe, phase: Phase, shapes: dict, state: Any, n: int, b: int) -> tuple[int, dict[str, float]]:
    """Compile only the terms and their gradient for n devices -> (bytes of temporaries, bytes sent by kind)."""
    mesh = sharding.make_mesh(n)
    names = recipe.term_names(phase)
    values = make_terms(recipe, mesh, names)

    def loss(embeddings, label, memory):
        return sum(recipe.terms[k].weight * v for k, v in values(embeddings, label, memory).items())

    def grow(x: Any) -> Any:
        return jax.ShapeDtypeStruct((n * x.shape[0], *x.shape[1:]), x.dtype)

    # The masks `where` are Boolean and have no gradient.
    wheres = {k: e.where for k, e in shapes.items()}
    embeddings = jax.tree.map(grow, {k: e._replace(where=None) for k, e in shapes.items()})
    wheres = jax.tree.map(grow, wheres)
    label = jax.ShapeDtypeStruct((n * b,), jnp.int32)

    def program(embeddings, wheres, label, memory):
        def of(e):
            return loss({k: x._replace(where=wheres[k]) for k, x in e.items()}, label, memory)

        return jax.value_and_grad(of)(embeddings)

    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    jitted = jax.jit(program, in_shardings=(rows, rows, rows, whole), out_shardings=(whole, rows))
    compiled = jitted.lower(embeddings, wheres, label, state.memory).compile()
    return compiled.memory_analysis().temp_size_in_bytes, totals(collectives(compiled.as_text()))


def _times(chip: Chip, step: Any, sent: dict, n: int) -> dict[str, Any]:
    """Seconds of a step at the chip's peak rates, and bytes that a device sends."""
    share = (n - 1) / n
    factors = {"all-reduce": 2 * share, "all-gather": share, "reduce-scatter": share}
    bytes_sent = {
        part: sum(v if part == "loss" else v * factors[k] for k, v in kinds.items()) for part, kinds in sent.items()
    }
    hops = sent["loss"].get("collective-permute", 0.0)
    total = sum(bytes_sent.values())
    seconds = (total - hops) / chip.link + hops / (chip.link / chip.links)
    known = True
    if n > chip.joined:
        known = chip.beyond > 0
        if known:  # the chips of a group share what the group sends over the slower links
            seconds += (total - hops) / chip.joined / chip.beyond + hops / chip.beyond
    compute, memory = step.flops / chip.flops, step.moved / chip.bandwidth
    longest = max(compute, memory)
    return dict(
        sent=bytes_sent,
        compute_seconds=compute,
        memory_seconds=memory,
        send_seconds=seconds,
        step_seconds=(max(longest, seconds), longest + seconds),
        known=known,
    )
