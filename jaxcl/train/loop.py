"""The loop, read top to bottom: data -> update -> metrics -> evaluate -> checkpoint -> report."""

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from jaxcl import config as configs
from jaxcl import report
from jaxcl.data import Loader, order_of, shuffle, source_of
from jaxcl.errors import Diverged, Preempted, UserError
from jaxcl.evaluate.suite import Evaluation
from jaxcl.method import sharding
from jaxcl.method.build import build_recipe, data_facts
from jaxcl.method.initial_weights import starting_weights
from jaxcl.method.recipe import Recipe
from jaxcl.method.state import TrainState
from jaxcl.method.update import compile_update, init_state, state_shardings
from jaxcl.report import JsonLines, MetricsWriter, Progress, read_metrics
from jaxcl.runtime import storage
from jaxcl.runtime.durations import to_steps
from jaxcl.train import profile as profiles
from jaxcl.train import run_folder
from jaxcl.train.checkpoint import Checkpoints, Preemption
from jaxcl.train.monitor import compile_monitor

logger = logging.getLogger("jaxcl")


def run(config: ConfigDict, workdir: str | os.PathLike, *, profile: int = 0) -> dict[str, Any]:
    """Train what the config says in `workdir`, or go on where it stopped; -> the contents of results.json.

    profile: how many updates to write a trace of (`jaxcl.train.profile`).

    Errors: UserError before anything compiles, and where the disk of `workdir` takes no more; Diverged when the loss is
    no longer finite; Preempted after a SIGTERM, with everything saved.
    """
    preemption = Preemption(at_once=True)
    with contextlib.ExitStack() as held:  # the lock of the folder
        held.callback(preemption.close)
        try:
            return _run(config, workdir, preemption, held, profile)
        except OSError as error:
            if reason := storage.refusal(error):
                what = f"cannot write in {workdir}: {reason}; {_last_good(workdir)}"
                raise UserError(f"{what}; make room, then the same command goes on") from None
            raise


