"""Weights & Biases, beside the run folder and never instead of it: whatever goes wrong there, the run goes on."""

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
    """One run there; after the first failure it takes everything and sends nothing."""

    def __init__(self, run: Any):
        self._run = run

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Sends the figures of a step. Steps that were sent before the run was interrupted are ignored there."""
        self._try("cannot be written to", lambda run: run.log(dict(metrics), step=int(step)))

    def finish(self, results: Mapping[str, Any] | None = None) -> None:
        """Sends results (numbers and words only) and ends the run; without results it has failed."""

        def end(run: Any) -> None:
            if results is not None:
                run.summary.update({k: v for k, v in flatten(results).items() if _plain(v)})
            run.finish(exit_code=int(results is None))

        # Without a network, W&B would try for as long as it takes.
        thread = threading.Thread(target=self._try, args=("cannot be finished", end), daemon=True)
        thread.start()
        thread.join(FINISH_SECONDS)
        if thread.is_alive():
            logger.warning("W&B takes longer than %.0f s to finish; `wandb sync` sends what is missing", FINISH_SECONDS)
        self._run = None

    def _try(self, what: str, do: Callable[[Any], Any]) -> None:
        if self._run is None:
            return
        try:
            do(self._run)
        except Exception as error:  # its library raises what it likes
            self._run = None
            logger.warning("W&B %s: %s; the run goes on without it", what, _reason(error))


def open_wandb(project: str, workdir: str | os.PathLike, config: Mapping[str, Any]) -> WandbRun | None:
    """The W&B run of a run folder, gone on with if it was begun before.

    Args:
      project: "": that of the environment variable WANDB_PROJECT; where that is not set either, there is none. The
        other variables (WANDB_ENTITY, WANDB_MODE=offline, ...) hold too.
      workdir: the run folder; W&B's own files are written there where it is local.
      config: what was run.

    Returns:
      None where W&B is not wanted, not installed or not to be reached; a line says so if it was wanted.
    """
    project = project or os.environ.get("WANDB_PROJECT", "")
    if not project:
        return None
    try:
        wandb = importlib.import_module("wandb")
    except Exception as error:  # a broken one raises more than ImportError
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
            # Its own files need a local folder; in None they are under the working directory.
            dir=None if storage.is_remote(workdir) else str(workdir),
            name=workdir.name,
            config=dict(config),
        )
    except Exception as error:
        logger.warning("no W&B (%s): %s; the run goes on without it", project, _reason(error))
        return None
    return None if run is None else WandbRun(run)


def _id(path: epath.Path) -> str:
    """The same one each time the run goes on."""
    if not path.exists():
        storage.write_whole(path, uuid.uuid4().hex[:12] + "\n")
    return path.read_text().strip()


def _plain(value: Any) -> bool:
    return isinstance(value, (str, bool, int)) or (isinstance(value, float) and math.isfinite(value))


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
