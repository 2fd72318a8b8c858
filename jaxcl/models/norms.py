"""The norms of an encoder: batch norms, once more for each named set, or group norms.

A set is the batch norms of a whole network, each with its own scale, bias and running statistics; all else is shared
(auxiliary batch norms: Xie et al. 2020, "Adversarial Examples Improve Image Recognition", arXiv 1911.09665). The set ""
is the clean one, by which the encoder is evaluated. In the variables the further ones stand beside it: `bn1_adv`.

C channels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax

from jaxcl.errors import UserError
from jaxcl.models.batch_norm import BatchNorm

Array = jax.Array
Tree = Any

NORMS = ("batch", "group")
# Flax keeps 0.9 of the old value where torch writes momentum 0.1; its running variance is biased (n, not n-1).
MOMENTUM = 0.9
SET_MOMENTUM = 0.99


def check_norm_sets(norm: str, norm_sets: Sequence[str], momentum: float) -> None:
    """UserError for sets of norms that cannot be."""
    if isinstance(norm_sets, str):
        raise UserError(f"model.norm_sets is {norm_sets!r}; expected names in brackets, ({norm_sets!r},)")
    for name in norm_sets:
        # No underscore: it is what divides `bn1_adv` into norm and set.
        if not isinstance(name, str) or not (name.isascii() and name.isalnum()):
            raise UserError(f"model.norm_sets holds {name!r}; expected names of letters and digits")
    if len(set(norm_sets)) < len(norm_sets):
        raise UserError(f"model.norm_sets is {tuple(norm_sets)}; expected each name once")
    if norm_sets and norm != "batch":
        raise UserError(f"model.norm_sets with model.norm={norm}: only batch norms come in sets; use model.norm=batch")
    if not 0 <= momentum < 1:
        raise UserError(f"model.norm_set_momentum is {momentum}; expected at least 0 and less than 1")


def norm_groups(channels: int) -> int:
    """Groups of a group norm: 32, or the nearest divisor below that leaves two channels to a group."""
    # One channel a group would be instance norm, which erases a 1x1 feature map.
    return max(g for g in range(1, max(1, min(32, channels // 2)) + 1) if channels % g == 0)


def _norm(kind: str, channels: int, momentum: float, dtype: Any) -> nn.Module:
    if kind == "batch":
        return BatchNorm(momentum=momentum, epsilon=1e-5, dtype=dtype)
    return nn.GroupNorm(num_groups=norm_groups(channels), epsilon=1e-5, dtype=dtype)


def name_in_set(name: str, norm_set: str) -> str:
    """What a norm is called in the variables: ("bn1", "adv") -> "bn1_adv"."""
    return f"{name}_{norm_set}" if norm_set else name


def add_norms(module: nn.Module, name: str, channels: int) -> None:
    """In a module's setup: its norm of this name, one a set, by its fields norm, momentum and so on."""
    for norm_set in ("", *module.norm_sets):
        momentum = module.norm_set_momentum if norm_set else module.momentum
        setattr(module, name_in_set(name, norm_set), _norm(module.norm, channels, momentum, module.dtype))


def apply_norm(module: nn.Module, name: str, x: Array, mode: dict) -> Array:
    """x [..., C] normalised by a module's norm of this name, of the set that `mode` says."""
    mode = dict(mode)
    chosen = mode.pop("norm_set", "")
    if module.is_initializing():  # only what is called gets variables
        for norm_set in ("", *module.norm_sets):
            if norm_set != chosen:
                getattr(module, name_in_set(name, norm_set))(x, **mode)
    return getattr(module, name_in_set(name, chosen))(x, **mode)


def statistics_of(stats: Tree, norm_set: str, norm_sets: Sequence[str]) -> Tree:
    """The part of the running statistics that belongs to one set."""
    if not norm_sets:
        return stats

    def owner(name: str, beside: dict) -> str:
        base, _, last = name.rpartition("_")
        return last if last in norm_sets and base in beside else ""

    def part(node: dict) -> dict:
        norms = {k: v for k, v in node.items() if "mean" in v and owner(k, node) == norm_set}
        return norms | {k: part(v) for k, v in node.items() if "mean" not in v}

    return part(stats)


def replace(tree: Tree, part: Tree, by: Callable[[Array, Array], Array]) -> Tree:
    """A tree with by(old, new) where the part has something to say, as it was elsewhere."""
    if not isinstance(tree, dict):
        return by(tree, part)
    return {k: replace(v, part[k], by) if k in part else v for k, v in tree.items()}
