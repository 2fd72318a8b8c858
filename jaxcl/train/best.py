"""The best state of a run by its accuracy on the validation split, in `best/` beside the checkpoints."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from jaxcl.errors import UserError
from jaxcl.evaluate.suite import Evaluation
from jaxcl.method.state import TrainState
from jaxcl.runtime import storage
from jaxcl.train import run_folder
from jaxcl.train.checkpoint import Checkpoints


class Best:
    """Keeps the state with the highest validation accuracy.

    Does nothing unless `checkpoint.keep_best` is set and `data.validation` holds images out: a state must not be
    selected on the test split.
    """

    def __init__(self, workdir: epath.Path, config: ConfigDict):
        self._on = bool(config.checkpoint.keep_best and config.data.validation)
        self._path, self._file = workdir / "best", workdir / "best.json"
        self._record = None
        if self._on and self._file.exists():
            advice = "remove it, and the best state is looked for from now on"
            self._record = storage.read_json(self._file, "step", "validation_accuracy", advice=advice)
            if any(type(self._record[key]) not in (int, float) for key in ("step", "validation_accuracy")):
                raise UserError(f"{self._file} is not one of jaxcl: a value in it is no number; {advice}")

    def offer(self, step: int, state: TrainState, metrics: dict[str, float]) -> None:
        """Save the state if its accuracy in `metrics` (from `Evaluation.quick`) is higher than that of all before."""
        score = metrics.get("eval/classifier_accuracy", metrics.get("eval/knn_accuracy"))
        if not self._on or score is None or not np.isfinite(score):
            return
        if self._record and score <= self._record["validation_accuracy"]:
            return
        with Checkpoints(self._path, keep=1) as checkpoints:
            checkpoints.save(step, state)
        self._record = {"step": step, "validation_accuracy": score}
        if jax.process_index() == 0:
            run_folder.write_json(self._file, self._record)

    def result(
        self,
        evaluation: Evaluation,
        state: TrainState,
        gather: Callable[[TrainState], TrainState],
        mesh: jax.sharding.Mesh,
    ) -> tuple[dict[str, Any], TrainState]:
        """Offer the last state too, and measure the best one, once, on the test split.

        Args:
          gather: replicates a state over the mesh, as evaluation needs it.

        Returns:
          {"best": {"step", "validation_accuracy", test metrics by name}} and the best state; {} and the given state if
          no state could be scored.
        """
        if not self._on:
            return {}, state
        self.offer(int(state.step), state, evaluation.quick(gather(state), mesh))
        if self._record is None:  # no metric to select by, for example without labels
            return {}, state
        with Checkpoints(self._path, keep=1) as checkpoints:
            best = checkpoints.restore(state)
        metrics = evaluation.quick(gather(best), mesh, split="test")
        return {"best": self._record | {k.removeprefix("eval/"): v for k, v in metrics.items()}}, best


def check_selection(config: ConfigDict) -> None:
    """Raises UserError where the best state is to be evaluated and nothing selects one."""
    if config.eval.state == "best" and not (config.checkpoint.keep_best and config.data.validation):
        raise UserError(
            "eval.state is 'best', but nothing selects a state: set data.validation above 0 and checkpoint.keep_best, "
            "or eval.state=last"
        )
