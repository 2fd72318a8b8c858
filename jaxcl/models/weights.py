"""Weights of encoders in files: write them as safetensors, read them, and fit them to an encoder.

`models.pretrained` says which texts name files that can be read. The header of a file holds a description in JSON,
`about`: the layout of the tensors ("jaxcl" or "torch"), the encoder's architecture, its preprocessing and its
provenance. In layout jaxcl the tensors are the variables of one encoder by the paths of flax's trees
("params.stem_conv.kernel"); in layout torch they are a state dict (`models.torch_layout`). A file without a description
is read too if an encoder's torch layout recognises it.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxcl.errors import UserError
from jaxcl.models import torch_pickle
from jaxcl.models.model import Model
from jaxcl.models.preprocessing import CLASSIFIERS, Preprocessing, of_export
from jaxcl.models.pretrained import PICKLES, SUFFIX, WORDS, Checkpoint, file_of, find
from jaxcl.models.registry import MODELS
from jaxcl.models.torch_layout import TorchLayout, Variables
from jaxcl.models.trees import ENCODER, encoder_stats
from jaxcl.runtime import storage
from jaxcl.runtime.options import quoted

logger = logging.getLogger("jaxcl")
Tree = Any
LAYOUTS = ("jaxcl", "torch")
_KEY = "jaxcl"  # in the header
_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


class Weights(NamedTuple):
    """The content of a checkpoint.

    Attributes:
      variables: of one encoder, float32.
      about: the description in the file, {} without one.
      kind: without a description, the kind of encoder whose torch layout recognised the file; otherwise "".
      config: the hub's description of the network, {} without one.
      preprocessing: of the images that the weights were trained on; None: not known.
      usual: whether the preprocessing is only what such weights usually have; they do not tell.
      origin: where the weights are from: "weights", "revision" and "licence" where they are known, and "sha256", the
        hash and the name of each file.
      file: the first one, for messages.
    """

    variables: Variables
    about: dict[str, Any]
    kind: str = ""
    config: Mapping[str, Any] = {}
    preprocessing: Preprocessing | None = None
    usual: bool = False
    origin: Mapping[str, Any] = {}
    file: str = ""


def flat(params: Tree, stats: Tree) -> Variables:
    """Parameters and batch statistics of an encoder -> variables by dotted names."""
    return flatten_dict({"params": params, "batch_stats": stats}, sep=".")


def nested(variables: Variables) -> tuple[Tree, Tree]:
    """Variables by dotted names -> (parameters, batch statistics)."""
    tree = unflatten_dict(variables, sep=".")
    return tree["params"], tree.get("batch_stats", {})


def torch_layout(kind: str) -> TorchLayout:
    """The torch layout of a kind of encoder. Raises UserError if the kind has none."""
    layout = MODELS.resolve(kind).torch_layout
    if layout is None:
        raise UserError(f"{kind} has no torch layout; use layout jaxcl")
    return layout


def _torch_layouts(kind: str) -> Iterator[tuple[str, TorchLayout]]:
    """(kind, torch layout) of the given kind, if it has one, and of the built-in kinds."""
    for name in dict.fromkeys((*filter(None, (kind,)), *MODELS)):
        if layout := MODELS.resolve(name).torch_layout:
            yield name, layout


def write(
    path: str | os.PathLike, variables: Variables, about: Mapping[str, Any], *, torch: TorchLayout | None = None
) -> epath.Path:
    """Write the variables of an encoder to a file, and `about` to a JSON file beside it for people.

    Args:
      path: a file that ends in .safetensors, or a folder, which is made if it is missing; local or remote.
      variables: float32.
      about: the description.
      torch: the layout to write; None: jaxcl's.

    Returns:
      The file.

    Raises:
      UserError: nothing can be written there.
    """
    path = file_of(path)
    tensors = torch.to_torch(variables) if torch else variables
    tensors = {name: np.ascontiguousarray(value) for name, value in sorted(tensors.items())}
    about = {**about, "layout": "torch" if torch else "jaxcl"}
    # Readers in torch ask for "format".
    header = {_KEY: json.dumps(about), **({"format": "pt"} if torch else {})}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.write_whole(path, safetensors.numpy.save(tensors, header))
        storage.write_whole(_beside(path), json.dumps(about, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {storage.refusal(error) or error.strerror or error}") from error
    return path


def _beside(path: epath.Path) -> epath.Path:
    return path.with_name(path.name.removesuffix(SUFFIX) + ".json")


def read(path: str | os.PathLike, *, kind: str = "") -> Weights:
    """Read the weights of an encoder.

    Args:
      path: a word, a model of the hub, a folder or a file, as `models.pretrained` describes them.
      kind: of the encoder that the weights are for; a file without a description is tried in its torch layout first.

    Raises:
      UserError: the file is missing or damaged, or its names are unknown.
    """
    found = find(path)
    tensors, about, hashes = _content(found)
    file = found.files[0]
    origin = {"weights": found.word, "revision": found.revision, "licence": found.licence}
    origin = {k: v for k, v in origin.items() if v} | {"sha256": hashes}
    known = found.preprocessing or of_export(str(file), about)
    facts = dict(about=about, config=found.config, origin=origin, file=str(file), preprocessing=known)

    if about.get("layout") == "jaxcl":
        return Weights(_arrays(file, tensors), **facts)
    if about.get("layout") == "torch" and "architecture" in about:
        layout = torch_layout(about["architecture"].get("kind"))
        return Weights(layout.from_torch(_arrays(file, tensors, layout)), **facts)
    for name, layout in _torch_layouts(kind):
        if layout.recognises(tensors):
            variables = layout.from_torch(_arrays(file, tensors, layout))
            known = known or layout.preprocessing(variables)
            usual = layout.usual_preprocessing if not known and _of_imagenet(tensors) else None
            return Weights(variables, **facts | dict(kind=name, preprocessing=known or usual, usual=usual is not None))
    some = ", ".join(sorted(tensors)[:3]) or "nothing"
    networks = [layout.network for _, layout in _torch_layouts(kind)]
    raise UserError(f"{file} holds {some}, ...; expected an export of jaxcl, or {' or '.join(networks)}")


def _of_imagenet(tensors: Mapping[str, Any]) -> bool:
    """Whether there is a classifier of ImageNet's 1,000 classes."""
    heads = [tensors[name] for name in (f"{head}.weight" for head in CLASSIFIERS) if name in tensors]
    return any(tuple(head["shape"])[:1] == (1000,) for head in heads)


