"""Weights of encoders as safetensors files: how they are written, read, and fitted to an encoder.

A file says of itself what it is, in JSON, in the header that safetensors has for that: `about`. Its tensors are the
variables of one encoder, by the paths of flax's tree ("params.stem_conv.kernel") or by torchvision's names
(`models.torch_layout`). A file by torchvision's names without a word about itself is read too.
"""

import json
import logging
import os
from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from jaxcl.errors import UserError
from jaxcl.method.recipe import Recipe
from jaxcl.models import BRANCHES, HEAD, Model, torch_layout
from jaxcl.runtime import storage

logger = logging.getLogger("jaxcl")

Tree = Any
Variables = dict[str, np.ndarray]  # by dotted names
SUFFIX = ".safetensors"
DEFAULT_NAME = "backbone" + SUFFIX
LAYOUTS = ("jaxcl", "torch")
_KEY = "jaxcl"  # of the header
_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def flat(params: Tree, stats: Tree) -> Variables:
    """Parameters and statistics of an encoder, by dotted names."""
    return flatten_dict({"params": params, "batch_stats": stats}, sep=".")


def nested(variables: Variables) -> tuple[Tree, Tree]:
    """-> (parameters, statistics), from dotted names."""
    tree = unflatten_dict(variables, sep=".")
    return tree["params"], tree.get("batch_stats", {})


def file_of(path: str | os.PathLike) -> epath.Path:
    """The file that a path means: itself, or the backbone in a folder."""
    path = storage.folder(path)
    return path if path.name.endswith(SUFFIX) else path / DEFAULT_NAME


def write(path: str | os.PathLike, variables: Variables, about: Mapping[str, Any], *, layout: str) -> epath.Path:
    """Write variables of an encoder to a file, and `about` beside it too, for people; -> the file.

    Args:
      path: a file that ends in .safetensors, or a folder, made where it is missing; local or remote.
      variables: by our names; float32.
      layout: "jaxcl" or "torch".

    Errors: UserError where nothing can be written.
    """
    path = file_of(path)
    tensors = torch_layout.to_torch(variables) if layout == "torch" else variables
    tensors = {name: np.ascontiguousarray(value) for name, value in sorted(tensors.items())}
    about = {**about, "layout": layout}
    # "format" is for readers of torch's world, who ask for it.
    header = {_KEY: json.dumps(about), **({"format": "pt"} if layout == "torch" else {})}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.write_whole(path, safetensors.numpy.save(tensors, header))
        storage.write_whole(_beside(path), json.dumps(about, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {storage.refusal(error) or error.strerror or error}") from error
    return path


def _beside(path: epath.Path) -> epath.Path:
    return path.with_name(path.name.removesuffix(SUFFIX) + ".json")


def read(path: str | os.PathLike) -> tuple[Variables, dict[str, Any]]:
    """-> (variables by our names, float32; what the file says about itself, {} where nothing).

    Errors: UserError for what is no such file, damaged, or of no known names.
    """
    path = file_of(path)
    storage.need_library(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise UserError(f"weights {path} cannot be read ({why}); expected what jaxcl export wrote") from error
    if content[:2] in (b"PK", b"\x80\x02"):
        raise UserError(
            f"{path} is a pickle of torch, which may run code when it is read; convert it where you trust it, with "
            "safetensors.torch.save_file(model.state_dict(), PATH)"
        )
    try:
        tensors = safetensors.deserialize(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        about = json.loads(header.get("__metadata__", {}).get(_KEY, "{}"))
    except (safetensors.SafetensorError, ValueError) as error:
        raise UserError(f"{path} is no safetensors file, or damaged ({error})") from error
    state = {name: _array(path, name, tensor) for name, tensor in tensors if not torch_layout.ignored(name)}
    if about.get("layout") == "torch" or (not about and torch_layout.is_torch(state)):
        return torch_layout.from_torch(state), about
    if about.get("layout") != "jaxcl":
        some = ", ".join(sorted(state)[:3]) or "nothing"
        raise UserError(
            f"{path} holds {some}, ...; expected an export of jaxcl, or a ResNet by torchvision's names (conv1.weight, "
            "bn1.weight, layer1.0.conv1.weight, ...)"
        )
    return state, about


def _array(path: epath.Path, name: str, tensor: Mapping[str, Any]) -> np.ndarray:
    if tensor["dtype"] not in _FLOATS:
        raise UserError(f"{path}: {name} is {tensor['dtype']}; expected one of {', '.join(_FLOATS)}")
    return np.frombuffer(tensor["data"], _FLOATS[tensor["dtype"]]).reshape(tensor["shape"]).astype(np.float32)


def fit(where: str, variables: Variables, model: Model, image_shape: tuple[int, int, int]) -> tuple[Tree, Tree]:
    """Variables as (parameters, statistics) of a model's encoder.

    Further sets of batch norms, which no file has, begin as copies of the clean one.

    Args:
      where: what the variables are called in messages.
      variables: by our names.
      image_shape: of the images that the model is for.

    Errors: UserError where a name is missing or too many, or a shape differs.
    """
    wanted, norm_sets = shapes(model, image_shape), getattr(model.encoder, "norm_sets", ())
    sources = {name: _clean(name, norm_sets) for name in wanted}
    needed = set(sources.values())
    odd = [
        f"{name} is {_of(variables, name)} there and {wanted.get(name, 'absent')} here"
        for name in sorted(needed | set(variables))
        if name not in needed or name not in variables or variables[name].shape != wanted[name]
    ]
    if odd:
        more = f" (and {len(odd) - 1} more)" if len(odd) > 1 else ""
        raise UserError(f"{where} does not fit the encoder: {odd[0]}{more}; use the options of the model it is of")
    return nested({name: variables[source] for name, source in sources.items()})


def _of(variables: Variables, name: str) -> Any:
    return variables[name].shape if name in variables else "absent"


def shapes(model: Model, image_shape: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
    """Of the variables of a model's encoder, of all its sets of batch norms, by name."""
    params, stats = jax.eval_shape(lambda: model.init(jax.random.key(0), image_shape))
    stats = {k: v for k, v in stats.items() if k not in (HEAD, BRANCHES)}
    return {name: tuple(x.shape) for name, x in flat(params["encoder"], stats).items()}


def _clean(name: str, norm_sets: tuple[str, ...]) -> str:
    """The name of the same variable in the clean set: "params.stages_0_0.bn1_adv.scale" -> "...bn1.scale"."""
    path = name.split(".")
    for norm_set in norm_sets:
        path[-2] = path[-2].removesuffix(f"_{norm_set}")
    return ".".join(path)


def starting_weights(config: ConfigDict, recipe: Recipe) -> dict[str, tuple[Tree, Tree]]:
    """What the config's `model.weights` and `encoders.NAME.weights` name: (parameters, statistics) by encoder, "" main.

    Errors: UserError for files that cannot be read or do not fit.
    """
    nodes = {"": ("model", config.model), **{n: (f"encoders.{n}", node) for n, node in config.encoders.items()}}
    out = {}
    for name, (where, node) in nodes.items():
        if path := node.get("weights"):
            if not isinstance(path, str):
                raise UserError(f"{where}.weights is {path!r}; expected a path, or '' for none")
            variables, about = read(path)
            out[name] = fit(f"{where}.weights {path}", variables, recipe.encoder(name), recipe.image_shape)
            origin = about.get("provenance", {})
            of = f", of {origin.get('name')} at step {origin.get('step')}" if origin else ""
            logger.info("%s begins with the weights in %s%s", where, path, of)
    return out
