"""The contract of a term, and what terms of several views share.

B batch, S side of a view, C channels, D features, E embedding, M negatives an image.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxcl.errors import UserError
from jaxcl.losses.common import AxisName
from jaxcl.method.terms.similarity import Similarity
from jaxcl.runtime.options import OptionError, Options, Range
from jaxcl.runtime.registry import Contract

Array = jax.Array
NO_STATE: Mapping[str, Any] = MappingProxyType({})


class Embedding(NamedTuple):
    """What an encoder made of one view.

    h: features [B,D]. z: embedding [B,E], not normalised. where: [B] bool, rows that exist; None: all do.
    image: [B,S,S,C], the view itself, for terms that name it in `images`. out: {head: its output [B,...]}, for terms
    that name the head in `heads`.
    """

    h: Array
    z: Array
    where: Array | None = None
    image: Array | None = None
    out: dict[str, Array] = {}  # noqa: RUF012 - never changed, only replaced


@dataclasses.dataclass(frozen=True)
class Term(Options, Contract):
    """A loss on the named embeddings of one update: a frozen dataclass of its options.

    Attributes:
      weight: factor of this term in the total loss.
      needs_labels: whether every training image must have a label.
      per_image: whether the loss is a mean over images, none of which sees another (no negatives in the batch). Only
        such terms can accumulate gradients over micro-batches.
      reads: names of the embeddings the term cannot do without.
      optional: names of embeddings it also takes, once a stage makes them.
      heads: (embedding, head) pairs whose output it reads, as `Embedding.out[head]`.
      images: names of embeddings whose view it reads, as `Embedding.image`.
      memories: names of memory parts it reads.
    """

    needs_labels: ClassVar[bool] = False
    per_image: ClassVar[bool] = False

    weight: Annotated[float, Range()] = dataclasses.field(default=1.0, kw_only=True)

    @property
    def reads(self) -> tuple[str, ...]:
        raise NotImplementedError(f"{type(self).__name__} must define `reads`")

    @property
    def optional(self) -> tuple[str, ...]:
        return ()

    @property
    def heads(self) -> tuple[tuple[str, str], ...]:
        return ()

    @property
    def images(self) -> tuple[str, ...]:
        return ()

    @property
    def memories(self) -> tuple[str, ...]:
        return ()

    def __call__(
        self,
        e: dict[str, Embedding],
        label: Array,
        *,
        memory: Mapping[str, Any] = NO_STATE,
        axis_name: AxisName = None,
    ) -> Array:
        """The loss of the global batch, a scalar.

        With an axis name it runs on every device of that mesh axis inside `jax.shard_map`: embeddings and labels are
        this device's rows of the global batch, and the result is the same on all devices. Sums over rows must then be
        summed over the axis too, and row numbers start at `losses.common.first_row`.

        Args:
          e: embeddings by name.
          label: int32 [B], -1 where unlabelled.
          memory: for each part in `memories`, what that part shows (`MemoryPart.exposed`).
          axis_name: the mesh axis that rows lie over, or None.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `__call__`")

    def count(self, label: Array, where: Mapping[str, Array | None]) -> Array | None:
        """Over how many rows the loss of a `per_image` term is a mean; None: always all of them.

        Args:
          label: int32 [B], -1 where unlabelled.
          where: for each view, bool [B], its rows that exist; None: all do.
        """
        return None

    def similarities(
        self, e: dict[str, Embedding], count: int, memory: Mapping[str, Any]
    ) -> dict[str, list[Similarity]]:
        """What to log of cosines, {kind: pairs}, for terms with negatives of an image's own; count: images."""
        return {}


@dataclasses.dataclass(frozen=True)
class PairTerm(Term):
    """A term on two views, [B,E] each. Subclasses say what their order means, if anything."""

    views: tuple[str, ...] = ("view1", "view2")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.views) != 2:
            raise OptionError("views", f"is {self.views}; expected the names of two views")

    @property
    def reads(self) -> tuple[str, ...]:
        return self.views

    def pair(self, e: dict[str, Embedding]) -> tuple[Array, Array]:
        """The embeddings of the two views. Errors: UserError for a view with padded rows."""
        for name in self.views:
            if e[name].where is not None:
                raise UserError(
                    f"{type(self).__name__}: view {name!r} has padded rows, which this loss cannot leave out; use a "
                    "supcon term, or views without padding"
                )
        return tuple(e[name].z for name in self.views)


def embedding_name(encoder: str, view: str) -> str:
    """The name of a view's embedding by an encoder; "" is the main encoder."""
    return f"{encoder}/{view}" if encoder else view


def split_name(embedding: str) -> tuple[str, str]:
    """-> (encoder, view) of an embedding's name."""
    encoder, _, view = embedding.rpartition("/")
    return encoder, view


def exist_in_all(e: dict[str, Embedding], views: tuple[str, ...]) -> Array | None:
    """The images, bool [B], all of whose views exist; None where no view is padded."""
    wheres = [e[name].where for name in views if e[name].where is not None]
    return jnp.all(jnp.stack(wheres), axis=0) if wheres else None


def own_negatives(e: dict[str, Embedding], name: str, count: int) -> Array | None:
    """[B,M,E]: the M negatives of each image; None without a name, or before a stage makes them."""
    if name not in e:
        return None
    z = e[name].z
    return z.reshape(count, len(z) // count, -1)
