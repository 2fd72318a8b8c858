"""What a config may hold, checked before anything of it is used: keys, kinds of values and their ranges.

The command line is checked by ml_collections; a config file may set anything. Options of parts (views, terms, ...) are
checked where the parts are made, by `fits` too.
"""

import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from jaxcl.errors import UserError
from jaxcl.recipe_check import fits, quoted, suggestion

# Name -> part, and lists of parts.
MAPPINGS, LISTS = ("views", "terms", "memory", "heads", "encoders"), ("stages", "passes")
PARTS = ("model", "optimizer", "grad_cache", "accumulate")
TEXTS = ("eval.corruptions", "eval.ood")  # empty by default, so that their default does not tell
AT_LEAST = {
    "seed": 0,
    "batch_size": 1,
    "size": 0,
    "devices": 0,
    "hosts": 0,
    "data.limit": 0,
    "data.prefetch": 1,
    "data.files.image_size": 0,
    "data.tfds.image_size": 0,
    "eval.batch_size": 1,
    "eval.knn_k": 1,
    "eval.neighbours": 1,
    "eval.logistic_epochs": 1,
    "eval.logistic_batch_size": 1,
    "eval.transfer_epochs": 1,
    "eval.sgd_epochs": 0,
    "eval.fgsm": 0,
    "eval.pgd": 0,
    "eval.pgd_steps": 1,
    "eval.shuffle_grids": 1,
    "checkpoint.keep": 1,
}
ABOVE_0 = ("eval.knn_temperature", "eval.logistic_lr", "eval.explanation_fraction")
AT_MOST = {"seed": 2**32 - 1, "eval.explanation_fraction": 1, "batch_size": 2**31 - 1, "size": 2**15}


def check(config: ConfigDict, known: ConfigDict) -> None:
    """UserError for a key that `known` lacks or the config does, and for a value of another kind or out of range."""
    _check_node(config, known, "")
    for name in (*MAPPINGS, *PARTS):
        _mapping(name, config[name])
    for name in MAPPINGS:
        for key, node in config[name].items():
            _mapping(f"{name}.{key}", node)
    for name, node in config.memory.items():
        if "optimizer" in node:
            _mapping(f"memory.{name}.optimizer", node.optimizer)
    for name in LISTS:
        if not isinstance(config[name], (tuple, list)):
            raise UserError(f"{name} is {quoted(config[name])}; expected a tuple of them")
        for i, node in enumerate(config[name]):
            _mapping(f"{name}[{i}]", node)


def _check_node(node: ConfigDict, known: ConfigDict, prefix: str) -> None:
    for key in node:
        if key not in known:
            raise UserError(f"unknown config key {prefix}{key}{suggestion(key, known)}")
    for key in known:
        name = f"{prefix}{key}"
        if key not in node:
            raise UserError(f"config key {name} is missing; start from jaxcl.config.default()")
        if name in (*MAPPINGS, *PARTS, *LISTS):
            continue
        if isinstance(known[key], ConfigDict):
            _mapping(name, node[key])
            _check_node(node[key], known[key], f"{name}.")
        else:
            _check_value(name, node[key], known[key])


def _mapping(name: str, node: Any) -> None:
    if not isinstance(node, (ConfigDict, Mapping)):
        raise UserError(f"{name} is {quoted(node)}; expected keys and values, as jaxcl.config makes them")


def _check_value(name: str, value: Any, default: Any) -> None:
    if not fits(value, default, "str" if name in TEXTS else ""):
        raise UserError(f"{name} is {quoted(value)}; expected a value like {default!r}")
    least, most = AT_LEAST.get(name, -math.inf), AT_MOST.get(name, math.inf)
    for number in value if isinstance(value, (tuple, list)) else (value,):
        if name in ABOVE_0 and not number > 0:
            raise UserError(f"{name} is {quoted(value)}; expected a number above 0")
        if name in AT_LEAST and number < least or name in AT_MOST and number > most:
            raise UserError(
                f"{name} is {quoted(value)}; expected at {f'least {least}' if number < least else f'most {most}'}"
            )
