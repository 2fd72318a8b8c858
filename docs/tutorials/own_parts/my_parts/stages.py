"""A view of one's own, made from another view. B batch, S side of a view."""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from jaxcl.method import Stage, StageOutput
from jaxcl.runtime.options import Range


@dataclasses.dataclass(frozen=True)
class Erase(Stage):
    """Sets one random square of each image of a view to the mean colour."""

    of: str = "view1"  # the view to change
    share: Annotated[float, Range(above=0, at_most=1)] = 0.3  # side of the square, as a share of the view's

    @property
    def reads(self):
        return (self.of,)

    @property
    def writes(self):
        return (self.of,)

    def __call__(self, context, views):
        view = views[self.of]
        S = view.image.shape[1]
        side = max(1, round(self.share * S))
        # One key an image, from (seed, step, example index, name): the same on any number of devices.
        keys_B = context.keys(f"{self.of}/erase")
        corner_Bx2 = jax.vmap(lambda key: jax.random.randint(key, (2,), 0, S - side + 1))(keys_B)
        inside_BxSx2 = jnp.abs(jnp.arange(S)[:, None] - corner_Bx2[:, None] - (side - 1) / 2) <= (side - 1) / 2
        erased = inside_BxSx2[:, :, None, 0] & inside_BxSx2[:, None, :, 1]
        # Views are normalised, so 0 is the mean colour.
        return StageOutput({self.of: view._replace(image=jnp.where(erased[..., None], 0, view.image))})
