"""Baselines that an encoder must beat: pixels, an untrained encoder, the largest class. N images, D features."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.augment import ops
from jaxcl.evaluate.base import Evaluator, Metric, Metrics, NotApplicable, Panels, accuracy
from jaxcl.evaluate.beginnings import PRETRAINED, UNTRAINED, at_the_beginning, beginnings
from jaxcl.evaluate.context import EvalContext
from jaxcl.evaluate.knn import knn_accuracy
from jaxcl.evaluate.linear_probe import fit_linear_probe, probe_logits

BATCH = 500
PIXELS = 32  # side of the images whose pixels are taken for features, at most


class RawPixels(Evaluator):
    """The linear probe on pixels instead of features, with a stronger penalty: an encoder must do better.

    Larger images are shrunk to 32 pixels a side: more pixels than that cost much, and say no more.
    """

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
        flat = [_pixels(s.images) for s in (train, test)]
        classes = context.num_classes
        probe = fit_linear_probe(flat[0], train.labels, num_classes=classes, l2=1.0, max_steps=60)
        return {"accuracy": accuracy(np.asarray(probe_logits(probe, flat[1])).argmax(-1), test.labels)}, {}


def _pixels(images_NxHxWxC: np.ndarray) -> np.ndarray:
    """float32 [N,P] in [0,1]"""
    if images_NxHxWxC.shape[1] > PIXELS:
        shrink = jax.jit(lambda x: ops.resize(x.astype(jnp.float32), PIXELS, antialias=True, cubic=False))
        parts = [images_NxHxWxC[i : i + BATCH] for i in range(0, len(images_NxHxWxC), BATCH)]
        images_NxHxWxC = np.concatenate([np.asarray(shrink(part)) for part in parts])
    return np.asarray(images_NxHxWxC, np.float32).reshape(len(images_NxHxWxC), -1) / 255


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

    which = UNTRAINED

    def __call__(self, context: EvalContext) -> tuple[Metrics, Panels]:
        before = at_the_beginning(context, self.which)
        logits = np.asarray(probe_logits(before.fitted_probe(), before.features("test")))
        right = accuracy(logits.argmax(-1), context.test.labels)
        return {"accuracy": right, "knn_accuracy": knn_accuracy(before)[0]}, {}


class Pretrained(Untrained):
    """The same on the encoder as its weights were (`model.weights`): training on must not do worse."""

    which = PRETRAINED
    metrics = {
        "accuracy": Metric(
            "Pretrained encoder, linear probe", better="", meaning="what the same network gave before it was trained on"
        ),
        "knn_accuracy": Metric("Pretrained encoder, nearest neighbours", better="", meaning="likewise"),
    }

    def __call__(self, context: EvalContext) -> tuple[Metrics, Panels]:
        if PRETRAINED not in beginnings(context.setup.config):
            raise NotApplicable("the encoder began with random weights (no model.weights)")
        return super().__call__(context)
