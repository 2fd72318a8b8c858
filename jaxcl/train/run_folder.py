"""The run folder holds one run of one config; the same command continues an unfinished run.

It contains config.json, data.json, environment.json, metrics.jsonl, tensorboard/, checkpoints/, results.json and
report/, and lock.json while a process trains. It is on a local disk or in an object store (gs://).
"""

import json
import logging
import math
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

import jax
import numpy as np
from etils import epath

from jaxcl.errors import UserError
from jaxcl.runtime import distributed, storage
from jaxcl.runtime.cores import usable_cores
from jaxcl.runtime.lock import RunLock
from jaxcl.train import code, config_diff

logger = logging.getLogger("jaxcl")
ROW_ORDER = "row_order"  # key of data.json: name of the order in which training rows are drawn
FINGERPRINT = "fingerprint"  # key of data.json: hash of the names, labels and content of the training data
RESTORE = "restore a copy of it, or use another --workdir"


def finished(workdir: epath.Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """The results of a finished run, with a log line; None if the run is unfinished or new. Raises: UserError."""
    if not (workdir / "results.json").exists():
        return None
    _same_config(workdir, config)
    results = storage.read_json(
        workdir / "results.json", advice="remove it, then run the same command again to evaluate the run once more"
    )
    for key, own in (("config", config["name"]), ("seed", config["seed"])):
        if results.get(key, own) != own:
            raise UserError(
                f"{workdir / 'results.json'} is of another run, {key}: {results[key]} and not {own}; move it away, "
                "then run the same command again"
            )
    logger.info("%s is finished; its results are in results.json. Use another --workdir to run again.", workdir)
    return results


def _same_config(workdir: epath.Path, config: dict[str, Any]) -> None:
    path = workdir / "config.json"
    if not path.exists():
        return
    changed = config_diff.differences(storage.read_json(path, advice=RESTORE), config)
    if changed:
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise UserError(
            f"{workdir} holds a run of another config, {changed[0]}{more}; "
            "use another --workdir, or the same config to continue"
        )


def claim(
    workdir: epath.Path, config: dict[str, Any], facts: dict[str, Any], writes: bool, *, record: bool = True
) -> RunLock | None:
    """Make the run folder, or check that it holds this run, and lock it.

    Args:
      config: as plain containers.
      facts: of the training data (`data_facts`), "class_names", ROW_ORDER and, where it is known, FINGERPRINT.
      writes: whether this process writes to the folder; exactly one process does.
      record: write config.json, data.json and environment.json; without it, a run stays as it was.

    Returns:
      The lock, in the process that writes; None in the others.

    Raises:
      UserError: the folder holds another run, is locked or cannot be written to; on all processes if on one.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make --workdir {workdir}: {error.strerror}; choose a folder that you may write to"
        ) from None
    _same_config(workdir, config)
    _same_data(workdir, facts)
    held: list[RunLock] = []

    def write() -> str:
        try:
            held.append(RunLock(workdir))
            here = environment(config)
            _say_other_code(workdir, here)
            if record:
                write_json(workdir / "config.json", config)
                write_json(workdir / "data.json", facts)
                write_json(workdir / "environment.json", here)
        except (OSError, UserError) as error:
            for lock in held:
                lock.close()
            reason = storage.refusal(error) or str(error)
            return str(error) if isinstance(error, UserError) else f"cannot write in --workdir {workdir}: {reason}"
        return ""

    if error := distributed.agreed(write if writes else str):
        raise UserError(error)
    return held[0] if held else None


def _say_other_code(workdir: epath.Path, here: dict[str, Any]) -> None:
    """Log a line if a run that has a checkpoint was made by other code: it goes on, but not to the same bits."""
    path, saved = workdir / "environment.json", workdir / "checkpoints"
    if not (path.exists() and saved.is_dir() and any(p.name.isdigit() for p in saved.iterdir())):
        return
    try:
        found = code.changes(storage.read_json(path), here)
    except UserError:  # it is only for people, and written again
        return
    if found:
        logger.warning(
            "%s goes on under other code than it was made with: %s; numbers may differ from those of one run",
            *(workdir, ", ".join(found)),
        )


def _same_data(workdir: epath.Path, facts: dict[str, Any]) -> None:
    """UserError if the data changed: with one image more, all later batches would hold other examples."""
    path = workdir / "data.json"
    if not path.exists():
        return
    old, new = storage.read_json(path, advice=RESTORE), plain(facts)
    before, now = old.pop(ROW_ORDER, None), new.pop(ROW_ORDER, None)
    if now is not None and before != now:
        raise UserError(
            f"{workdir} was trained with another order of the training rows "
            f"({before or 'that of an older jaxcl'} -> {now}), so continuing would "
            "repeat some images and skip others; use another --workdir (this one can still be evaluated)"
        )
    hashes = old.pop(FINGERPRINT, ""), new.pop(FINGERPRINT, "")  # versions before it wrote none
    for key in sorted(old.keys() & new.keys()):
        if not _close(old[key], new[key]):
            raise UserError(
                f"the data has changed since {workdir} was started, {key}: {old[key]} -> {new[key]}; "
                "restore the data, or use another --workdir"
            )
    if all(hashes) and hashes[0] != hashes[1]:
        raise UserError(
            f"the data has changed since {workdir} was started: as many images, but other names, labels or content of "
            "some; restore the data, or use another --workdir"
        )


def _close(a: Any, b: Any) -> bool:
    """Equality up to the last digits of a mean, which may differ between machines."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_close, a, b))
    if isinstance(a, float) or isinstance(b, float):
        return all(isinstance(x, (int, float)) for x in (a, b)) and math.isclose(a, b, rel_tol=1e-6)
    return a == b


def write_json(path: epath.Path | pathlib.Path, content: Any) -> None:
    """Write a JSON file atomically."""
    storage.write_whole(path, json.dumps(content, indent=2, default=number) + "\n")


def plain(content: Any) -> Any:
    """The content as JSON gives it back: lists for tuples, Python numbers for arrays."""
    return json.loads(json.dumps(content, default=number))


def number(value: Any) -> Any:
    """`default` of json.dumps: numbers and arrays of NumPy and JAX as Python numbers and lists."""
    if isinstance(value, (np.generic, np.ndarray, jax.Array)):
        return np.asarray(value).tolist()
    raise TypeError(f"cannot write {type(value).__name__} to JSON")


def environment(config: dict[str, Any]) -> dict[str, Any]:
    """Packages, Python, devices, commit and hashes of the code of this process. config: as plain containers."""
    return {
        "packages": code.packages(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "usable_cores": usable_cores(),
        "devices": [f"{d.platform}:{d.device_kind}" for d in jax.devices()],
        "processes": jax.process_count(),
        "commit": _commit(),
        "code": code.hashes(config),
    }


def _commit() -> str:
    here = pathlib.Path(__file__).parent
    git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(git, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def command() -> str:
    """The command line of this process."""
    return " ".join(["python -m jaxcl.main", *sys.argv[1:]])
