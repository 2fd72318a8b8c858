"""The classifier that is trained along with the encoder."""

import numpy as np

from jaxcl.evaluate.base import Evaluator, Metric, Metrics, Panels, accuracy
from jaxcl.evaluate.context import EvalContext


class Classifier(Evaluator):
    """Accuracy of the online classifier, and its confusion matrix."""

    needs_classifier = True
    needs_labels = ("test",)
    intervals = ("accuracy",)
    metrics = {"accuracy": Metric("Online classifier", meaning="the classifier trained along with the encoder")}

    def __call__(self, context: EvalContext) -> tuple[Metrics, Panels]:
        predicted, labels = context.probabilities("test").argmax(-1), context.test.labels
        known = labels >= 0
        matrix = np.zeros((context.recipe.num_classes,) * 2, np.int64)
        np.add.at(matrix, (labels[known], predicted[known]), 1)
        panel = {"confusion": {"matrix": matrix, "class_names": context.test.class_names}}
        return {"accuracy": accuracy(predicted, labels)}, panel
