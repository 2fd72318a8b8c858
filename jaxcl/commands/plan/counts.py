"""The numbers of `jaxcl plan`: what is counted from programs, and what is assumed of chips.

b images a device, n devices, B = b n images a step.
"""

import pathlib
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
from jaxcl.method.recipe import Phase, Recipe
from jaxcl.method.terms import Embedding
from jaxcl.method.update import init_state, make_terms, make_update, make_views, run_stages, state_shardings
from jaxcl.report.style import BLUE, MUTED, VERMILLION, new_figure, save, styled

Tree = Any
Plan = dict[str, Any]


def make_plan(
    config: ConfigDict, facts: dict[str, Any], *, devices: int, kind: str, hosts: int = 0, most: int = 1024
) -> Plan:
    """Everything that the text, the file and the figure show. facts: as of `recipe.data_facts`. Errors: UserError.

    JAX must have started with at least max(devices, most) devices.
    """
    chip = CHIPS[kind]
    recipe = build_recipe(config, **facts, num_devices=devices)
    hosts = hosts or max(1, devices // chip.per_host)
    mesh = sharding.make_mesh(devices, config.hosts or hosts)
    phase = Phase("encoder", tuple(range(len(recipe.stages))))  # with all stages begun
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
    """The recipe with one device's part of the batch: what each of them computes, but for the loss."""
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
    """Of one device, by part of the state."""
    out = {}
    for name in ("params", "opt_state", "memory", "batch_stats"):
        pairs = zip(jax.tree.leaves(getattr(state, name)), jax.tree.leaves(getattr(placed, name)), strict=True)
        out[name] = sum(int(np.prod(s.shard_shape(x.shape))) * x.dtype.itemsize for x, s in pairs)
    return out


def _traffic(recipe: Recipe, phase: Phase, state: Any) -> dict[str, dict[str, float]]:
    """Bytes of arrays that a step reduces and gathers beside the loss, the same at any number of devices.

    The gradient of every parameter once; two sums a channel of each batch norm in the forward pass and two in the
    backward pass; parameters where they are split. `tests/test_plan.py` holds this against compiled programs.
    """
    params, probe = _bytes(state.params), sum(_bytes(m["params"]) for n, m in state.memory.items() if "opt_state" in m)
    targets = sum(_bytes(state.memory[n]["params"]) for n in recipe.targets)
    norms = 0
    for p in recipe.passes:
        trained = p.encoder not in recipe.targets
        tree = state.batch_stats if not p.encoder else state.memory.get(p.encoder, state.batch_stats.get("encoders"))
        tree = tree.get("batch_stats", tree.get(p.encoder, tree)) if p.encoder else tree
        own = {k: v for k, v in tree.items() if k not in ("encoders", "heads")}
        norms += _bytes(own) * (2 if trained else 1)
    if recipe.sharding == "data":
        return {"gradients": {"all-reduce": params + probe}, "norms": {"all-reduce": norms}, "parameters": {}}
    # Gathered for the forward pass and once more for the backward one; zero1 gathers what has been updated.
    gathered = 2 * params + targets if recipe.sharding == "fsdp" else params + targets
    return {
        "gradients": {"reduce-scatter": params, "all-reduce": probe},
        "norms": {"all-reduce": norms},
        "parameters": {"all-gather": gathered},
    }


def _embeddings(local: Recipe, phase: Phase, state: Any, batch: Any) -> dict[str, Embedding]:
    """Shapes of what the terms read, of one device."""

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
    shown = {e for n in names for e in getattr(local.terms[n], "images", ())}
    return {n: e if n in shown else e._replace(image=None) for n, e in out.items()}


def _loss(recipe: Recipe, phase: Phase, shapes: dict, state: Any, n: int, b: int) -> tuple[int, dict[str, float]]:
    """Compile the terms alone, with their gradient, for n devices -> (bytes of temporaries, bytes sent by kind)."""
    mesh = sharding.make_mesh(n)
    names = recipe.term_names(phase)
    values = make_terms(recipe, mesh, names)

    def loss(embeddings, label, memory):
        return sum(recipe.terms[k].weight * v for k, v in values(embeddings, label, memory).items())

    def grow(x: Any) -> Any:
        return jax.ShapeDtypeStruct((n * x.shape[0], *x.shape[1:]), x.dtype)

    # Rows that exist are no numbers to differentiate.
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
    """Seconds of a step at the chip's peaks, and bytes that a device sends."""
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
        if known:  # of what a group of joined chips sends, each carries its share over the slower way
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


# ---- for people


def as_text(plan: Plan) -> str:
    """The plan in plain words."""
    p, m = plan, plan["memory"]
    mine = next(r for r in p["table"] if r["devices"] == p["devices"])
    low, high = (1e3 * s for s in mine["step_seconds"])
    lines = [
        f"{p['config'] or 'plan'}: {p['devices']} x {p['kind']} on {p['hosts']} hosts, batch {mine['batch']} "
        f"({p['images_per_device']} images a device), sharding={p['sharding']}, {p['dtype']}",
        "",
        "Memory of one device",
        *(f"  {k:<28}{_size(v):>12}" for k, v in m.items() if k != "loss"),
        f"  {'in all':<28}{_size(p['memory_needed']):>12}  of {_size(p['memory_of_chip'])} on the chip",
        f"  {'(of these, the loss)':<28}{_size(m['loss']):>12}  {mine['loss']}",
        "",
        f"One step of {p['steps']:,}",
        *(
            f"  {what:<28}{amount:>12}  {1e3 * mine[seconds]:>9.2f} ms at peak"
            for what, amount, seconds in (
                ("work of a device", f"{p['flops'] / 1e9:,.0f} GFLOP", "compute_seconds"),
                ("memory read and written", _size(p["moved"]), "memory_seconds"),
                ("sent by a device", _size(sum(mine["sent"].values())), "send_seconds"),
            )
        ),
        *(f"    {k:<26}{_size(v):>12}" for k, v in mine["sent"].items() if v),
        f"  step                        {low:.2f} ms if all of that overlaps, {high:.2f} ms if sending does not",
        "",
        "Weak scaling, images of a device as above",
        "  devices      batch  loss       loss memory   sent by a device   step, ms          images/s",
    ]
    for r in p["table"]:
        a, z = r["step_seconds"]
        note = "" if r["known"] else "  (more than one pod: the way between pods is not in this)"
        lines.append(
            f"  {r['devices']:>7}{r['batch']:>11}  {r['loss']:<9}{_size(r['loss_memory']):>13}"
            f"{_size(sum(r['sent'].values())):>19}   {1e3 * a:>7.2f} - {1e3 * z:<7.2f}{r['batch'] / z:>14,.0f}{note}"
        )
    ring = p["ring_from"]
    lines += [
        "",
        f"The loss goes round a ring from {ring} devices on."
        if ring
        else f"The loss does not go round a ring up to {p['table'][-1]['devices']} devices: it does where the rows of "
        f"one, times all columns, exceed {p['dense_logits']:,}.",
        "",
        "Counted: the state, from its shapes and how they are split. Work, memory moved and activations, from the",
        "  jaxpr of one device's update (nothing compiled; results of products, reductions and loops are written, what",
        "  is computed element by element is not; within XLA's fusions and layouts, so expect some tens of percent).",
        "  The loss: its memory and what it sends, from the program that XLA compiles for each number of fake devices.",
        "Derived: what is sent beside the loss, from the sizes of parameters and statistics (checked on the compiled",
        "  programs of small networks; a program may send a gradient once for each pass that it comes from).",
        "Assumed: every part at the chip's peak rate, which no program reaches (ResNets are far from it); collectives",
        "  at the rate of all links together, a ring's hop at that of one; loading images costs nothing.",
    ]
    if not p["fits"]:
        lines += [
            "",
            f"THIS DOES NOT FIT: a device needs {_size(p['memory_needed'])}, a {p['kind']} has "
            f"{_size(p['memory_of_chip'])}. Use more devices, --config.model.remat=True, a smaller batch, "
            "--config.grad_cache.micro_batch, or --config.sharding=fsdp where the state is what is large.",
        ]
    return "\n".join(lines)


def _size(n: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n:,.0f} {unit}" if unit == "B" else f"{n:,.1f} {unit}"
        n /= 1024
    raise AssertionError


def draw(plan: Plan, path: pathlib.Path) -> None:
    """The table as a figure: images a second over devices, against as many times those of one."""
    save(_figure(plan), path)


@styled
def _figure(plan: Plan) -> Any:
    figure = new_figure(3.6)
    speed, loss = figure.subplots(1, 2)
    rows = [r for r in plan["table"] if r["known"]]
    n = np.array([r["devices"] for r in rows])
    fast, slow = (np.array([r["batch"] / r["step_seconds"][i] for r in rows]) for i in (0, 1))
    speed.plot(n, fast[0] * n / n[0], color=MUTED, linestyle=":", label="as many times one device")
    speed.fill_between(n, slow, fast, color=BLUE, alpha=0.2, linewidth=0)
    speed.plot(n, fast, color=BLUE, label="sending overlaps work")
    speed.plot(n, slow, color=VERMILLION, label="sending comes after work")
    speed.set(xscale="log", yscale="log", xlabel="devices", title="Images a second at the chip's peaks")
    loss.plot(n, [max(r["loss_memory"], 1) / 2**20 for r in rows], color=BLUE, label="memory of the loss")
    sent = [max(r["sent"]["loss"], 1) / 2**20 for r in rows]
    loss.plot(n, sent, color=VERMILLION, label="sent for the loss")
    if plan["ring_from"]:
        loss.axvline(plan["ring_from"], color=MUTED, linestyle=":", label="a ring from here on")
    loss.set(xscale="log", yscale="log", xlabel="devices", title="MiB of the loss on a device")
    for ax in (speed, loss):
        ax.legend(frameon=False, fontsize=8)
    return figure
