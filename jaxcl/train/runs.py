"""Runs opened from their folders, finished or not, to be evaluated again, one by one or several joined.

N images, D features.
"""

import ast
import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from jaxcl import config as configs
from jaxcl.data import Source, default_fit, keeps_size, source_of
from jaxcl.errors import UserError
from jaxcl.evaluate.base import Metrics
from jaxcl.evaluate.context import EvalContext
from jaxcl.evaluate.registry import EVALUATORS, make_evaluator
from jaxcl.evaluate.suite import Evaluation, check_split
from jaxcl.method import sharding
from jaxcl.method.build import build_recipe
from jaxcl.method.init_state import init_state
from jaxcl.method.recipe import Recipe
from jaxcl.method.state import TrainState
from jaxcl.runtime import storage
from jaxcl.runtime.options import OptionError, check, options_of, suggestion
from jaxcl.train.checkpoint import Checkpoints
from jaxcl.train.first_weights import first_weights
from jaxcl.train.run_folder import FINGERPRINT, ROW_ORDER

logger = logging.getLogger("jaxcl")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saved:
    """A run, opened from its folder: its config, recipe and state. It does not need the run's data.

    Attributes:
      workdir: the folder.
      config, recipe: of the run, with the changes that `open_run` was given.
      state: from the checkpoint of step `step`, replicated over `mesh`.
      class_names: of the training data; None for runs of versions that did not save them.
      environment: contents of environment.json: packages, commit and so on.
    """

    workdir: epath.Path
    config: ConfigDict
    recipe: Recipe
    state: TrainState
    step: int
    mesh: jax.sharding.Mesh
    class_names: tuple[str, ...] | None
    environment: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Saved):
    """An open run with its data, ready to be evaluated."""

    evaluation: Evaluation

    def context(self, split: str = "test") -> EvalContext:
        """The context of its state, to measure on a split."""
        return EvalContext(self.evaluation, self.state, self.mesh, split)


def load_run(
    workdir: str | os.PathLike,
    *,
    source: str = "",
    step: int | None = None,
    options: Sequence[str] = (),
    any_part: bool = False,
) -> Run:
    """Opens a run with its data. Arguments and errors as in `open_run`; also UserError if data is missing.

    any_part: the data may have no training images; its features can be read, split by split.
    """
    saved = open_run(workdir, source=source, step=step, options=options)
    config, parts = saved.config, ("train", "test") if any_part else ("train",)
    if any_part:
        config.eval.split = "test"  # not used, but a split that results are measured on must be there
    if source:
        _fit_labels(config, parts)
    part, found = _first(config, parts)
    evaluation = Evaluation(
        config,
        saved.recipe,
        train=found if part == "train" else None,
        make_source=lambda split: source_of(config, split),
        class_names=saved.class_names,
    )
    evaluation.first = lambda: first_weights(saved.config, saved.recipe, saved.workdir)
    return Run(**vars(saved), evaluation=evaluation)


def open_run(
    workdir: str | os.PathLike, *, source: str = "", step: int | None = None, options: Sequence[str] = ()
) -> Saved:
    """Opens a run.

    Args:
      workdir: the --workdir of the training, local or remote.
      source: a data source that replaces the run's own. Images are normalised as in training, and image files are
        decoded at the size of the training images.
      step: of the checkpoint; None: the newest, or the best one of a run whose eval.state is "best".
      options: "KEY=VALUE" texts that change keys of config.eval, such as "ood=('sketch=folder:PATH',)".

    Raises:
      UserError: no run in the folder, no such checkpoint, a checkpoint that does not fit the config, or an option that
        does not exist or cannot have this value.
    """
    storage.need_library(workdir)
    workdir = storage.expanded(workdir)
    files = {name: workdir / f"{name}.json" for name in ("config", "data")}
    for path in files.values():
        if not path.is_file():
            raise UserError(f"{workdir} is not a run folder: it has no {path.name}; give the --workdir of a run")
    plain, facts = map(storage.read_json, files.values())
    class_names = facts.pop("class_names", None)
    for key in (ROW_ORDER, FINGERPRINT):  # only training needs them
        facts.pop(key, None)
    shape = facts.get("image_shape")
    if not (isinstance(shape, list) and len(shape) == 3 and all(isinstance(n, int) for n in shape)):
        raise UserError(f"{files['data']} is not one of jaxcl: image_shape is {shape}; restore a copy of it")
    environment = workdir / "environment.json"
    with _of_jaxcl(files["config"]):
        config = configs.from_dict(plain)
        if "fit" not in plain["data"].get("files", {}) and default_fit(config.data.source):
            config.data.files.fit = "crop"  # as versions did that had no such key
    config.report = False
    config.data.textures = ""  # only training needs them
    if source:
        config.data.source = source
        if keeps_size(source):
            # Otherwise files decode at their own size, larger than needed or smaller than the encoder's input.
            config.data.files.image_size = config.data.files.image_size or shape[0]
    for option in options:
        _set(config.eval, option)
    with _of_jaxcl(workdir):
        recipe = build_recipe(config, **{k: tuple(v) if isinstance(v, list) else v for k, v in facts.items()})
    mesh = sharding.make_mesh()
    best = config.eval.state == "best" and step is None and (workdir / "best.json").exists()
    with Checkpoints(workdir / ("best" if best else "checkpoints"), read_only=True) as checkpoints:
        if checkpoints.latest is None:
            raise UserError(f"{workdir} has no checkpoint yet; let the run save one first")
        if step is not None and step not in checkpoints.steps:
            there = ", ".join(map(str, checkpoints.steps))
            raise UserError(f"{workdir} has no checkpoint of step {step}; it has {there}")
        place = sharding.replicated(mesh)
        abstract = jax.eval_shape(lambda: init_state(recipe))
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract)
        state = checkpoints.restore(abstract, step)  # without a step: the newest one that is not damaged
        step = int(state.step) if step is None else step
    return Saved(
        workdir=workdir,
        config=config,
        recipe=recipe,
        state=state,
        step=step,
        mesh=mesh,
        class_names=None if class_names is None else tuple(class_names),
        environment=storage.read_json(environment) if environment.is_file() else {},
    )


