"""The table at the top of the page: the main results, each explained in plain words; and the page's title."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from jaxcl.report import names
from jaxcl.report.progress import duration

DEFAULT_SOURCE = "garments"  # of a config; part of the names of presets that do not choose another one
HIGHER, LOWER = "↑ higher", "↓ lower"


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table at the top of the page."""

    name: str
    value: str
    better: str
    meaning: str


# (title, names of the metric, better, meaning). The first name in the results is shown, in percent.
_PERCENT = (
    (
        "Linear probe",
        (names.LINEAR,),
        HIGHER,
        "a linear classifier trained on the frozen features, the usual measure of an encoder",
    ),
    (
        "Nearest neighbours",
        (names.KNN,),
        HIGHER,
        "the class of the most similar training embeddings, with nothing trained on top",
    ),
    (
        "Neighbours of the same class",
        (names.NEIGHBOURS_AGREEMENT,),
        HIGHER,
        "of the training images nearest to each test image, the share with the same class",
    ),
    (
        "Online classifier",
        (names.CLASSIFIER,),
        HIGHER,
        "the classifier trained along with the encoder",
    ),
    (
        "Fine classes, from coarse labels",
        (names.TRANSFER,),
        HIGHER,
        "a linear probe for the fine classes: what the encoder kept beyond the coarse ones it was trained on",
    ),
    (
        "Tint of the object",
        (names.TINT_IN_COLOR, names.TINT),
        "",
        "a linear probe for the tint on the frozen features: how much colour they have kept",
    ),
    (
        "Object mask, frozen (IoU)",
        (names.DENSE_IOU,),
        HIGHER,
        "overlap of the true object with the one found by a linear classifier on the map of the best stage",
    ),
    (
        "Baseline: pretrained, linear probe",
        (names.PRETRAINED,),
        "",
        "the same linear probe on the network as its weights were: what training on has to keep",
    ),
    (
        "Baseline: pretrained, neighbours",
        (names.PRETRAINED_KNN,),
        "",
        "nearest neighbours by the network as its weights were",
    ),
    (
        "Baseline: untrained, linear probe",
        (names.UNTRAINED,),
        "",
        "the same linear probe on the same network with random weights: what training has to beat",
    ),
    (
        "Baseline: untrained, neighbours",
        (names.UNTRAINED_KNN,),
        "",
        "nearest neighbours by the same network with random weights",
    ),
    (
        "Baseline: raw pixels",
        (names.RAW_PIXELS,),
        "",
        "the same linear probe on plain pixels",
    ),
    (
        "Baseline: largest class",
        (names.MAJORITY,),
        "",
        "the share of test images in the class with the most training images",
    ),
    (
        "Accuracy, shifted test",
        (names.SHIFTED_CLASSIFIER, names.OOD_SHIFTED),
        HIGHER,
        "on test images from another distribution than the training images",
    ),
    (
        "Accuracy, corrupted test",
        (names.OOD_CORRUPTION,),
        HIGHER,
        "a linear probe on test images with noise, blur, weather and compression, the mean over all of them",
    ),
    (
        "Texture only",
        (names.OOD_TEXTURE,),
        LOWER,
        "a linear probe on texture made of each test image, without its object: what the texture alone gives away",
    ),
    (
        "Shape bias",
        (names.SHAPE_BIAS, names.SHAPE_BIAS_STIMULI),
        HIGHER,
        "where shape and texture suggest different classes, the share of decisions for the shape",
    ),
    (
        "ECE, clean",
        (names.ECE,),
        LOWER,
        "the mean gap between confidence and accuracy",
    ),
    (
        "ECE, shifted test",
        (names.ECE_SHIFTED,),
        LOWER,
        "the same on the shifted test images, on which networks tend to be overconfident",
    ),
    (
        "Average drop",
        (names.AVERAGE_DROP,),
        LOWER,
        "confidence lost when only the most salient pixels are left; low: the map found what mattered",
    ),
    (
        "Rate of increase",
        (names.RATE_OF_INCREASE,),
        HIGHER,
        "share of images for which confidence rises when only the salient pixels are left",
    ),
    (
        "Mask overlap (IoU)",
        (names.MASK_IOU,),
        HIGHER,
        "overlap of the salient area with the true object, 100% = identical",
    ),
    (
        "Pointing hit",
        (names.POINTING_HIT,),
        HIGHER,
        "share of images whose most salient pixel lies on the object",
    ),
)

# attack -> (title, how the pixels were moved)
_ATTACKS = {
    "fgsm": ("Classifier under FGSM", "in one step, in the direction that hurts most"),
    "pgd": ("Classifier under PGD", "in many small steps"),
    "linear_fgsm": ("Linear probe under FGSM", "in one step, in the direction that hurts most"),
    "linear_pgd": ("Linear probe under PGD", "in many small steps"),
}


