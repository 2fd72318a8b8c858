"""Pipelines of operations, applied to a batch under one jit, and the factories of the usual views.

    view = random_view(32, mean, std)
    images, params = view(keys, batch)      # keys [N], one per image; images [N,H,W,C] uint8 or float in [0,1]

`params` holds what was drawn, one row per image, for whoever needs it: heads that are conditioned on the augmentation,
pictures, tests. The result of an image depends on its own key and pixels only.

`Pipeline` is the contract of the slot `views` of a config: a factory that is annotated to return one can fill it. The
data supplies `size`, `mean` and `std`; all other keywords are options of the view.
"""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp

from jaxcl.augment.base import Op, Params
from jaxcl.augment.pixels import to_float
from jaxcl.augment.transforms import (
    AREA,
    HUE,
    NOT_NEGATIVE,
    ColorJitter,
    GaussianBlur,
    Normalize,
    Pair,
    RandomFlip,
    RandomGrayscale,
    RandomResizedCrop,
    RandomRotation,
    RandomSolarize,
    Resize,
    low_above_high,
)
from jaxcl.errors import UserError
from jaxcl.runtime.options import POSITIVE, SHARE, OptionError, check, options_of

Area = Annotated[Pair, AREA]
PositivePair = Annotated[Pair, POSITIVE]
Probability = Annotated[float, SHARE]
Strength = Annotated[float, NOT_NEGATIVE]
Interpolation = Literal["bilinear", "bicubic"]


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Operations in order: `pipeline(keys, images) -> (images, params)`.

    The keys of an operation are folded from the keys of the images by the operation's name and the number of earlier
    operations of that name, not by its position. So removing an operation, or setting its probability to 0, does not
    change the draws of the others, and an ablation compares the same crops. The second operation of a name writes its
    parameters as "flip_2", and so on.
    """

    ops: tuple[Op, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "ops", tuple(self.ops))
        for op in self.ops:
            if not isinstance(op, Op):
                raise UserError(f"a pipeline holds {op!r}; expected operations, subclasses of {Op.__module__}.Op")

    def __call__(self, keys: jax.Array, images: jax.Array) -> tuple[jax.Array, Params]:
        """Augments a batch.

        Args:
          keys: [N] typed threefry keys, one per image; or [V N] for V views of each image, whose keys are adjacent.
          images: [N,H,W,C], uint8 or float in [0,1].

        Returns:
          images float32 [N,S,S,C] and the drawn parameters, name -> [N,...]; or [V N,...], in the order of the keys.

        Raises:
          UserError: a number of keys that is no multiple of the number of images, or images that an operation cannot
            take.
        """
        _check_batch(keys, images)
        images = to_float(images)
        if len(keys) > len(images) and not (self.ops and self.ops[0].takes_views):
            images = jnp.repeat(images, len(keys) // len(images), axis=0)
        names = [op.name for op in self.ops]
        nths = [names[: i + 1].count(name) for i, name in enumerate(names)]
        op_keys = _op_keys(keys, [f"{name}:{nth}" for name, nth in zip(names, nths, strict=True)])
        params: Params = {}
        flipped = None
        for i, (op, nth) in enumerate(zip(self.ops, nths, strict=True)):
            if flipped is not None:  # the operation before has mirrored the images already
                drawn, flipped = {op.name: flipped}, None
            else:
                rest, fused = self.ops[i + 1 :], {}
                if op.fuses_flip and rest and rest[0].is_flip:
                    flipped = fused["flipped"] = rest[0].flips(op_keys[:, i + 1])
                    rest = rest[1:]
                if op.gives_planes and rest:
                    channels = len(images) if isinstance(images, tuple) else images.shape[-1]
                    fused["planar"] = rest[0].takes_planes(channels)
                images, drawn = op(op_keys[:, i], images, **fused)
            params |= {name if nth == 1 else f"{name}_{nth}": value for name, value in drawn.items()}
        return images, params


def _op_keys(keys: jax.Array, labels: list[str]) -> jax.Array:
    """keys [N] -> [N, len(labels)], one key per operation. One hash of all of them compiles once."""
    # crc32, unlike hash(), is the same in every process and Python version.
    words = jnp.array([zlib.crc32(label.encode()) for label in labels], jnp.uint32)
    return jax.vmap(lambda key: jax.vmap(lambda word: jax.random.fold_in(key, word))(words))(keys)


def random_view(
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    crop_area: Area = (0.2, 1.0),
    crop_ratio: PositivePair = (3 / 4, 4 / 3),
    interpolation: Interpolation = "bilinear",
    flip: Probability = 0.5,
    jitter: tuple[Strength, Strength, Strength, Strength] = (0.4, 0.4, 0.4, 0.1),
    jitter_p: Probability = 0.8,
    grayscale: Probability = 0.2,
    blur: Probability = 0.0,
    blur_sigma: PositivePair = (0.1, 2.0),
    blur_above: Annotated[int, NOT_NEGATIVE] = 0,
    blur_taps: Annotated[int, NOT_NEGATIVE] = 0,
    solarize: Probability = 0.0,
    rotation: Probability = 0.0,
) -> Pipeline:
    """The random view of SimCLR and its successors.

    The order is crop, flip, rotation, jitter, grayscale, blur, solarize, normalize. Chen et al. 2020, arXiv 2002.05709.

    Args:
      size: side of the view in pixels.
      mean, std: of the data per channel, in [0,1] units.
      crop_area: range of the crop's share of the image's area.
      crop_ratio: range of the crop's width / height.
      interpolation: of the crop, as Pillow's BILINEAR or BICUBIC.
      jitter: strengths of brightness, contrast, saturation and hue (`ColorJitter`); the last is at most 0.5.
      flip, jitter_p, grayscale, blur, solarize, rotation: probabilities. An operation of probability 0 is left out of
        the program.
      blur_sigma: range of the blur's standard deviation in pixels.
      blur_above: only views with a larger side than this, in pixels, are blurred.
      blur_taps: odd size of the blur's kernel; 0: a tenth of the side, at least 3 (SimCLR).

    Raises:
      UserError: an option of another type or out of range.
    """
    _check_options(random_view, locals())
    _check_ascending(crop_area=crop_area, crop_ratio=crop_ratio, blur_sigma=blur_sigma)
    if blur_taps and (blur_taps % 2 == 0 or blur_taps // 2 >= size):
        raise OptionError("blur_taps", f"is {blur_taps}; expected an odd number below {2 * size}, or 0")
    if jitter[3] > HUE.at_most:
        raise OptionError("jitter", f"is {jitter}; expected a hue, its last number, of at most {HUE.at_most} turns")
    every = (
        RandomResizedCrop(size=size, area=tuple(crop_area), ratio=tuple(crop_ratio), interpolation=interpolation),
        RandomFlip(p=flip),
        RandomRotation(p=rotation),
        ColorJitter(brightness=jitter[0], contrast=jitter[1], saturation=jitter[2], hue=jitter[3], p=jitter_p),
        RandomGrayscale(p=grayscale),
        GaussianBlur(p=blur if size > blur_above else 0.0, sigma=tuple(blur_sigma), kernel_size=blur_taps or None),
        RandomSolarize(p=solarize),
        Normalize(mean=mean, std=std),
    )
    return Pipeline(tuple(op for op in every if getattr(op, "p", 1.0) > 0.0))


def standard_view(
    size: int, mean: tuple[float, ...], std: tuple[float, ...], *, interpolation: Interpolation = "bilinear"
) -> Pipeline:
    """The image itself, resized to `size` if it has another size, and normalised. It draws nothing."""
    return Pipeline((Resize(size=size, interpolation=interpolation), Normalize(mean=mean, std=std)))


def classifier_view(
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    crop_area: Area = (0.2, 1.0),
    crop_ratio: PositivePair = (3 / 4, 4 / 3),
    flip: Probability = 0.5,
) -> Pipeline:
    """The usual training view of a classifier: crop, flip, normalize. Arguments as for `random_view`."""
    options = dict(crop_area=crop_area, crop_ratio=crop_ratio, flip=flip)
    return random_view(size, mean, std, **options, jitter_p=0.0, grayscale=0.0)


# ---- checks


def _check_options(factory: Callable[..., Pipeline], given: dict[str, Any]) -> None:
    """Errors: OptionError for a keyword of another type or out of range, also where the factory is called directly."""
    for name, option in options_of(factory).items():
        check(name, given[name], option)


def _check_ascending(**pairs: Pair) -> None:
    for option, pair in pairs.items():
        if reason := low_above_high(pair):
            raise OptionError(option, reason)


def _check_batch(keys: jax.Array, images: jax.Array) -> None:
    if images.ndim != 4:
        raise UserError(f"a pipeline takes images [N,H,W,C], got shape {tuple(images.shape)}")
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
        raise UserError(f"a pipeline takes typed keys (jax.random.key), got {keys.dtype}")
    if "fry" not in str(keys.dtype):
        # Under vmap, rbg generators draw from the first key of the batch: an image would depend on its neighbours.
        raise UserError(
            f"a pipeline takes threefry keys, got {keys.dtype}: use jax.random.key(seed, impl='threefry2x32')"
        )
    if keys.ndim != 1 or len(keys) < len(images) or len(keys) % max(len(images), 1):
        raise UserError(
            f"a pipeline takes one key per image and view: got keys of shape {keys.shape} for {len(images)} images"
        )
