"""Terms of methods with a target encoder or a predictor: MoCo, BYOL, SimSiam.

B batch (of this device), E embedding, K length of a queue, M negatives of an image's own.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import jax

from jaxcl import losses
from jaxcl.losses.common import AxisName
from jaxcl.method.terms.base import NO_STATE, Embedding, PairTerm, Term, own_negatives
from jaxcl.method.terms.similarity import Similarity, of_views
from jaxcl.runtime.options import POSITIVE, OptionError

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class MoCo(Term):
    """InfoNCE of queries with their keys, against a queue of older keys. `losses.moco`; MoCo-v2, arXiv 2003.04297."""

    per_image: ClassVar[bool] = True

    query: str = "view1"
    key: str = "target/view2"  # by the moving average
    negatives: str = ""  # embedding of non-semantic negatives, M an image, which only its own query sees
    queue: str = "queue"  # part of memory
    alpha: float = 2.0  # of the negatives: their similarity counts alpha times, inside the exponent
    temperature: Annotated[float, POSITIVE] = 0.2

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.query, self.key)

    @property
    def optional(self) -> tuple[str, ...]:
        return (self.negatives,) if self.negatives else ()

    @property
    def memories(self) -> tuple[str, ...]:
        return (self.queue,)

    def __call__(
        self,
        e: dict[str, Embedding],
        label: Array,
        *,
        memory: Mapping[str, Any] = NO_STATE,
        axis_name: AxisName = None,
    ) -> Array:
        return losses.moco(
            e[self.query].z,
            e[self.key].z,
            memory[self.queue],
            negatives=own_negatives(e, self.negatives, len(label)),
            alpha=self.alpha,
            temperature=self.temperature,
            where=e[self.query].where,
            axis_name=axis_name,
        )

    def similarities(
        self, e: dict[str, Embedding], count: int, memory: Mapping[str, Any]
    ) -> dict[str, list[Similarity]]:
        """Of queries with their keys, their own negatives and the queue; nothing without negatives."""
        own, q = own_negatives(e, self.negatives, count), e[self.query].z
        if own is None or e[self.query].where is not None:
            return {}
        return {
            "positive": [Similarity(q, e[self.key].z[:, None])],
            "own negative": [Similarity(q, own)],
            "queue": [Similarity(q, memory[self.queue].T)],
        }


@dataclasses.dataclass(frozen=True)
class BYOL(PairTerm):
    """Predictions of two views and the target's projections of the other one. `losses.byol`; arXiv 2006.07733."""

    per_image: ClassVar[bool] = True

    target: str = "target"  # the moving average
    head: str = "predictor"
    # The target's embeddings of each view's non-semantic negatives, or one for both; "" for a view without.
    negatives: tuple[str, ...] = ()
    alpha: float = 0.2  # weight of the negatives

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.negatives) > 2:
            raise OptionError("negatives", f"is {self.negatives}; expected none, one for both views, or two")

    @property
    def reads(self) -> tuple[str, ...]:
        return (*self.views, *(f"{self.target}/{v}" for v in self.views))

    @property
    def heads(self) -> tuple[tuple[str, str], ...]:
        return tuple((v, self.head) for v in self.views)

    @property
    def optional(self) -> tuple[str, ...]:
        return tuple(n for n in self.negatives if n)

    def __call__(
        self,
        e: dict[str, Embedding],
        label: Array,
        *,
        memory: Mapping[str, Any] = NO_STATE,
        axis_name: AxisName = None,
    ) -> Array:
        self.pair(e)  # refuses padded rows
        p1, p2 = (e[v].out[self.head] for v in self.views)
        z1, z2 = (e[f"{self.target}/{v}"].z for v in self.views)
        own = [own_negatives(e, name, len(label)) for name in self.negatives]
        negatives = None if all(n is None for n in own) else tuple(own) if len(own) == 2 else own[0]
        return losses.byol(p1, p2, z1, z2, negatives=negatives, alpha=self.alpha, axis_name=axis_name)

    def similarities(
        self, e: dict[str, Embedding], count: int, memory: Mapping[str, Any]
    ) -> dict[str, list[Similarity]]:
        """Of predictions with the targets of the other view, their own negatives and another image."""
        predicted = [e[v].out[self.head] for v in self.views]
        targets = [e[f"{self.target}/{v}"].z for v in reversed(self.views)]
        own = [own_negatives(e, name, count) for name in self.negatives]
        return of_views(predicted, targets, own * 2 if len(own) == 1 else own)


@dataclasses.dataclass(frozen=True)
class SimSiam(PairTerm):
    """Predictions of two views and the projections of the other one, without a target. `losses.simsiam`."""

    per_image: ClassVar[bool] = True

    head: str = "predictor"

    @property
    def heads(self) -> tuple[tuple[str, str], ...]:
        return tuple((v, self.head) for v in self.views)

    def __call__(
        self,
        e: dict[str, Embedding],
        label: Array,
        *,
        memory: Mapping[str, Any] = NO_STATE,
        axis_name: AxisName = None,
    ) -> Array:
        z1, z2 = self.pair(e)
        p1, p2 = (e[v].out[self.head] for v in self.views)
        return losses.simsiam(p1, p2, z1, z2, axis_name=axis_name)
