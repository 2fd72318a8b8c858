"""Names of the metrics in results.json that are read by name: by this page, by comparisons and by claims.

A name is a path with dots: results["linear"]["accuracy"] is "linear.accuracy". Evaluators (`jaxcl.evaluate`) write
these metrics; tests/report/test_names.py runs the evaluators and fails if one of them is not written.
"""

LINEAR = "linear.accuracy"
KNN = "knn.accuracy"
CLASSIFIER = "classifier.accuracy"
RAW_PIXELS = "raw_pixels.accuracy"
UNTRAINED = "untrained.accuracy"
UNTRAINED_KNN = "untrained.knn_accuracy"
PRETRAINED = "pretrained.accuracy"
PRETRAINED_KNN = "pretrained.knn_accuracy"
MAJORITY = "majority.accuracy"
TRANSFER = "transfer.accuracy"
TRANSFER_KNN = "transfer.knn_accuracy"
TINT = "tint.accuracy"
TINT_IN_COLOR = "color.tint"  # the same metric, as part of the evaluator color
DENSE_IOU = "dense.iou"

NEIGHBOURS_AGREEMENT = "neighbours.agreement"
NEIGHBOURS_COSINE = "neighbours.cosine"
NEIGHBOURS_ANY_COSINE = "neighbours.any_cosine"
NEIGHBOURS_COPIES = "neighbours.copies"
NEIGHBOURS_ALL_COMPARED = "neighbours.all_compared"

ECE = "calibration.clean.ece"
ECE_SHIFTED = "calibration.test_shifted.ece"
SHIFTED_CLASSIFIER = "calibration.test_shifted.accuracy"

OOD = "ood.accuracy"  # in domain
OOD_SHIFTED = "ood.shifted.accuracy"
OOD_CORRUPTION = "ood.corruption.accuracy"
OOD_TEXTURE = "ood.texture.accuracy"
SHAPE_BIAS = "shape_bias.shape_bias"
SHAPE_BIAS_STIMULI = "shape_bias.stimuli.shape_bias"  # only with a folder of stimuli (eval.cue_conflict)
TEXTURE_TAUGHT = "shape_bias.texture_taught"

AVERAGE_DROP = "explanation.average_drop"
RATE_OF_INCREASE = "explanation.rate_of_increase"
MASK_IOU = "explanation.iou"
POINTING_HIT = "explanation.pointing_hit"

WORST_GROUP_ERM = "worst_group.erm_worst"
WORST_GROUP_DRO = "worst_group.dro_worst"
GROUPS_F1 = "worst_group.cluster_f1"

# Of the embeddings that the loss sees, and of the features.
WITHIN_CLASS_COSINE_Z = "collapse.z_within_class_cosine"
WITHIN_CLASS_COSINE_H = "collapse.h_within_class_cosine"

# Evaluators whose metrics are given by attack strength.
ATTACKS = ("fgsm", "pgd", "linear_fgsm", "linear_pgd")


def under_attack(attack: str, epsilon: float, metric: str = "accuracy") -> str:
    """The name of "accuracy" or "ece" under one of ATTACKS; epsilon in 1/255: "fgsm.4.accuracy"."""
    return f"{attack}.{epsilon:g}.{metric}"


ALL = tuple(v for k, v in sorted(globals().items()) if k.isupper() and isinstance(v, str))
