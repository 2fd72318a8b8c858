"""An evaluator of one's own."""

import numpy as np
from sklearn.metrics import silhouette_score

from jaxcl.evaluate import Evaluator, Metric


class Silhouette(Evaluator):
    """The mean silhouette of the true classes in the test features, from -1 to 1."""

    name = "silhouette"  # of its results in results.json
    needs_labels = ("test",)
    features_only = True  # so it also takes several runs joined
    metrics = {"mean": Metric("Silhouette", percent=False, meaning="how compact the classes are in feature space")}

    def __call__(self, context):
        labels = context.test.labels
        known = labels >= 0
        features = np.asarray(context.features("test"))[known]
        return {"mean": float(silhouette_score(features, labels[known], metric="cosine"))}, {}
