"""One update of a run again, with everything that it computes: `jaxcl train --replay=STEP`.

The state before the update is made from the nearest one that was saved; the updates in between are repeated. A run that
stops and continues is equal to the bit to one that does not, so on the devices of the run this is the update that it
made. It is made twice: once by the program of the run, for its metrics, and once by a program that also returns
gradients and watches the arrays inside (`jaxcl.method.watch`), whose last bits may differ.

K watched arrays.
"""

import contextlib
import functools
import logging
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxcl import config as configs
from jaxcl import report
from jaxcl.errors import UserError
from jaxcl.method.recipe import Phase
from jaxcl.method.sharding import replicated
from jaxcl.method.state import TrainState
from jaxcl.method.update import compile_update, make_update
from jaxcl.method.watch import Watched, watched
from jaxcl.report.metrics import as_json
from jaxcl.runtime import distributed, storage
from jaxcl.train import agreement, diverged, pretrained, run_folder
from jaxcl.train.checkpoint import Checkpoints, Preemption
from jaxcl.train.intervals import due
from jaxcl.train.job import Job, latest, prepare, same_data, writes
from jaxcl.train.monitor import compile_monitor

logger = logging.getLogger("jaxcl")
Batch = dict[str, jax.Array]


def run(config: ConfigDict, workdir: str | os.PathLike, step: int) -> dict[str, Any]:
    """Make update `step` (from 1) of a run again, print a table and write `nan/replay_STEP.json`.

    Nothing else in the folder changes. The lock is held meanwhile, so that nobody trains there.

    Args:
      config: of the run.
      workdir: its folder.
      step: of the update. It may be one that the run has not reached yet.

    Returns:
      The contents of the file:
        "step", "key", "batch": as in `nan/batch_STEP.json` (`jaxcl.train.diverged.about`).
        "from": {"step", "folder"} of the saved state; the folder is "" for a fresh one.
        "phase": what the update trains ("encoder", "probe"), and the kinds of the stages that have begun.
        "metrics": by the run's own program. "recorded": {"same": names, "differ": {name: the run's value}}, as far as
        the run kept metrics of this update alone.
        "terms": {name: {"value", "weight"}}.
        "layers": {layer: {"gradient", "parameter", "update": L2 norms}}, in the order of the parameters' tree; {} in a
        phase that trains only the probe.
        "first": the first array that is not finite, in the order of the program, or None.
        "arrays": all K, as {"name", "pass": "forward" | "backward", "operation", "shape", "largest": finite magnitude,
        "not_finite": number of entries}.

    Raises:
      UserError: no run in the folder, another config or other data than its own, a run in progress, or no such update.
    """
    storage.need_library(workdir)
    workdir = storage.expanded(workdir)
    configs.check(config)
    config = pretrained.resolved(config, workdir)
    plain = configs.to_dict(config)
    for name in ("config.json", "data.json"):
        if not (workdir / name).is_file():
            raise UserError(f"--replay: {workdir} is not a run folder: it has no {name}; give the --workdir of a run")
    if jax.process_count() > 1:
        agreement.same_start(plain, workdir, latest(workdir), {"--replay": step})
    job = prepare(config, plain, workdir)
    if not 1 <= step <= job.recipe.total_steps:
        raise UserError(f"--replay is {step}, but the run has the updates 1 to {job.recipe.total_steps}")
    same_data(job)
    with contextlib.ExitStack() as stack:
        preemption = Preemption(at_once=True)
        stack.callback(preemption.close)
        preemption.loop_ended()  # there is nothing to save
        if lock := run_folder.claim(workdir, plain, job.known, writes(), record=False):
            stack.callback(lock.close)
        found = _replay(job, step)
        if writes():
            print(table(found), flush=True)
            path = workdir / diverged.FOLDER / f"replay_{step}.json"
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                run_folder.write_json(path, found)
            except OSError as error:
                why = storage.refusal(error) or error.strerror or error
                raise UserError(f"cannot write {os.fspath(path)}: {why}; the table is above") from None
            print(f"written to {os.fspath(path)}", flush=True)
        return found


