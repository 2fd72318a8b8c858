"""Terms of the class-conditional losses across two or more views: attract, class-conditional InfoNCE, and their mean.

Unlabelled images (-1) keep that label: the losses know it, and make each of them its own class. Images of which a view
does not exist are left out. V views, B batch (of this device), E embedding.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxcl import losses
from jaxcl.errors import UserError
from jaxcl.losses.common import AxisName, check_above_zero, check_choice
from jaxcl.terms.base import Embedding, exist_in_all

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class ClassConditionalInfoNCE:
    """Tell an image's other view from the other images of its class. `losses.class_conditional_infonce`.

    The anchors are the later view's rows, the candidates the earlier one's; over all pairs of views.
    """

    kind: ClassVar[str] = "class_conditional_infonce"
    optional: ClassVar[tuple[str, ...]] = ()

    views: tuple[str, ...] = ("view1", "view2")
    weight: float = 1.0
    temperature: float = 0.5
    norm: str = "unit"  # "unit": cosines; "none": inner products; "released": the authors' (see losses.attract)

    def __post_init__(self):
        if len(self.views) < 2:
            raise UserError(f"term {self.kind}: views is {self.views}; expected the names of two or more views")
        check_above_zero(f"term {self.kind}", temperature=self.temperature)
        check_choice(f"term {self.kind}", "norm", self.norm, ("unit", "none", "released"))

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

    def __call__(self, e: dict[str, Embedding], label: Array, *, axis_name: AxisName = None) -> Array:
        views_VxBxE, options = self._arguments(e, axis_name)
        return losses.class_conditional_infonce(views_VxBxE, label, **options)


@dataclasses.dataclass(frozen=True)
class Attract(ClassConditionalInfoNCE):
    """Supervised contrast across views with one positive at a time in the denominator. `losses.attract`."""

    kind: ClassVar[str] = "attract"

    labels: bool = True  # False: each image is its own class, which is InfoNCE across views
    positives_in_denominator: bool = False  # all positives instead
    positive_weight: float = 1.0  # of those positives there
    clip_positive: float = 0.0  # an attracted logit counts no more than this; 0: not clipped (released code: 1)

    def __post_init__(self):
        super().__post_init__()
        check_above_zero(f"term {self.kind}", positive_weight=self.positive_weight)
        if self.positive_weight != 1 and not self.positives_in_denominator:
            raise UserError(f"term {self.kind}: positive_weight needs positives_in_denominator=True; expected 1")

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

    def __call__(self, e: dict[str, Embedding], label: Array, *, axis_name: AxisName = None) -> Array:
        views_VxBxE, options = self._arguments(e, axis_name)
        return losses.attract(views_VxBxE, label if self.labels else None, **options)


@dataclasses.dataclass(frozen=True)
class Spread(Attract):
    """L_spread: (a_lc attract + a_spread class-conditional InfoNCE) / (a_lc + a_spread). `losses.spread`.

    With a_spread = 0 it is a_lc * attract, not divided, as in the released code.
    """

    kind: ClassVar[str] = "spread"

    a_lc: float = 1.0  # weight of attract
    a_spread: float = 1.0  # weight of class-conditional InfoNCE

    def __post_init__(self):
        super().__post_init__()
        if not (self.a_lc >= 0 and self.a_spread >= 0 and self.a_lc + self.a_spread > 0):
            raise UserError(
                f"term spread: a_lc is {self.a_lc} and a_spread {self.a_spread}; "
                "expected numbers that are not negative, one of them above 0"
            )

    def __call__(self, e: dict[str, Embedding], label: Array, *, axis_name: AxisName = None) -> Array:
        views_VxBxE, options = self._arguments(e, axis_name)
        labels = label if self.labels else None
        return losses.spread(views_VxBxE, labels, a_lc=self.a_lc, a_spread=self.a_spread, **options)[0]
