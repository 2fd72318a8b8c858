"""Terms on a pair of views, without labels: NT-Xent, one-way InfoNCE, instance spreading, Barlow Twins.

They refuse a view with padded rows (`Embedding.where`).
B batch (of this device), E embedding.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from jaxcl import losses
from jaxcl.losses.common import AxisName, unit, widened
from jaxcl.method.terms.base import NO_STATE, Embedding, PairTerm, own_negatives
from jaxcl.method.terms.similarity import Similarity, of_views
from jaxcl.runtime.options import POSITIVE, OptionError, Range

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class NTXent(PairTerm):
    """NT-Xent (SimCLR): cosine similarity, both views are anchors. `losses.nt_xent`; arXiv 2002.05709.

    Non-semantic negatives (arXiv 2110.14189): an anchor sees only its own.
    """

    temperature: Annotated[float, POSITIVE] = 0.5
    negatives: tuple[str, ...] = ()  # embeddings of each view's non-semantic negatives, or one for both
    alpha: float = 2.0  # of the negatives: their similarity counts alpha times, inside the exponent
    negatives_gradient: bool = True  # whether they receive gradient

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.negatives) > 2 or "" in self.negatives:
            raise OptionError("negatives", f"is {self.negatives}; expected none, one for both views, or two")

    @property
    def optional(self) -> tuple[str, ...]:
        return self.negatives

    def __call__(
        self,
        e: dict[str, Embedding],
        label: Array,
        *,
        memory: Mapping[str, Any] = NO_STATE,
        axis_name: AxisName = None,
    ) -> Array:
        own = [own_negatives(e, name, len(label)) for name in self.negatives]
        if not self.negatives_gradient:
            own = jax.lax.stop_gradient(own)
        negatives = None if not own or own[0] is None else tuple(own) if len(own) == 2 else own[0]
        options = dict(negatives=negatives, alpha=self.alpha, temperature=self.temperature)
        return losses.nt_xent(*self.pair(e), axis_name=axis_name, **options)

    def similarities(
        self, e: dict[str, Embedding], count: int, memory: Mapping[str, Any]
    ) -> dict[str, list[Similarity]]:
        """Of views with the other view, their own negatives and another image; nothing without negatives."""
        views, own = self.pair(e), [own_negatives(e, name, count) for name in self.negatives]
        return of_views(views, views[::-1], own * 2 if len(own) == 1 else own)


@dataclasses.dataclass(frozen=True)
class OneWayInfoNCE(PairTerm):
    """InfoNCE from the first view's rows to the second's ("Plain" in CLAE). `losses.one_way_infonce`; clae.md b.1.

    Views are (anchors, keys): an anchor meets the keys of all images and no other anchor.
    """

    temperature: Annotated[float, POSITIVE] = 0.1
    normalize: bool = True  # rows to unit length first; False: inner products of the embeddings as they are

    def __call__(
        self,
        e: dict[str, Embedding],
        label: Array,
        *,
        memory: Mapping[str, Any] = NO_STATE,
        axis_name: AxisName = None,
    ) -> Array:
        anchors_BxE, keys_BxE = _rows(self.pair(e), self.normalize)
        return losses.one_way_infonce(anchors_BxE, keys_BxE, temperature=self.temperature, axis_name=axis_name)


@dataclasses.dataclass(frozen=True)
class InstanceSpread(PairTerm):
    """Instance spreading ("UEL" in CLAE), keys under stop-gradient. `losses.instance_spread`; arXiv 1904.03436."""

    temperature: Annotated[float, POSITIVE] = 0.1
    negative_multiplier: Annotated[float, Range(1)] = 1.0  # weight of the negatives
    normalize: bool = True  # rows to unit length first; False: inner products of the embeddings as they are

    def __call__(
        self,
        e: dict[str, Embedding],
        label: Array,
        *,
        memory: Mapping[str, Any] = NO_STATE,
        axis_name: AxisName = None,
    ) -> Array:
        return losses.instance_spread(
            jnp.concatenate(_rows(self.pair(e), self.normalize)),
            temperature=self.temperature,
            negative_multiplier=self.negative_multiplier,
            axis_name=axis_name,
        )


@dataclasses.dataclass(frozen=True)
class BarlowTwins(PairTerm):
    """Barlow Twins: features standardised over the batch, not correlated with each other. `losses.barlow_twins`."""

    off_diagonal_weight: float = 3.9e-3
    scale: float = 1 / 32  # of the whole loss; the paper's own: 1, with an off_diagonal_weight of 5e-3

    def __call__(
        self,
        e: dict[str, Embedding],
        label: Array,
        *,
        memory: Mapping[str, Any] = NO_STATE,
        axis_name: AxisName = None,
    ) -> Array:
        return losses.barlow_twins(
            *self.pair(e), off_diagonal_weight=self.off_diagonal_weight, scale=self.scale, axis_name=axis_name
        )


def _rows(pair: tuple[Array, Array], normalize: bool) -> list[Array]:
    # Lengths of a half-precision embedding are those of its float32 values, as inside the losses.
    return [unit(z) if normalize else z for z in widened(*pair)]
