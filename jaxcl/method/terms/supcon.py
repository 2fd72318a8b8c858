"""The SupCon term: which rows are positives, negatives or nothing.

B batch, K background rows, V views, E embedding.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp

from jaxcl import losses
from jaxcl.losses.common import AxisName, first_row
from jaxcl.method.terms.base import NO_STATE, Embedding, Term, exist_in_all
from jaxcl.runtime.options import POSITIVE, OptionError, Range

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class SupCon(Term):
    """SupCon (L_out) on two or more views, with an optional view of background rows. `losses.supcon`."""

    views: tuple[str, ...] = ("view1", "view2")
    labels: bool = True  # False: each image is its own class, which is SimCLR's NT-Xent
    background: str = ""  # a view whose rows are negatives only; dropped while no stage makes it
    background_anchor: bool = False  # those rows are instead one more class, and anchors too
    temperature: Annotated[float, POSITIVE] = 0.1
    # the loss is multiplied by temperature / base_temperature; 0: not scaled
    base_temperature: Annotated[float, Range(0)] = 0.0
    anchors: Literal["all", "first"] = "all"  # "all" views or the "first" only
    # an anchor without a positive counts 0 ("all") or not at all ("positive")
    anchor_mean: Literal["all", "positive"] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.views:
            raise OptionError("views", "is empty; expected the names of one or more views")

    @property
    def needs_labels(self) -> bool:
        return self.labels

    @property
    def reads(self) -> tuple[str, ...]:
        return self.views

    @property
    def optional(self) -> tuple[str, ...]:
        return (self.background,) if self.background else ()

    def __call__(
        self,
        e: dict[str, Embedding],
        label: Array,
        *,
        memory: Mapping[str, Any] = NO_STATE,
        axis_name: AxisName = None,
    ) -> Array:
        z_BxVxE = jnp.stack([e[name].z for name in self.views], axis=1)
        where = exist_in_all(e, self.views)
        B = z_BxVxE.shape[0]
        # An image without a label (-1) is a class of its own, below every real one, in the batch of all devices.
        image = first_row(B, axis_name) + jnp.arange(B)
        labels = jnp.where(label >= 0, label, -2 - image) if self.labels else image
        options = dict(
            axis_name=axis_name,
            temperature=self.temperature,
            base_temperature=self.base_temperature or None,
            anchors=self.anchors,
            anchor_mean=self.anchor_mean,
        )
        background = e.get(self.background) if self.background else None
        # Without classes the loss itself knows the positives, and need not look for them.
        classes = labels if self.labels else None
        if background is None:
            return losses.supcon(z_BxVxE, classes, where=where, **options)
        if not self.background_anchor:
            return losses.supcon(
                z_BxVxE,
                classes,
                where=where,
                negatives=background.z,
                negatives_where=background.where,
                negatives_count=len(self.views),
                **options,
            )
        # One class past the last for all backgrounds. Every view of a background is its one image.
        K, V = background.z.shape[0], len(self.views)
        extra = jnp.broadcast_to(background.z[:, None], (K, V, background.z.shape[-1]))
        ones = jnp.ones(B, bool) if where is None else where
        exists = jnp.ones(K, bool) if background.where is None else background.where
        return losses.supcon(
            jnp.concatenate([z_BxVxE, extra]),
            jnp.concatenate([labels, jnp.full(K, jnp.iinfo(labels.dtype).max, labels.dtype)]),
            where=jnp.concatenate([ones, exists]),
            **options,
        )