def _run(
    config: ConfigDict, workdir: str | os.PathLike, preemption: Preemption, held: contextlib.ExitStack, profile: int
) -> dict[str, Any]:
    started = time.monotonic()
    storage.need_library(workdir)
    workdir = epath.Path(workdir)
    configs.check(config)
    plain = configs.to_dict(config)
    if (results := run_folder.finished(workdir, plain)) is not None:
        return results

    # ---- data
    source = source_of(config, "train")
    devices = config.devices or jax.device_count()
    if devices > jax.device_count():
        raise UserError(f"devices is {devices}, but there are {jax.device_count()}; use 0 for all of them")
    facts = data_facts(source)
    recipe = build_recipe(config, **facts, num_devices=devices)
    evaluation = Evaluation(config, recipe, train=source, make_source=lambda split: source_of(config, split))
    evaluation.check_options()
    every = _intervals(config, recipe)
    if profile:
        profiles.check(profile, recipe.total_steps)
    writes = jax.process_index() == 0
    order = order_of(config, source)
    weights = {} if _has_checkpoint(workdir) else starting_weights(config, recipe)
    known = facts | {"class_names": source.class_names, run_folder.ROW_ORDER: order.name if order else shuffle.ORDER}
    if lock := run_folder.claim(workdir, plain, known, writes):
        held.callback(lock.close)

    # ---- state: the newest checkpoint of this workdir, else fresh
    mesh = sharding.make_mesh(devices, config.hosts)
    placed, rows = state_shardings(recipe, mesh), sharding.batch_sharding(mesh)
    # Evaluation wants all of a state on every device.
    gather = jax.jit(lambda state: state, out_shardings=sharding.replicated(mesh))
    whole = gather if recipe.sharding != "data" else lambda state: state
    about = {"config": configs.fingerprint(plain), "data": run_folder.plain(facts), "batch_size": recipe.batch_size}
    about |= {"devices": devices, "processes": jax.process_count()}
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep, about=about)
    state, step = _initial_state(recipe, checkpoints, placed, weights)
    if step:
        logger.info("resuming %s from step %d", workdir, step)

    # ---- loop
    total = recipe.total_steps
    wandb = report.open_wandb(config.wandb, workdir, plain) if writes else None
    also = wandb.write if wandb else None
    metrics_writer = MetricsWriter(workdir, first_step=step, also=also) if writes else None
    examples = _examples(workdir, step) if config.log_examples else None
    stream = None if writes else open(os.devnull, "w")
    progress = Progress(total, initial=step, unit_images=recipe.batch_size, stream=stream)
    monitor = compile_monitor(recipe, placed, rows)
    updates, pending, log = {}, None, _Log(recipe, metrics_writer, progress, every["log"])
    best = _Best(workdir, config, recipe)
    trace = _profile(workdir, profile, recipe, step, every)
    loader = Loader(
        source,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        start_step=step,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        sharding=rows,
        prefetch=config.data.prefetch,
        order=order,
    )
    try:
        log.begin(loader)
        preemption.loop_begins()
        while step < total:
            phase = recipe.phase(step)
            if phase not in updates:
                updates[phase] = compile_update(recipe, phase, placed, rows)
            trace.before(step, state)
            with trace.waiting():
                batch = next(loader)
            with trace.update(step), jax.transfer_guard("disallow"):
                state, metrics = updates[phase](state, batch)
                if every["collapse"] and (step + 1) % every["collapse"] == 0:
                    metrics |= monitor(state, batch)
            trace.after(step, updates[phase], state, batch)
            # Step n is on its way; only now read what step n - 1 gave, so the device never waits for the host.
            if pending is not None:
                log.add(*pending)
            step, pending = step + 1, (step + 1, metrics)
            if examples:
                examples.write({"step": step, "index": _local_rows(batch["index"])})

            due = step == total or step % every["checkpoint"] == 0
            evaluate = step < total and every["eval"] and step % every["eval"] == 0
            preempted = preemption.reached(step)
            if lock:
                lock.check()
            if due or evaluate or preempted:
                log.add(*pending)  # waits for this step: a state whose loss is not finite is never saved
                pending = None
            if evaluate:
                with progress.paused():
                    figures = evaluation.quick(whole(state), mesh)
                log.write(step, figures)
                best.offer(step, state, figures)
                log.begin(loader)
            if due or preempted:
                for record in filter(None, (metrics_writer, examples)):
                    record.flush()
                checkpoints.save(step, state)
            if preempted:
                checkpoints.wait()
                raise Preempted(f"stopped at step {step} of {total} on request; the same command goes on from there")
        preemption.loop_ended()
    except Diverged as error:
        raise Diverged(_diverged(error, checkpoints)) from None
    finally:
        # All of them, whatever one of them says: what was saved must be complete before this process ends.
        with contextlib.ExitStack() as closing:
            for record in filter(None, (metrics_writer, examples)):
                closing.callback(record.close)
            # From the last to the first.
            for close in (checkpoints.close, progress.close, loader.close, trace.close, log.flush):
                closing.callback(close)
        if wandb and sys.exc_info()[0]:
            wandb.finish()

    # ---- evaluation, results, report
    trained = time.monotonic()
    results, panels = evaluation.final(whole(state), mesh)
    results |= best.result(evaluation, state, whole, mesh)
    results |= {
        "seed": config.seed,
        "config": config.name,
        "steps": total,
        "command": run_folder.command(),
        "versions": run_folder.environment()["packages"],
        "seconds": {"train": round(trained - started, 1), "evaluate": round(time.monotonic() - trained, 1)},
    }
    if writes:
        if config.report:
            begun = time.monotonic()
            page = report.write_report(
                workdir,
                config=plain,
                environment=run_folder.environment(),
                results=results,
                metrics=read_metrics(workdir),
                panels=panels | {"step_time": profiles.read_step_time(workdir)},
            )
            results["seconds"]["report"] = round(time.monotonic() - begun, 1)
            logger.info("report: %s", page)
        run_folder.write_json(workdir / "results.json", results)  # last: its presence means the run is finished
    if wandb:
        wandb.finish(results)
    return results


