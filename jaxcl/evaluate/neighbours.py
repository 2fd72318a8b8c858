"""Nearest neighbours of the test images, and near-duplicates among all images; needs no labels.

N images, Q queries, D features, k neighbours.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxcl.data import default_fit
from jaxcl.data.selection import cut_down
from jaxcl.errors import UserError
from jaxcl.evaluate.all_images import AllImages
from jaxcl.evaluate.base import Evaluator, Metric, Metrics, NotApplicable, Panels
from jaxcl.evaluate.beginnings import PRETRAINED, at_the_beginning, beginnings
from jaxcl.evaluate.context import THUMBNAIL, EvalContext, EvalSetup
from jaxcl.evaluate.duplicate_table import Row, table
from jaxcl.evaluate.duplicates import Found, near_duplicates
from jaxcl.evaluate.knn import nearest_neighbours
from jaxcl.evaluate.rows import NotFinite, normalized
from jaxcl.evaluate.structure import unboxed

logger = logging.getLogger("jaxcl")

LISTED = 100  # groups of near-duplicates in results.json
PICTURED = 8  # queries in the report
GROUPS, GROUP_SIZE = 12, 8  # groups of near-duplicates in the report, and images shown of each


class Neighbours(Evaluator):
    """The `eval.neighbours` nearest training images of each test image, and near-duplicates among both.

    Metrics: "cosine", mean over the test images of the cosine to the nearest training image; "any_cosine", the mean
    cosine over all pairs; "agreement", share of the neighbours that have the class of the test image, where labels are
    known; "copies", number of images that are near-duplicates of another one, not counting one of each group;
    "groups" and "pairs" of near-duplicates; "all_compared", whether no pair was skipped; "near_duplicates", the first
    `LISTED` groups, or pairs outside groups, by the names of their images. The report's duplicates.csv has them all.
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
        if not 0 < options.duplicate_score <= 1:
            raise UserError(f"eval.duplicate_score is {options.duplicate_score}; expected a number from 0 to 1")

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

        both, features = AllImages(context), np.concatenate([bank_NxD, queries_QxD])
        found, rows, fit = self._duplicates(context, both)
        metrics |= {
            "copies": sum(len(group) - 1 for group in found.groups),
            "groups": len(found.groups),
            "pairs": len(found.pairs),
            "all_compared": found.complete,
            "near_duplicates": _listed(rows),
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
        if rows:
            groups = found.groups[:GROUPS] or [[p.first, p.second] for p in found.pairs[:GROUPS]]
            panels["near_duplicates"] = {
                "images": [both.images(np.array(group[:GROUP_SIZE])) for group in groups],
                "rows": rows,
                "shown": [[both.name(i) for i in group] for group in groups],
                "fit": fit,
                "complete": found.complete,
            }
        return metrics, panels

    def _duplicates(self, context: EvalContext, both: AllImages) -> tuple[Found, list[Row], str]:
        """(near-duplicates, their table, how images became squares)."""
        config, files = context.setup.config, both.originals()
        thumbnails = np.concatenate([context.features(split, THUMBNAIL) for split in ("train", "test")])
        fit = config.data.files.fit or default_fit(config.data.source)
        # Middle squares have no proportions to compare.
        aspect = np.ones(len(thumbnails)) if fit == "crop" else files.width / np.maximum(1, files.height)
        if fit == "letterbox":
            thumbnails = unboxed(thumbnails, aspect)
        found = near_duplicates(thumbnails, aspect, least=context.options.duplicate_score)
        return found, table(found, both.name, files), fit


def _listed(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The first groups, or pairs outside groups, as results.json has them."""
    units: dict[Any, list[Row]] = {}
    for row in rows:
        units.setdefault(row.group or row, []).append(row)
    return [
        {
            "images": [row.file for row in unit] if unit[0].group else [unit[0].like, unit[0].file],
            "score": min(row.score for row in unit),
        }
        for unit in list(units.values())[:LISTED]
    ]


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
