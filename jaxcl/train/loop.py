"""The training loop, read top to bottom: data -> update -> metrics -> evaluate -> checkpoint -> report."""

import contextlib
import dataclasses
import functools
import logging
import os
import time
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from jaxcl import config as configs
from jaxcl import report
from jaxcl.data import Loader, Source, order_of, shuffle, source_of
from jaxcl.errors import Diverged, Preempted, UserError
from jaxcl.evaluate.suite import Evaluation
from jaxcl.method import sharding
from jaxcl.method.build import build_recipe, data_facts
from jaxcl.method.init_state import init_state, state_shardings
from jaxcl.method.initial_weights import starting_weights
from jaxcl.method.recipe import Recipe
from jaxcl.method.state import TrainState
from jaxcl.method.update import compile_update
from jaxcl.report.wandb import WandbRun
from jaxcl.runtime import storage
from jaxcl.runtime.lock import RunLock
from jaxcl.train import agreement, config_diff, first_weights, run_folder
from jaxcl.train import profile as profiles
from jaxcl.train.best import Best, check_selection
from jaxcl.train.checkpoint import AGAIN, Checkpoints, Preemption
from jaxcl.train.intervals import Intervals, due, intervals_of
from jaxcl.train.log import TrainLog
from jaxcl.train.monitor import compile_monitor

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
            _set_ruined_aside(workdir, error.step)
            advice = "try a lower optimizer.lr, a warm-up or optimizer.clip_norm"
            raise Diverged(f"{error}; {_last_good(workdir)} in {workdir}; {advice}", step=error.step) from None
        except OSError as error:
            if not epath.Path(workdir).exists():
                what = f"{workdir} was renamed or removed during the run"
                raise UserError(f"{what}; put it back, then run the same command again to continue") from None
            if reason := storage.refusal(error):
                what = f"cannot write in {workdir}: {reason}; {_last_good(workdir)}"
                raise UserError(f"{what}; make room, then run the same command again to continue") from None
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
    plain = configs.to_dict(config)
    if jax.process_count() > 1:
        agreement.same_start(plain, workdir, _latest(workdir), {"--profile": profile})
    if (results := run_folder.finished(workdir, plain)) is not None:
        return results

    job = _prepare(config, plain, workdir, profile)
    if jax.process_count() > 1:
        agreement.same_data(train=job.source, **{config.eval.split: job.evaluation.source(config.eval.split)})
    order = job.order.name if job.order else shuffle.ORDER
    known = job.facts | {"class_names": job.source.class_names, run_folder.ROW_ORDER: order}
    if job.source.fingerprint:
        known[run_folder.FINGERPRINT] = job.source.fingerprint
    lock = run_folder.claim(workdir, plain, known, _writes())
    if lock:
        stack.callback(lock.close)
    if _writes() and job.weights and "drift" in (*config.eval.quick, *config.eval.final):
        first_weights.record(workdir, job.weights)
    wandb = report.open_wandb(config.wandb, workdir, plain) if _writes() else None
    if wandb:
        stack.enter_context(wandb)
    best = Best(workdir, config)
    state = _train(job, preemption, lock, wandb, best)
    results = _finish(job, state, best, started=started, trained=time.monotonic())
    if wandb:
        wandb.finish(results)
    return results


def _train(job: "Job", preemption: Preemption, lock: RunLock | None, wandb: WandbRun | None, best: Best) -> TrainState:
    """The state after the last update, from the newest checkpoint of the folder or from a fresh state."""
    recipe, every, total = job.recipe, job.every, job.recipe.total_steps
    with contextlib.ExitStack() as stack:  # closes from the last to the first, even if one of them fails
        checkpoints = stack.enter_context(_checkpoints(job))
        state, step = _initial_state(job, checkpoints)
        log = stack.enter_context(_log(job, step, wandb))
        loader = stack.enter_context(_loader(job, step))
        trace = stack.enter_context(_trace(job, step))
        update_of = functools.cache(lambda phase: compile_update(recipe, phase, job.state_shardings, job.rows))
        monitor = compile_monitor(recipe, job.state_shardings, job.rows)

        def save(step: int, state: TrainState) -> None:
            log.flush()
            if not _sound(state.params):
                raise Diverged(f"the parameters are no longer finite at step {step}", step=step + 1)
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