def _intervals(config: ConfigDict, recipe: Recipe) -> dict[str, int]:
    """log, eval and checkpoint intervals in steps."""
    unit = dict(steps_per_epoch=recipe.steps_per_epoch, batch_size=recipe.batch_size, total=recipe.total_steps)
    return {
        "log": max(1, to_steps(config.log_every, name="log_every", **unit)),
        "eval": to_steps(config.eval.every, name="eval.every", **unit),
        "collapse": to_steps(config.collapse_every, name="collapse_every", **unit),
        "checkpoint": to_steps(config.checkpoint.every, name="checkpoint.every", **unit) or recipe.total_steps,
    }


def _profile(workdir: epath.Path, count: int, recipe: Recipe, first: int, every: dict[str, int]) -> profiles.Profile:
    """The trace of `count` updates, where that many are left after the first few."""

    def pauses(step: int) -> bool:
        return any(n and step % n == 0 for n in (every["eval"], every["checkpoint"], every["collapse"]))

    begin = profiles.window(first, recipe.total_steps, count, recipe.phase, pauses) if count else None
    if count and begin is None:
        left = max(0, recipe.total_steps - first - profiles.WARM)
        logger.info("no profile: %d updates are left to be traced, %d are asked for", left, count)
    return profiles.Profile(workdir, count, begin)


def _has_checkpoint(workdir: epath.Path) -> bool:
    """Whether there is a state to go on from: weights to begin with are then of the past, and need not be there."""
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        return False
    with Checkpoints(folder, read_only=True) as checkpoints:
        return checkpoints.latest is not None


def _initial_state(
    recipe: Recipe, checkpoints: Checkpoints, placed: TrainState, weights: dict[str, Any]
) -> tuple[TrainState, int]:
    # Runs once: on a CPU, where drawing many weights compiles slowly, optimising that program is not worth it.
    quickly = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    create = jax.jit(
        lambda seed, weights: init_state(recipe, seed, weights), out_shardings=placed, compiler_options=quickly
    )
    seed = np.uint32(recipe.seed)
    if checkpoints.latest is None:
        return create(seed, weights), 0
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), jax.eval_shape(create, seed, weights), placed
    )
    state = checkpoints.restore(abstract)
    return state, int(state.step)  # an older one's where the newest is damaged


def _examples(workdir: epath.Path, step: int) -> JsonLines:
    """Which examples this process fed to each update, step by step."""
    part = f"-{jax.process_index()}" if jax.process_index() else ""
    return JsonLines(workdir / f"examples{part}.jsonl", first_step=step)


def _local_rows(index: jax.Array) -> list[int]:
    parts = sorted(index.addressable_shards, key=lambda s: s.index[0].start or 0)
    return [i for part in parts if part.replica_id == 0 for i in np.asarray(part.data).tolist()]


def _last_good(workdir: str | os.PathLike) -> str:
    folder = epath.Path(workdir) / "checkpoints"
    if not folder.exists():
        return "no checkpoint was saved yet"
    with Checkpoints(folder, read_only=True) as checkpoints:
        return checkpoints.last_good()


