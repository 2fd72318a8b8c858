"""The weights that a run starts from: `model.weights` and `encoders.NAME.weights` of its config."""

import logging
from typing import Any

from ml_collections import ConfigDict

from jaxcl.errors import UserError
from jaxcl.method.recipe import Recipe
from jaxcl.models import weights

logger = logging.getLogger("jaxcl")

Tree = Any


def starting_weights(config: ConfigDict, recipe: Recipe) -> dict[str, tuple[Tree, Tree]]:
    """Read the files that the config names, fitted to the encoders of its recipe.

    Where `config.pretrained` tells what the weights were when the run began, these are read: the same commit of a model
    of the hub, and files with the same hash.

    Returns:
      encoder's name ("" for the main one) -> (parameters, batch statistics), for each encoder with a file.

    Raises:
      UserError: a file that cannot be read, does not fit or has changed; the message begins with the config key.
    """
    nodes = {"": ("model", config.model), **{n: (f"encoders.{n}", node) for n, node in config.encoders.items()}}
    out = {}
    for name, (where, node) in nodes.items():
        if word := node.get("weights"):
            if not isinstance(word, str):
                raise UserError(f"{where}.weights is {word!r}; expected a path, or '' for none")
            known = config.get("pretrained", {}).get(where.replace(".", "/"), {})
            known = known if known.get("word") == word else {}
            found = weights.read(known.get("weights", word), kind=node.kind)
            where = f"{where}.weights {word}"
            if known and tuple(known["sha256"]) != tuple(found.origin["sha256"]):
                raise UserError(f"{where}: {found.file} is another file than when the run began; use another --workdir")
            out[name] = weights.fit(where, found.variables, recipe.encoder(name), recipe.image_shape)
            logger.info("%s: the encoder starts from these weights%s", where, _about(found, recipe, name))
    return out


def _about(found: weights.Weights, recipe: Recipe, name: str) -> str:
    origin, model = found.about.get("provenance", {}), recipe.encoder(name)
    parts = [f"from {origin.get('name')} at step {origin.get('step')}"] if origin else []
    parts += [f"licence {found.origin['licence']}"] if found.origin.get("licence") else []
    if found.preprocessing is None:
        parts.append("they do not tell how images were normalised: set data.mean and data.std if you know")
    elif found.usual:
        parts.append("images are normalised as is usual for them, since they do not tell")
    if model.input_size:
        parts.append(f"images are resized to {model.input_size} pixels")
    return ", " + ", ".join(parts) if parts else ""
