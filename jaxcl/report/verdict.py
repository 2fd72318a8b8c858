"""Which results stand at the top of the report, and what each of them says in plain words."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from jaxcl.report.progress import duration

DEFAULT_SOURCE = "garments"  # of a config; part of the names of presets that do not choose another one
HIGHER, LOWER = "↑ higher", "↓ lower"


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    value: str
    better: str
    meaning: str


# (name, where it may stand in the results, better, meaning); fractions, shown in percent.
_PERCENT = (
    (
        "Linear probe",
        ("linear.accuracy", "linear"),
        HIGHER,
        "a linear classifier trained on the frozen features, the usual measure of an encoder",
    ),
    (
        "Nearest neighbours",
        ("knn.accuracy", "knn"),
        HIGHER,
        "the class of the most similar training embeddings, with nothing trained on top",
    ),
    (
        "Neighbours of the same class",
        ("neighbours.agreement",),
        HIGHER,
        "of the training images nearest to each test image, the share that is of its class",
    ),
    (
        "Online classifier",
        ("classifier.accuracy", "probe.accuracy", "classifier", "probe"),
        HIGHER,
        "the classifier learned beside the encoder",
    ),
    (
        "Fine classes, from coarse labels",
        ("transfer.accuracy",),
        HIGHER,
        "a linear probe for the fine classes: what the encoder kept beyond the coarse ones it was trained on",
    ),
    (
        "Tint of the object",
        ("color.tint",),
        "",
        "a linear probe for it on the frozen features: how much of colour they have kept",
    ),
    (
        "Object mask, frozen (IoU)",
        ("dense.iou",),
        HIGHER,
        "overlap with the true object of what a linear classifier on the cells of the best stage's map marks",
    ),
    (
        "Raw-pixel baseline",
        (
            "raw_pixels.accuracy",
            "raw_pixel.accuracy",
            "linear_raw_pixels.accuracy",
            "raw_pixels",
            "raw_pixel",
        ),
        "",
        "the same linear probe on plain pixels: what the encoder has to beat",
    ),
    (
        "Accuracy, shifted test",
        ("calibration.test_shifted.accuracy", "test_shifted.accuracy", "ood.shifted.accuracy"),
        HIGHER,
        "on test images from another distribution than the training images",
    ),
    (
        "Accuracy, corrupted test",
        ("ood.corruption.accuracy",),
        HIGHER,
        "a linear probe on test images with noise, blur, weather and compression, the mean over all of them",
    ),
    (
        "Texture only",
        ("ood.texture.accuracy",),
        LOWER,
        "a linear probe on texture made of each test image, its object gone: how much the texture alone gives away",
    ),
    (
        "Shape bias",
        ("shape_bias.shape_bias", "shape_bias.stimuli.shape_bias"),
        HIGHER,
        "where shape and texture speak for different classes, the share of decisions for the shape",
    ),
    (
        "ECE, clean",
        (
            "calibration.clean.ece",
            "calibration.test.ece",
            "calibration.ece",
            "calibration.clean",
            "calibration.test",
        ),
        LOWER,
        "how far confidence is from the share of right answers, on average",
    ),
    (
        "ECE, shifted test",
        (
            "calibration.test_shifted.ece",
            "calibration.shifted.ece",
            "calibration.test_shifted",
            "calibration.shifted",
        ),
        LOWER,
        "the same on the shifted test images, where networks tend to be too sure",
    ),
    (
        "Average drop",
        ("explanation.average_drop",),
        LOWER,
        "confidence lost when only the most salient pixels are left; low: the map found what mattered",
    ),
    (
        "Rate of increase",
        ("explanation.rate_of_increase",),
        HIGHER,
        "share of images that get more confident when all but the salient pixels is removed",
    ),
    (
        "Mask overlap (IoU)",
        ("explanation.iou", "explanation.mask_iou", "iou"),
        HIGHER,
        "overlap of the salient area with the true object, 100% = identical",
    ),
    (
        "Pointing hit",
        ("explanation.pointing_hit", "explanation.pointing_game", "pointing_hit"),
        HIGHER,
        "share of images whose most salient pixel lies on the object",
    ),
)

_PIXELS = next(places for name, places, _, _ in _PERCENT if name == "Raw-pixel baseline")

# (key of the results, name, how the pixels were moved)
_ATTACKS = (
    ("fgsm", "Classifier under FGSM", "in one step, in the direction that hurts most"),
    ("pgd", "Classifier under PGD", "in many small steps"),
    ("linear_fgsm", "Linear probe under FGSM", "in one step, in the direction that hurts most"),
    ("linear_pgd", "Linear probe under PGD", "in many small steps"),
)


def rows(results: Mapping[str, Any]) -> list[Row]:
    """The known results that are there, in the order of the page."""
    found = []
    pixels = number(results, *_PIXELS)
    for name, places, better, meaning in _PERCENT:
        value = number(results, *places)
        if value is None:
            continue
        if name == "Shape bias" and _untaught(results):
            meaning += "; here no texture was tied to a class in training, so it says little"
        if name == "Linear probe" and pixels is not None:
            meaning += f"; {_points(value - pixels)} raw pixels"
        found.append(Row(name, percent(value), better, meaning))
    found += _neighbours(results)
    found += _worst_group(results)
    for key, name, how in _ATTACKS:
        attacked = _attacks(results, key)
        if attacked:
            epsilon = min(attacked, key=lambda e: abs(e - 4))
            meaning = f"after every pixel moved by up to {epsilon:g}/255 {how}"
            found.append(Row(name, percent(attacked[epsilon]), HIGHER, meaning))
    seconds = total_seconds(results)
    if seconds is not None:
        found.append(Row("Time", duration(seconds), LOWER, _time_split(results)))
    return found


def title(config: Mapping[str, Any]) -> str:
    """The config's name and the data source that was used; "" for a config without a name.

    A name contains the data set of its preset, which is not the one used if `data.source` was set by hand: "simclr
    garments unlabelled" on a folder of photos is "simclr unlabelled on folder:photos".
    """
    name, source = str(config.get("name") or ""), _source(config)
    if not (name and source):
        return name
    words = [word for word in name.split() if word != DEFAULT_SOURCE and word not in re.split(r"\W+", source)]
    return f"{' '.join(words)} on {source}"


def _source(config: Mapping[str, Any]) -> str:
    data = config.get("data")
    return str((data.get("source") if hasattr(data, "get") else data) or "")


def sentence(config: Mapping[str, Any], results: Mapping[str, Any], images: Mapping[str, int]) -> str:
    """One sentence that says what was run and how it went; images: their number by split."""
    said = "Trained"
    if source := _source(config):
        said += f" on {source}"
    if images:
        said += f" ({' and '.join(f'{count:,} {split}' for split, count in images.items())} images)"
    steps = results.get("steps")
    if isinstance(steps, int):
        said += f" for {steps:,} steps"
    seed = results.get("seed", config.get("seed"))
    if seed is not None:
        said += f" with seed {seed}"
    seconds = total_seconds(results)
    if seconds is not None:
        said += f" in {duration(seconds)}"
    linear, pixels = number(results, *_PERCENT[0][1]), number(results, *_PIXELS)
    neighbours = number(results, *_PERCENT[1][1])
    if linear is not None:
        said += f": a linear probe reaches {percent(linear)}"
        said += f", {_points(linear - pixels)} raw pixels" if pixels is not None else ""
    elif neighbours is not None:
        said += f": nearest neighbours reach {percent(neighbours)}"
    return said + "."


def number(results: Mapping[str, Any], *places: str) -> float | None:
    """The first of the dotted `places` that holds a finite number."""
    for place in places:
        value: Any = results
        for key in place.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        value = _as_float(value)
        if value is not None:
            return value
    return None


def total_seconds(results: Mapping[str, Any]) -> float | None:
    """seconds.total, else the sum of the parts, else None."""
    seconds = results.get("seconds")
    if not isinstance(seconds, Mapping):
        return _as_float(seconds)
    if (total := _as_float(seconds.get("total"))) is not None:
        return total
    parts = [v for v in map(_as_float, seconds.values()) if v is not None]
    return sum(parts) if parts else None


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}%"


def _points(difference: float) -> str:
    return f"{abs(100 * difference):.1f} points {'above' if difference >= 0 else 'below'}"


def _as_float(value: Any) -> float | None:
    if isinstance(value, (bool, str)) or value is None or isinstance(value, Mapping):
        return None
    try:
        value = float(value)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _attacks(results: Mapping[str, Any], key: str) -> dict[float, float]:
    """Accuracy by epsilon in 1/255."""
    attacks = {}
    for epsilon, value in (results.get(key) if isinstance(results.get(key), Mapping) else {}).items():
        accuracy = number({"a": value}, "a.accuracy", "a")
        try:
            epsilon = float(epsilon)
        except ValueError:
            continue
        if accuracy is not None and epsilon > 0:
            attacks[epsilon] = accuracy
    return attacks


def _untaught(results: Mapping[str, Any]) -> bool:
    found = results.get("shape_bias")
    return isinstance(found, Mapping) and found.get("texture_taught") is False


def _neighbours(results: Mapping[str, Any]) -> list[Row]:
    """What can be said of images without labels."""
    nearest, usual, copies = (number(results, f"neighbours.{k}") for k in ("cosine", "any_cosine", "copies"))
    rows = []
    if nearest is not None:
        meaning = "the cosine of the features of a test image and the training image nearest to it"
        meaning += "" if usual is None else f"; of any two images it is {usual:.2f} on average"
        rows.append(Row("Nearest image", f"{nearest:.2f}", "", meaning))
    if copies is not None:
        meaning = "images that are nearly the same as another one, counted without the first of each kind"
        if results["neighbours"].get("all_compared") is False:
            meaning += "; there are more, as not all pairs were compared"
        rows.append(Row("Near-duplicates", f"{copies:,.0f}", LOWER, meaning))
    return rows


def _worst_group(results: Mapping[str, Any]) -> list[Row]:
    robust, plain = (number(results, f"worst_group.{name}_worst") for name in ("dro", "erm"))
    if robust is None and plain is None:
        return []
    meaning = "accuracy on the true group where it is lowest, of a linear classifier"
    if robust is not None:
        meaning += " made robust over groups found by clustering"
        meaning += f"; {_points(robust - plain)} the plain one" if plain is not None else ""
    return [Row("Worst group", percent(plain if robust is None else robust), HIGHER, meaning)]


def _time_split(results: Mapping[str, Any]) -> str:
    seconds = results.get("seconds")
    parts = seconds if isinstance(seconds, Mapping) else {}
    said = [f"{key} {duration(v)}" for key in parts if key != "total" and (v := _as_float(parts[key])) is not None]
    return ("by the clock: " + ", ".join(said)) if said else "by the clock, from start to end"
