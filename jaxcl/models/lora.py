"""LoRA: low-rank factors that are added to chosen kernels of an encoder, which stay as they are.

A kernel W [I,O] becomes W + (alpha / r) A B, with A [I,r] and B [r,O]. B starts at 0, so that the first features are
those of the weights. The factors form a tree like the encoder's, {..., "qkv": {"a": A, "b": B}}; the network knows
nothing of them. A fused kernel of queries, keys and values has one pair, as any other.

I inputs, O outputs, r rank.

Source: Hu et al. 2021, arXiv 2106.09685; A is drawn as in its released code.
"""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcl.errors import UserError
from jaxcl.models.encoder import Encoder, EncoderOptions

Array = jax.Array
Tree = Any
KERNEL, A, B = "kernel", "a", "b"


class LoRA(NamedTuple):
    """What is added to an encoder, by its options `lora_rank`, `lora_alpha` and `lora_targets`.

    Attributes:
      rank: r.
      factor: alpha / r.
      modules: of the modules whose kernels get factors, names or parts of paths in the encoder's tree, such as "qkv"
        or "attention/out".
    """

    rank: int
    factor: float
    modules: frozenset[str]

    @classmethod
    def of(cls, options: EncoderOptions, encoder: Encoder) -> "LoRA | None":
        """None for rank 0. Raises UserError for an encoder without such kernels, or an unknown target."""
        if not options.lora_rank:
            return None
        known = encoder.lora_modules
        if not known:
            raise UserError(f"lora_rank is {options.lora_rank}; expected 0: this encoder has no kernels for LoRA")
        for target in options.lora_targets:
            if target not in known:
                raise UserError(f"lora_targets holds {target!r}; expected some of {', '.join(known)}")
        modules = frozenset(name for target in options.lora_targets for name in known[target])
        if not modules:
            raise UserError(f"lora_targets is (); expected some of {', '.join(known)}")
        return cls(options.lora_rank, (options.lora_alpha or options.lora_rank) / options.lora_rank, modules)

    def init(self, key: Array, params: Tree) -> Tree:
        """The factors of an encoder's parameters: A uniform in +-1/sqrt(I), B zero, both float32."""

        def pair(path: str, kernel: Array) -> Tree:
            if kernel.ndim != 2:
                raise UserError(f"LoRA takes kernels [inputs, outputs], and {path} has the shape {kernel.shape}")
            inputs, outputs = kernel.shape
            own = jax.random.fold_in(key, zlib.crc32(path.encode()))
            a = jax.random.uniform(own, (inputs, self.rank), minval=-(inputs**-0.5), maxval=inputs**-0.5)
            return {A: a, B: jnp.zeros((self.rank, outputs))}

        return self._chosen(params, pair)

    def _chosen(self, tree: Tree, make: Callable[[str, Array], Tree], path: tuple[str, ...] = ()) -> Tree:
        """A tree with make(path, kernel) for the kernels in the chosen modules, at any depth within them."""
        out = {}
        for name, node in tree.items():
            here = (*path, name)
            if not isinstance(node, dict):
                continue
            at = "/".join(here)
            if KERNEL in node and any(f"/{module}/" in f"/{at}/" for module in self.modules):
                out[name] = make(at, node[KERNEL])
            elif inner := self._chosen(node, make, here):
                out[name] = inner
        return out

    def merged(self, params: Tree, factors: Tree) -> Tree:
        """The encoder's parameters with (alpha / r) A B added; all other arrays are the same objects."""
        out = dict(params)
        for name, node in factors.items():
            if A in node:
                change = jnp.matmul(node[A], node[B], precision="highest")
                out[name] = {**params[name], KERNEL: params[name][KERNEL] + self.factor * change}
            else:
                out[name] = self.merged(params[name], node)
        return out