class _Log:
    """Means of the metrics since the last line, one line every `interval` steps."""

    def __init__(self, recipe: Recipe, writer: MetricsWriter | None, progress: Progress, interval: int):
        self._recipe, self._writer, self._progress, self._interval = recipe, writer, progress, interval
        self._sums: dict[str, list[float]] = {}
        self._step = 0

    def begin(self, loader: Loader) -> None:
        """Start the clock of an interval (again, after time spent on other things)."""
        self._loader, self._since, self._waited = loader, time.monotonic(), loader.seconds_waited
        self._first = None

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Take in the metrics of update `step` (counted from 1). Errors: Diverged."""
        metrics = jax.device_get(metrics)
        values = {k: float(v) for k, v in metrics.items() if not np.ndim(v)}
        # What a batch cannot tell, such as how near two of a class are where it has no two of any.
        values = {k: v for k, v in values.items() if not (k.startswith("collapse/") and math.isnan(v))}
        # The loss first; but a gradient may be lost before it, or the probe by itself.
        for k in sorted(values, key=lambda k: k != "loss"):
            if not math.isfinite(values[k]):
                raise Diverged(f"{k} is {values[k]} at step {step}")
        for k, v in (values | {k: v for k, v in metrics.items() if np.ndim(v)}).items():
            self._sums.setdefault(k, []).append(v)
        self._step = step
        if self._first is None:
            self._first = step - 1
        if step % self._interval == 0 or step == self._recipe.total_steps:
            self.flush()

    def flush(self) -> None:
        """Write the line of what was added since the last one."""
        if not self._sums:
            return
        now, waited = time.monotonic(), self._loader.seconds_waited
        seconds, steps = now - self._since, 0 if self._first is None else self._step - self._first
        figures = {k: sum(v) / len(v) for k, v in self._sums.items()}
        figures["lr"] = float(self._recipe.schedule(jnp.asarray(self._recipe.encoder_step(self._step - 1))))
        if steps:  # otherwise the clock has only just begun anew
            figures["images_per_second"] = steps * self._recipe.batch_size / seconds
            figures["data_wait"] = (waited - self._waited) / seconds
        self._sums, self._since, self._waited, self._first = {}, now, waited, self._step
        loss = figures.get("loss", figures.get("probe/loss"))  # a probe that learns by itself has only its own
        self._progress.update(self._step, loss=loss, data_wait=figures.get("data_wait", 0.0))
        self.write(self._step, figures)

    def write(self, step: int, figures: dict[str, float]) -> None:
        if self._writer:
            # Numbers as they are, and rows of them (histograms) with the digits that a figure shows.
            rows = {k: np.round(np.asarray(v, np.float64), 5).tolist() for k, v in figures.items() if np.ndim(v)}
            self._writer.write(step, {k: v for k, v in figures.items() if k not in rows}, **rows)


class _Best:
    """Keeps the state that is best on the validation split; without one there is no best, only a last."""

    def __init__(self, workdir: epath.Path, config: ConfigDict, recipe: Recipe):
        self._on = bool(config.checkpoint.keep_best and config.data.validation)
        self._recipe, self._path, self._file = recipe, workdir / "best", workdir / "best.json"
        self._record = json.loads(self._file.read_text()) if self._on and self._file.exists() else None

    def offer(self, step: int, state: TrainState, figures: dict[str, float]) -> None:
        score = figures.get("eval/classifier_accuracy", figures.get("eval/knn_accuracy"))
        if not self._on or score is None or (self._record and score <= self._record["validation_accuracy"]):
            return
        with Checkpoints(self._path, keep=1) as checkpoints:
            checkpoints.save(step, state)
        self._record = {"step": step, "validation_accuracy": score}
        if jax.process_index() == 0:
            run_folder.write_json(self._file, self._record)

    def result(self, evaluation: Evaluation, state: TrainState, whole: Callable, mesh) -> dict[str, Any]:
        """{"best": ...}: the last state is offered too, and the winner measured once on the test split."""
        if not self._on:
            return {}
        self.offer(int(state.step), state, evaluation.quick(whole(state), mesh))
        if self._record is None:  # nothing that can be scored, as without labels
            return {}
        with Checkpoints(self._path, keep=1) as checkpoints:
            winner = checkpoints.restore(state)
        figures = evaluation.quick(whole(winner), mesh, split="test")
        return {"best": self._record | {k.removeprefix("eval/"): v for k, v in figures.items()}}


def _diverged(error: Diverged, checkpoints: Checkpoints) -> str:
    checkpoints.wait()
    last = checkpoints.latest
    where = (
        "no checkpoint was saved yet"
        if last is None
        else f"the last good checkpoint is step {last} in {checkpoints.directory}"
    )
    return f"{error}; {where}; try a lower optimizer.lr, a warm-up or optimizer.clip_norm"
