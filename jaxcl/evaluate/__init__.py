"""Evaluation of frozen encoders: one evaluator a file, the context they receive, and the suites that run them.

What measures features, probabilities or saliency maps belongs here; what trains the encoder belongs in `method`, what
draws pictures of the results in `report`. This module exports the pure functions, which take arrays and know neither
configs nor runs, and the contract for evaluators of your own; `registry` names the built-in ones.
"""

from jaxcl.evaluate.base import Evaluator, Metric, NotApplicable
from jaxcl.evaluate.calibration import expected_calibration_error, reliability
from jaxcl.evaluate.collapse import collapse_metrics
from jaxcl.evaluate.context import EvalContext
from jaxcl.evaluate.duplicates import near_duplicates
from jaxcl.evaluate.explanation import drop_increase, mask_agreement
from jaxcl.evaluate.knn import knn_predict, nearest_neighbours
from jaxcl.evaluate.linear_probe import LinearFit, fit_linear_probe, probe_logits
from jaxcl.evaluate.logistic import LogisticFit, fit_logistic
from jaxcl.evaluate.robustness import fgsm_examples, pgd_examples
from jaxcl.evaluate.shape_bias import shape_bias
from jaxcl.evaluate.transfer import balanced_accuracy
from jaxcl.evaluate.worst_group import cluster_quality, find_groups, group_accuracies, group_dro, robust_probe

__all__ = [
    "EvalContext",
    "Evaluator",
    "LinearFit",
    "LogisticFit",
    "Metric",
    "NotApplicable",
    "balanced_accuracy",
    "cluster_quality",
    "collapse_metrics",
    "drop_increase",
    "expected_calibration_error",
    "fgsm_examples",
    "find_groups",
    "fit_linear_probe",
    "fit_logistic",
    "group_accuracies",
    "group_dro",
    "knn_predict",
    "mask_agreement",
    "near_duplicates",
    "nearest_neighbours",
    "pgd_examples",
    "probe_logits",
    "reliability",
    "robust_probe",
    "shape_bias",
]
