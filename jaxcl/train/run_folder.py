"""The run folder: one config, one run. Running the same command again goes on, or says that it is finished.

config.json, data.json, environment.json, metrics.jsonl, tensorboard/, checkpoints/, results.json, report/; lock.json
while it runs. On a local disk or in an object store (gs://).
"""

import json
import logging
import math
import os
import pathlib
import platform
import subprocess
import sys
from importlib import metadata
from typing import Any

import jax
import numpy as np
from etils import epath

from jaxcl import config as configs
from jaxcl.errors import UserError
from jaxcl.runtime import distributed, storage
from jaxcl.runtime.lock import RunLock

logger = logging.getLogger("jaxcl")
ROW_ORDER = "row_order"  # key of data.json: the name of the order of the training rows
PACKAGES = ("jaxcl", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def finished(workdir: epath.Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """The results of a finished run, after saying so; None where there is something left to do."""
    if not (workdir / "results.json").exists():
        return None
    _same_config(workdir, config)
    logger.info("%s is finished; its results are in results.json. Use another --workdir to run again.", workdir)
    return json.loads((workdir / "results.json").read_text())


def _same_config(workdir: epath.Path, config: dict[str, Any]) -> None:
    path = workdir / "config.json"
    if not path.exists():
        return
    changed = configs.differences(json.loads(path.read_text()), config)
    if changed:
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise UserError(
            f"{workdir} holds a run of another config, {changed[0]}{more}; "
            "use another --workdir, or the same config to go on"
        )


def claim(workdir: epath.Path, config: dict[str, Any], facts: dict[str, Any], writes: bool) -> RunLock | None:
    """Make the run folder, or check that it is this run's, and lock it; -> the lock, of the process that writes.

    facts: what the recipe was told of the data, the class names and ROW_ORDER. Errors: UserError, on all processes where one has it.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make --workdir {workdir}: {error.strerror}; choose a folder you may write to"
        ) from None
    _same_config(workdir, config)
    _same_data(workdir, facts)
    held: list[RunLock] = []

    def write() -> str:
        try:
            held.append(RunLock(workdir))
            write_json(workdir / "config.json", config)
            write_json(workdir / "data.json", facts)
            write_json(workdir / "environment.json", environment())
        except (OSError, UserError) as error:
            for lock in held:
                lock.close()
            reason = storage.refusal(error) or str(error)
            return str(error) if isinstance(error, UserError) else f"cannot write in --workdir {workdir}: {reason}"
        return ""

    if error := distributed.agreed(write if writes else str):
        raise UserError(error)
    return held[0] if held else None


def _same_data(workdir: epath.Path, facts: dict[str, Any]) -> None:
    """With an image more or less every batch to come would hold other examples."""
    path = workdir / "data.json"
    if not path.exists():
        return
    old, new = json.loads(path.read_text()), plain(facts)
    before, now = old.pop(ROW_ORDER, None), new.pop(ROW_ORDER, None)
    if now is not None and before != now:
        raise UserError(
            f"{workdir} began under another order of the training rows ({before or 'of an older jaxcl'} -> {now}), so "
            "going on would repeat some images and leave out others; use another --workdir (it can still be evaluated)"
        )
    for key in old.keys() & new.keys():
        if not _close(old[key], new[key]):
            raise UserError(
                f"the data is not what {workdir} began with, {key}: {old[key]} -> {new[key]}; "
                "put it back as it was, or use another --workdir"
            )


def _close(a: Any, b: Any) -> bool:
    """Equal but for the last digits of a mean, which may differ between machines."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_close, a, b))
    if isinstance(a, float) or isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6)
    return a == b


def write_json(path: epath.Path | pathlib.Path, content: Any) -> None:
    storage.write_whole(path, json.dumps(content, indent=2, default=number) + "\n")


def plain(content: Any) -> Any:
    """What comes back when it is written to JSON and read."""
    return json.loads(json.dumps(content, default=number))


def number(value: Any) -> Any:
    """What JSON writes for a number or array of NumPy or JAX."""
    if isinstance(value, (np.generic, np.ndarray, jax.Array)):
        return np.asarray(value).tolist()
    raise TypeError(f"cannot write {type(value).__name__} to JSON")


def environment() -> dict[str, Any]:
    """Packages, Python, devices and commit of this process."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "packages": packages,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "devices": [f"{d.platform}:{d.device_kind}" for d in jax.devices()],
        "processes": jax.process_count(),
        "commit": _commit(),
    }


def _commit() -> str:
    here = pathlib.Path(__file__).parent
    git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(git, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def command() -> str:
    return " ".join(["python -m jaxcl.main", *sys.argv[1:]])
