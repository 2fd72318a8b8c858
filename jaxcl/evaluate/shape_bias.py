"""Shape bias: on images whose shape speaks for one class and whose texture for another, which of the two is followed.

N images, K classes of the classifier, C coarse categories.
"""

import pathlib
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.typing import ArrayLike
from PIL import Image

from jaxcl.data import ArraySource, Source
from jaxcl.data.label_levels import coarse_of_fine
from jaxcl.errors import UserError
from jaxcl.evaluate.base import Metrics, NotApplicable, from_files, needs_labels
from jaxcl.evaluate.categories import CATEGORIES, category_of
from jaxcl.evaluate.linear_probe import probe_logits

if TYPE_CHECKING:
    from jaxcl.evaluate.suite import EvalContext, Evaluation


def shape_bias(
    probs: ArrayLike, fine_to_coarse: ArrayLike, shape_labels: ArrayLike, texture_labels: ArrayLike
) -> dict[str, Any]:
    """How often a classifier decides for the shape, of the times it decides for the shape or the texture.

    The probability of a coarse category is the mean of those of its classes; the largest one is the decision.

    Args:
      probs: [N,K] class probabilities.
      fine_to_coarse: [K] int, the category of each class, -1 for a class of none; a category without a class is never
        decided for.
      shape_labels, texture_labels: [N] int, the two categories of each image. Images where they are equal, or where
        one is negative, do not count.

    Returns:
      "shape_bias" and "texture_bias", in [0,1] and 1 together, NaN if neither was ever decided for; "shape_accuracy"
      and "texture_accuracy", the shares of the images that count decided for the one and the other; "cue_share",
      their sum; and the numbers "conflicts", "shape" and "texture" of these images.

    Raises:
      UserError: shapes that do not match, or no class of any category.

    Source: Geirhos et al. 2019, arXiv 1811.12231; papers/non_semantic_negatives.md e.
    """
    probs = np.asarray(probs, np.float64)
    fine_to_coarse, shape, texture = (np.asarray(x) for x in (fine_to_coarse, shape_labels, texture_labels))
    if (
        probs.ndim != 2
        or fine_to_coarse.shape != probs.shape[1:]
        or not shape.shape == texture.shape == probs.shape[:1]
    ):
        shapes = ", ".join(str(x.shape) for x in (probs, fine_to_coarse, shape, texture))
        raise UserError(f"shape_bias: shapes {shapes}; expected [images,classes], [classes], [images] and [images]")
    if not (fine_to_coarse >= 0).any():
        raise UserError("shape_bias: no class belongs to a category; expected a number from 0 for some of them")
    decision = coarse_probabilities(probs, fine_to_coarse).argmax(-1)
    conflict = (shape != texture) & (shape >= 0) & (texture >= 0)
    count = int(conflict.sum())
    by_shape, by_texture = (int((decision == labels)[conflict].sum()) for labels in (shape, texture))
    share = lambda part, of: part / of if of else float("nan")  # noqa: E731
    return {
        "shape_bias": share(by_shape, by_shape + by_texture),
        "texture_bias": share(by_texture, by_shape + by_texture),
        "shape_accuracy": share(by_shape, count),
        "texture_accuracy": share(by_texture, count),
        "cue_share": share(by_shape + by_texture, count),
        "conflicts": count,
        "shape": by_shape,
        "texture": by_texture,
    }


def coarse_probabilities(probs: np.ndarray, fine_to_coarse: np.ndarray) -> np.ndarray:
    """Mean probability of the classes of each category, [N,C]; -inf for a category without a class."""
    member_KxC = fine_to_coarse[:, None] == np.arange(fine_to_coarse.max() + 1)
    size_C = member_KxC.sum(0)
    return np.where(size_C > 0, probs @ member_KxC / np.maximum(size_C, 1), -np.inf)


