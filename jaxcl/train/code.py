"""Which code a run is made with: packages, and hashes of the files of jaxcl and of the user's own parts."""

import hashlib
import pathlib
import platform
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

import jaxcl
from jaxcl.train import config_diff

PACKAGES = ("jaxcl", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def packages() -> dict[str, str]:
    """The installed versions of PACKAGES."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hashes(config: Mapping[str, Any]) -> dict[str, str]:
    """A short hash of the files of jaxcl and one of those of the parts ("package.module:Name") that are loaded.

    config: as plain containers.
    """
    modules = {str(v).partition(":")[0] for v in config_diff.flatten(config).values() if ":" in str(v)}
    files = {getattr(sys.modules.get(name), "__file__", None) for name in modules}
    return {
        "jaxcl": _hash(pathlib.Path(jaxcl.__file__).parent.rglob("*.py")),
        "parts": _hash(pathlib.Path(file) for file in files if file),
    }


def _hash(files: Iterable[pathlib.Path]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two contents of environment.json in the code, in words; what one does not know is equal."""

    def known(there: Any, name: str) -> str:
        value = there.get(name) if isinstance(there, Mapping) else None
        return value if isinstance(value, str) else ""

    found = []

    def compare(what: str, a: str, b: str, show: bool = True) -> None:
        if a and b and a != b:
            found.append(f"{what} {a} -> {b}" if show else what)

    for name in PACKAGES:
        compare(name, *(known(x.get("packages"), name) for x in (before, now)))
    # Of Python, the patch level changes no number.
    compare("Python", *(".".join(known(x, "python").split(".")[:2]) for x in (before, now)))
    compare("commit", *(known(x, "commit") for x in (before, now)))
    for name, what in (("jaxcl", "files of jaxcl"), ("parts", "files of your own parts")):
        compare(what, *(known(x.get("code"), name) for x in (before, now)), show=False)
    return found


def python_version() -> str:
    """The version of Python without its patch level."""
    return ".".join(platform.python_version_tuple()[:2])
