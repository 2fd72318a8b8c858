"""Terms on the output of a head: cross-entropy of a classifier, reconstruction by a decoder.

B batch, K classes, S side of a view.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp

from jaxcl import losses
from jaxcl.losses.common import AxisName
from jaxcl.method.terms.base import NO_STATE, Embedding, Term
from jaxcl.runtime.options import SHARE, OptionError

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class HeadTerm(Term):
    """A term on one head's output for some views; every row of every view counts alike."""

    per_image: ClassVar[bool] = True

    views: tuple[str, ...] = ("view1", "view2")
    head: str = ""  # name of one of the config's heads

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.views:
            raise OptionError("views", "is empty; expected the names of one or more views")

    @property
    def reads(self) -> tuple[str, ...]:
        return self.views

    @property
    def heads(self) -> tuple[tuple[str, str], ...]:
        return tuple((v, self.head) for v in self.views)


@dataclasses.dataclass(frozen=True)
class CrossEntropy(HeadTerm):
    """Cross-entropy of a classifier head with the labels; it trains the encoder too. `losses.cross_entropy`."""

    needs_labels: ClassVar[bool] = True

    head: str = "classifier"
    label_smoothing: Annotated[float, SHARE] = 0.0

    def count(self, label: Array, where: Mapping[str, Array | None]) -> Array:
        known = label >= 0
        return sum(jnp.sum(known if where[v] is None else known & where[v]) for v in self.views)

    def __call__(
        self,
        e: dict[str, Embedding],
        label: Array,
        *,
        memory: Mapping[str, Any] = NO_STATE,
        axis_name: AxisName = None,
    ) -> Array:
        logits = jnp.concatenate([e[v].out[self.head] for v in self.views])
        labels = jnp.concatenate(
            [label if e[v].where is None else jnp.where(e[v].where, label, -1) for v in self.views]
        )
        return losses.cross_entropy(logits, labels, label_smoothing=self.label_smoothing, axis_name=axis_name)


@dataclasses.dataclass(frozen=True)
class Reconstruction(HeadTerm):
    """Mean squared error of a decoder head to the view itself, in its normalised units. `losses.reconstruction`."""

    head: str = "decoder"

    @property
    def images(self) -> tuple[str, ...]:
        return self.views

    def __call__(
        self,
        e: dict[str, Embedding],
        label: Array,
        *,
        memory: Mapping[str, Any] = NO_STATE,
        axis_name: AxisName = None,
    ) -> Array:
        x_hat = jnp.concatenate([e[v].out[self.head] for v in self.views])
        x = jnp.concatenate([e[v].image for v in self.views])
        where = None
        if any(e[v].where is not None for v in self.views):
            wheres = [e[v].where for v in self.views]
            ones = jnp.ones(len(label), bool)
            where = jnp.concatenate([ones if w is None else w for w in wheres])
        return losses.reconstruction(x_hat, x, where=where, axis_name=axis_name)
