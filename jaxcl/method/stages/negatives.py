"""Non-semantic negatives as stages: views of patches or of texture, made from the images of another view.

B batch, M negatives an image, H W image, S side of a view, C channels.

Source: Ge et al. 2021, arXiv 2110.14189.
"""

import dataclasses
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from jaxcl.augment import quilting
from jaxcl.augment.patches import check_patches, image_keys, patch_negatives, scaled_range
from jaxcl.errors import UserError
from jaxcl.method.stages.base import Stage, StageContext, StageOutput
from jaxcl.method.views import View
from jaxcl.runtime.options import Range

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class PatchNegatives(Stage):
    """Adds a view of patch negatives of another view. Rows b * count to (b + 1) * count - 1 are those of image b."""

    of: str = "view1"  # the view that is cut up
    into: str = "negatives"  # the new view
    min_patch: Annotated[int, Range(0)] = 0  # pixels; 0: the published 16 of 224, scaled to the view
    max_patch: Annotated[int, Range(0)] = 0  # pixels; 0: the published 72 of 224, scaled to the view
    count: Annotated[int, Range(1)] = 1  # negatives an image
    include_last_offset: bool = False  # let patches reach the last row and column (the released code does not)
    dihedral: bool = False  # mirror and turn every patch at random

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.of,)

    @property
    def writes(self) -> tuple[str, ...]:
        return (self.into,)

    def sizes(self, side: int) -> tuple[int, int]:
        """Smallest and largest patch for a view of this side."""
        low, high = scaled_range(side)
        return self.min_patch or low, self.max_patch or high

    def check(self, where: str, recipe: Any, num_devices: int) -> None:
        side = recipe.image_shape[0]
        check_patches(where, side, *self.sizes(side), self.count)
        recipe.grad_cache.check_rows(f"{where}.count", self.count * recipe.batch_size, recipe.batch_size, num_devices)

    def __call__(self, context: StageContext, views: dict[str, View]) -> StageOutput:
        view = views[self.of]
        low, high = self.sizes(view.image.shape[1])
        image = patch_negatives(
            context.keys(f"{self.into}/patches"),
            view.image,
            min_patch=low,
            max_patch=high,
            count=self.count,
            include_last_offset=self.include_last_offset,
            dihedral=self.dihedral,
        )
        where = None if view.where is None else jnp.repeat(view.where, self.count)
        return StageOutput({self.into: View(image.reshape(-1, *image.shape[2:]), {}, where)})


@dataclasses.dataclass(frozen=True)
class TextureNegatives(Stage):
    """Adds a view of texture: made from the image before augmentation, then augmented with another view's draws.

    Textures are quilted inside the update, `count` an image: rows b * count to (b + 1) * count - 1 are those of image
    b. If the data comes with prepared textures (data.textures in a config), one an image, they are used instead.
    """

    of: str = "view1"  # the view whose draws are repeated: same crop, flip and colours
    into: str = "negatives"  # the new view
    pipeline: str = ""  # the view whose pipeline is applied, with the draws of `of`; "": that of `of`
    exemplar: Annotated[int, Range(0)] = 0  # side of its two pieces, pixels; 0: 96/224 of the shorter side
    patch: Annotated[int, Range(0)] = 0  # side of a patch; 0: 4 + 1/8 of the image's shorter side
    overlap: Annotated[int, Range(0)] = 0  # of neighbouring patches; 0: a quarter of the patch or a little more
    candidates: Annotated[int, Range(1)] = 32  # patches compared for a place
    tolerance: Annotated[float, Range(0)] = 0.1  # take a random candidate within this of the best; 0: the best
    count: Annotated[int, Range(1)] = 1  # negatives an image

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.of,)

    @property
    def writes(self) -> tuple[str, ...]:
        return (self.into,)

    def check(self, where: str, recipe: Any, num_devices: int) -> None:
        for name, value in (("of", self.of), ("pipeline", self.pipeline or self.of)):
            if value not in recipe.views:
                raise UserError(f"{where}.{name} is {value!r}, which has no pipeline; name one of views")

    def __call__(self, context: StageContext, views: dict[str, View]) -> StageOutput:
        def augment(texture: Array) -> View:
            return context.augment(self.pipeline or self.of, self.of, texture)

        texture_BxM = self._textures(context)
        if self.count == 1:
            view = augment(texture_BxM[:, 0])
        else:
            view = jax.vmap(augment, in_axes=1, out_axes=1)(texture_BxM)
            view = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), view)
        where = views[self.of].where
        where = None if where is None else jnp.repeat(where, self.count)
        return StageOutput({self.into: view._replace(where=where)})

    def _textures(self, context: StageContext) -> Array:
        """[B,M,H,W,C]: the prepared textures, or quilted ones."""
        if context.textures is not None:
            if self.count > 1:
                raise UserError(
                    f"stage texture_negatives: count is {self.count}, but data.textures holds one an image; use 1"
                )
            return context.textures[:, None]
        pixels = context.pixels
        # Checked here, not in `check`: a recipe knows the size of its views but not of the images.
        sizes = (value or None for value in (self.exemplar, self.patch, self.overlap))
        layout = quilting.make_layout("stage texture_negatives", pixels.shape[1:], *sizes)
        keys = image_keys("stage texture_negatives", context.keys(f"{self.into}/texture"), len(pixels))
        # Folded, so that the first texture does not depend on `count`.
        keys_MxB = [jax.vmap(lambda k, m=m: jax.random.fold_in(k, m))(keys) if m else keys for m in range(self.count)]
        quilts = [quilting.quilt(k, pixels, layout, self.candidates, self.tolerance) for k in keys_MxB]
        return jnp.stack(quilts, axis=1)
