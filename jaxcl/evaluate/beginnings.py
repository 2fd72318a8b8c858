"""The encoder as it was before training, beside which a trained one is shown."""

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxcl.errors import UserError
from jaxcl.evaluate.base import NotApplicable
from jaxcl.evaluate.context import EvalContext
from jaxcl.method import sharding
from jaxcl.method.init_state import init_state

PRETRAINED, UNTRAINED = "pretrained", "untrained"


def beginnings(config: ConfigDict) -> tuple[str, ...]:
    """Which of the two there are: the weights that the config names, and random ones."""
    return ((PRETRAINED,) if config.model.get("weights") else ()) + (UNTRAINED,)


def at_the_beginning(context: EvalContext, which: str) -> EvalContext:
    """The context of the same images and of an encoder that was not trained on them.

    Args:
      context: of the trained encoder.
      which: "untrained", the random weights that training from scratch begins with, whatever `model.weights` is; or
        "pretrained", the weights that it names.

    Raises:
      NotApplicable: the pretrained weights cannot be read any more.
    """
    if which == PRETRAINED:
        try:
            return context.at_first()
        except UserError as error:
            raise NotApplicable(f"the weights that training began with cannot be read any more ({error})") from error
    recipe = context.recipe

    def variables(seed: jax.Array) -> tuple[dict, dict]:
        state = init_state(recipe, seed)
        return state.params, state.batch_stats

    replicated = sharding.replicated(context.mesh)
    fresh = context.setup.compiled(which, lambda: jax.jit(variables, out_shardings=replicated))
    return context.of_other(which, lambda: fresh(np.uint32(recipe.seed)))
