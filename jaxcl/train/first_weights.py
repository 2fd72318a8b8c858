"""The weights that a run began with: recorded in its folder where an evaluator compares with them.

A run that began with a file of weights has a copy of what it used, run/first/ENCODER.safetensors: the file may be gone
or another one later. A run without files needs none: its first weights are a function of the seed.
"""

from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from jaxcl.method.init_state import init_state
from jaxcl.method.initial_weights import starting_weights
from jaxcl.method.recipe import Recipe
from jaxcl.models import weights

Tree = Any
FOLDER, MAIN = "first", "main"


def record(workdir: epath.Path, given: dict[str, tuple[Tree, Tree]]) -> None:
    """Write the weights by encoder (`starting_weights`) to the run folder."""
    for name, (params, stats) in given.items():
        variables = {k: np.asarray(v) for k, v in weights.flat(params, stats).items()}
        weights.write(_file(workdir, name), variables, {"provenance": {"name": "the first weights of the run"}})


def first_weights(config: ConfigDict, recipe: Recipe, workdir: epath.Path) -> tuple[Tree, Tree]:
    """-> (parameters, batch statistics) of the run at step 0. Raises UserError for files that cannot be read."""
    given = {}
    for name in ("", *recipe.encoders):
        file = _file(workdir, name)
        if file.exists():
            given[name] = weights.nested(weights.read(file).variables)
    if not given:
        given = starting_weights(config, recipe)
    # As in training: this program runs once, and optimising it does not pay on a CPU.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None

    def create(seed: jax.Array, given: dict[str, tuple[Tree, Tree]]) -> tuple[Tree, Tree]:
        state = init_state(recipe, seed, given)
        return state.params, state.batch_stats

    return jax.device_get(jax.jit(create, compiler_options=options)(np.uint32(recipe.seed), given))


def _file(workdir: epath.Path, name: str) -> epath.Path:
    return workdir / FOLDER / f"{name or MAIN}{weights.SUFFIX}"