def cue_conflict(f: "EvalContext") -> tuple[Metrics, dict]:
    """Shape bias of the linear probe on the data's own cue-conflict images, and on stimuli from a folder.

    On garments the textures in conflict are those that `spurious` ties to the classes. "texture_taught" says whether
    they were tied in training: if not, no texture speaks for a class there, decisions for the texture's class are
    mistakes like any other (a ninth of them by chance), and the bias says no more than "shape_accuracy" does.

    Metrics: those of `shape_bias` on the data's images, and under "stimuli" those on eval.cue_conflict, with the
    "categories" that classes of the data belong to; stimuli of the others do not count.
    """
    needs_labels(f, "train")
    own = f.source("cue_conflict")
    own = own if own is not None and {"shape", "texture"} <= own.extras.keys() else None
    if own is None and not f.options.cue_conflict:
        raise NotApplicable(
            "the data has no cue-conflict images (garments has; eval.cue_conflict names a folder of them)"
        )
    figures: Metrics = {}
    panel = {}
    if own is not None:
        figures |= shape_bias(_probabilities(f, own), np.arange(f.recipe.num_classes), *_cues(own))
        figures["texture_taught"] = "cue" in f.source("train").extras
        said = "Shape bias" if figures["texture_taught"] else "Shape bias (textures not taught)"
        panel[said] = {"value": figures["shape_bias"], "chance": 0.5}
    if f.options.cue_conflict:
        with from_files():
            stimuli = read_stimuli(f.options.cue_conflict, f.recipe.image_shape[0])
        to_category = category_of(f.source("train").class_names)
        covered = np.unique(to_category[to_category >= 0])
        labels = (stimuli.extras[cue] for cue in ("shape", "texture"))
        labels = (np.where(np.isin(of, covered), of, -1) for of in labels)
        figures["stimuli"] = shape_bias(_probabilities(f, stimuli), to_category, *labels)
        figures["stimuli"]["categories"] = ", ".join(CATEGORIES[c] for c in covered)
        panel["Shape bias, stimuli"] = {"value": figures["stimuli"]["shape_bias"], "chance": 0.5}
    return figures, {"ood": panel}


def check_stimuli(evaluation: "Evaluation") -> None:
    """UserError for a folder that holds no stimuli, or for data without a class of two of their categories."""
    if not (folder := evaluation.options.cue_conflict):
        return
    files = _files(folder)
    covered = set(category_of(evaluation.source("train").class_names).tolist()) - {-1}
    if not any({shape, texture} <= covered for _, shape, texture in files if shape != texture):
        raise UserError(
            f"eval.cue_conflict: no image of {folder} has two categories that the data has classes of; its classes are "
            f"in {', '.join(CATEGORIES[c] for c in sorted(covered)) or 'none'} of {', '.join(CATEGORIES)}"
        )


def read_stimuli(folder: str, side: int) -> Source:
    """Cue-conflict images as published: SHAPE/SHAPE1-TEXTURE2.png, named by category and number.

    Args:
      folder: of a folder a shape category.
      side: to which the images are resized.

    Returns:
      A source whose labels and extras "shape" and "texture" are numbers in CATEGORIES, files in order of their names.

    Raises:
      UserError: no folder, or no such file in it, or one that cannot be read.
    """
    files = _files(folder)
    images = np.empty((len(files), side, side, 3), np.uint8)
    for i, (path, _, _) in enumerate(files):
        try:
            with Image.open(path, formats=("PNG", "JPEG")) as image:
                images[i] = np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR))
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"{path} cannot be read as an image ({error}); copy it again") from error
    shape, texture = (np.array([file[k] for file in files], np.int32) for k in (1, 2))
    return ArraySource(
        images=images,
        labels=shape,
        class_names=CATEGORIES,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        extras={"shape": shape, "texture": texture},
        name=folder,
        split="cue_conflict",
    )


def _files(folder: str) -> list[tuple[pathlib.Path, int, int]]:
    """(path, shape, texture) of the stimuli."""
    root = pathlib.Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(
            f"eval.cue_conflict is {folder!r}, which is no folder; expected one with a folder a shape class"
        )
    found = []
    for path in sorted(root.glob("*/*")):
        words = [word.rstrip("0123456789") for word in path.stem.split("-")]
        if path.suffix.lower() in (".png", ".jpg", ".jpeg") and len(words) == 2 and set(words) <= set(CATEGORIES):
            found.append((path, *(CATEGORIES.index(word) for word in words)))
    if not found:
        raise UserError(f"eval.cue_conflict: {folder} holds no images named like airplane/airplane1-bicycle2.png")
    return found


def _probabilities(f: "EvalContext", source: Source) -> np.ndarray:
    return np.asarray(jax.nn.softmax(probe_logits(f.fitted_probe(), f.features_of(source))))


def _cues(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Shape and texture as classes of the level that the source is labelled with."""
    cues = source.extras["shape"], source.extras["texture"]
    if not source.fine_names:
        return cues
    of_fine = coarse_of_fine(source.extras["fine"], source.labels, len(source.fine_names))
    return tuple(of_fine[cue] for cue in cues)
