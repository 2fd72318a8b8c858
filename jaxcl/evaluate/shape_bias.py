"""Shape bias: whether a classifier follows the shape or the texture of an image where the two contradict each other.

N images, K classes of the classifier, C coarse categories.
"""

import pathlib
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike
from PIL import Image

from jaxcl.data import ArraySource, Source
from jaxcl.data.images import open_image
from jaxcl.data.label_levels import coarse_of_fine
from jaxcl.errors import UserError
from jaxcl.evaluate.base import Evaluator, Metric, Metrics, NotApplicable, Panels, from_files
from jaxcl.evaluate.categories import CATEGORIES, category_of
from jaxcl.evaluate.context import EvalContext, EvalSetup
from jaxcl.evaluate.linear_probe import probe_logits


def shape_bias(
    probs: ArrayLike, fine_to_coarse: ArrayLike, shape_labels: ArrayLike, texture_labels: ArrayLike
) -> dict[str, Any]:
    """The share of decisions for the shape among all decisions for the shape or the texture.

    The decision is the coarse category with the largest probability: the mean over the classes in it.

    Args:
      probs: [N,K] class probabilities.
      fine_to_coarse: [K] int, the category of each class, -1 for a class in none. A category without a class is never
        the decision.
      shape_labels, texture_labels: [N] int, the two categories of each image. Images where they are equal, or where
        one is negative, do not count.

    Returns:
      "shape_bias" and "texture_bias", in [0,1], with sum 1, NaN without any decision for one of the two;
      "shape_accuracy" and "texture_accuracy", the shares of all images that count; "cue_share", the sum of these; and
      the numbers of images: "conflicts" that count, "shape" and "texture" decisions.

    Raises:
      UserError: shapes that do not match, or no class in any category.

    References:
      Geirhos et al. 2019, arXiv 1811.12231; as in Ge et al. 2021, arXiv 2110.14189.
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
        raise UserError("shape_bias: no class belongs to a category; expected a number from 0 for at least one class")
    decision = coarse_probabilities(probs, fine_to_coarse).argmax(-1)
    conflict = (shape != texture) & (shape >= 0) & (texture >= 0)
    count = int(conflict.sum())
    by_shape, by_texture = (int((decision == labels)[conflict].sum()) for labels in (shape, texture))
    share = lambda some, all_: some / all_ if all_ else float("nan")  # noqa: E731
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
    """Mean probability over the classes of each category, [N,C]; -inf for a category without a class."""
    member_KxC = fine_to_coarse[:, None] == np.arange(fine_to_coarse.max() + 1)
    size_C = member_KxC.sum(0)
    return np.where(size_C > 0, probs @ member_KxC / np.maximum(size_C, 1), -np.inf)


class ShapeBias(Evaluator):
    """Shape bias of the linear probe on the data's own cue-conflict images, and on stimuli from a folder.

    On garments, the conflicting textures are those that `spurious` ties to the classes. "texture_taught" tells whether
    training tied them. If not, no texture speaks for a class: decisions for the class of the texture are ordinary
    mistakes, one in nine by chance, and the bias says no more than "shape_accuracy" does.

    Metrics: the results of `shape_bias` on the data's images; under "stimuli" its results on the images in
    `eval.cue_conflict`, with the "categories" in which the data has classes. Stimuli of other categories do not count.
    """

    needs_labels = ("train",)
    features_only = True
    metrics = {
        "shape_bias": Metric(
            "Shape bias",
            meaning="where shape and texture speak for different classes, the share of decisions for the shape",
        ),
        "stimuli.shape_bias": Metric(
            "Shape bias, stimuli", meaning="the share of decisions for the shape on published cue-conflict stimuli"
        ),
    }

    def check(self, setup: EvalSetup) -> None:
        if not (folder := setup.options.cue_conflict):
            return
        files = _files(folder)
        covered = set(category_of(setup.source("train").class_names).tolist()) - {-1}
        names = ", ".join(CATEGORIES[c] for c in sorted(covered))
        if not any({shape, texture} <= covered for _, shape, texture in files if shape != texture):
            raise UserError(
                f"eval.cue_conflict: no image of {folder} has two categories in which the data has classes; its "
                f"classes are in {names or 'none'} of {', '.join(CATEGORIES)}"
            )

    def __call__(self, context: EvalContext) -> tuple[Metrics, Panels]:
        own, folder = context.source("cue_conflict"), context.options.cue_conflict
        own = own if own is not None and {"shape", "texture"} <= own.extras.keys() else None
        if own is None and not folder:
            raise NotApplicable(
                "the data has no cue-conflict images (garments has; eval.cue_conflict names a folder of them)"
            )
        metrics: Metrics = {}
        panel = {}
        if own is not None:
            metrics |= shape_bias(_probabilities(context, own), np.arange(context.num_classes), *_cues(own))
            metrics["texture_taught"] = "cue" in context.source("train").extras
            title = "Shape bias" if metrics["texture_taught"] else "Shape bias (textures not taught)"
            panel[title] = {"value": metrics["shape_bias"], "chance": 0.5}
        if folder:
            with from_files():
                stimuli = read_stimuli(folder, context.recipe.eval_size)
            to_category = category_of(context.source("train").class_names)
            covered = np.unique(to_category[to_category >= 0])
            labels = (stimuli.extras[cue] for cue in ("shape", "texture"))
            labels = (np.where(np.isin(category, covered), category, -1) for category in labels)
            metrics["stimuli"] = shape_bias(_probabilities(context, stimuli), to_category, *labels)
            metrics["stimuli"]["categories"] = ", ".join(CATEGORIES[c] for c in covered)
            panel["Shape bias, stimuli"] = {"value": metrics["stimuli"]["shape_bias"], "chance": 0.5}
        return metrics, {"ood": panel}


def read_stimuli(folder: str, side: int) -> Source:
    """Reads the published cue-conflict images, SHAPE/SHAPE1-TEXTURE2.png, named by category and number.

    Args:
      folder: holds one folder for each shape category.
      side: the images are resized to it.

    Returns:
      A source in the order of the file names. Its labels and extras "shape" and "texture" are numbers in CATEGORIES.

    Raises:
      UserError: no such folder, no such file in it, or a file that cannot be read.
    """
    files = _files(folder)
    images = np.empty((len(files), side, side, 3), np.uint8)
    for i, (path, _, _) in enumerate(files):
        try:
            with open_image(path, formats=("PNG", "JPEG")) as image:
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
            f"eval.cue_conflict is {folder!r}, which is no folder; expected one with a folder for each shape class"
        )
    found = []
    for path in sorted(root.glob("*/*")):
        words = [word.rstrip("0123456789") for word in path.stem.split("-")]
        if path.suffix.lower() in (".png", ".jpg", ".jpeg") and len(words) == 2 and set(words) <= set(CATEGORIES):
            found.append((path, *(CATEGORIES.index(word) for word in words)))
    if not found:
        raise UserError(f"eval.cue_conflict: {folder} holds no images named like airplane/airplane1-bicycle2.png")
    return found


def _probabilities(context: EvalContext, source: Source) -> np.ndarray:
    return np.asarray(jax.nn.softmax(probe_logits(context.fitted_probe(), context.features_of(source))))


def _cues(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Shape and texture as classes, fine or coarse like the labels of the source."""
    cues = source.extras["shape"], source.extras["texture"]
    if not source.fine_names:
        return cues
    to_coarse = coarse_of_fine(source.extras["fine"], source.labels, len(source.fine_names))
    return tuple(to_coarse[cue] for cue in cues)
