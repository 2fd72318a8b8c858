"""A baseline without an encoder: logistic regression on pixels."""

import numpy as np

from jaxcl.evaluate.base import Evaluator, Metric, Metrics, NotApplicable, Panels, accuracy
from jaxcl.evaluate.context import EvalContext
from jaxcl.evaluate.linear_probe import fit_linear_probe, probe_logits


class RawPixels(Evaluator):
    """The linear probe on pixels instead of features, with a stronger penalty: an encoder must do better."""

    needs_labels = ("train", "test")
    features_only = True
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
