"""Weights & Biases, in addition to the run folder. No failure of W&B ends a run."""

import importlib
import logging
import math
import os
import threading
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from jaxcl.report.verdict import flatten
from jaxcl.runtime import storage

logger = logging.getLogger("jaxcl")

ID_FILE = "wandb_id.txt"
FINISH_SECONDS = 60.0  # for what is still to be sent


class WandbRun:
    """One W&B run. After the first failure nothing is sent any more.

    As a context manager it ends the W&B run as failed if an exception ends the block.
    """

    def __init__(self, run: Any):
        self._run = run

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the metrics of a step. W&B ignores steps that it received before the run was interrupted."""
        self._try("cannot be written to", lambda run: run.log(dict(metrics), step=int(step)))

    def finish(self, results: Mapping[str, Any] | None = None) -> None:
        """Send the results (numbers and strings) and end the run; None: it has failed. May be called twice."""
        if self._run is None:
            return

        def end(run: Any) -> None:
            if results is not None:
                run.summary.update({k: v for k, v in flatten(results).items() if _plain(v)})
            run.finish(exit_code=int(results is None))

        # Without a network, W&B would retry without end.
        thread = threading.Thread(target=self._try, args=("cannot be finished", end), daemon=True)
        thread.start()
        thread.join(FINISH_SECONDS)
        if thread.is_alive():
            logger.warning("W&B takes longer than %.0f s to finish; `wandb sync` sends the rest", FINISH_SECONDS)
        self._run = None

    def __enter__(self) -> "WandbRun":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.finish()

    def _try(self, what: str, do: Callable[[Any], Any]) -> None:
        if self._run is None:
            return
        try:
            do(self._run)
        except Exception as error:  # the library may raise anything
            self._run = None
            logger.warning("W&B %s: %s; the run continues without it", what, _reason(error))


def open_wandb(project: str, workdir: str | os.PathLike, config: Mapping[str, Any]) -> WandbRun | None:
    """Open the W&B run of a run folder, or continue it.

    Args:
      project: the W&B project; "": the environment variable WANDB_PROJECT, and if that is not set either, no W&B. The
        other variables (WANDB_ENTITY, WANDB_MODE=offline, ...) apply too.
      workdir: the run folder; if it is local, W&B's own files are written there.
      config: of the run.

    Returns:
      None if W&B is not wanted, not installed or not reachable; in the latter two cases with a warning.
    """
    project = project or os.environ.get("WANDB_PROJECT", "")
    if not project:
        return None
    try:
        wandb = importlib.import_module("wandb")
    except Exception as error:  # a broken package may raise more than ImportError
        missing = isinstance(error, ModuleNotFoundError)
        why = "the package is not installed: pip install wandb" if missing else _reason(error)
        logger.warning("no W&B (%s): %s", project, why)
        return None
    workdir = storage.folder(workdir)
    try:
        run = wandb.init(
            project=project,
            id=_id(workdir / ID_FILE),
            resume="allow",
            # W&B's own files need a local folder; None: the working directory.
            dir=None if storage.is_remote(workdir) else str(workdir),
            name=workdir.name,
            config=dict(config),
        )
    except Exception as error:
        logger.warning("no W&B (%s): %s; the run continues without it", project, _reason(error))
        return None
    return None if run is None else WandbRun(run)


def _id(path: epath.Path) -> str:
    """The id of the run: the same each time it is continued."""
    if not path.exists():
        storage.write_whole(path, uuid.uuid4().hex[:12] + "\n")
    return path.read_text().strip()


def _plain(value: Any) -> bool:
    return isinstance(value, (str, bool, int)) or (isinstance(value, float) and math.isfinite(value))


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
