"""What every term meets: the embeddings of a view, and the options that terms of several views share."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxcl.errors import UserError
from jaxcl.losses.common import check_above_zero

Array = jax.Array


class Embedding(NamedTuple):
    """What one view became: features h [B,D], embedding z [B,E] (not normalised), rows that exist [B] or None.

    image: [B,S,S,C], the view itself, where a term says that it reads it (`images`). out: by head, its output [B,...],
    where a term says that it reads that (`heads`).
    """

    h: Array
    z: Array
    where: Array | None = None
    image: Array | None = None
    out: dict[str, Array] = {}  # noqa: RUF012 - never changed, only replaced


def embedding_name(encoder: str, view: str) -> str:
    """What terms call a view as encoded by an encoder ("": the main one)."""
    return f"{encoder}/{view}" if encoder else view


def split_name(embedding: str) -> tuple[str, str]:
    """-> (encoder, view) of an embedding's name."""
    encoder, _, view = embedding.rpartition("/")
    return encoder, view


def exist_in_all(e: dict[str, Embedding], views: tuple[str, ...]) -> Array | None:
    """The images [B] all of whose views exist; None where no view lacks any."""
    wheres = [e[name].where for name in views if e[name].where is not None]
    return jnp.all(jnp.stack(wheres), axis=0) if wheres else None


def own_negatives(e: dict[str, Embedding], name: str, count: int) -> Array | None:
    """[B,M,E]: the M rows an image of the embedding of that name; None while no stage makes it (or without a name)."""
    if name not in e:
        return None
    z = e[name].z
    return z.reshape(count, len(z) // count, -1)


@dataclasses.dataclass(frozen=True)
class PairTerm:
    """The options of a term on two views, [B,E] each. Subclasses say what the order of the two means, if anything."""

    kind: ClassVar[str]
    needs_labels: ClassVar[bool] = False
    optional: ClassVar[tuple[str, ...]] = ()

    views: tuple[str, ...] = ("view1", "view2")
    weight: float = 1.0

    def __post_init__(self):
        if len(self.views) != 2:
            raise UserError(f"term {self.kind}: views is {self.views}; expected the names of two views")
        if hasattr(self, "temperature"):  # Barlow Twins has none
            check_above_zero(f"term {self.kind}", temperature=self.temperature)

    @property
    def reads(self) -> tuple[str, ...]:
        return self.views

    def pair(self, e: dict[str, Embedding]) -> tuple[Array, Array]:
        """The embeddings of the two views. Errors: UserError for a view with padded rows."""
        for name in self.views:
            if e[name].where is not None:
                raise UserError(
                    f"term {self.kind}: view {name!r} has rows that do not exist, which this loss cannot leave out; "
                    "use a supcon term, or views without padding"
                )
        return tuple(e[name].z for name in self.views)
