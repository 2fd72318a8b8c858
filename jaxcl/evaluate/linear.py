"""The linear probe: the usual measure of a frozen encoder."""

import numpy as np

from jaxcl.evaluate.base import Evaluator, Metric, Metrics, Panels, accuracy
from jaxcl.evaluate.context import EvalContext
from jaxcl.evaluate.linear_probe import probe_logits


class Linear(Evaluator):
    """Multinomial logistic regression on frozen features, fitted to its optimum."""

    needs_labels = ("train", "test")
    features_only = True
    intervals = ("accuracy",)
    metrics = {
        "accuracy": Metric(
            "Linear probe",
            meaning="a linear classifier trained on the frozen features, the usual measure of an encoder",
        )
    }

    def __call__(self, context: EvalContext) -> tuple[Metrics, Panels]:
        logits = np.asarray(probe_logits(context.fitted_probe(), context.features("test")))
        return {"accuracy": accuracy(logits.argmax(-1), context.test.labels)}, {}
