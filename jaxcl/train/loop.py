"""The training loop, read top to bottom: data -> update -> metrics -> evaluate -> checkpoint -> report."""

import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from etils import epath
from ml_collections import ConfigDict

from jaxcl import config as configs
from jaxcl import report
from jaxcl.errors import Diverged, Preempted, UserError
from jaxcl.method.state import TrainState
from jaxcl.method.update import compile_update
from jaxcl.report.verdict import main_accuracies
from jaxcl.report.wandb import WandbRun
from jaxcl.runtime import storage
from jaxcl.runtime.lock import RunLock
from jaxcl.train import agreement, code, diverged, first_weights, pretrained, run_folder
from jaxcl.train import profile as profiles
from jaxcl.train.best import Best
from jaxcl.train.checkpoint import AGAIN, Preemption, last_good
from jaxcl.train.intervals import due
from jaxcl.train.job import Job, latest, prepare, same_data, writes
from jaxcl.train.log import TrainLog
from jaxcl.train.monitor import compile_monitor
from jaxcl.train.step_names import complete_steps

logger = logging.getLogger("jaxcl")


def run(config: ConfigDict, workdir: str | os.PathLike, *, profile: int = 0) -> dict[str, Any]:
    """Train what the config says in `workdir`, or continue where an earlier call stopped.

    Args:
      config: as `jaxcl.config.default` makes it, with the slots of the method filled.
      workdir: the run folder; local or in an object store (gs://).
      profile: number of updates to trace (`jaxcl.train.profile`); 0: none.

    Returns:
      The contents of results.json.

    Raises:
      UserError: a mistake in the config or the data, before anything compiles; or the storage of `workdir` is full.
      Diverged: a metric is no longer finite.
      Preempted: stopped by SIGTERM, Ctrl-C or SIGHUP, after everything was saved.
    """
    storage.need_library(workdir)
    workdir = storage.expanded(workdir)
    preemption = Preemption(at_once=True)
    with contextlib.ExitStack() as stack:  # what lives as long as the run: the signal handler, the lock, W&B
        stack.callback(preemption.close)
        try:
            return _run(config, workdir, profile, preemption, stack)
        except Diverged as error:
            advice = "try a lower optimizer.lr, a warm-up or optimizer.clip_norm"
            if error.update is not None:
                advice += f"; --replay={error.update} shows where it begins"
            error.args = (f"{error}; {_last_good(workdir)} in {workdir}; {advice}",)
            raise
        except OSError as error:
            if not epath.Path(workdir).exists():
                what = f"{workdir} was renamed or removed during the run"
                raise UserError(f"{what}; put it back, then run the same command again to continue") from None
            if reason := storage.refusal(error):
                what = f"cannot write in {workdir}: {reason}; {_last_good(workdir)}"
                raise UserError(f"{what}; make room, then run the same command again to continue") from None
            if storage.inside(error.filename, workdir):  # something else is in its place, or it may not be used
                what = f"cannot use {error.filename}: {(error.strerror or str(error)).lower()}; {_last_good(workdir)}"
                raise UserError(f"{what}; mend that, then run the same command again to continue") from None
            raise


def _run(
    config: ConfigDict,
    workdir: epath.Path,
    profile: int,
    preemption: Preemption,
    stack: contextlib.ExitStack,
) -> dict[str, Any]:
    started = time.monotonic()
    configs.check(config)
    config = pretrained.resolved(config, workdir)
    plain = configs.to_dict(config)
    if jax.process_count() > 1:
        agreement.same_start(plain, workdir, latest(workdir), {"--profile": profile})
    if (results := run_folder.finished(workdir, plain)) is not None:
        return results

    job = prepare(config, plain, workdir)
    if profile:
        profiles.check(profile, job.recipe.total_steps)
    same_data(job)
    lock = run_folder.claim(workdir, plain, job.known, writes())
    if lock:
        stack.callback(lock.close)
    if writes() and job.weights and {"drift", "neighbours"} & {*config.eval.quick, *config.eval.final}:
        first_weights.record(workdir, job.weights)
    wandb = report.open_wandb(config.wandb, workdir, plain) if writes() else None
    if wandb:
        stack.enter_context(wandb)
    best = Best(workdir, config)
    try:
        state = _train(job, profile, preemption, lock, wandb, best)
    except Diverged as error:
        diverged.keep(job, error)
        raise
    results = _finish(job, state, best, started=started, trained=time.monotonic())
    if wandb:
        wandb.finish(results)
    return results


