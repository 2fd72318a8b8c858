"""One run, prepared: everything that is known before a program compiles, and what the loop is given to work with."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from jaxcl.data import Loader, Source, order_of, shuffle, source_of
from jaxcl.errors import UserError
from jaxcl.evaluate.suite import Evaluation
from jaxcl.method import sharding
from jaxcl.method.build import build_recipe, data_facts
from jaxcl.method.init_state import init_state, state_shardings
from jaxcl.method.initial_weights import starting_weights
from jaxcl.method.recipe import Recipe
from jaxcl.method.state import TrainState
from jaxcl.train import agreement, config_diff, first_weights, run_folder
from jaxcl.train.best import check_selection
from jaxcl.train.checkpoint import Checkpoints
from jaxcl.train.intervals import Intervals, intervals_of
from jaxcl.train.step_names import complete_steps

logger = logging.getLogger("jaxcl")


@dataclasses.dataclass(frozen=True)
class Job:
    """One run, prepared by `prepare`."""

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
    weights: dict[str, Any] | None  # that training starts from, by encoder; None: a run that continues needs none

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

    # ---- data

    @property
    def known(self) -> dict[str, Any]:
        """The contents of data.json: facts of the training data and the order of its rows."""
        found = self.facts | {
            "class_names": self.source.class_names,
            run_folder.ROW_ORDER: self.order.name if self.order else shuffle.ORDER,
        }
        if self.source.fingerprint:
            found[run_folder.FINGERPRINT] = self.source.fingerprint
        return found

    def rows_of(self, step: int) -> np.ndarray:
        """The rows of the training data [batch_size] in the batch of update `step` (from 1), over all processes."""
        if self.order:
            return np.asarray(self.order(step - 1))
        return shuffle.Shuffled(len(self.source), batch_size=self.recipe.batch_size, seed=self.recipe.seed)(step - 1)

    def loader(self, step: int) -> Loader:
        """The batches after update `step`, on the devices."""
        return Loader(
            self.source,
            batch_size=self.recipe.batch_size,
            seed=self.recipe.seed,
            start_step=step,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            sharding=self.rows,
            prefetch=self.config.data.prefetch,
            order=self.order,
        )

    # ---- state

    def checkpoints(self) -> Checkpoints:
        """The checkpoints of the run, to be written."""
        about = {
            "config": config_diff.fingerprint(self.plain),
            "data": run_folder.plain(self.facts),
            "batch_size": self.recipe.batch_size,
            "devices": self.devices,
            "processes": jax.process_count(),
        }
        return Checkpoints(self.workdir / "checkpoints", keep=self.config.checkpoint.keep, about=about)

    @functools.cached_property
    def _create(self) -> Callable[[np.uint32, dict[str, Any]], TrainState]:
        # This program runs once. On a CPU the many draws of weights compile slowly, and optimising them does not pay.
        options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        return jax.jit(
            lambda seed, weights: init_state(self.recipe, seed, weights),
            out_shardings=self.state_shardings,
            compiler_options=options,
        )

    def fresh_state(self) -> TrainState:
        """The state at step 0, with the weights that the config names."""
        weights = starting_weights(self.config, self.recipe) if self.weights is None else self.weights
        return self._create(np.uint32(self.recipe.seed), weights)  # a seed as argument: XLA would fold a constant

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """The shapes and shardings of a state, to read one from a checkpoint."""
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            jax.eval_shape(lambda seed: init_state(self.recipe, seed), jax.ShapeDtypeStruct((), np.uint32)),
            self.state_shardings,
        )

    def initial_state(self, checkpoints: Checkpoints) -> tuple[TrainState, int]:
        """The state of the newest checkpoint, else a fresh one; -> (state, its step)."""
        if checkpoints.latest is None:
            return self.fresh_state(), 0
        state = checkpoints.restore(self.abstract_state)
        step = int(state.step)  # less than `latest` if that one is damaged
        if step > self.recipe.total_steps:
            raise UserError(
                f"{checkpoints.directory}/{step} is no checkpoint of this run, which has {self.recipe.total_steps} "
                "steps; move it away"
            )
        logger.info("resuming %s from step %d", self.workdir, step)
        return state, step


def prepare(config: ConfigDict, plain: dict[str, Any], workdir: epath.Path) -> Job:
    """Open the data, build the recipe and check everything that can be wrong; on all processes. Raises: UserError."""
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
        every=intervals_of(config, recipe),
        weights=starting_weights(config, recipe) if latest(workdir) is None else None,
    )


def same_data(job: Job) -> None:
    """Compare the data over all processes. Raises: UserError if it differs."""
    if jax.process_count() > 1:
        split = job.config.eval.split
        agreement.same_data(train=job.source, **{split: job.evaluation.source(split)})


def latest(workdir: epath.Path) -> int | None:
    """The newest checkpoint of a run that continues; the weights that it started from are not needed any more."""
    return max(complete_steps(workdir / "checkpoints"), default=None)


def writes() -> bool:
    """Whether this process is the one that writes to the run folder."""
    return jax.process_index() == 0