def _finish(job: "Job", state: TrainState, best: Best, *, started: float, trained: float) -> dict[str, Any]:
    """Evaluate the last state or the best one, write the report and results.json; -> the results."""
    config, workdir = job.config, job.workdir
    of_best, chosen = best.result(job.evaluation, state, job.gather, job.mesh)
    results, panels = job.evaluation.final(job.gather(chosen if config.eval.state == "best" else state), job.mesh)
    results |= of_best
    results |= {
        "seed": config.seed,
        "config": config.name,
        "steps": job.recipe.total_steps,
        "command": run_folder.command(),
        "versions": run_folder.environment()["packages"],
        "seconds": {"train": round(trained - started, 1), "evaluate": round(time.monotonic() - trained, 1)},
    }
    if not _writes():
        return results
    if config.report:
        begun = time.monotonic()
        page = report.write_report(
            workdir,
            config=job.plain,
            environment=run_folder.environment(),
            results=results,
            metrics=report.read_metrics(workdir),
            panels=panels | {"step_time": profiles.read_step_time(workdir)},
            images={"training": len(job.source), config.eval.split: len(job.evaluation.source(config.eval.split))},
        )
        results["seconds"]["report"] = round(time.monotonic() - begun, 1)
        logger.info("report: %s", page)
    run_folder.write_json(workdir / "results.json", results)  # last: a run with this file is finished
    return results


# ---- what the loop works with


@dataclasses.dataclass(frozen=True)
class Job:
    """One run, prepared: everything that is known before a program compiles."""

    config: ConfigDict
    plain: dict[str, Any]  # config as plain containers
    workdir: epath.Path
    source: Source
    order: Any  # of the training rows; None: the default
    facts: dict[str, Any]  # of the data, as the recipe needs them
    devices: int
    recipe: Recipe
    evaluation: Evaluation
    every: Intervals
    profile: int
    weights: dict[str, Any]  # that training starts from, by encoder

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        return sharding.make_mesh(self.devices, self.config.hosts)

    @functools.cached_property
    def rows(self) -> jax.sharding.NamedSharding:
        """Sharding of the arrays of a batch."""
        return sharding.batch_sharding(self.mesh)

    @functools.cached_property
    def state_shardings(self) -> TrainState:
        return state_shardings(self.recipe, self.mesh)

    @functools.cached_property
    def gather(self) -> Callable[[TrainState], TrainState]:
        """Replicates a state over the mesh, as evaluation needs it."""
        if self.recipe.sharding == "data":
            return lambda state: state
        return jax.jit(lambda state: state, out_shardings=sharding.replicated(self.mesh))


def _prepare(config: ConfigDict, plain: dict[str, Any], workdir: epath.Path, profile: int) -> Job:
    """Open the data, build the recipe and check everything that can be wrong. Raises: UserError."""
    source = source_of(config, "train")
    if len(source) == 1:
        source_of(config, "test")  # UserError if that one image is the whole set
    devices = config.devices or jax.device_count()
    if devices > jax.device_count():
        raise UserError(f"devices is {devices}, but there are {jax.device_count()}; use 0 for all of them")
    facts = data_facts(source)
    recipe = build_recipe(config, **facts, num_devices=devices)
    evaluation = Evaluation(config, recipe, train=source, make_source=lambda split: source_of(config, split))
    evaluation.first = lambda: first_weights.first_weights(config, recipe, workdir)
    evaluation.check_options()
    recipe.finetune.say(lambda: jax.eval_shape(lambda: init_state(recipe)).params)
    check_selection(config)
    every = intervals_of(config, recipe)
    if profile:
        profiles.check(profile, recipe.total_steps)
    return Job(
        config=config,
        plain=plain,
        workdir=workdir,
        source=source,
        order=order_of(config, source),
        facts=facts,
        devices=devices,
        recipe=recipe,
        evaluation=evaluation,
        every=every,
        profile=profile,
        weights={} if _latest(workdir) is not None else starting_weights(config, recipe),
    )


