"""Coarse-to-fine transfer: what an encoder trained on coarse classes has kept of the fine ones."""

from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcl.data import Source
from jaxcl.data.label_levels import coarse_of_fine
from jaxcl.evaluate.base import Figures, LeftOut, accuracy
from jaxcl.evaluate.linear_probe import fit_linear_probe, probe_logits

if TYPE_CHECKING:
    from jaxcl.evaluate.suite import Frozen

SHOWN = 1500  # test images of the panel


def transfer(f: "Frozen") -> tuple[Figures, dict]:
    """A linear probe on the fine labels, fitted to its optimum on frozen features without augmentation.

    This is the cheap, exact variant of the protocol of "Perfectly Balanced" (arXiv:2204.07596), which trains the
    layer by AdamW for 100 epochs on augmented images, picks an epoch on the validation split, and whose released code
    leaves dropout on; its figures need not be equal to these. Of an encoder trained on the fine labels themselves it
    is the ceiling that transfer can reach.

    Figures: "accuracy" on the fine labels; "coarse_accuracy" of the coarse class of the predicted fine one;
    "balanced_accuracy", the mean over the fine classes of the test images.
    """
    fine, coarse = _levels(f.source("train"), "training")
    test_fine, test_coarse = _levels(f.test, "test")
    names = f.test.fine_names or f.test.class_names
    probe = fit_linear_probe(f.features("train"), fine, num_classes=len(names))
    predicted = np.asarray(probe_logits(probe, f.features("test"))).argmax(-1)
    figures = {
        "accuracy": accuracy(predicted, test_fine),
        "coarse_accuracy": accuracy(coarse_of_fine(fine, coarse, len(names))[predicted], test_coarse),
        "balanced_accuracy": balanced_accuracy(predicted, test_fine),
    }
    panel: dict[str, Any] = {
        "features": f.features("test")[:SHOWN],
        "labels": test_fine[:SHOWN],
        "coarse": test_coarse[:SHOWN],
        "class_names": names,
        "coarse_names": f.test.coarse_names,
    }
    return figures, {"transfer": panel}


def balanced_accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Mean over classes of the share of a class's rows that are right; negative labels do not count, NaN for none."""
    classes = np.unique(labels[labels >= 0])
    return float(np.mean([(predicted[labels == c] == c).mean() for c in classes])) if len(classes) else float("nan")


def _levels(source: Source, which: str) -> tuple[np.ndarray, np.ndarray]:
    """Fine and coarse labels, int [N] each, whichever of them are the source's own."""
    if "coarse" not in source.extras:
        raise LeftOut("the data has one level of labels")
    fine = source.extras["fine"] if "fine" in source.extras else source.labels
    if not (fine >= 0).any():
        raise LeftOut(f"no {which} image has a fine label")
    return fine, source.extras["coarse"]
