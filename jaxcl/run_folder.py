"""The run folder: one config, one run. Running the same command again goes on, or says that it is finished.

config.json, data.json, environment.json, metrics.jsonl, tensorboard/, checkpoints/, results.json, report/.
"""

import json
import logging
import os
import pathlib
import platform
import subprocess
import sys
from importlib import metadata
from typing import Any

import jax
import numpy as np

from jaxcl import config as configs
from jaxcl.errors import UserError

say = logging.getLogger("jaxcl")
PACKAGES = ("jaxcl", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def finished(workdir: pathlib.Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """The results of a finished run, after saying so; None where there is something left to do."""
    if not (workdir / "results.json").exists():
        return None
    _same_config(workdir, config)
    say.info("%s is finished; its results are in results.json. Use another --workdir to run again.", workdir)
    return json.loads((workdir / "results.json").read_text())


def _same_config(workdir: pathlib.Path, config: dict[str, Any]) -> None:
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


def claim(workdir: pathlib.Path, config: dict[str, Any], facts: dict[str, Any], writes: bool) -> None:
    """Make the run folder, or check that it is this run's. facts: what the recipe was told of the data."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make --workdir {workdir}: {error.strerror}; choose a folder you may write to"
        ) from None
    _same_config(workdir, config)
    if writes:
        write_json(workdir / "config.json", config)
        write_json(workdir / "data.json", facts)
        write_json(workdir / "environment.json", environment())


def write_json(path: pathlib.Path, content: Any) -> None:
    # Through a temporary file: a kill leaves the old file or the new one, never half of one.
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2, default=number) + "\n")
    os.replace(temporary, path)


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
