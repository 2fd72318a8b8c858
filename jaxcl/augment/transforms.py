"""The operations that pipelines are made of, each a frozen dataclass of its options.

Each returns the images and the parameters it drew, one row per image. N images, S side of a crop.
"""

import dataclasses
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxcl.augment import color, ops, pixels
from jaxcl.augment.base import Array, Op, Params, Planes
from jaxcl.errors import UserError
from jaxcl.runtime.options import POSITIVE, SHARE, Range

Pair = tuple[float, float]
AREA = Range(above=0, at_most=1)
NOT_NEGATIVE = Range(0)
HUE = Range(0, 0.5)

# Values of the drawn parameters for an image that an operation leaves unchanged; parameters that are numbers only.
IDENTITY: dict[str, tuple[float, ...]] = {
    "jitter": color.IDENTITY,
    "crop": (0.0, 0.0, 1.0, 1.0),
    "blur_sigma": (0.0,),
    "grayscale": (0.0,),
    "flip": (0.0,),
}


def low_above_high(pair: Pair) -> str:
    """ "" for a pair in ascending order, else the reason to refuse it."""
    low, high = pair
    return f"is {pair}, with low above high; swap them" if low > high else ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomResizedCrop(Op):
    """Cuts out a random box and resizes it to size x size.

    `params["crop"]` [N,4]: top / H, left / W, height / H, width / W, as fractions of the image that was cropped.

    Args:
      size: side of the crop, pixels.
      area: range of the box's share of the image's area.
      ratio: range of the box's width / height.
      antialias: see `ops.resized_crop`.
      interpolation: bilinear, or bicubic, whose values are clipped to [0, 1].
    """

    takes_views: ClassVar[bool] = True
    # Mirroring the weights costs less than mirroring the pixels afterwards, and gives the same bits.
    fuses_flip: ClassVar[bool] = True
    gives_planes: ClassVar[bool] = True

    size: int
    area: Annotated[Pair, AREA] = (0.2, 1.0)
    ratio: Annotated[Pair, POSITIVE] = (3 / 4, 4 / 3)
    antialias: bool = True
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    name: str = "crop"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_size(self)
        for option in ("area", "ratio"):
            if reason := low_above_high(getattr(self, option)):
                raise self.bad_option(option, reason)

    def __call__(
        self, keys: Array, images: Array, flipped: Array | None = None, planar: bool = False
    ) -> tuple[Array | Planes, Params]:
        _, height, width, _ = images.shape
        boxes = ops.draw_resized_crop(keys, height, width, area=self.area, ratio=self.ratio)
        fractions = boxes / jnp.array([height, width, height, width], jnp.float32)
        crop = ops.crop_planes if planar else ops.resized_crop
        cubic = self.interpolation == "bicubic"
        crops = crop(images, boxes, self.size, antialias=self.antialias, cubic=cubic, flipped=flipped)
        if cubic:
            crops = jax.tree.map(lambda x: x.clip(0, 1), crops)
        return crops, {"crop": fractions}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomFlip(Op):
    """Mirrors left to right with probability p. `params["flip"]` bool [N]."""

    is_flip: ClassVar[bool] = True

    p: Annotated[float, SHARE] = 0.5
    name: str = "flip"

    def flips(self, keys: Array) -> Array:
        return ops.draw_mask(keys, p=self.p)

    def __call__(self, keys: Array, images: Array) -> tuple[Array, Params]:
        flipped = self.flips(keys)
        return ops.flip(images, flipped), {self.name: flipped}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomRotation(Op):
    """Turns by 0, 90, 180 or 270 degrees with probability p. `params["rotation"]` int32 [N], quarter turns."""

    p: Annotated[float, SHARE] = 0.5
    name: str = "rotation"

    def __call__(self, keys: Array, images: Array) -> tuple[Array, Params]:
        turns = ops.draw_quarter_turns(keys, p=self.p)
        return ops.quarter_turns(images, turns), {"rotation": turns}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomTilt(Op):
    """Turns by up to `degrees` either way; pixels from outside the image are 0. `params["tilt"]` [N], degrees."""

    degrees: Annotated[float, NOT_NEGATIVE] = 30.0
    name: str = "tilt"

    def __call__(self, keys: Array, images: Array) -> tuple[Array, Params]:
        tilts = self.degrees * (2 * ops.draw_uniform(keys, 1)[:, 0] - 1)
        return ops.tilt(images, jnp.deg2rad(tilts)), {"tilt": tilts}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColorJitter(Op):
    """Changes brightness, contrast, saturation and hue in random order, with probability p.

    `params`: "jitter" [N,4] the three factors and the hue shift in turns, (1, 1, 1, 0) where skipped; "jitter_order"
    int32 [N,4], the property that was changed t-th; "jitter_applied" bool [N].

    Args:
      brightness, contrast, saturation: strengths s; a factor is uniform in [max(0, 1 - s), 1 + s].
      hue: strength s, at most 0.5; the shift is uniform in [-s, s] turns.
    """

    brightness: Annotated[float, NOT_NEGATIVE] = 0.4
    contrast: Annotated[float, NOT_NEGATIVE] = 0.4
    saturation: Annotated[float, NOT_NEGATIVE] = 0.4
    hue: Annotated[float, HUE] = 0.1
    p: Annotated[float, SHARE] = 0.8
    name: str = "jitter"

    def takes_planes(self, channels: int) -> bool:
        return channels == 3

    def __call__(self, keys: Array, images: Array | Planes) -> tuple[Array, Params]:
        strength = (self.brightness, self.contrast, self.saturation, self.hue)
        factors, order, applied = color.draw_color_jitter(keys, strength=strength, p=self.p)
        changed = tuple(p for p in color.PROPERTIES if getattr(self, p) > 0)
        images = color.color_jitter(images, factors, order, properties=changed)
        return images, {"jitter": factors, "jitter_order": order, "jitter_applied": applied}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomGrayscale(Op):
    """Removes the colour with probability p and keeps three channels. `params["grayscale"]` bool [N]."""

    p: Annotated[float, SHARE] = 0.2
    name: str = "grayscale"

    def __call__(self, keys: Array, images: Array) -> tuple[Array, Params]:
        mask = ops.draw_mask(keys, p=self.p)
        return color.grayscale(images, mask), {"grayscale": mask}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussianBlur(Op):
    """Blurs with a random width, with probability p. `params["blur_sigma"]` [N] pixels, 0 where skipped.

    Args:
      sigma: range of the standard deviation, pixels.
      kernel_size: odd number of taps; None: `ops.blur_kernel_size` of the shorter side.
    """

    p: Annotated[float, SHARE] = 0.5
    sigma: Annotated[Pair, POSITIVE] = (0.1, 2.0)
    kernel_size: int | None = None
    name: str = "blur"

    def __post_init__(self) -> None:
        super().__post_init__()
        if reason := low_above_high(self.sigma):
            raise self.bad_option("sigma", reason)

    def __call__(self, keys: Array, images: Array) -> tuple[Array, Params]:
        sigma = ops.draw_blur_sigma(keys, sigma=self.sigma, p=self.p)
        return ops.gaussian_blur(images, sigma, kernel_size=self.kernel_size), {"blur_sigma": sigma}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomSolarize(Op):
    """Inverts values of at least `threshold`, with probability p. `params["solarize"]` bool [N]."""

    p: Annotated[float, SHARE] = 0.2
    threshold: float = 0.5
    name: str = "solarize"

    def __call__(self, keys: Array, images: Array) -> tuple[Array, Params]:
        mask = ops.draw_mask(keys, p=self.p)
        return ops.solarize(images, mask, threshold=self.threshold), {"solarize": mask}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resize(Op):
    """Resizes to size x size without keeping the aspect ratio. Images of that size are returned unchanged.

    interpolation: bilinear, or bicubic, whose values are clipped to [0, 1].
    """

    size: int
    antialias: bool = True
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    name: str = "resize"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_size(self)

    def __call__(self, keys: Array, images: Array) -> tuple[Array, Params]:
        cubic = self.interpolation == "bicubic"
        resized = ops.resize(images, self.size, antialias=self.antialias, cubic=cubic)
        return resized.clip(0, 1) if cubic else resized, {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Normalize(Op):
    """(x - mean) / std per channel, both in [0, 1] units."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str = "normalize"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "mean", tuple(float(v) for v in self.mean))
        object.__setattr__(self, "std", tuple(float(v) for v in self.std))
        if len(self.mean) != len(self.std) or min(self.std, default=0.0) <= 0.0:
            raise self.bad_option("std", f"is {self.std} for mean {self.mean}; expected as many, each above 0")

    def __call__(self, keys: Array, images: Array) -> tuple[Array, Params]:
        if len(self.mean) != images.shape[-1]:
            raise UserError(
                f"normalize has {len(self.mean)} channel means, the images have {images.shape[-1]} channels"
            )
        return pixels.normalize(images, self.mean, self.std), {}


def _check_size(op: RandomResizedCrop | Resize) -> None:
    # The data decides the size, so it has no default and the options layer does not check it.
    if not isinstance(op.size, int) or op.size < 1:
        raise op.bad_option("size", f"is {op.size!r}; expected a whole number of pixels, at least 1")