def _train(
    job: Job, profile: int, preemption: Preemption, lock: RunLock | None, wandb: WandbRun | None, best: Best
) -> TrainState:
    """The state after the last update, from the newest checkpoint of the folder or from a fresh state."""
    recipe, every, total = job.recipe, job.every, job.recipe.total_steps
    with contextlib.ExitStack() as stack:  # closes from the last to the first, even if one of them fails
        checkpoints = stack.enter_context(job.checkpoints())
        state, step = job.initial_state(checkpoints)
        log = stack.enter_context(_log(job, step, wandb))
        loader = stack.enter_context(job.loader(step))
        trace = stack.enter_context(_trace(job, profile, step))
        update_of = functools.cache(lambda phase: compile_update(recipe, phase, job.state_shardings, job.rows))
        monitor = compile_monitor(recipe, job.state_shardings, job.rows)

        def look(step: int, state: TrainState) -> None:
            """Raise Diverged unless a run can go on from this state; before anything is saved."""
            ruined = [part for part, count in jax.device_get(_ruined(state)).items() if count]
            if ruined:
                what = f"the {ruined[0]} are no longer finite at step {step}"
                raise Diverged(what, step=step + 1, update=step, metrics=log.newest)

        def save(step: int, state: TrainState) -> None:
            log.flush()
            look(step, state)
            checkpoints.save(step, state)

        def stop(step: int, state: TrainState) -> NoReturn:
            log.sync()
            if step:
                save(step, state)
            checkpoints.wait()
            error = Preempted(f"stopped at step {step} of {total} on request; {AGAIN}")
            error.at_once = jax.process_count() == 1
            raise error from None

        def evaluate(step: int, state: TrainState) -> None:
            look(step, state)
            try:
                with log.paused(), preemption.waiting():
                    metrics = job.evaluation.quick(job.gather(state), job.mesh)
            except Preempted:
                stop(step, state)  # the run evaluates this state when it continues
            log.write(step, metrics)
            best.offer(step, state, metrics)
            log.start_clock(loader)

        log.start_clock(loader)
        preemption.loop_begins()
        if due(step, every.eval) and 0 < step < total and not _evaluated(job.workdir, step):
            evaluate(step, state)
        while step < total:
            update = update_of(recipe.phase(step))
            trace.before(step, state)
            try:
                with trace.waiting(), preemption.waiting():
                    batch = next(loader)
            except Preempted:
                stop(step, state)
            with trace.update(step), jax.transfer_guard("disallow"):
                state, metrics = update(state, batch)
                if due(step + 1, every.collapse):
                    metrics |= monitor(state, batch)
            trace.after(step, update, state, batch)
            step += 1
            log.add(step, metrics, batch)

            preempted = preemption.reached(step)
            evaluates = due(step, every.eval) and step < total
            saves = due(step, every.checkpoint) or step == total or preempted
            if lock:
                lock.check(look=evaluates or saves)
            if evaluates or saves:
                log.sync()  # waits for this update: a state with a loss that is not finite is never saved
            if evaluates:
                evaluate(step, state)
            if saves:
                save(step, state)
            if preempted:
                stop(step, state)
        preemption.loop_ended()
    return state


def _finish(job: Job, state: TrainState, best: Best, *, started: float, trained: float) -> dict[str, Any]:
    """Evaluate the last state or the best one, write the report and results.json; -> the results."""
    config, workdir = job.config, job.workdir
    of_best, chosen = best.result(job.evaluation, state, job.gather, job.mesh)
    results, panels = job.evaluation.final(job.gather(chosen if config.eval.state == "best" else state), job.mesh)
    results |= of_best
    results |= {
        "seed": config.seed,
        "config": config.name,
        "images": _images(job),
        "steps": job.recipe.total_steps,
        "command": run_folder.command(),
        "versions": code.packages(),
        "seconds": {"train": round(trained - started, 1), "evaluate": round(time.monotonic() - trained, 1)},
    }
    if not writes():
        return results
    if config.report:
        begun = time.monotonic()
        page = report.write_report(
            workdir,
            config=job.plain,
            environment=run_folder.environment(job.plain),
            results=results,
            metrics=report.read_metrics(workdir),
            panels=panels | {"step_time": profiles.read_step_time(workdir)},
            images=results["images"],
        )
        results["seconds"]["report"] = round(time.monotonic() - begun, 1)
    for line in main_accuracies(results):
        logger.info(line)
    if config.report:
        logger.info("report: %s", page)
    run_folder.write_json(workdir / "results.json", results)  # last: a run with this file is finished
    return results


def _images(job: "Job") -> dict[str, int]:
    """The number of images by split."""
    split = job.config.eval.split
    return {"training": len(job.source), split: len(job.evaluation.source(split))}


# ---- what the loop works with


@jax.jit
def _ruined(state: TrainState) -> dict[str, jax.Array]:
    """How many arrays of each part of a state no run can go on from: NaN, or so large that their square is infinite.

    Memory, which may be anybody's, may hold infinities.
    """

    def count(bad: Callable[[jax.Array], jax.Array], tree: Any) -> jax.Array:
        arrays = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
        return sum((bad(x).any() for x in arrays), jnp.zeros((), jnp.int32))

    return {
        "parameters": count(lambda x: ~jnp.isfinite(jnp.sum(jnp.square(jnp.abs(x).astype(jnp.float32)))), state.params),
        "batch statistics": count(lambda x: ~jnp.isfinite(x), state.batch_stats),
        "optimizer's sums": count(lambda x: ~jnp.isfinite(x), state.opt_state),
        "arrays in memory": count(jnp.isnan, state.memory),
    }


def _evaluated(workdir: epath.Path, step: int) -> bool:
    """Whether the log has the evaluation of a step; a run of several processes does not look: it never stops in one."""
    if jax.process_count() > 1:
        return True
    return any(row["step"] == step and any(k.startswith("eval/") for k in row) for row in report.read_metrics(workdir))


def _log(job: Job, step: int, wandb: WandbRun | None) -> TrainLog:
    return TrainLog(
        job.recipe,
        job.workdir,
        interval=job.every.log,
        first_step=step,
        examples=job.config.log_examples,
        wandb=wandb,
    )


def _trace(job: Job, count: int, step: int) -> profiles.Profile:
    """The trace of `count` updates, started where no pause is near."""
    every = (job.every.eval, job.every.checkpoint, job.every.collapse)
    return profiles.Profile.of_run(
        job.workdir,
        count,
        first=step,
        total=job.recipe.total_steps,
        kind=job.recipe.phase,
        pauses=lambda step: any(due(step, n) for n in every),
    )


def _last_good(workdir: epath.Path) -> str:
    folder = workdir / "checkpoints"
    return last_good(folder, complete_steps(folder))
