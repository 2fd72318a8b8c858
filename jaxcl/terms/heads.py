"""Terms on the output of a head: cross-entropy of a classifier, reconstruction by a decoder.

B batch, K classes, S side of a view.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxcl import losses
from jaxcl.errors import UserError
from jaxcl.losses.common import AxisName
from jaxcl.terms.base import Embedding

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class HeadTerm:
    """The options of a term on one head's output for some views; their mean counts."""

    kind: ClassVar[str]
    optional: ClassVar[tuple[str, ...]] = ()
    per_image: ClassVar[bool] = True

    views: tuple[str, ...] = ("view1", "view2")
    head: str = ""  # name of one of the config's heads
    weight: float = 1.0

    def __post_init__(self):
        if not self.views:
            raise UserError(f"term {self.kind}: views is empty; expected the names of one or more views")

    @property
    def reads(self) -> tuple[str, ...]:
        return self.views

    @property
    def heads(self) -> tuple[tuple[str, str], ...]:
        """(embedding, head) pairs whose output it reads."""
        return tuple((v, self.head) for v in self.views)


@dataclasses.dataclass(frozen=True)
class CrossEntropy(HeadTerm):
    """Cross-entropy of a classifier head with the labels, which shapes the encoder too. `losses.cross_entropy`."""

    kind: ClassVar[str] = "cross_entropy"
    needs_labels: ClassVar[bool] = True

    head: str = "classifier"
    label_smoothing: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.label_smoothing <= 1:
            raise UserError(f"term cross_entropy: label_smoothing is {self.label_smoothing}; expected 0 to 1")

    def __call__(self, e: dict[str, Embedding], label: Array, *, axis_name: AxisName = None) -> Array:
        # All rows of all views count alike, however many of a view exist.
        logits = jnp.concatenate([e[v].out[self.head] for v in self.views])
        labels = jnp.concatenate(
            [label if e[v].where is None else jnp.where(e[v].where, label, -1) for v in self.views]
        )
        return losses.cross_entropy(logits, labels, label_smoothing=self.label_smoothing, axis_name=axis_name)


@dataclasses.dataclass(frozen=True)
class Reconstruction(HeadTerm):
    """Mean squared error of a decoder head to the view itself, in its normalised units. `losses.reconstruction`."""

    kind: ClassVar[str] = "reconstruction"
    needs_labels: ClassVar[bool] = False

    head: str = "decoder"

    @property
    def images(self) -> tuple[str, ...]:
        """The embeddings whose views it reads."""
        return self.views

    def __call__(self, e: dict[str, Embedding], label: Array, *, axis_name: AxisName = None) -> Array:
        x_hat = jnp.concatenate([e[v].out[self.head] for v in self.views])
        x = jnp.concatenate([e[v].image for v in self.views])
        where = None
        if any(e[v].where is not None for v in self.views):
            wheres = [e[v].where for v in self.views]
            ones = jnp.ones(len(label), bool)
            where = jnp.concatenate([ones if w is None else w for w in wheres])
        return losses.reconstruction(x_hat, x, where=where, axis_name=axis_name)
