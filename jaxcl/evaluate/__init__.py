"""Evaluators: pure functions of features, probabilities and maps."""

from jaxcl.evaluate.calibration import expected_calibration_error, reliability
from jaxcl.evaluate.explanation import drop_increase, mask_agreement
from jaxcl.evaluate.knn import knn_predict
from jaxcl.evaluate.linear_probe import LinearProbe, fit_linear_probe, probe_logits
from jaxcl.evaluate.logistic import LogisticFit, fit_logistic
from jaxcl.evaluate.robustness import fgsm_examples, pgd_examples

__all__ = [
    "LinearProbe",
    "LogisticFit",
    "drop_increase",
    "expected_calibration_error",
    "fgsm_examples",
    "fit_linear_probe",
    "fit_logistic",
    "knn_predict",
    "pgd_examples",
    "mask_agreement",
    "probe_logits",
    "reliability",
]
