"""Heads: parts trained on top of an encoder that terms read, such as the classifier of a cross-entropy or a decoder.

A head reads the features h (or embeddings z) of its encoders, side by side where it has several, and gives one output
a row. It is trained with the encoder: gradients flow through it, unlike the online probe, a part of memory, which never
moves an encoder. N rows, D features, E embedding, K classes, S side of a view.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxcl.errors import UserError
from jaxcl.models.decoder import Decoder as DecoderNetwork
from jaxcl.models.heads import Dense, ProjectionHead, check_head

Array = jax.Array
Tree = Any


class Facts(NamedTuple):
    """What a head has to know of the rest."""

    features: int  # D, of what it reads of its encoders together
    num_classes: int
    image_shape: tuple[int, int, int]  # of a view


@dataclasses.dataclass(frozen=True)
class Network:
    """A head that is a flax module with batch norms: `network(facts)`."""

    def check(self, where: str, facts: Facts) -> None:
        """UserError for what cannot work."""

    def init(self, key: Array, facts: Facts) -> tuple[Tree, Tree]:
        """-> (params, batch statistics)."""
        variables = self.network(facts).init(key, jnp.zeros((1, facts.features)), train=False)
        return variables["params"], variables.get("batch_stats", {})

    def apply(
        self, facts: Facts, params: Tree, stats: Tree, x: Array, *, train: bool, where: Array | None = None
    ) -> tuple[Array, Tree]:
        """-> (output, new batch statistics)."""
        variables, network = {"params": params, "batch_stats": stats}, self.network(facts)
        if not train:
            return network.apply(variables, x, train=False), stats
        out, new = network.apply(variables, x, train=True, where=where, mutable=["batch_stats"])
        return out, new.get("batch_stats", {})


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A linear classifier: h [N,D] -> logits [N,K], for a cross_entropy term."""

    encoders: Sequence[str] = ("",)  # whose features it reads; "" is the main encoder
    together: bool = False  # all views in one go; here it makes no difference

    reads: ClassVar[str] = "h"

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
class Decoder(Network):
    """A mirrored ResNet: h [N,D] -> images [N,S,S,C] in the units of the views, for a reconstruction term."""

    encoders: Sequence[str] = ("",)
    together: bool = True  # all views are one batch of its batch norms
    widths: Sequence[int] = (512, 256, 128, 64, 64)  # channels before, between and after the stages
    blocks: int = 2  # residual blocks a stage
    patch: int = 1  # pixels a side that one place of the last map becomes; above 1 it costs far less

    reads: ClassVar[str] = "h"

    def check(self, where: str, facts: Facts) -> None:
        """UserError for what cannot work."""
        try:
            self.network(facts)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    def network(self, facts: Facts) -> DecoderNetwork:
        side, _, channels = facts.image_shape
        options = dict(widths=tuple(self.widths), blocks=self.blocks, patch=self.patch)
        return DecoderNetwork(size=side, channels=channels, **options)


@dataclasses.dataclass(frozen=True)
class MLP(Network):
    """An MLP on the embedding: z [N,E] -> [N,features]; the predictor of BYOL and SimSiam."""

    reads: ClassVar[str] = "z"

    encoders: Sequence[str] = ("",)
    together: bool = False  # views are batches of their own of its batch norms
    features: int = 128  # of the output: those of the embedding it predicts
    hidden_layers: int = 1
    hidden: int = 0  # 0: as wide as the input
    norm: str = "batch"  # after each hidden layer: none, batch
    out_norm: str = "none"  # after the last: none, batch, plain (no scale, no bias)

    def check(self, where: str, facts: Facts) -> None:
        names = ("features", "hidden_layers", "hidden", "norm", "out_norm")
        check_head(f"{where}.", **{n: getattr(self, n) for n in names})
        if not self.features:
            raise UserError(f"{where}.features is 0; expected the size of the embedding it predicts")

    def network(self, facts: Facts) -> ProjectionHead:
        return ProjectionHead(self.features, self.hidden_layers, self.hidden, self.norm, self.out_norm)
