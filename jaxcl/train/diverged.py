"""What is kept of an update whose loss is not finite: `nan/` in the run folder.

    nan/batch_STEP.json       its examples, its key and its metrics
    nan/checkpoints/STEP-1    the state before it, if that had been saved; the run does not start from it again
    nan/replay_STEP.json      what `jaxcl train --replay=STEP` found (`jaxcl.train.replay`)

No state is copied while a run trains. An update is made again from the nearest state that was saved before it: the
updates in between are repeated, which gives the same bits.
"""

import logging
import os
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from jaxcl.errors import Diverged
from jaxcl.report.metrics import as_json
from jaxcl.runtime import storage
from jaxcl.train import run_folder
from jaxcl.train.job import Job, writes

logger = logging.getLogger("jaxcl")
FOLDER = "nan"
KEY_KIND = "threefry2x32"  # as in `init_state`


def keep(job: Job, error: Diverged) -> None:
    """Write what is known of the update, and set the ruined state aside; on all processes, of which one writes.

    The others wait for it: a process that ends first would be missed, and the exit code say so.
    """
    if writes() and error.step is not None and error.update is not None:
        _keep(job, error)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("jaxcl diverged")


def _keep(job: Job, error: Diverged) -> None:
    try:
        _set_aside(job.workdir, error.step - 1)
        folder, saved = saved_before(job.workdir, error.update)
        content = {
            "step": error.update,
            "why": str(error),
            **about(job, error.update),
            "metrics": error.metrics,
            "state": {"step": saved, "folder": "" if folder is None else os.fspath(folder.relative_to(job.workdir))},
        }
        path = batch_file(job.workdir, error.update)
        path.parent.mkdir(parents=True, exist_ok=True)
        run_folder.write_json(path, as_json(content))
    except Exception as problem:  # noqa: BLE001 - a full disk must not hide why the run ends
        why = storage.refusal(problem) or f"{type(problem).__name__}: {problem}"
        logger.warning("the batch of step %d cannot be kept in %s: %s", error.update, job.workdir / FOLDER, why)


def batch_file(workdir: epath.Path, step: int) -> epath.Path:
    """What `keep` writes."""
    return workdir / FOLDER / f"batch_{step}.json"


def _set_aside(workdir: epath.Path, step: int) -> None:
    """Move a checkpoint to nan/: every start from it would fail again."""
    ruined = workdir / "checkpoints" / str(step)
    if ruined.is_dir():
        target = workdir / FOLDER / "checkpoints" / ruined.name
        target.parent.mkdir(parents=True, exist_ok=True)
        storage.move_folder(ruined, target)


def about(job: Job, step: int) -> dict[str, Any]:
    """The batch of update `step` (from 1), over all processes, and what its random draws depend on.

    Returns:
      "key": the seed, the kind of generator, the number that is folded into it (updates done before) and the data of
      the key that results. "batch": the source and its split, the epoch (from 0), and for each image its row in the
      source (the id that `log_examples` writes), its label (-1: none) and, of files, its name.
    """
    key = jax.random.fold_in(jax.random.key(job.recipe.seed, impl=KEY_KIND), step - 1)
    rows, names = job.rows_of(step), job.source.extras.get("name")
    batch = {
        "source": job.config.data.source,
        "split": job.source.split,
        "epoch": (step - 1) // job.recipe.steps_per_epoch,
        "index": rows,
        "label": np.asarray(job.source.labels)[rows],
    }
    if names is not None:
        batch["name"] = [str(names[row]) for row in rows]
    return {
        "key": {
            "seed": job.recipe.seed,
            "impl": KEY_KIND,
            "step": step - 1,
            "data": np.asarray(jax.random.key_data(key)),
        },
        "batch": batch,
    }


def saved_before(workdir: epath.Path, step: int) -> tuple[epath.Path | None, int]:
    """(folder of checkpoints, step) of the newest saved state from which update `step` can be made; (None, 0): none.

    It only lists folders, so one process may ask alone. Orbax decides whether a checkpoint is complete.
    """
    found: list[tuple[int, epath.Path]] = []
    for folder in (workdir / FOLDER / "checkpoints", workdir / "checkpoints"):
        if folder.is_dir():
            steps = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]
            found += [(saved, folder) for saved in steps if saved < step]
    if not found:
        return None, 0
    saved, folder = max(found, key=lambda pair: pair[0])
    return folder, saved