def rows(results: Mapping[str, Any]) -> list[Row]:
    """The rows of the known metrics in `results`, in the order of the page."""
    found = []
    for title, places, better, meaning in _PERCENT:
        value = next((v for v in (number(results, place) for place in places) if v is not None), None)
        if value is None:
            continue
        if title == "Shape bias" and _at(results, names.TEXTURE_TAUGHT) is False:
            meaning += "; here no texture was tied to a class in training, so it says little"
        place = next(place for place in places if number(results, place) is not None)
        if title == "Linear probe":
            for baseline, of in ((names.UNTRAINED, "the untrained encoder"), (names.RAW_PIXELS, "raw pixels")):
                if (below := number(results, baseline)) is not None:
                    meaning += f"; {_points(value - below)} {of}"
        found.append(Row(title, percent(value) + interval(results, place), better, meaning))
    found += _neighbours(results)
    found += _worst_group(results)
    for attack in names.ATTACKS:
        title, how = _ATTACKS[attack]
        if attacked := _attacked(results, attack):
            epsilon = min(attacked, key=lambda e: abs(e - 4))
            meaning = f"after every pixel moved by up to {epsilon:g}/255 {how}"
            found.append(Row(title, percent(attacked[epsilon]), HIGHER, meaning))
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
    return f"{' '.join(words) or name} on {source}"


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
    linear, knn = number(results, names.LINEAR), number(results, names.KNN)
    if linear is not None:
        said += f": a linear probe reaches {percent(linear)}{interval(results, names.LINEAR)}"
        for name, of in ((names.UNTRAINED, "the untrained encoder"), (names.RAW_PIXELS, "raw pixels")):
            if (baseline := number(results, name)) is not None:
                said += f", {_points(linear - baseline)} {of}"
                break
    elif knn is not None:
        said += f": nearest neighbours reach {percent(knn)}{interval(results, names.KNN)}"
    return said + "."


def interval(results: Mapping[str, Any], name: str) -> str:
    """The interval of 95 % of a share, as " (45-66 %)"; "" where the results have none."""
    ends = _at(results, f"{name}_interval")
    if not isinstance(ends, (list, tuple)) or len(ends) != 2 or None in (pair := [_as_float(end) for end in ends]):
        return ""
    return f" ({100 * pair[0]:.1f} to {100 * pair[1]:.1f})"


# In the last lines of a run: (title, name of the metric).
_LAST_LINES = (
    ("linear probe", names.LINEAR),
    ("nearest neighbours", names.KNN),
    ("pretrained encoder, linear probe", names.PRETRAINED),
    ("pretrained encoder, neighbours", names.PRETRAINED_KNN),
    ("untrained encoder, linear probe", names.UNTRAINED),
    ("untrained encoder, neighbours", names.UNTRAINED_KNN),
    ("raw pixels", names.RAW_PIXELS),
    ("largest class", names.MAJORITY),
)


def main_accuracies(results: Mapping[str, Any]) -> list[str]:
    """The main accuracies as lines for the terminal, each with its interval of 95 %; none without labels."""
    found = [(title, name) for title, name in _LAST_LINES if number(results, name) is not None]
    if not found:
        return []
    images = results.get("images") or {}
    count = next((n for split, n in images.items() if split != "training"), None)
    head = "accuracy" if count is None else f"accuracy on {count:,} test images"
    width = max(len(title) for title, _ in found)
    return [f"{head}, with the interval of 95 %:"] + [
        f"  {title:<{width}}  {percent(number(results, name)):>6}{interval(results, name)}" for title, name in found
    ]


def number(results: Mapping[str, Any], name: str) -> float | None:
    """The finite number at a dotted path into the results; None if there is none."""
    return _as_float(_at(results, name))


def _at(results: Mapping[str, Any], name: str) -> Any:
    value: Any = results
    for key in name.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def total_seconds(results: Mapping[str, Any]) -> float | None:
    """The sum of results["seconds"]: train, evaluate, report."""
    seconds = results.get("seconds")
    parts = [v for v in map(_as_float, seconds.values()) if v is not None] if isinstance(seconds, Mapping) else []
    return sum(parts) if parts else None


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts to one with dotted names."""
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


def _attacked(results: Mapping[str, Any], attack: str) -> dict[float, float]:
    """Accuracy by epsilon in 1/255."""
    by_epsilon = results.get(attack)
    found = {}
    for text, metrics in by_epsilon.items() if isinstance(by_epsilon, Mapping) else ():
        try:
            epsilon = float(text)
        except ValueError:
            continue
        accuracy = number(metrics, "accuracy")
        if accuracy is not None and epsilon > 0:
            found[epsilon] = accuracy
    return found


def _neighbours(results: Mapping[str, Any]) -> list[Row]:
    """Rows that need no labels."""
    nearest, usual = number(results, names.NEIGHBOURS_COSINE), number(results, names.NEIGHBOURS_ANY_COSINE)
    copies = number(results, names.NEIGHBOURS_COPIES)
    rows = []
    if nearest is not None:
        meaning = "the cosine of the features of a test image and the training image nearest to it"
        meaning += "" if usual is None else f"; the mean over all pairs of images is {usual:.2f}"
        rows.append(Row("Nearest image", f"{nearest:.2f}", "", meaning))
    if copies is not None:
        meaning = "images that are nearly the same as another one, without the first of each group"
        if _at(results, names.NEIGHBOURS_ALL_COMPARED) is False:
            meaning += "; there may be more, as not all pairs were compared"
        rows.append(Row("Near-duplicates", f"{copies:,.0f}", LOWER, meaning))
    return rows


def _worst_group(results: Mapping[str, Any]) -> list[Row]:
    robust, plain = number(results, names.WORST_GROUP_DRO), number(results, names.WORST_GROUP_ERM)
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
    said = [f"{key} {duration(v)}" for key in parts if (v := _as_float(parts[key])) is not None]
    return ("by the clock: " + ", ".join(said)) if said else "by the clock, from start to end"
