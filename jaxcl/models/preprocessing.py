"""How images were prepared for published weights: moments, size, interpolation, and how a photo becomes a square.

The hub has it in one of two forms: `preprocessor_config.json` (transformers), or `pretrained_cfg` in config.json
(timm). An export of jaxcl says it in its description.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxcl.errors import UserError

INTERPOLATIONS = ("bilinear", "bicubic", "lanczos", "box")  # Pillow's names
FITS = ("crop", "squash", "letterbox")
# Pillow's numbers. The nearest (0) and Hamming's filter (5) have the one that is closest to them.
_RESAMPLE = {0: "box", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "bilinear"}
CLASSIFIERS = ("fc", "classifier", "classifier.1", "head", "head.fc")  # names of the last layer in torch


class Preprocessing(NamedTuple):
    """What images must be like for an encoder.

    Attributes:
      mean, std: one number a channel, in [0, 1] units.
      image_size: side in pixels.
      interpolation: bilinear, bicubic, lanczos or box, as Pillow names them.
      fit: how a photo becomes a square. crop: its shorter side is resized, and the centre cut out; squash: both sides
        are resized; letterbox: its longer side is, and the rest is filled up.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    interpolation: str = "bilinear"
    fit: str = "crop"


IMAGENET = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224)


def checked(where: str, mean: Any, std: Any, image_size: Any, interpolation: Any, fit: Any) -> Preprocessing:
    """The preprocessing of these values. Raises UserError, which begins with `where`, for impossible ones."""
    try:
        mean, std = tuple(map(float, mean)), tuple(map(float, std))
        good = len(mean) == len(std) > 0 and all(map(math.isfinite, mean)) and all(0 < s < math.inf for s in std)
        good = good and type(image_size) is int and 0 < image_size < 2**15
    except (TypeError, ValueError):
        good = False
    if not good or interpolation not in INTERPOLATIONS or fit not in FITS:
        shown = f"mean {mean}, std {std}, size {image_size}, interpolation {interpolation}, fit {fit}"
        raise UserError(f"{where}: the preprocessing is {shown[:200]}; expected numbers for each channel and a size")
    return Preprocessing(mean, std, image_size, interpolation, fit)


def of_hub(where: str, config: Mapping[str, Any], processor: Mapping[str, Any]) -> Preprocessing | None:
    """The preprocessing of a model from the hub.

    Args:
      where: the model, for messages.
      config: content of config.json, {} without it.
      processor: content of preprocessor_config.json, {} without it.

    Returns:
      None if neither says it.

    Raises:
      UserError: impossible values.
    """
    processor = processor.get("image_processor", processor)
    timm = config.get("pretrained_cfg", config)
    if isinstance(processor, Mapping) and "image_mean" in processor:
        return _of_transformers(where, processor)
    if isinstance(timm, Mapping) and {"mean", "std", "input_size"} <= timm.keys():
        return _of_timm(where, timm)
    return None


def _of_transformers(where: str, processor: Mapping[str, Any]) -> Preprocessing:
    def sides(value: Any) -> tuple[Any, bool]:
        """-> (side, whether both sides are given); None for the former if there is none."""
        if not isinstance(value, Mapping):
            return value, True
        if "shortest_edge" in value:
            return value["shortest_edge"], False
        return value.get("height"), True

    size, both = sides(processor.get("size"))
    crops = processor.get("do_center_crop", "crop_size" in processor or "crop_pct" in processor)
    if crops and processor.get("crop_size") is not None:
        size, _ = sides(processor["crop_size"])
    # Pixels are multiplied by this, and then normalised. Ours are in [0, 1] units.
    try:
        factor = 255 * float(processor.get("rescale_factor", 1 / 255)) if processor.get("do_rescale", True) else 255.0
        normalizes = processor.get("do_normalize", True)
        mean = [float(m) / factor for m in (processor["image_mean"] if normalizes else [0.0] * 3)]
        std = [float(s) / factor for s in (processor["image_std"] if normalizes else [1.0] * 3)]
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{where}: preprocessor_config.json is not as transformers writes it ({error!r})") from error
    fit = "crop" if crops or not both else "squash"
    return checked(where, mean, std, size, _RESAMPLE.get(processor.get("resample", 2)), fit)


def _of_timm(where: str, config: Mapping[str, Any]) -> Preprocessing:
    size = config["input_size"]
    side = size[-1] if isinstance(size, (list, tuple)) and size else None
    interpolation = config.get("interpolation", "bilinear")
    fit = "squash" if config.get("crop_mode") == "squash" else "crop"
    known = interpolation if interpolation in INTERPOLATIONS else "bicubic"  # nearest, random
    return checked(where, config["mean"], config["std"], side, known, fit)


def of_export(where: str, about: Mapping[str, Any]) -> Preprocessing | None:
    """The preprocessing in the description of an export of jaxcl; None for an older one without it."""
    known = about.get("preprocessing", {})
    if not isinstance(known, Mapping) or not {"size", "mean", "std"} <= known.keys():
        return None
    rest = known.get("interpolation", "bilinear"), known.get("fit", "squash")
    return checked(where, known["mean"], known["std"], known["size"], *rest)
