"""Nearest neighbours of the test images, and near-duplicates among all images; needs no labels.

N images, Q queries, D features, k neighbours.
"""

import logging
from typing import Any

import numpy as np

from jaxcl.data.selection import cut_down
from jaxcl.errors import UserError
from jaxcl.evaluate.all_images import AllImages
from jaxcl.evaluate.base import Evaluator, Metric, Metrics, NotApplicable, Panels
from jaxcl.evaluate.beginnings import PRETRAINED, at_the_beginning, beginnings
from jaxcl.evaluate.context import THUMBNAIL, EvalContext, EvalSetup
from jaxcl.evaluate.duplicates import connected_groups, near_duplicates, normalized
from jaxcl.evaluate.knn import nearest_neighbours
from jaxcl.evaluate.rows import NotFinite

logger = logging.getLogger("jaxcl")

LISTED = 100  # near-duplicates in results.json
PICTURED = 8  # queries in the report
GROUPS, GROUP_SIZE = 12, 8  # groups of near-duplicates in the report, and images shown of each


class Neighbours(Evaluator):
    """The `eval.neighbours` nearest training images of each test image, and near-duplicates among both.

    Metrics: "cosine", mean over the test images of the cosine to the nearest training image; "any_cosine", the mean
    cosine over all pairs; "agreement", share of the neighbours that have the class of the test image, where labels are
    known; "copies", number of images that are near-duplicates of another one, not counting the first of each group;
    "all_compared", whether no pair was skipped; "near_duplicates", the first pairs by the names of their images.
    """

    feature_kinds = (THUMBNAIL,)
    metrics = {
        "agreement": Metric(
            "Neighbours of the same class",
            meaning="of the training images nearest to each test image, the share that is of its class",
        ),
        "cosine": Metric(
            "Nearest image",
            "",
            percent=False,
            meaning="cosine of a test image and its nearest training image",
        ),
        "copies": Metric(
            "Near-duplicates", "lower", percent=False, meaning="images that are nearly the same as an earlier one"
        ),
    }

    def check(self, setup: EvalSetup) -> None:
        options = setup.options
        if options.neighbours < 1:
            raise UserError(f"eval.neighbours is {options.neighbours}; expected at least 1")
        if not -1 <= options.duplicate_cosine <= 1:
            raise UserError(f"eval.duplicate_cosine is {options.duplicate_cosine}; expected a cosine, such as 0.95")
        if not 0 <= options.duplicate_pixels <= 1:
            raise UserError(f"eval.duplicate_pixels is {options.duplicate_pixels}; expected a number from 0 to 1")

    def __call__(self, context: EvalContext) -> tuple[Metrics, Panels]:
        options = context.options
        kind = options.knn_features or options.features
        train, test = context.source("train"), context.test
        bank_NxD, queries_QxD = context.features("train", kind), context.features("test", kind)
        cosine_Qxk, rows_Qxk = map(np.asarray, nearest_neighbours(bank_NxD, queries_QxD, k=options.neighbours))
        metrics = {
            "k": cosine_Qxk.shape[1],
            "cosine": float(cosine_Qxk[:, 0].mean()),
            # The mean over all pairs.
            "any_cosine": float(normalized(bank_NxD).mean(0) @ normalized(queries_QxD).mean(0)),
        }
        known_Qxk = (test.labels >= 0)[:, None] & (train.labels[rows_Qxk] >= 0)
        agree_Qxk = test.labels[:, None] == train.labels[rows_Qxk]
        if known_Qxk.any():
            metrics["agreement"] = float(agree_Qxk[known_Qxk].mean())

        both = AllImages(context)
        thumbnails = np.concatenate([context.features(split, THUMBNAIL) for split in ("train", "test")])
        features = np.concatenate([bank_NxD, queries_QxD])
        limits = dict(cosine=options.duplicate_cosine, pixels=options.duplicate_pixels)
        found = near_duplicates(features, thumbnails, both.images, **limits)
        metrics |= {
            "copies": len(found.pairs),  # each pair adds one image to a group
            "all_compared": found.complete,
            "near_duplicates": [
                {"images": [both.name(p.first), both.name(p.second)], "cosine": p.cosine, "pixels": p.pixels}
                for p in found.pairs[:LISTED]
            ],
        }

        shown = cut_down(test.labels, PICTURED, seed=0)
        panels = {
            "neighbours": {
                "queries": test.batch(shown)["image"],
                "found": np.stack([train.batch(rows)["image"] for rows in rows_Qxk[shown]]),
                "cosine": cosine_Qxk[shown],
                "agree": np.where(known_Qxk, agree_Qxk, np.nan)[shown] if known_Qxk.any() else None,
                "names": [both.name(len(train) + q) for q in shown],
                "found_names": [[both.name(row) for row in rows] for rows in rows_Qxk[shown]],
            },
            "map": _map(context, both, features),
        }
        if groups := connected_groups(found.pairs)[:GROUPS]:
            panels["near_duplicates"] = {
                "images": [both.images(np.array(group[:GROUP_SIZE])) for group in groups],
                "names": [[both.name(i) for i in group] for group in groups],
            }
        return metrics, panels


def _map(context: EvalContext, both: AllImages, features: np.ndarray) -> dict[str, Any]:
    """The panel of the map: some images, with the features of this encoder and of the same one before training."""
    rows, labels = both.mapped(), both.labels
    encoders = {}
    for which in beginnings(context.setup.config):
        try:
            encoders[which] = both.features_of(at_the_beginning(context, which), rows)
        except (NotApplicable, NotFinite) as reason:
            logger.info("evaluation: the map shows no %s encoder: %s", which, reason)
    trained = "continued" if PRETRAINED in encoders else "trained"
    return {
        "features": {trained: features[rows], **encoders},
        "images": both.images(rows),
        "names": [both.name(row) for row in rows],
        "classes": [both.class_name(labels[row]) for row in rows] if (labels >= 0).any() else None,
        "total": len(both),
    }
