"""Weights of encoders as safetensors files: write them, read them, and fit them to an encoder.

The header of a file holds a description in JSON, `about`: the layout of the tensors ("jaxcl" or "torch"), the encoder's
architecture, its preprocessing and its provenance. In layout jaxcl the tensors are the variables of one encoder by the
paths of flax's trees ("params.stem_conv.kernel"); in layout torch they are a state dict (`models.torch_layout`). A file
without a description is read too if an encoder's torch layout recognises it.
"""

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
from jaxcl.models.model import Model
from jaxcl.models.registry import MODELS
from jaxcl.models.torch_layout import TorchLayout, Variables
from jaxcl.models.trees import ENCODER, encoder_stats
from jaxcl.runtime import storage

logger = logging.getLogger("jaxcl")
Tree = Any
SUFFIX = ".safetensors"
DEFAULT_NAME = "backbone" + SUFFIX
LAYOUTS = ("jaxcl", "torch")
_KEY = "jaxcl"  # in the header
_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


class Weights(NamedTuple):
    """The content of a file.

    Attributes:
      variables: of one encoder, float32.
      about: the description in the file, {} without one.
      kind: without a description, the kind of encoder whose torch layout recognised the file; otherwise "".
    """

    variables: Variables
    about: dict[str, Any]
    kind: str = ""


def flat(params: Tree, stats: Tree) -> Variables:
    """Parameters and batch statistics of an encoder -> variables by dotted names."""
    return flatten_dict({"params": params, "batch_stats": stats}, sep=".")


def nested(variables: Variables) -> tuple[Tree, Tree]:
    """Variables by dotted names -> (parameters, batch statistics)."""
    tree = unflatten_dict(variables, sep=".")
    return tree["params"], tree.get("batch_stats", {})


def file_of(path: str | os.PathLike) -> epath.Path:
    """The file that a path means: itself, or the backbone in a folder."""
    path = storage.folder(path)
    return path if path.name.endswith(SUFFIX) else path / DEFAULT_NAME


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
    """Read a file of weights.

    Args:
      path: the file, or a folder with an export.
      kind: of the encoder that the weights are for; a file without a description is tried in its torch layout first.

    Raises:
      UserError: the file is missing or damaged, or its names are unknown.
    """
    path = file_of(path)
    storage.need_library(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise UserError(f"weights {path} cannot be read ({why}); expected a file by jaxcl export") from error
    if content[:2] in (b"PK", b"\x80\x02"):
        raise UserError(
            f"{path} is a pickle of torch, which may run code when it is read; convert it where you trust it, with "
            "safetensors.torch.save_file(model.state_dict(), PATH)"
        )
    try:
        tensors = dict(safetensors.deserialize(content))
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        about = json.loads(header.get("__metadata__", {}).get(_KEY, "{}"))
        if not isinstance(about, dict) or not isinstance(about.get("architecture", {}), dict):
            raise ValueError(f"the description {_KEY} is not one of jaxcl")
    except (safetensors.SafetensorError, ValueError, RecursionError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is no safetensors file, or damaged ({error})") from error
    if about.get("layout") == "jaxcl":
        return Weights(_arrays(path, tensors), about)
    if about.get("layout") == "torch" and "architecture" in about:
        layout = torch_layout(about["architecture"].get("kind"))
        return Weights(layout.from_torch(_arrays(path, tensors, layout)), about)
    for name, layout in _torch_layouts(kind):
        if layout.recognises(tensors):
            return Weights(layout.from_torch(_arrays(path, tensors, layout)), about, name)
    some = ", ".join(sorted(tensors)[:3]) or "nothing"
    networks = [layout.network for _, layout in _torch_layouts(kind)]
    raise UserError(f"{path} holds {some}, ...; expected an export of jaxcl, or {' or '.join(networks)}")


def _arrays(path: epath.Path, tensors: Mapping[str, Any], layout: TorchLayout | None = None) -> Variables:
    arrays = {}
    for name, tensor in tensors.items():
        if layout and layout.ignores(name):
            continue
        if tensor["dtype"] not in _FLOATS:
            raise UserError(f"{path}: {name} is {tensor['dtype']}; expected one of {', '.join(_FLOATS)}")
        array = np.frombuffer(tensor["data"], _FLOATS[tensor["dtype"]])
        arrays[name] = array.reshape(tensor["shape"]).astype(np.float32)
    return arrays


def architecture(weights: Weights) -> dict[str, Any]:
    """The options of the encoder that has these weights, with its kind: from the description, or from the tensors.

    Raises:
      UserError: no encoder has such weights, or the description lacks the options.
    """
    if weights.kind:
        layout = torch_layout(weights.kind)
        if assumed := layout.assumed(weights.variables):
            taken = ", ".join(f"{k} {v}" for k, v in assumed.items())
            logger.info("the tensors do not tell all of the %s; taken as usual: %s", weights.kind, taken)
        return {"kind": weights.kind, **layout.architecture(weights.variables)}
    if "architecture" not in weights.about:
        raise UserError("it names no architecture")
    return weights.about["architecture"]


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
        more = f" (and {len(odd) - 1} more)" if len(odd) > 1 else ""
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
