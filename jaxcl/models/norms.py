"""The norms of an encoder: group norms, or batch norms in one or several named sets.

A set holds one batch norm for each norm of the network, with its own scale, bias and running statistics; the sets share
all other parameters (auxiliary batch norms: Xie et al. 2020, "Adversarial Examples Improve Image Recognition", arXiv
1911.09665). The set "" is the clean one, which evaluation uses. In the variables the others lie beside it: `bn1_adv`.

C channels.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax

from jaxcl.models.batch_norm import BatchNorm, zero_rows
from jaxcl.runtime.options import OptionError

Array = jax.Array
Tree = Any

# The share of the old value that is kept: 0.9 where torch writes momentum 0.1. The running variance is biased (n).
MOMENTUM = 0.9
SET_MOMENTUM = 0.99


def check_norm_sets(norm: str, norm_sets: Sequence[str]) -> None:
    """Raises OptionError for names of sets that cannot be, or for sets of a norm other than batch norm."""
    for name in norm_sets:
        # No underscore: it separates the norm from the set in `bn1_adv`.
        if not isinstance(name, str) or not (name.isascii() and name.isalnum()):
            raise OptionError("norm_sets", f"holds {name!r}; expected names of letters and digits")
    if len(set(norm_sets)) < len(norm_sets):
        raise OptionError("norm_sets", f"is {tuple(norm_sets)}; expected each name once")
    if norm_sets and norm != "batch":
        raise OptionError("norm_sets", f"is {tuple(norm_sets)} with norm={norm}; only batch norms come in sets")


def norm_groups(channels: int) -> int:
    """Groups of a group norm: the largest divisor of the channels up to 32 that leaves two channels or more a group."""
    # One channel a group would be instance norm, which erases a 1x1 feature map.
    return max(g for g in range(1, max(1, min(32, channels // 2)) + 1) if channels % g == 0)


def _norm(kind: str, channels: int, momentum: float, dtype: Any, zero: bool, epsilon: float) -> nn.Module:
    if kind == "batch":
        return BatchNorm(momentum=momentum, epsilon=epsilon, dtype=dtype, zero_scale=zero)
    start = nn.initializers.zeros if zero else nn.initializers.ones
    return nn.GroupNorm(num_groups=norm_groups(channels), epsilon=epsilon, dtype=dtype, scale_init=start)


def name_in_set(name: str, norm_set: str) -> str:
    """The name of a norm in the variables: ("bn1", "adv") -> "bn1_adv"."""
    return f"{name}_{norm_set}" if norm_set else name


def add_norms(module: nn.Module, name: str, channels: int, zero: bool = False, epsilon: float = 1e-5) -> None:
    """In a module's `setup`: add a norm of this name for each set. zero: their scales start at 0 instead of 1.

    The module has the fields norm, norm_sets, momentum, norm_set_momentum and dtype.
    """
    for norm_set in ("", *module.norm_sets):
        momentum = module.norm_set_momentum if norm_set else module.momentum
        norm = _norm(module.norm, channels, momentum, module.dtype, zero, epsilon)
        setattr(module, name_in_set(name, norm_set), norm)


def apply_norm(module: nn.Module, name: str, x: Array, mode: dict) -> Array:
    """x [..., C] normalised by the norm of this name, in the set that `mode` names.

    mode: arguments of `BatchNorm.__call__` and norm_set; {} for a group norm.
    """
    mode = dict(mode)
    chosen = mode.pop("norm_set", "")
    if module.is_initializing():  # flax makes variables only of the modules that are called
        for norm_set in ("", *module.norm_sets):
            if norm_set != chosen:
                getattr(module, name_in_set(name, norm_set))(x, **mode)
    return getattr(module, name_in_set(name, chosen))(x, **mode)


def with_running_statistics(frozen: Callable[[tuple[str, ...]], bool]) -> contextlib.AbstractContextManager:
    """Within it, batch norms normalise by their running statistics in training too, and keep them.

    frozen: path of a norm in the tree of the network that is applied -> whether it does.
    """

    def call(norm: Callable, args: tuple, kwargs: dict, context: Any) -> Array:
        module = context.module
        is_norm = isinstance(module, (BatchNorm, nn.BatchNorm)) and context.method_name == "__call__"
        if not is_norm or module.is_initializing() or not frozen(module.path):
            return norm(*args, **kwargs)
        # Padded rows stay zero, as the norms that follow need them.
        return zero_rows(norm(args[0], use_running_average=True), kwargs.get("where"))

    return nn.intercept_methods(call)


def statistics_of(stats: Tree, norm_set: str, norm_sets: Sequence[str]) -> Tree:
    """The running statistics of one set."""
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
    """A tree with by(old, new) for the leaves that `part` has too, and its own values elsewhere."""
    if not isinstance(tree, dict):
        return by(tree, part)
    return {k: replace(v, part[k], by) if k in part else v for k, v in tree.items()}