def _first(config: ConfigDict, parts: Sequence[str]) -> tuple[str, Source]:
    """The first of some splits that can be read. Raises UserError, of the first, if none can."""
    errors = []
    for part in parts:
        try:
            return part, source_of(config, part)
        except UserError as error:
            errors.append(error)
    raise errors[0]


def _fit_labels(config: ConfigDict, parts: Sequence[str]) -> None:
    """Drop what the run asked of the labels of its own data, where another source cannot give it."""
    config.data.imbalance = ""  # of training images of CIFAR-100
    if config.data.labels == "coarse":
        config.data.labels = "fine"
        if _first(config, parts)[1].coarse_names:
            config.data.labels = "coarse"
        else:
            logger.info("%s has no coarse classes; it is evaluated on its own", config.data.source)


@contextlib.contextmanager
def _of_jaxcl(path: epath.Path) -> Iterator[None]:
    """Turn what a foreign or damaged file causes into one line."""
    try:
        yield
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not one of jaxcl, or damaged ({error}); restore a copy of it") from error


def _set(options: ConfigDict, text: str) -> None:
    """Sets a key of config.eval from "KEY=VALUE"; a value that is no Python literal is a text."""
    key, equals, value = text.partition("=")
    key = key.removeprefix("eval.")
    if not equals or key not in options:
        raise UserError(f"--set={text}: expected KEY=VALUE with a key of config.eval{suggestion(key, options)}")
    try:
        value = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        pass
    try:
        check(key, value, options_of(configs.Eval)[key])
    except OptionError as error:
        raise UserError(f"--set={text}: eval.{key} {error.reason}") from None
    options[key] = type(options[key])(value)


class Joined(EvalContext):
    """Several runs as one encoder, their features side by side. Labels and options come from the first run.

    Raises:
      UserError: the runs do not have the same images.
    """

    def __init__(self, runs: Sequence[Run], split: str = "test"):
        first = runs[0]
        super().__init__(first.evaluation, first.state, first.mesh, split)
        self._contexts = [run.context(split) for run in runs]
        for run, context in zip(runs[1:], self._contexts[1:], strict=True):
            context.batch_size = self.batch_size  # `stream` joins batches, too
            if not _same_images(self.test, context.test):
                raise UserError(
                    f"{runs[0].workdir} and {run.workdir} were trained on different data, {self.test.name} and "
                    f"{context.test.name}; give both the same --source"
                )

    def features(self, split: str, kind: str = "") -> np.ndarray:
        """float32 [N,D], D the sum over the runs."""
        return np.concatenate([context.features(split, kind) for context in self._contexts], axis=-1)

    def features_of(self, source: Source) -> np.ndarray:
        """float32 [N,D], as `features`."""
        return np.concatenate([context.features_of(source) for context in self._contexts], axis=-1)

    def stream(self, source: Source, kind: str) -> Iterator[np.ndarray]:
        """Yields float32 [n,D], as `EvalContext.stream`."""
        for features in zip(*(context.stream(source, kind) for context in self._contexts), strict=True):
            yield np.concatenate(features, axis=-1)

    def augmented_features(self, split: str, draw: int) -> np.ndarray:
        """float32 [N,D]; runs with one seed and equal views see the same augmented images."""
        return np.concatenate([context.augmented_features(split, draw) for context in self._contexts], axis=-1)


def _same_images(a: Source, b: Source) -> bool:
    if len(a) != len(b) or a.image_shape != b.image_shape:
        return False
    some = np.arange(min(len(a), 16))
    return np.array_equal(a.batch(some)["image"], b.batch(some)["image"])


def evaluate_runs(runs: Sequence[Run], suite: Sequence[str] = (), *, split: str = "") -> dict[str, Metrics]:
    """Results by evaluator, of one run or of several joined.

    Args:
      runs: from `load_run`. Several are one encoder, their features side by side (Thanos as two runs).
      suite: evaluators, by name or as "package.module:Name"; empty: those in eval.final of the first run, of several
        runs only those that read features alone (`Evaluator.features_only`).
      split: "test" or "validation"; empty: eval.split of the first run.

    Raises:
      UserError: an evaluator that does not exist, or one that cannot take several runs.
    """
    evaluation = runs[0].evaluation
    split = split or evaluation.options.split
    check_split("split", split, runs[0].config)
    kinds, where = (tuple(suite), "suite") if suite else (tuple(evaluation.options.final), "eval.final")
    if len(runs) == 1:
        return evaluation.evaluate(kinds, runs[0].context(split), where=where)
    joinable = [kind for kind in kinds if make_evaluator(kind, where).features_only]
    if suite and len(joinable) < len(kinds):
        odd = next(kind for kind in kinds if kind not in joinable)
        known = [kind for kind in EVALUATORS if make_evaluator(kind).features_only]
        raise UserError(f"suite has {odd!r}, which cannot take several runs; expected some of {', '.join(known)}")
    return evaluation.evaluate(joinable, Joined(runs, split), where=where)


def summary(runs: Sequence[Run], results: dict[str, Metrics]) -> dict[str, Any]:
    """The results with their runs and source, ready for JSON."""
    evaluated = [{"workdir": str(r.workdir), "step": r.step, "config": r.config.name} for r in runs]
    return {"runs": evaluated, "source": runs[0].config.data.source, "results": results}