@jax.jit
def _sound(params: Any) -> jax.Array:
    """Whether parameters can be trained further: none is NaN, or so large that its square is infinite."""
    return jnp.isfinite(sum(jnp.sum(jnp.square(jnp.abs(x).astype(jnp.float32))) for x in jax.tree.leaves(params)))


def _writes() -> bool:
    """Whether this process is the one that writes to the run folder."""
    return jax.process_index() == 0


def _checkpoints(job: Job) -> Checkpoints:
    about = {
        "config": config_diff.fingerprint(job.plain),
        "data": run_folder.plain(job.facts),
        "batch_size": job.recipe.batch_size,
        "devices": job.devices,
        "processes": jax.process_count(),
    }
    return Checkpoints(job.workdir / "checkpoints", keep=job.config.checkpoint.keep, about=about)


def _latest(workdir: epath.Path) -> int | None:
    """The newest checkpoint of a run that continues; the weights that it started from are not needed any more."""
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        return None
    with Checkpoints(folder, read_only=True) as checkpoints:
        return checkpoints.latest


def _initial_state(job: Job, checkpoints: Checkpoints) -> tuple[TrainState, int]:
    """The state of the newest checkpoint, else a fresh one; -> (state, its step)."""
    # This program runs once. On a CPU the many draws of weights compile slowly, and optimising them does not pay.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    create = jax.jit(
        lambda seed, weights: init_state(job.recipe, seed, weights),
        out_shardings=job.state_shardings,
        compiler_options=options,
    )
    seed = np.uint32(job.recipe.seed)  # an argument: XLA would fold a constant
    if checkpoints.latest is None:
        return create(seed, job.weights), 0
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(create, seed, job.weights),
        job.state_shardings,
    )
    state = checkpoints.restore(abstract)
    step = int(state.step)  # less than `latest` if that one is damaged
    if step > job.recipe.total_steps:
        raise UserError(
            f"{checkpoints.directory}/{step} is no checkpoint of this run, which has {job.recipe.total_steps} steps; "
            "move it away"
        )
    logger.info("resuming %s from step %d", job.workdir, step)
    return state, step


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


def _loader(job: Job, step: int) -> Loader:
    return Loader(
        job.source,
        batch_size=job.recipe.batch_size,
        seed=job.recipe.seed,
        start_step=step,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        sharding=job.rows,
        prefetch=job.config.data.prefetch,
        order=job.order,
    )


def _trace(job: Job, step: int) -> profiles.Profile:
    """The trace of `job.profile` updates, started where no pause is near."""
    every = (job.every.eval, job.every.checkpoint, job.every.collapse)
    return profiles.Profile.of_run(
        job.workdir,
        job.profile,
        first=step,
        total=job.recipe.total_steps,
        kind=job.recipe.phase,
        pauses=lambda step: any(due(step, n) for n in every),
    )


def _set_ruined_aside(workdir: epath.Path, step: int | None) -> None:
    """Rename the checkpoint that the update `step` began with: its loss is not finite, so every start from it fails."""
    if step is None or not _writes():
        return
    ruined = workdir / "checkpoints" / str(step - 1)
    if ruined.is_dir():
        storage.move_folder(ruined, ruined.with_name(f"ruined-{step - 1}"))


def _last_good(workdir: epath.Path) -> str:
    folder = workdir / "checkpoints"
    if not folder.exists():
        return "no checkpoint was saved yet"
    with Checkpoints(folder, read_only=True) as checkpoints:
        return checkpoints.last_good()