def _replay(job: Job, step: int) -> dict[str, Any]:
    recipe, phase = job.recipe, job.recipe.phase(step - 1)
    state, begin, folder = _state(job, step)
    where = {"step": begin, "folder": folder}
    logger.info(
        "replaying update %d from the state of step %d (%s), which takes %d updates before it",
        *(step, begin, where["folder"] or "a fresh one", step - 1 - begin),
    )
    update_of = functools.cache(lambda phase: compile_update(recipe, phase, job.state_shardings, job.rows))
    with job.loader(begin) as loader:
        state = _forward(job, state, begin, step - 1, update_of, loader)
        batch = next(loader)
        examined = _compile_examination(job, phase)
        after, metrics = update_of(phase)(_copy(job)(state), batch)  # the update overwrites its state
        if due(step, job.every.collapse):
            metrics |= compile_monitor(recipe, job.state_shardings, job.rows)(after, batch)
        details, found = examined(state, batch)
    metrics = {k: np.asarray(v).tolist() for k, v in jax.device_get(metrics).items()}
    details = jax.device_get(details)
    arrays = _arrays(found, details["largest"], details["faults"])
    content = {
        "step": step,
        **diverged.about(job, step),
        "from": where,
        "phase": {"learns": phase.learns, "stages": [recipe.stage_name(i) for i in phase.stages]},
        "metrics": metrics,
        "recorded": _compared(_recorded(job, step), metrics),
        "terms": {n: {"value": v, "weight": recipe.terms[n].weight} for n, v in details["terms"].items()},
        "layers": details["layers"],
        "first": next((row for row in arrays if row["not_finite"]), None),
        "arrays": arrays,
    }
    return as_json(content)


def _state(job: Job, step: int) -> tuple[TrainState, int, str]:
    """The nearest state before an update; -> (state, its step, its folder in the run's: "" for a fresh one)."""

    def find() -> str:
        folder, _ = diverged.saved_before(job.workdir, step)
        return "" if folder is None else os.fspath(folder.relative_to(job.workdir))

    if folder := distributed.agreed(find):
        with Checkpoints(job.workdir / folder, read_only=True) as checkpoints:
            if any(saved < step for saved in checkpoints.steps):
                state = checkpoints.restore(job.abstract_state, at_most=step - 1)
                return state, int(state.step), folder
    return job.fresh_state(), 0, ""


def _forward(job: Job, state: TrainState, begin: int, end: int, update_of: Callable, loader: Any) -> TrainState:
    """The state after the updates from `begin` to `end`."""
    stream = None if writes() else open(os.devnull, "w")
    with report.Progress(end, initial=begin, unit_images=job.recipe.batch_size, stream=stream) as progress:
        before = None
        for done in range(begin, end):
            state, metrics = update_of(job.recipe.phase(done))(state, next(loader))
            jax.block_until_ready(before)  # one update ahead of the device, as in a run
            before = metrics
            progress.update(done + 1)
    if stream:
        stream.close()
    return state


def _copy(job: Job) -> Callable[[TrainState], TrainState]:
    return jax.jit(lambda state: jax.tree.map(jnp.copy, state), out_shardings=job.state_shardings)


def _compile_examination(job: Job, phase: Phase) -> Callable[[TrainState, Batch], tuple[dict[str, Any], list[Watched]]]:
    """(state, batch) -> (terms, norms by layer, measurements [K] of the watched arrays; the K arrays by name)."""
    update = make_update(job.recipe, phase, job.mesh, details=True)

    def one(state: TrainState, batch: Batch) -> dict[str, Any]:
        after, metrics = update(state, batch)
        details = metrics.pop("details")
        return {"terms": details["terms"], "gradients": details["gradients"], "metrics": metrics, "new state": after}

    watching, found = watched(one)

    def examine(state: TrainState, batch: Batch) -> dict[str, Any]:
        out, largest, faults = watching(state=state, batch=batch)
        moved = jax.tree.map(jnp.subtract, out["new state"].params, state.params)
        norms = {"gradient": norm_by_layer(out["gradients"]), "update": norm_by_layer(moved)}
        layers = {
            layer: {
                "gradient": norms["gradient"].get(layer, jnp.zeros(())),
                "parameter": norm,
                "update": norms["update"][layer],
            }
            for layer, norm in norm_by_layer(state.params).items()
            if norms["gradient"]  # none in a phase that trains only the probe
        }
        return {"terms": out["terms"], "layers": layers, "largest": largest, "faults": faults}

    everywhere = replicated(job.mesh)
    program = jax.jit(examine, in_shardings=(job.state_shardings, job.rows), out_shardings=everywhere)
    return lambda state, batch: (program(state, batch), found)


