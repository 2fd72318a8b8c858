"""Runs the suites of evaluators that a config names, and collects the panels of its report.

S side of a view, C channels.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxcl.augment import denormalize
from jaxcl.data import Source, has_own_validation
from jaxcl.errors import UserError
from jaxcl.evaluate.base import Evaluator, Metrics, NotApplicable, Panels, share_interval
from jaxcl.evaluate.context import FEATURES, EvalContext, EvalSetup
from jaxcl.evaluate.registry import make_suite
from jaxcl.evaluate.rows import NotFinite
from jaxcl.method import sharding
from jaxcl.method.inputs import make_views, run_stages
from jaxcl.method.recipe import Phase, Recipe
from jaxcl.method.state import TrainState

logger = logging.getLogger("jaxcl")

Array = jax.Array
SHOWN = 10  # columns of the grid of views
MAPPED = 1500  # test images on the map of embeddings


def check_split(where: str, split: str, config: ConfigDict) -> None:
    """Raises UserError for a split that results cannot be measured on. where: the config key or flag of the split."""
    if split not in ("test", "validation"):
        raise UserError(f"{where} is {split!r}; expected 'test' or 'validation'")
    if split == "validation" and not (config.data.validation or has_own_validation(config.data.source)):
        raise UserError(f"{where} is 'validation', but nothing is held out; set data.validation, for example to 0.1")


class Evaluation(EvalSetup):
    """The suites of one run: `quick` while it trains, `final` at its end. Every program compiles once.

    Args:
      config: the whole config.
      recipe: of this config.
      train: the training source; None of data without training images, of which only features are read.
      make_source: reads another split of the data.
      class_names: of the data that the run was trained on; None: unknown, or those of `train`.

    Raises:
      UserError: an evaluator that does not exist, a split that does not, or features of an unknown kind.
    """

    def __init__(
        self,
        config: ConfigDict,
        recipe: Recipe,
        *,
        train: Source | None,
        make_source: Callable[[str], Source],
        class_names: Sequence[str] | None = None,
    ):
        super().__init__(config, recipe, train=train, make_source=make_source, class_names=class_names)
        self._suites = {key: make_suite(f"eval.{key}", config.eval[key]) for key in ("quick", "final")}
        check_split("eval.split", config.eval.split, config)
        for key, known in (("features", FEATURES), ("knn_features", ("", *FEATURES))):
            if config.eval[key] not in known:
                expected = " or ".join(f"{k!r} ({v})" for k, v in FEATURES.items())
                raise UserError(f"eval.{key} is {config.eval[key]!r}; expected {expected}")
        for suite in self._suites.values():
            self._ask_for(suite)
        if config.eval.split == "validation" and not config.data.validation:
            self.source("validation")  # only reading the data tells whether there is one
        self._logged: set[str] = set()

    def quick(self, state: TrainState, mesh: Mesh, split: str | None = None) -> dict[str, float]:
        """The quick suite on a split; None: the validation split, or the test split without one.

        Returns:
          {"eval/knn_accuracy": ...}: the results that are floats, as they are logged.
        """
        context = EvalContext(self, state, mesh, split or self.selects_on)
        results, _ = self._run(self._suites["quick"], context)
        numbers = ((f"eval/{name}_{k}", v) for name, metrics in results.items() for k, v in metrics.items())
        return {key: v for key, v in numbers if isinstance(v, float)}

    def final(self, state: TrainState, mesh: Mesh) -> tuple[dict[str, Metrics], Panels]:
        """The final suite on the split in `eval.split`: (results by evaluator, panels of the report)."""
        context = EvalContext(self, state, mesh, self.options.split)
        results, panels = self._run(self._suites["final"], context)
        if not self.config.report:
            return results, {}
        panels["views"] = training_views(context)
        if len(context.test) and "map" not in panels:  # which shows these points and more
            n = min(len(context.test), MAPPED)
            with contextlib.suppress(NotFinite):  # the log says so
                panels["embedding"] = {
                    "features": context.features("test")[:n],
                    "labels": context.test.labels[:n],
                    "class_names": context.test.class_names,
                }
        return results, panels

    def evaluate(self, kinds: Iterable[str], context: EvalContext, *, where: str = "suite") -> dict[str, Metrics]:
        """Results of some evaluators by name.

        Args:
          kinds: names of ours, or "package.module:Name".
          context: the state to evaluate.
          where: the config key or flag that holds the kinds, for messages.

        Raises:
          UserError: an evaluator that does not exist, or options that it cannot use.
        """
        suite = make_suite(where, kinds)
        self._check_suite(suite)
        self._ask_for(suite)
        return self._run(suite, context)[0]

    def check_options(self) -> None:
        """Raises UserError for options, or files they name, that the evaluators of the config cannot use."""
        for suite in self._suites.values():
            self._check_suite(suite)

    def _check_suite(self, suite: dict[str, Evaluator]) -> None:
        for evaluator in suite.values():
            if self.classifier is not None or not evaluator.needs_classifier:  # otherwise it will be left out
                evaluator.check(self)

    def _ask_for(self, suite: dict[str, Evaluator]) -> None:
        self.kinds |= {kind for evaluator in suite.values() for kind in evaluator.feature_kinds}

    def _run(self, suite: dict[str, Evaluator], context: EvalContext) -> tuple[dict[str, Metrics], Panels]:
        """Runs evaluators; those that cannot run are left out, with one line of the log for each reason."""
        results, panels, left_out = {}, {}, {}
        for name, evaluator in suite.items():
            try:
                evaluator.check_needs(context)
                metrics, pictures = evaluator(context)
            except (NotApplicable, NotFinite) as reason:
                left_out.setdefault(str(reason), []).append(name)
                continue
            if metrics:
                results[name] = metrics | _intervals(evaluator, metrics, context)
            for panel, content in pictures.items():  # several evaluators may add to one panel
                panels[panel] = panels.get(panel, {}) | content
        for reason, names in left_out.items():
            line = f"evaluation: {reason}, so there is no {', '.join(names)}"
            if line not in self._logged:
                logger.info(line)
                self._logged.add(line)
        return results, panels


def _intervals(evaluator: Evaluator, metrics: Metrics, context: EvalContext) -> Metrics:
    """The intervals of the shares that an evaluator names, as "KEY_interval"."""
    count = int((context.test.labels >= 0).sum())
    values = {key: metrics.get(key) for key in evaluator.intervals}
    known = {key: v for key, v in values.items() if isinstance(v, float) and 0 <= v <= 1 and count}
    return {f"{key}_interval": list(share_interval(v, count)) for key, v in known.items()}


def training_views(context: EvalContext) -> dict[str, Any]:
    """The panel of views: the first training images as the encoder sees them at the end of the run, after all stages.

    Returns:
      {"images": {view: [n,S,S,C] in [0,1]}, "labels": [class name]}.
    """
    recipe, mesh, source = context.recipe, context.mesh, context.setup.training
    last = Phase("encoder", tuple(range(len(recipe.stages))))
    names = recipe.view_names(last)

    def show(state: TrainState, batch: dict[str, Array]) -> dict[str, Array]:
        views, _, _ = run_stages(recipe, last, state, batch, make_views(recipe, state, batch, names), mesh)
        shown = {n: denormalize(v.image, recipe.mean, recipe.std).clip(0, 1) for n, v in views.items()}
        return shown | {f"{n}.where": v.where for n, v in views.items() if v.where is not None}

    count = min(len(source), recipe.batch_size) // mesh.size * mesh.size
    batch = sharding.device_put(source.batch(np.arange(count)), sharding.batch_sharding(mesh))
    jitted = context.setup.compiled("views", lambda: jax.jit(show, out_shardings=sharding.replicated(mesh)))
    out = jax.device_get(jitted(context.state, batch))
    images = {"image": source.images[:SHOWN] / np.float32(255)} if source.in_memory else {}
    made = (n for n in out if n not in recipe.views and not n.endswith(".where"))
    for name in (*names, *made):
        where = out.get(f"{name}.where")
        if where is not None and len(out[name]) == count:
            # A padded row is no image that the encoder saw: show it empty.
            out[name] = np.where(where[:, None, None, None], out[name], 1.0)
        rows_per_image = max(1, len(out[name]) // count)
        images[name] = out[name][::rows_per_image][:SHOWN]
    labels = [source.class_names[i] if i >= 0 else "" for i in source.batch(np.arange(min(SHOWN, count)))["label"]]
    return {"images": {k: v[: len(labels)] for k, v in images.items()}, "labels": labels}
