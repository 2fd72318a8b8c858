"""Augmentation pipelines: a tuple of small frozen dataclasses, applied to a batch under one jit.

    view = random_view(32, mean, std)
    images, params = view(keys, batch)      # keys [N], one an image; images [N,H,W,C] uint8 or float in [0,1]

`params` holds what was drawn, one row an image: whoever needs the parameters (augmentation embeddings,
figures, tests) reads them instead of guessing. An image's result depends on its own key and pixels only.
"""

import dataclasses
import math
import zlib
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxcl.augment import color, ops
from jaxcl.errors import UserError

Params = dict[str, jax.Array]

# What the parameters of a view would be that an operation left as it was; of those that are numbers of an image.
IDENTITY: dict[str, tuple[float, ...]] = {
    "jitter": color.IDENTITY,
    "crop": (0.0, 0.0, 1.0, 1.0),
    "blur_sigma": (0.0,),
    "grayscale": (0.0,),
    "flip": (0.0,),
}


class Op(Protocol):
    """An operation of a pipeline. `name` labels its keys and its parameters."""

    name: str

    def __call__(self, keys: jax.Array, images: jax.Array) -> tuple[jax.Array, Params]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomResizedCrop:
    """Random box, resized to size x size.

    `params["crop"]` [N,4]: top / H, left / W, height / H, width / W, fractions of the image the crop was
    taken from.
    """

    size: int
    area: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    antialias: bool = True
    name: str = "crop"

    def __post_init__(self):
        _check_size("crop size", self.size)
        _check_range("crop area", self.area, above=0.0, most=1.0)
        _check_range("crop ratio", self.ratio, above=0.0, most=math.inf)

    def __call__(self, keys, images, flipped=None, planar=False):
        """flipped: which crops are mirrored, bool [N]. planar: gives a tuple of the channels, each [N,S,S]."""
        _, height, width, _ = images.shape
        boxes = ops.draw_resized_crop(keys, height, width, area=self.area, ratio=self.ratio)
        fractions = boxes / jnp.array([height, width, height, width], jnp.float32)
        crop = ops.crop_planes if planar else ops.resized_crop
        crops = crop(images, boxes, self.size, antialias=self.antialias, flipped=flipped)
        return crops, {"crop": fractions}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomFlip:
    """Mirror left and right. `params["flip"]` bool [N]."""

    p: float = 0.5
    name: str = "flip"

    def __post_init__(self):
        _check_probability("flip", self.p)

    def draw(self, keys):
        return ops.draw_mask(keys, p=self.p)

    def __call__(self, keys, images):
        flipped = self.draw(keys)
        return ops.flip(images, flipped), {"flip": flipped}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomRotation:
    """Turn by 0, 90, 180 or 270 degrees, with probability p. `params["rotation"]` int32 [N], quarter turns."""

    p: float = 0.5
    name: str = "rotation"

    def __post_init__(self):
        _check_probability("rotation", self.p)

    def __call__(self, keys, images):
        turns = ops.draw_quarter_turns(keys, p=self.p)
        return ops.quarter_turns(images, turns), {"rotation": turns}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomTilt:
    """Turn by up to so many degrees either way, black where nothing was. `params["tilt"]` [N], degrees."""

    degrees: float = 30.0
    name: str = "tilt"

    def __call__(self, keys, images):
        tilts = self.degrees * (2 * ops.draw_uniform(keys, 1)[:, 0] - 1)
        return ops.tilt(images, jnp.deg2rad(tilts)), {"tilt": tilts}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColorJitter:
    """Brightness, contrast, saturation and hue in random order, with probability p.

    `params`: "jitter" [N,4] the three factors and the hue shift in turns, (1, 1, 1, 0) where skipped;
    "jitter_order" int32 [N,4], which part came t-th; "jitter_applied" bool [N].
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    p: float = 0.8
    name: str = "jitter"

    def __post_init__(self):
        _check_probability("jitter", self.p)
        for part in color.PARTS:
            most = 0.5 if part == "hue" else math.inf
            if not 0.0 <= getattr(self, part) <= most:
                limit = "in [0, 0.5] turns" if part == "hue" else "at least 0"
                raise UserError(f"jitter {part} {getattr(self, part)} must be {limit}")

    def __call__(self, keys, images):
        strength = (self.brightness, self.contrast, self.saturation, self.hue)
        factors, order, applied = color.draw_color_jitter(keys, strength=strength, p=self.p)
        parts = tuple(part for part in color.PARTS if getattr(self, part) > 0)
        images = color.color_jitter(images, factors, order, parts=parts)
        return images, {"jitter": factors, "jitter_order": order, "jitter_applied": applied}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomGrayscale:
    """Drop the colour, keep three channels. `params["grayscale"]` bool [N]."""

    p: float = 0.2
    name: str = "grayscale"

    def __post_init__(self):
        _check_probability("grayscale", self.p)

    def __call__(self, keys, images):
        mask = ops.draw_mask(keys, p=self.p)
        return color.grayscale(images, mask), {"grayscale": mask}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussianBlur:
    """Blur of random width. `params["blur_sigma"]` [N] pixels, 0 where skipped."""

    p: float = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)
    kernel_size: int | None = None
    name: str = "blur"

    def __post_init__(self):
        _check_probability("blur", self.p)
        _check_range("blur sigma", self.sigma, above=0.0, most=math.inf)

    def __call__(self, keys, images):
        sigma = ops.draw_blur_sigma(keys, sigma=self.sigma, p=self.p)
        return ops.gaussian_blur(images, sigma, kernel_size=self.kernel_size), {"blur_sigma": sigma}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomSolarize:
    """Invert bright values. `params["solarize"]` bool [N]."""

    p: float = 0.2
    threshold: float = 0.5
    name: str = "solarize"

    def __post_init__(self):
        _check_probability("solarize", self.p)

    def __call__(self, keys, images):
        mask = ops.draw_mask(keys, p=self.p)
        return ops.solarize(images, mask, threshold=self.threshold), {"solarize": mask}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resize:
    """Resize to size x size, the aspect ratio not kept; nothing where the image has that size already."""

    size: int
    antialias: bool = True
    name: str = "resize"

    def __post_init__(self):
        _check_size("resize size", self.size)

    def __call__(self, keys, images):
        return ops.resize(images, self.size, antialias=self.antialias), {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Normalize:
    """(x - mean) / std a channel, both in [0,1] units."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str = "normalize"

    def __post_init__(self):
        object.__setattr__(self, "mean", tuple(float(v) for v in self.mean))
        object.__setattr__(self, "std", tuple(float(v) for v in self.std))
        if len(self.mean) != len(self.std) or min(self.std, default=0.0) <= 0.0:
            raise UserError(
                f"normalize needs as many std as mean, each std above 0, got mean {self.mean}, std {self.std}"
            )

    def __call__(self, keys, images):
        if len(self.mean) != images.shape[-1]:
            raise UserError(
                f"normalize has {len(self.mean)} channel means, the images have {images.shape[-1]} channels"
            )
        return ops.normalize(images, self.mean, self.std), {}


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Operations in order: `pipeline(keys, images) -> (images, params)`.

    Operation keys are folded from the image's key by the operation's name and how often the name came before,
    not by
    its place: leaving one operation out, or setting its probability to 0, changes no number the others draw,
      so an
    ablation compares the same crops. The second operation of a name writes its parameters as "flip_2", and so
    on.
    """

    ops: tuple[Any, ...]

    def __post_init__(self):
        object.__setattr__(self, "ops", tuple(self.ops))

    def __call__(self, keys: jax.Array, images: jax.Array) -> tuple[jax.Array, Params]:
        """Augments a batch.

        Args:
          keys: [N] typed threefry keys, one an image; or [V N] for V views of each, those of an image side by side.
          images: [N,H,W,C], uint8 or float in [0,1].

        Returns:
          images float32 [N,S,S,C] and the drawn parameters, name -> [N,...]; or [V N,...], as the keys.

        Raises:
          UserError: keys not one an image nor as many for each, or images an operation cannot take.
        """
        _check_batch(keys, images)
        images = ops.to_unit(images)
        if len(keys) > len(images) and not isinstance(next(iter(self.ops), None), RandomResizedCrop):
            # A crop reads an image once for all its views.
            images = jnp.repeat(images, len(keys) // len(images), axis=0)
        names = [op.name for op in self.ops]
        nths = [names[: i + 1].count(name) for i, name in enumerate(names)]
        op_keys = _op_keys(keys, [f"{name}:{nth}" for name, nth in zip(names, nths, strict=True)])
        params: Params = {}
        # A crop is mirrored by its weights, a tenth of a whole view cheaper than its pixels afterwards, with the same
        # bits; so the flip's coin is drawn before its turn. And a jitter takes the channels apart as the crop has them.
        flipped = None
        for i, (op, nth) in enumerate(zip(self.ops, nths, strict=True)):
            if flipped is not None:  # by the crop before it
                drawn, flipped = {"flip": flipped}, None
            elif isinstance(op, RandomResizedCrop):
                after = self.ops[i + 1 :]
                if after and isinstance(after[0], RandomFlip):
                    flipped, after = after[0].draw(op_keys[:, i + 1]), after[1:]
                planar = images.shape[-1] == 3 and bool(after) and isinstance(after[0], ColorJitter)
                images, drawn = op(op_keys[:, i], images, flipped, planar)
            else:
                images, drawn = op(op_keys[:, i], images)
            params |= {name if nth == 1 else f"{name}_{nth}": value for name, value in drawn.items()}
        return images, params


def _op_keys(keys: jax.Array, labels: list[str]) -> jax.Array:
    """keys [N] -> [N, len(labels)], one key an operation; all in one hash, which compiles once."""
    # crc32: the same in every process and Python version, unlike hash().
    words = jnp.array([zlib.crc32(label.encode()) for label in labels], jnp.uint32)
    return jax.vmap(lambda key: jax.vmap(lambda word: jax.random.fold_in(key, word))(words))(keys)


def random_view(
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    crop_area: tuple[float, float] = (0.2, 1.0),
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1),
    jitter_p: float = 0.8,
    grayscale: float = 0.2,
    blur: float = 0.0,
    blur_sigma: tuple[float, float] = (0.1, 2.0),
    blur_above: int = 0,
    solarize: float = 0.0,
    rotation: float = 0.0,
) -> Pipeline:
    """The random view of SimCLR and its heirs: crop, flip, rotation, jitter, grayscale, blur, solarize, normalize,
    in this order.

    Args:
      size: side of the view in pixels.
      mean, std: of the data, a channel, in [0,1] units.
      crop_area: range of the crop's share of the image's area.
      crop_ratio: range of the crop's width / height.
      jitter: strengths of brightness, contrast, saturation, hue (`ColorJitter`).
      flip, jitter_p, grayscale, blur, solarize, rotation: probabilities. A part of probability 0 is not in the
        program at all.
      blur_sigma: range of the blur's standard deviation in pixels.
      blur_above: only views of more than so many pixels a side are blurred.
    """
    if len(jitter) != 4:
        raise UserError(f"jitter needs 4 strengths (brightness, contrast, saturation, hue), got {len(jitter)}")
    parts = [
        RandomResizedCrop(size=size, area=tuple(crop_area), ratio=tuple(crop_ratio)),
        RandomFlip(p=flip),
        RandomRotation(p=rotation),
        ColorJitter(brightness=jitter[0], contrast=jitter[1], saturation=jitter[2], hue=jitter[3], p=jitter_p),
        RandomGrayscale(p=grayscale),
        dataclasses.replace(GaussianBlur(p=blur, sigma=tuple(blur_sigma)), p=blur if size > blur_above else 0.0),
        RandomSolarize(p=solarize),
        Normalize(mean=mean, std=std),
    ]
    # Built first and dropped afterwards, so that a bad option is refused even where its part is off.
    return Pipeline(tuple(part for part in parts if getattr(part, "p", 1.0) > 0.0))


def standard_view(size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Pipeline:
    """The image as it is: resized to size if it has another, normalised. Draws nothing."""
    return Pipeline((Resize(size=size), Normalize(mean=mean, std=std)))


def classifier_view(
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    crop_area: tuple[float, float] = (0.2, 1.0),
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
) -> Pipeline:
    """What a classifier trains on: crop, flip, normalize."""
    return random_view(
        size,
        mean,
        std,
        crop_area=crop_area,
        crop_ratio=crop_ratio,
        flip=flip,
        jitter_p=0.0,
        grayscale=0.0,
    )


# ---------------------------------------------------------------------------------------------- checks


def _check_size(what: str, size: int) -> None:
    if not isinstance(size, int) or size < 1:
        raise UserError(f"{what} {size!r} must be a whole number of pixels, at least 1")


def _check_probability(what: str, p: float) -> None:
    if not 0.0 <= p <= 1.0:
        raise UserError(f"{what} probability {p} must be in [0, 1]")


def _check_range(what: str, pair: tuple[float, float], *, above: float, most: float) -> None:
    limit = f"({above:g}, {most:g}]" if math.isfinite(most) else f"({above:g}, inf)"
    if len(pair) != 2:
        raise UserError(f"{what} {pair} must be two numbers (low, high) in {limit}")
    low, high = pair
    if low > high:
        raise UserError(f"{what} {pair} has low above high: swap them")
    if not (above < low and high <= most and math.isfinite(high)):
        raise UserError(f"{what} {pair} must lie in {limit}")


def _check_batch(keys: jax.Array, images: jax.Array) -> None:
    if images.ndim != 4:
        raise UserError(f"a pipeline takes images [N,H,W,C], got shape {tuple(images.shape)}")
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
        raise UserError(f"a pipeline takes typed keys (jax.random.key), got {keys.dtype}")
    if "fry" not in str(keys.dtype):
        # Under vmap the rbg generators draw from the first key of the batch: an image would depend on its
        # neighbours.
        raise UserError(
            f"a pipeline takes threefry keys, got {keys.dtype}: use jax.random.key(seed, impl='threefry2x32')"
        )
    if keys.ndim != 1 or len(keys) < len(images) or len(keys) % max(len(images), 1):
        raise UserError(
            f"a pipeline takes one key an image, or as many for each: got keys {keys.shape}, {len(images)} images"
        )