def norm_by_layer(tree: Any) -> dict[str, jax.Array]:
    """{"encoder/stages_0_0/conv1": L2 norm of its arrays, ...}, float32; their squares may overflow."""
    layers: dict[str, list[jax.Array]] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path[:-1], simple=True, separator="/")
        layers.setdefault(name, []).append(x.astype(jnp.float32).reshape(-1))

    def norm(arrays: list[jax.Array]) -> jax.Array:
        largest = jnp.stack([jnp.max(jnp.abs(x), initial=0.0) for x in arrays]).max()
        scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1.0)
        return scale * jnp.sqrt(sum(jnp.sum(jnp.square(x / scale)) for x in arrays))

    return {name: norm(arrays) for name, arrays in layers.items()}


def _arrays(found: list[Watched], largest: np.ndarray, faults: np.ndarray) -> list[dict[str, Any]]:
    return [
        {
            "name": watch.name,
            "pass": "backward" if watch.backward else "forward",
            "operation": watch.operation,
            "shape": watch.shape,
            "largest": float(size),
            "not_finite": int(count),
        }
        for watch, size, count in zip(found, largest, faults, strict=True)
    ]


# ---- what the run itself measured


def _recorded(job: Job, step: int) -> dict[str, Any]:
    """The metrics that the run kept of this update alone."""
    path, advice = diverged.batch_file(job.workdir, step), "remove it"
    if path.is_file():
        found = storage.read_json(path, "metrics", advice=advice)["metrics"]
        if not isinstance(found, dict):
            raise UserError(f"{path} is not one of jaxcl: its metrics are no object; {advice}")
        return found
    if job.every.log > 1:  # the lines are means over several updates
        return {}
    rows = [row for row in report.read_metrics(job.workdir) if row["step"] == step and "lr" in row]
    return rows[-1] if rows else {}


def _compared(recorded: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
    same, differ = [], {}
    for name in sorted(recorded.keys() & metrics.keys()):
        there, here = recorded[name], metrics[name]
        try:
            there = float(there)
        except (TypeError, ValueError):  # histograms are rounded when they are written
            continue
        if there == here or (math.isnan(there) and math.isnan(here)):
            same.append(name)
        else:
            differ[name] = there
    return {"same": same, "differ": differ}


# ---- the table


def table(found: dict[str, Any]) -> str:
    """What `run` found, for a terminal: terms, metrics, norms by layer (largest gradient first), the first fault."""
    rows: list[tuple[str, ...]] = []
    if found["terms"]:
        rows.append(("term", "value", "weight", ""))
        rows += [(name, _number(term["value"]), _number(term["weight"]), "") for name, term in found["terms"].items()]
        rows.append(("", "", "", ""))
    rows.append(("metric", "value", "recorded", ""))
    for name, value in found["metrics"].items():
        if not isinstance(value, list):
            differs = found["recorded"]["differ"].get(name)
            then = "the same" if name in found["recorded"]["same"] else "" if differs is None else _number(differs)
            rows.append((name, _number(value), then, ""))
    if found["layers"]:
        rows += [("", "", "", ""), ("layer", "gradient", "parameter", "update")]
        layers = sorted(found["layers"].items(), key=lambda item: -_rank(item[1]["gradient"]))
        rows += [(name, *(_number(norms[k]) for k in ("gradient", "parameter", "update"))) for name, norms in layers]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    stages = ", ".join(found["phase"]["stages"])
    count, learns = len(found["batch"]["index"]), found["phase"]["learns"]
    lines = [f"update {found['step']} trains the {learns} on {count:,} images{stages and f', after {stages}'}", ""]
    lines += ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    first, count = found["first"], sum(row["not_finite"] > 0 for row in found["arrays"])
    lines.append("")
    if first is None:
        lines.append(f"all {len(found['arrays'])} arrays of the update are finite")
    else:
        shape, size = " x ".join(map(str, first["shape"])) or "a scalar", math.prod(first["shape"])
        made = f", by {first['operation']}" if first["operation"] else ""
        lines += [
            f"first array that is not finite: {first['name']}",
            f"  in the {first['pass']} pass{made}; {shape}; {first['not_finite']:,} of {size:,} entries",
            f"  after it {count - 1} of the {len(found['arrays'])} arrays have such entries",
        ]
    return "\n".join(lines)


def _rank(value: float | str) -> float:
    """Larger numbers first, and before them those that are not finite (texts, as in JSON)."""
    return math.inf if isinstance(value, str) else value


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"
