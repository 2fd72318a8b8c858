"""Heads: parts trained on top of an encoder that terms read, such as the classifier of a cross-entropy or a decoder.

A head reads the features h of its encoders, side by side where it has several, and gives one output a row. It is
trained with the encoder: gradients flow through it (unlike the online probe, a part of memory, which never moves an
encoder). N rows, D features, K classes, S side of a view.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcl.errors import UserError
from jaxcl.models.decoder import Decoder as DecoderNetwork
from jaxcl.models.heads import Dense

Array = jax.Array
Tree = Any


class Facts(NamedTuple):
    """What a head has to know of the rest."""

    features: int  # D, of its encoders together
    num_classes: int
    image_shape: tuple[int, int, int]  # of a view


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A linear classifier: h [N,D] -> logits [N,K], for a cross_entropy term."""

    encoders: Sequence[str] = ("",)  # whose features it reads; "" is the main encoder
    together: bool = False  # all views in one go; here it makes no difference

    needs_classes = True

    def check(self, where: str, facts: Facts) -> None:
        """UserError for what cannot work."""

    def init(self, key: Array, facts: Facts) -> tuple[Tree, Tree]:
        """-> (params, batch statistics)."""
        return Dense(facts.num_classes).init(key, jnp.zeros((1, facts.features)))["params"], {}

    def apply(
        self, facts: Facts, params: Tree, stats: Tree, h: Array, *, train: bool, where: Array | None = None
    ) -> tuple[Array, Tree]:
        """-> (output, new batch statistics)."""
        return Dense(facts.num_classes).apply({"params": params}, h), stats


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A mirrored ResNet: h [N,D] -> images [N,S,S,C] in the units of the views, for a reconstruction term."""

    encoders: Sequence[str] = ("",)
    together: bool = True  # all views are one batch of its batch norms
    widths: Sequence[int] = (512, 256, 128, 64, 64)  # channels before, between and after the stages
    blocks: int = 2  # residual blocks a stage

    needs_classes = False

    def check(self, where: str, facts: Facts) -> None:
        """UserError for what cannot work."""
        try:
            self._network(facts)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    def _network(self, facts: Facts) -> DecoderNetwork:
        side, _, channels = facts.image_shape
        return DecoderNetwork(size=side, channels=channels, widths=tuple(self.widths), blocks=self.blocks)

    def init(self, key: Array, facts: Facts) -> tuple[Tree, Tree]:
        variables = self._network(facts).init(key, jnp.zeros((1, facts.features)), train=False)
        return variables["params"], variables.get("batch_stats", {})

    def apply(
        self, facts: Facts, params: Tree, stats: Tree, h: Array, *, train: bool, where: Array | None = None
    ) -> tuple[Array, Tree]:
        variables, network = {"params": params, "batch_stats": stats}, self._network(facts)
        if not train:
            return network.apply(variables, h, train=False), stats
        out, new = network.apply(variables, h, train=True, where=where, mutable=["batch_stats"])
        return out, new.get("batch_stats", {})
