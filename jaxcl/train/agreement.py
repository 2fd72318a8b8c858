"""What all processes of a run must have in common: config, flags, code, run folder and data.

Each process reads its own, so a host with another file or another flag would train something else, without a word.
"""

import hashlib
from typing import Any

import jax
import numpy as np
from etils import epath

from jaxcl.data import Source
from jaxcl.runtime import together
from jaxcl.train import code, config_diff

SAMPLE = 512  # images of a set that is not in memory
HERE = ("data.prefetch", "data.tfds.data_dir")  # keys of the config that may differ between processes


def same_start(config: dict[str, Any], workdir: epath.Path, latest: int | None, flags: dict[str, Any]) -> None:
    """Compare what is known before the data is opened; on all processes. Raises: UserError if anything differs.

    Args:
      config: as plain containers.
      latest: step of the newest checkpoint in `workdir`.
      flags: of the command line, by name.
    """
    facts = {name: value for name, value in config_diff.flatten(config).items() if name not in HERE}
    packages = code.packages() | {"python": code.python_version()}
    numbers = ("jax_enable_x64", "jax_default_matmul_precision", "jax_threefry_partitionable")
    facts |= {
        **flags,
        **{f"version of {name}": version for name, version in packages.items()},
        **{name: getattr(jax.config, name) for name in numbers},
        **{f"code of {name}": digest for name, digest in code.hashes(config).items()},
    }
    together.same(facts, "start all processes with the same command, packages and code")
    there = {
        "--workdir": {
            "config.json": _digest(workdir / "config.json"),
            "results.json": (workdir / "results.json").exists(),
            "checkpoint": latest,
        }
    }
    together.same(there, "all processes need one --workdir that they share")


def same_data(**sources: Source) -> None:
    """Compare the images and labels by split; on all processes. Raises: UserError if anything differs."""
    facts = {}
    for split, source in sources.items():
        facts |= {f"data.source ({split}) {name}": value for name, value in fingerprint(source).items()}
    together.same(facts, "give all processes the same data")


def fingerprint(source: Source) -> dict[str, Any]:
    """Short facts of a set that change with its images, labels or their order. A large set is not read whole."""
    names = source.extras.get("name")
    found = {
        "images": len(source),
        "shape": tuple(map(int, source.image_shape)),
        "classes": _hash("\n".join(source.class_names).encode()),
        "labels": _hash(np.ascontiguousarray(source.labels, np.int32)),
        "files": "" if names is None else _hash("\n".join(map(str, names)).encode()),
    }
    if source.in_memory:
        return found | {"pixels": _hash(np.ascontiguousarray(source.images))}
    rows = np.unique(np.linspace(0, len(source) - 1, min(SAMPLE, len(source))).astype(np.int64))
    blocks = (source.batch(rows[i : i + 64])["image"] for i in range(0, len(rows), 64))
    return found | {"pixels": _hash(*(np.ascontiguousarray(block) for block in blocks))}


def _hash(*content: Any) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in content:
        digest.update(part)
    return digest.hexdigest()


def _digest(path: epath.Path) -> str:
    return _hash(path.read_bytes()) if path.is_file() else ""
