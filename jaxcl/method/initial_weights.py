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

    Returns:
      encoder's name ("" for the main one) -> (parameters, batch statistics), for each encoder with a file.

    Raises:
      UserError: a file that cannot be read or does not fit; the message begins with the config key.
    """
    nodes = {"": ("model", config.model), **{n: (f"encoders.{n}", node) for n, node in config.encoders.items()}}
    out = {}
    for name, (where, node) in nodes.items():
        if path := node.get("weights"):
            if not isinstance(path, str):
                raise UserError(f"{where}.weights is {path!r}; expected a path, or '' for none")
            found = weights.read(path, kind=node.kind)
            where = f"{where}.weights {path}"
            out[name] = weights.fit(where, found.variables, recipe.encoder(name), recipe.image_shape)
            origin = found.about.get("provenance", {})
            of = f", from {origin.get('name')} at step {origin.get('step')}" if origin else ""
            logger.info("%s: the encoder starts from these weights%s", where, of)
    return out
