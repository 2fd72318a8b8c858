"""Terms of the class-conditional losses across two or more views: attract, class-conditional InfoNCE, and their mean.

Unlabelled images keep their label of -1: the losses make each of them its own class. Images with a padded view are left
out. V views, B batch (of this device), E embedding.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp

from jaxcl import losses
from jaxcl.losses.common import AxisName
from jaxcl.method.terms.base import NO_STATE, Embedding, Term, exist_in_all
from jaxcl.runtime.options import POSITIVE, OptionError, Range

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class ClassConditionalInfoNCE(Term):
    """Tell an image's other view from the other images of its class. `losses.class_conditional_infonce`.

    The anchors are the later view's rows, the candidates the earlier one's; over all pairs of views.
    """

    views: tuple[str, ...] = ("view1", "view2")
    temperature: Annotated[float, POSITIVE] = 0.5
    # "unit": cosines; "none": inner products; "released": the authors' (see losses.attract)
    norm: Literal["unit", "none", "released"] = "unit"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.views) < 2:
            raise OptionError("views", f"is {self.views}; expected the names of two or more views")

    @property
    def needs_labels(self) -> bool:
        return True

    @property
    def reads(self) -> tuple[str, ...]:
        return self.views

    def _arguments(self, e: dict[str, Embedding], axis_name: AxisName) -> tuple[Array, dict[str, Any]]:
        """Views [V,B,E], and the options all three losses have."""
        views_VxBxE = jnp.stack([e[name].z for name in self.views])
        where = exist_in_all(e, self.views)
        return views_VxBxE, dict(where=where, temperature=self.temperature, norm=self.norm, axis_name=axis_name)

    def __call__(
        self,
        e: dict[str, Embedding],
        label: Array,
        *,
        memory: Mapping[str, Any] = NO_STATE,
        axis_name: AxisName = None,
    ) -> Array:
        views_VxBxE, options = self._arguments(e, axis_name)
        return losses.class_conditional_infonce(views_VxBxE, label, **options)


@dataclasses.dataclass(frozen=True)
class Attract(ClassConditionalInfoNCE):
    """Supervised contrast across views with one positive at a time in the denominator. `losses.attract`."""

    labels: bool = True  # False: each image is its own class, which is InfoNCE across views
    positives_in_denominator: bool = False  # all positives instead
    positive_weight: Annotated[float, POSITIVE] = 1.0  # of those positives there
    clip_positive: float = 0.0  # an attracted logit counts no more than this; 0: not clipped (released code: 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positive_weight != 1 and not self.positives_in_denominator:
            raise OptionError(
                "positive_weight", f"is {self.positive_weight}; expected 1 unless positives_in_denominator"
            )

    @property
    def needs_labels(self) -> bool:
        return self.labels

    def _arguments(self, e: dict[str, Embedding], axis_name: AxisName) -> tuple[Array, dict[str, Any]]:
        views_VxBxE, options = super()._arguments(e, axis_name)
        return views_VxBxE, options | dict(
            positives_in_denominator=self.positives_in_denominator,
            positive_weight=self.positive_weight,
            clip_positive=self.clip_positive or None,
        )

    def __call__(
        self,
        e: dict[str, Embedding],
        label: Array,
        *,
        memory: Mapping[str, Any] = NO_STATE,
        axis_name: AxisName = None,
    ) -> Array:
        views_VxBxE, options = self._arguments(e, axis_name)
        return losses.attract(views_VxBxE, label if self.labels else None, **options)


@dataclasses.dataclass(frozen=True)
class Spread(Attract):
    """L_spread: (a_lc attract + a_spread class-conditional InfoNCE) / (a_lc + a_spread). `losses.spread`.

    With a_spread = 0 it is a_lc * attract, not divided, as in the released code.
    """

    a_lc: Annotated[float, Range(0)] = 1.0  # weight of attract
    a_spread: Annotated[float, Range(0)] = 1.0  # weight of class-conditional InfoNCE

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.a_lc + self.a_spread > 0:
            raise OptionError("a_spread", "is 0, and so is a_lc; expected one of them above 0")

    def __call__(
        self,
        e: dict[str, Embedding],
        label: Array,
        *,
        memory: Mapping[str, Any] = NO_STATE,
        axis_name: AxisName = None,
    ) -> Array:
        views_VxBxE, options = self._arguments(e, axis_name)
        labels = label if self.labels else None
        return losses.spread(views_VxBxE, labels, a_lc=self.a_lc, a_spread=self.a_spread, **options)[0]