def _content(found: Checkpoint) -> tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]:
    """-> (tensors by name, the description of the first file that has one, "HASH  NAME" of each file)"""
    tensors, about, hashes = {}, {}, ()
    for path in found.files:
        storage.need_library(path)
        try:
            content = path.read_bytes()
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            raise UserError(
                f"weights {path} cannot be read ({why}); expected a folder or file by jaxcl export, a .safetensors or "
                f".pth file, hf:ORG/NAME, or {' or '.join(WORDS)}"
            ) from error
        hashes += (f"{hashlib.sha256(content).hexdigest()}  {path.name}",)
        if torch_pickle.looks_like(content) or (path.name.endswith(PICKLES) and content[8:9] != b"{"):
            # In the form of safetensors' own.
            tensors |= {
                k: dict(dtype=_dtype(v), shape=v.shape, data=v)
                for k, v in torch_pickle.read(content, str(path)).items()
            }
        else:
            new, known = _safetensors(path, content)
            tensors, about = tensors | new, about or known
    return tensors, about, hashes


def _dtype(array: np.ndarray) -> str:
    return next((name for name, kind in _FLOATS.items() if array.dtype == kind), str(array.dtype))


def _safetensors(path: epath.Path, content: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """-> (tensors by name, the description)"""
    try:
        tensors = dict(safetensors.deserialize(content))
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        about = json.loads(header.get("__metadata__", {}).get(_KEY, "{}"))
        if not isinstance(about, dict) or not isinstance(about.get("architecture", {}), dict):
            raise ValueError(f"the description {_KEY} is not one of jaxcl")
    except (safetensors.SafetensorError, ValueError, RecursionError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is no safetensors file, or damaged ({error})") from error
    return tensors, about


def _arrays(path: epath.Path, tensors: Mapping[str, Any], layout: TorchLayout | None = None) -> Variables:
    arrays = {}
    for name, tensor in tensors.items():
        if layout and layout.ignores(name):
            continue
        if tensor["dtype"] not in _FLOATS:
            raise UserError(f"{path}: {name} is {tensor['dtype']}; expected one of {', '.join(_FLOATS)}")
        array = tensor["data"]
        if not isinstance(array, np.ndarray):
            array = np.frombuffer(array, _FLOATS[tensor["dtype"]]).reshape(tensor["shape"])
        arrays[name] = array.astype(np.float32, order="C")
    return arrays


def architecture(weights: Weights) -> dict[str, Any]:
    """The options of the encoder that has these weights, with its kind: from the description, or from the tensors.

    Raises:
      UserError: no encoder has such weights, or the description lacks the options.
    """
    if weights.kind:
        known = torch_layout(weights.kind).architecture(weights.variables) | _said(weights)
        if taken := ", ".join(f"{k} {known[k]}" for k in sorted(assumed(weights))):
            logger.info("%s does not tell all of its %s; taken as usual: %s", weights.file, weights.kind, taken)
        return {"kind": weights.kind, **known}
    if "architecture" not in weights.about:
        raise UserError("it names no architecture")
    return weights.about["architecture"]


def assumed(weights: Weights) -> set[str]:
    """The options of `architecture` that nothing tells, so that they are as usual; a config may have others."""
    if not weights.kind:
        return set()
    layout, said = torch_layout(weights.kind), _said(weights)
    return {option for option in layout.assumed(weights.variables) if option not in said}


def _said(weights: Weights) -> dict[str, Any]:
    """The options that a config.json tells."""
    try:
        return torch_layout(weights.kind).architecture_from_config(weights.config) or {} if weights.config else {}
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"its config.json is not as the hub has it ({quoted(error)})") from error


def fit(where: str, variables: Variables, model: Model, image_shape: tuple[int, int, int]) -> tuple[Tree, Tree]:
    """Variables -> (parameters, batch statistics) of a model's encoder.

    Further sets of batch norms, which files lack, start as copies of the clean one.

    Args:
      where: the name of the variables in messages.
      variables: by dotted names.
      model: the model.
      image_shape: (H, W, C) of the images that the model is for.

    Raises:
      UserError: a name is missing or unknown, or a shape differs.
    """
    wanted = shapes(model, image_shape)
    sources = {name: _clean(name, model.encoder.norm_sets) for name in wanted}
    needed = set(sources.values())
    variables = {n: v for n, v in variables.items() if n in needed or not model.encoder.may_lack(n)}
    odd = [
        f"{name} is {_shape(variables, name)} there and {wanted.get(name, 'absent')} here"
        for name in sorted(needed | set(variables))
        if name not in needed or name not in variables or variables[name].shape != wanted[name]
    ]
    if odd:
        others = [text.partition(" ")[0] for text in odd[1:3]]
        more = f" (and {len(odd) - 1} more, such as {' and '.join(others)})" if others else ""
        raise UserError(f"{where} does not fit the encoder: {odd[0]}{more}; use the options of the model it is of")
    return nested({name: variables[source] for name, source in sources.items()})


def _shape(variables: Variables, name: str) -> Any:
    return variables[name].shape if name in variables else "absent"


def shapes(model: Model, image_shape: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
    """The shapes of the variables of a model's encoder, in all its sets of batch norms, by dotted names."""
    params, stats = jax.eval_shape(lambda: model.init(jax.random.key(0), image_shape))
    return {name: tuple(x.shape) for name, x in flat(params[ENCODER], encoder_stats(stats)).items()}


def _clean(name: str, norm_sets: tuple[str, ...]) -> str:
    """The name of the same variable in the clean set: "params.stages_0_0.bn1_adv.scale" -> "...bn1.scale"."""
    path = name.split(".")
    for norm_set in norm_sets:
        path[-2] = path[-2].removesuffix(f"_{norm_set}")
    return ".".join(path)
