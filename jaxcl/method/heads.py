"""Heads: networks on top of encoders whose output terms read, such as a classifier, a decoder or a predictor.

A head is trained with its encoders: gradients flow through it. The online probe (a memory part), by contrast, never
moves an encoder. N rows, D features, E embedding, K classes, S side of a view.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcl.errors import UserError
from jaxcl.models.decoder import Decoder as DecoderNetwork
from jaxcl.models.heads import Dense, ProjectionHead
from jaxcl.runtime.options import Options, Range
from jaxcl.runtime.registry import Contract

Array = jax.Array
Tree = Any


class HeadInput(NamedTuple):
    """The sizes that a head is made for."""

    features: int  # numbers it reads of a row: features or embeddings of its encoders, side by side
    num_classes: int
    image_shape: tuple[int, int, int]  # of a view


@dataclasses.dataclass(frozen=True)
class Head(Options, Contract):
    """A network on top of one or more encoders, trained with them: a frozen dataclass of its options.

    Attributes:
      reads: "h", the encoders' features, or "z", their embeddings.
      encoders: whose; "" is the main encoder.
      together: whether all its views are one batch of its batch norms, or each a batch by itself.
    """

    reads: ClassVar[str] = "h"

    encoders: Sequence[str] = dataclasses.field(default=("",), kw_only=True)
    together: bool = dataclasses.field(default=False, kw_only=True)

    def check(self, where: str, sizes: HeadInput) -> None:
        """Errors: UserError for what cannot work. where: the head's config key."""

    def network(self, sizes: HeadInput) -> nn.Module:
        """A flax module: (x [N,features], train=, where=) -> output [N,...]."""
        raise NotImplementedError(f"{type(self).__name__} must define `network`, or `init` and `apply`")

    def init(self, key: Array, sizes: HeadInput) -> tuple[Tree, Tree]:
        """-> (params, batch statistics)."""
        variables = self.network(sizes).init(key, jnp.zeros((1, sizes.features)), train=False)
        return variables["params"], variables.get("batch_stats", {})

    def apply(
        self, sizes: HeadInput, params: Tree, stats: Tree, x: Array, *, train: bool, where: Array | None = None
    ) -> tuple[Array, Tree]:
        """-> (output, new batch statistics). where: [N] bool, rows that exist."""
        variables, network = {"params": params, "batch_stats": stats}, self.network(sizes)
        if not train:
            return network.apply(variables, x, train=False), stats
        out, new = network.apply(variables, x, train=True, where=where, mutable=["batch_stats"])
        return out, new.get("batch_stats", {})


@dataclasses.dataclass(frozen=True)
class Classifier(Head):
    """A linear classifier: h [N,D] -> logits [N,K], for a cross_entropy term."""

    def init(self, key: Array, sizes: HeadInput) -> tuple[Tree, Tree]:
        return Dense(sizes.num_classes).init(key, jnp.zeros((1, sizes.features)))["params"], {}

    def apply(
        self, sizes: HeadInput, params: Tree, stats: Tree, x: Array, *, train: bool, where: Array | None = None
    ) -> tuple[Array, Tree]:
        return Dense(sizes.num_classes).apply({"params": params}, x), stats


@dataclasses.dataclass(frozen=True)
class Decoder(Head):
    """A mirrored ResNet: h [N,D] -> images [N,S,S,C] in the units of the views, for a reconstruction term."""

    together: bool = dataclasses.field(default=True, kw_only=True)
    widths: Sequence[int] = (512, 256, 128, 64, 64)  # channels before, between and after the stages
    blocks: Annotated[int, Range(1)] = 2  # residual blocks a stage
    # pixels a side that one place of the last map becomes; above 1 it costs far less
    patch: Annotated[int, Range(1)] = 1

    def check(self, where: str, sizes: HeadInput) -> None:
        try:
            self.network(sizes)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    def network(self, sizes: HeadInput) -> DecoderNetwork:
        side, _, channels = sizes.image_shape
        options = dict(widths=tuple(self.widths), blocks=self.blocks, patch=self.patch)
        return DecoderNetwork(size=side, channels=channels, **options)


@dataclasses.dataclass(frozen=True)
class MLP(Head):
    """An MLP on the embedding: z [N,E] -> [N,features]; the predictor of BYOL and SimSiam."""

    reads: ClassVar[str] = "z"

    features: Annotated[int, Range(1)] = 128  # of the output: those of the embedding it predicts
    hidden_layers: Annotated[int, Range(0)] = 1
    hidden: Annotated[int, Range(0)] = 0  # 0: as wide as the input
    norm: Literal["none", "batch"] = "batch"  # after each hidden layer
    out_norm: Literal["none", "batch", "plain"] = "none"  # after the last layer; plain: no scale, no bias

    def network(self, sizes: HeadInput) -> ProjectionHead:
        return ProjectionHead(self.features, self.hidden_layers, self.hidden, self.norm, self.out_norm)
