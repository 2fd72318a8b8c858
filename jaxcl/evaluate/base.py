"""What evaluators share: what they need, how they say that it is missing, and the two commonest figures."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcl.errors import UserError
from jaxcl.evaluate.calibration import reliability

if TYPE_CHECKING:
    from jaxcl.evaluate.suite import EvalContext

Metrics = dict[str, Any]


class NotApplicable(Exception):
    """An evaluator that cannot run on this data or recipe; its text says what is missing."""


@contextlib.contextmanager
def from_files() -> Iterator[None]:
    """A UserError becomes NotApplicable: files that have gone since training began must not cost the run its results."""
    try:
        yield
    except UserError as error:
        raise NotApplicable(str(error)) from error


def needs_labels(f: "EvalContext", *splits: str) -> None:
    """NotApplicable where no image of one of the splits has a label."""
    for split in splits:
        if not (f.source(split).labels >= 0).any():
            raise NotApplicable(f"no {'training' if split == 'train' else 'test'} image has a label")


def needs_classifier(f: "EvalContext") -> None:
    """NotApplicable where no classifier was trained along with the encoder."""
    if f.evaluation.classifier is None:
        raise NotApplicable("the config trains no classifier (no linear_probe in memory)")


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Share of the labelled rows that are right; NaN where there are none."""
    known = labels >= 0
    return float((predicted[known] == labels[known]).mean()) if known.any() else float("nan")


def bins(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """The reliability diagram's bars, on the host."""
    return {k: np.asarray(v) for k, v in reliability(probabilities, labels).items()}
