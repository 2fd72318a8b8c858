"""The contract of an evaluator: what it needs, what it returns, and which of its results are the main ones.

N images, K classes.
"""

import abc
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import numpy as np

from jaxcl.errors import UserError
from jaxcl.evaluate.context import EvalContext, EvalSetup
from jaxcl.runtime.registry import Contract

Metrics = dict[str, Any]
Panels = dict[str, Any]
SPLITS = ("train", "test")  # in which an evaluator may need labels


class NotApplicable(Exception):
    """Raised by an evaluator that cannot run on this data or recipe; the message says what is missing."""


@dataclasses.dataclass(frozen=True)
class Metric:
    """One main result of an evaluator, as reports and comparisons show it.

    Attributes:
      title: a few words, such as "Linear probe". "{}" stands for the part of the key that a "*" matched.
      better: whether "higher" or "lower" is better; "" where neither is.
      percent: the value is a fraction, shown in percent.
      meaning: one clause in plain words, for readers who do not know the evaluator.
    """

    title: str
    better: Literal["higher", "lower", ""] = "higher"
    percent: bool = True
    meaning: str = ""


class Evaluator(Contract, abc.ABC):
    """Measures one frozen encoder. A subclass is made without arguments; its options are keys of `config.eval`.

    Attributes:
      name: the key of its results; "": the name it has in the registry, or the class name of an evaluator of your own.
      needs_labels: splits ("train", "test") in which at least one image must have a label.
      needs_classifier: whether the config must train a classifier along with the encoder.
      features_only: whether it reads features alone, so that it also takes several runs joined, side by side.
      feature_kinds: kinds of features ("h", "z", "thumbnail") that it reads of the training and test images, beside
        the kind in `eval.features`. They are computed in the same pass over the images.
      metrics: its main results: key -> Metric. A key is dotted where results are nested ("test_shifted.accuracy");
        "*" matches any one part ("*.accuracy").
      intervals: keys of results that are shares of the labelled test images. For each of them the suite adds
        "KEY_interval", the two ends of its interval of 95 %.

    Example:

        class Margin(Evaluator):
            needs_labels = ("test",)
            needs_classifier = True
            metrics = {"margin": Metric("Margin", meaning="mean distance of the two largest probabilities")}

            def __call__(self, context):
                first, second = np.sort(context.probabilities("test"))[:, -1:-3:-1].T
                return {"margin": float((first - second).mean())}, {}

        c.eval.final += ("my_package.my_module:Margin",)  # in a config
    """

    name: ClassVar[str] = ""
    needs_labels: ClassVar[tuple[str, ...]] = ()
    needs_classifier: ClassVar[bool] = False
    features_only: ClassVar[bool] = False
    feature_kinds: ClassVar[tuple[str, ...]] = ()
    metrics: ClassVar[Mapping[str, Metric]] = {}
    intervals: ClassVar[tuple[str, ...]] = ()

    def check(self, setup: EvalSetup) -> None:
        """Checks the options in `setup.options`, and the files they name, before training begins.

        Raises:
          UserError: an option that cannot work; the message begins with its config key.
        """

    @abc.abstractmethod
    def __call__(self, context: EvalContext) -> tuple[Metrics, Panels]:
        """Measures.

        Returns:
          (metrics, panels). Metrics are numbers, ready for JSON, nested at will: results.json holds them. Panels are
          the arrays that the report draws pictures of, by the names it knows; {} for none.

        Raises:
          NotApplicable: the data or the recipe lack something beyond the needs that the attributes declare.
        """

    def check_needs(self, context: EvalContext) -> None:
        """Raises NotApplicable unless the needs that the attributes declare are met."""
        if self.needs_classifier and context.setup.classifier is None:
            raise NotApplicable("the config trains no classifier (no linear_probe in memory)")
        if self.needs_classifier and self.needs_labels and not context.setup.has_trained_classes(context.test):
            raise NotApplicable("the classifier was trained on other classes than those of the data")
        for split in self.needs_labels:
            if not (context.source(split).labels >= 0).any():
                raise NotApplicable(f"no {'training' if split == 'train' else 'test'} image has a label")


@contextlib.contextmanager
def from_files() -> Iterator[None]:
    """Turns a UserError into NotApplicable: files that vanished during training must not cost a run its results."""
    try:
        yield
    except UserError as error:
        raise NotApplicable(str(error)) from error


def share_interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of a share of `count` independent trials, for example of an accuracy on `count` images.

    Args:
      share: in [0, 1].
      count: number of trials, above 0.
      z: half width in standard deviations; 1.96 for 95 %.

    Returns:
      (lower, upper) end, in [0, 1]. It is useful for few trials, and for shares of 0 and 1.

    References:
      Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 1927.
    """
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Share of the labelled rows that are predicted right; NaN where no row has a label (labels of -1)."""
    known = labels >= 0
    return float((predicted[known] == labels[known]).mean()) if known.any() else float("nan")
