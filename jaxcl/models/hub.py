"""Models of the Hugging Face hub, by the word hf:ORG/NAME[@REVISION]: found in its cache, or fetched into it.

With the package huggingface_hub a model is fetched, and brought up to date; without it, or without a network, the cache
is read as it is. A revision that is a whole commit hash is never looked up again once it is in the cache.

    models--ORG--NAME/refs/main            the hash of the newest commit that was fetched
    models--ORG--NAME/snapshots/HASH/      its files
"""

import importlib.util
import json
import logging
import os
import pathlib
import re
from typing import NamedTuple

from jaxcl.errors import UserError

logger = logging.getLogger("jaxcl")

PREFIX = "hf:"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, PROCESSOR, CARD = "config.json", "preprocessor_config.json", "README.md"
_WANTED = (CONFIG, PROCESSOR, CARD, SINGLE, INDEX, "model-*-of-*.safetensors")
_WORD = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?")
_HASH = re.compile(r"[0-9a-f]{40}")
_TRUE = ("1", "ON", "YES", "TRUE")


class Snapshot(NamedTuple):
    """A model in the cache.

    Attributes:
      word: hf:ORG/NAME@HASH.
      folder: with its files.
      revision: the hash.
    """

    word: str
    folder: pathlib.Path
    revision: str


def cache() -> pathlib.Path:
    """The folder of the hub's cache, by the variables of the environment that the hub itself reads."""
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"), "huggingface"
    )
    found = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return pathlib.Path(os.path.expandvars(os.path.expanduser(found)))


def offline() -> bool:
    """Whether the environment forbids the network."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in _TRUE for name in names)


def find(word: str) -> Snapshot:
    """The model that a word names, fetched if that is needed and possible.

    Raises:
      UserError: a word of another form, a model that is neither in the cache nor can be fetched, or one without
        safetensors.
    """
    parts = _WORD.fullmatch(word.removeprefix(PREFIX))
    name, revision = (parts["name"], parts["revision"] or "main") if parts else ("", "")
    if not parts or ".." in name or ".." in revision or revision.startswith("/"):
        raise UserError(f"{word!r} is no model of the hub; expected hf:ORG/NAME or hf:ORG/NAME@REVISION")
    folder = cache() / f"models--{name.replace('/', '--')}"
    found = _in_cache(folder, revision)
    if found is None or not (_HASH.fullmatch(revision) and _complete(found)):
        found = _fetched(word, name, revision, found)
    if not _complete(found):
        there = ", ".join(sorted(p.name for p in found.iterdir())[:6]) or "nothing"
        raise UserError(
            f"{word} has no {SINGLE}, or not all of its shards (there: {there}); fetch it again, or choose "
            "a model with safetensors"
        )
    return Snapshot(f"{PREFIX}{name}@{found.name}", found, found.name)


def _in_cache(folder: pathlib.Path, revision: str) -> pathlib.Path | None:
    """The snapshot of a revision (a branch, a tag, a hash); None if it is not there."""
    try:
        if not _HASH.fullmatch(revision):
            revision = (folder / "refs" / revision).read_text().strip()
        found = folder / "snapshots" / revision
        return found if _HASH.fullmatch(revision) and found.is_dir() else None
    except (OSError, ValueError):
        return None


def _complete(folder: pathlib.Path) -> bool:
    """Whether the weights are there, with all of their shards; a fetch may have been interrupted."""
    if (folder / SINGLE).is_file():
        return True
    try:
        shards = json.loads((folder / INDEX).read_bytes())["weight_map"].values()
        return all((folder / os.path.basename(name)).is_file() for name in set(shards))
    except FileNotFoundError:
        return False
    except (OSError, RecursionError, ValueError, AttributeError, LookupError, TypeError):
        return True  # not as the hub has it, which the reader tells


def _fetched(word: str, name: str, revision: str, cached: pathlib.Path | None) -> pathlib.Path:
    """The snapshot by the hub's own client; without it, without a network or offline, what is in the cache."""
    if importlib.util.find_spec("huggingface_hub") is None:
        if cached is None:
            raise UserError(f"{word} is not in the cache {cache()}; pip install 'jaxcl[pretrained]' fetches it")
        return cached
    if offline() and cached is None:
        raise UserError(f"{word} is not in the cache {cache()}, and HF_HUB_OFFLINE is set; unset it to fetch the model")
    if offline():
        return cached
    from huggingface_hub import snapshot_download  # late: an extra

    try:
        return pathlib.Path(
            snapshot_download(name, revision=revision, cache_dir=str(cache()), allow_patterns=list(_WANTED))
        )
    except Exception as error:  # noqa: BLE001 - another library's, and its network's
        why = _WHY.get(type(error).__name__) or _first_line(error)
        if cached is None:
            raise UserError(f"{word} cannot be fetched: {why}") from error
        logger.info("%s is used as it is in the cache; it cannot be looked up (%s)", word, type(error).__name__)
        return cached


_WHY = {
    "RepositoryNotFoundError": "the hub has no such model, or it is private; look at its name",
    "GatedRepoError": "its owner asks you to accept terms first: do so on its page, then log in by `hf auth login`",
    "RevisionNotFoundError": "the model has no such revision; leave @REVISION out for the newest",
    "LocalEntryNotFoundError": "it is not in the cache, and the hub cannot be reached; try again with a network",
    "OfflineModeIsEnabled": "it is not in the cache, and HF_HUB_OFFLINE is set; unset it to fetch the model",
}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}; is there a network?"
