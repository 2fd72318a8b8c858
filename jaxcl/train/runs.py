"""Finished (or unfinished) runs read back from their folders, to be evaluated again, alone or joined.

N images, D features.
"""

import ast
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from jaxcl import config as configs
from jaxcl.data import FILES, Source, source_of
from jaxcl.errors import UserError
from jaxcl.evaluate.base import Metrics
from jaxcl.evaluate.suite import EvalContext, Evaluation, check_split
from jaxcl.method import sharding
from jaxcl.method.build import build_recipe
from jaxcl.method.init_state import init_state
from jaxcl.method.recipe import Recipe
from jaxcl.method.state import TrainState
from jaxcl.runtime import storage
from jaxcl.runtime.options import suggestion
from jaxcl.train.checkpoint import Checkpoints
from jaxcl.train.run_folder import ROW_ORDER

# Evaluators that see nothing but features: only they can take several encoders of different runs together.
OF_FEATURES = (
    "knn",
    "linear",
    "logistic",
    "raw_pixels",
    "transfer",
    "transfer_augmented",
    "worst_group",
    "collapse",
    "ood",
    "shape_bias",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saved:
    """A run folder, opened: its config, parts and newest checkpoint. Its data need not be at hand.

    class_names: of the training data; None where the run is of a version that did not write them down.
    environment: packages, commit and so on of the training.
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
    """A run folder, opened, and the evaluation of its encoder."""

    evaluation: Evaluation

    def frozen(self, split: str = "test") -> EvalContext:
        return EvalContext(self.evaluation, self.state, self.mesh, split)


def load_run(
    workdir: str | os.PathLike, *, source: str = "", step: int | None = None, options: Sequence[str] = ()
) -> Run:
    """Open a run folder, to evaluate: arguments and errors as of `open_run`, and UserError for data that is missing."""
    saved = open_run(workdir, source=source, step=step, options=options)
    config = saved.config
    train = source_of(config, "train")
    evaluation = Evaluation(config, saved.recipe, train=train, make_source=lambda split: source_of(config, split))
    return Run(**vars(saved), evaluation=evaluation)


def open_run(
    workdir: str | os.PathLike, *, source: str = "", step: int | None = None, options: Sequence[str] = ()
) -> Saved:
    """Open a run folder.

    Args:
      workdir: what `jaxcl.main --workdir` was given; local or remote.
      source: evaluate on this data source instead of the run's own; images are normalised as in training, and files
        of images decoded at the size of the training's.
      step: of the checkpoint; None: the newest.
      options: "KEY=VALUE" of config.eval to set otherwise, such as "ood=('sketch=folder:PATH',)".

    Raises:
      UserError: no run there, no such checkpoint, or one that does not fit its config; an unknown option.
    """
    storage.need_library(workdir)
    workdir = epath.Path(workdir)
    files = {name: workdir / f"{name}.json" for name in ("config", "data")}
    for path in files.values():
        if not path.is_file():
            raise UserError(f"{workdir} is not a run folder: it has no {path.name}; give the --workdir of a run")
    plain, facts = (json.loads(path.read_text()) for path in files.values())
    class_names = facts.pop("class_names", None)
    facts.pop(ROW_ORDER, None)  # of the training only
    environment = workdir / "environment.json"
    config = configs.from_dict(plain)
    config.report = False
    config.data.textures = ""  # of the training only
    if source:
        config.data.source = source
        if source.partition(":")[0] in FILES:
            # Not at a size of their own: small images enlarged, or large ones decoded for nothing.
            config.data.files.image_size = config.data.files.image_size or facts["image_shape"][0]
    for option in options:
        _set(config.eval, option)
    recipe = build_recipe(config, **{k: tuple(v) if isinstance(v, list) else v for k, v in facts.items()})
    mesh = sharding.make_mesh()
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        if checkpoints.latest is None:
            raise UserError(f"{workdir} has no checkpoint yet; let the run save one first")
        if step is not None and step not in checkpoints.steps:
            there = ", ".join(map(str, checkpoints.steps))
            raise UserError(f"{workdir} has no checkpoint of step {step}; it has {there}")
        place = sharding.replicated(mesh)
        abstract = jax.eval_shape(lambda: init_state(recipe))
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract)
        state = checkpoints.restore(abstract, step)  # the newest: or the one before, where that is damaged
        step = int(state.step) if step is None else step
    return Saved(
        workdir=workdir,
        config=config,
        recipe=recipe,
        state=state,
        step=step,
        mesh=mesh,
        class_names=None if class_names is None else tuple(class_names),
        environment=json.loads(environment.read_text()) if environment.is_file() else {},
    )


def _set(options: ConfigDict, text: str) -> None:
    key, equals, value = text.partition("=")
    key = key.removeprefix("eval.")
    if not equals or key not in options:
        raise UserError(f"--set={text}: expected KEY=VALUE with a key of config.eval{suggestion(key, options)}")
    try:
        value = ast.literal_eval(value)
    except (ValueError, SyntaxError):  # a word
        pass
    wanted = type(options[key])
    if not isinstance(value, wanted) and not (wanted is float and isinstance(value, int)):
        raise UserError(f"--set={text}: {value!r} is no {wanted.__name__}; expected one like {options[key]!r}")
    options[key] = wanted(value)


class Joined(EvalContext):
    """Several runs as one encoder: features side by side. Labels and options are those of the first."""

    def __init__(self, runs: Sequence[Run], split: str = "test"):
        first = runs[0]
        super().__init__(first.evaluation, first.state, first.mesh, split)
        self._parts = [run.frozen(split) for run in runs]
        for run, part in zip(runs[1:], self._parts[1:], strict=True):
            part.batch_size = self.batch_size  # batches of features are joined, too
            if not _same_images(self.test, part.test):
                raise UserError(
                    f"{runs[0].workdir} and {run.workdir} were trained on different data, {self.test.name} and "
                    f"{part.test.name}; give both the same --source"
                )

    def features(self, split: str, kind: str = "") -> np.ndarray:
        """float32 [N,D], D the sum over the runs."""
        return np.concatenate([part.features(split, kind) for part in self._parts], axis=-1)

    def features_of(self, source: Source) -> np.ndarray:
        """float32 [N,D], as of `features`."""
        return np.concatenate([part.features_of(source) for part in self._parts], axis=-1)

    def stream(self, source: Source, kind: str) -> Iterator[np.ndarray]:
        """float32 [n,D], as of `EvalContext.stream`."""
        for parts in zip(*(part.stream(source, kind) for part in self._parts), strict=True):
            yield np.concatenate(parts, axis=-1)

    def augmented_features(self, split: str, draw: int) -> np.ndarray:
        """float32 [N,D]; runs of one seed and the same views see the same ones."""
        return np.concatenate([part.augmented_features(split, draw) for part in self._parts], axis=-1)


def _same_images(a: Source, b: Source) -> bool:
    if len(a) != len(b) or a.image_shape != b.image_shape:
        return False
    some = np.arange(min(len(a), 16))
    return np.array_equal(a.batch(some)["image"], b.batch(some)["image"])


def evaluate_runs(runs: Sequence[Run], suite: Sequence[str] = (), *, split: str = "") -> dict[str, Metrics]:
    """Results by evaluator of one run, or of several joined.

    Args:
      runs: from `load_run`; several are one encoder, their features side by side (Thanos as two runs).
      suite: names of evaluators; empty: those of the first run's eval.final, of several runs those among them that
        see features only.
      split: "test" or "validation"; empty: the first run's eval.split.

    Raises:
      UserError: an evaluator nobody knows, or one that cannot take several runs.
    """
    evaluation = runs[0].evaluation
    split = split or evaluation.options.split
    check_split("the split", split, runs[0].config)
    if len(runs) == 1:
        return evaluation.evaluate(tuple(suite or evaluation.options.final), runs[0].frozen(split))
    if odd := [name for name in suite if name not in OF_FEATURES]:
        raise UserError(f"{odd[0]} cannot take several runs; expected some of {', '.join(OF_FEATURES)}")
    names = tuple(suite) or tuple(n for n in evaluation.options.final if n in OF_FEATURES)
    return evaluation.evaluate(names, Joined(runs, split))


def summary(runs: Sequence[Run], results: dict[str, Metrics]) -> dict[str, Any]:
    """The results and what they are of, ready for JSON."""
    of = [{"workdir": str(r.workdir), "step": r.step, "config": r.config.name} for r in runs]
    return {"runs": of, "source": runs[0].config.data.source, "results": results}
