"""Baselines that an encoder must beat: pixels, an untrained encoder, the largest class. N images, D features."""

import numpy as np

from jaxcl.evaluate.base import Evaluator, Metric, Metrics, NotApplicable, Panels, accuracy
from jaxcl.evaluate.beginnings import UNTRAINED, at_the_beginning
from jaxcl.evaluate.context import EvalContext
from jaxcl.evaluate.knn import knn_accuracy
from jaxcl.evaluate.linear_probe import fit_linear_probe, probe_logits


class RawPixels(Evaluator):
    """The linear probe on pixels instead of features, with a stronger penalty: an encoder must do better."""

    needs_labels = ("train", "test")
    features_only = True
    intervals = ("accuracy",)
    metrics = {
        "accuracy": Metric("Raw-pixel baseline", better="", meaning="a linear probe on pixels; an encoder must beat it")
    }

    def __call__(self, context: EvalContext) -> tuple[Metrics, Panels]:
        train, test = context.source("train"), context.test
        if not (train.in_memory and test.in_memory):
            raise NotApplicable("the images are not in memory")
        flat = [np.asarray(s.images, np.float32).reshape(len(s), -1) / 255 for s in (train, test)]
        classes = context.num_classes
        probe = fit_linear_probe(flat[0], train.labels, num_classes=classes, l2=1.0, max_steps=60)
        return {"accuracy": accuracy(np.asarray(probe_logits(probe, flat[1])).argmax(-1), test.labels)}, {}


class Majority(Evaluator):
    """The share of the test images in the class that is the largest of the training images."""

    needs_labels = ("train", "test")
    features_only = True
    intervals = ("accuracy",)
    metrics = {
        "accuracy": Metric("Largest class", better="", meaning="always the class that has the most training images")
    }

    def __call__(self, context: EvalContext) -> tuple[Metrics, Panels]:
        train, test = context.source("train").labels, context.test.labels
        largest = np.bincount(train[train >= 0]).argmax()
        return {"accuracy": accuracy(np.full(len(test), largest), test)}, {}


class Untrained(Evaluator):
    """The linear probe and nearest neighbours on the encoder with random weights, those that training began with.

    An encoder that starts from given weights (`model.weights`) is compared with a random one all the same.
    """

    needs_labels = ("train", "test")
    intervals = ("accuracy", "knn_accuracy")
    metrics = {
        "accuracy": Metric(
            "Untrained encoder, linear probe", better="", meaning="what the same network gives with random weights"
        ),
        "knn_accuracy": Metric(
            "Untrained encoder, nearest neighbours", better="", meaning="the same, with nothing trained on top"
        ),
    }

    def __call__(self, context: EvalContext) -> tuple[Metrics, Panels]:
        untrained = at_the_beginning(context, UNTRAINED)
        logits = np.asarray(probe_logits(untrained.fitted_probe(), untrained.features("test")))
        right = accuracy(logits.argmax(-1), context.test.labels)
        return {"accuracy": right, "knn_accuracy": knn_accuracy(untrained)[0]}, {}
