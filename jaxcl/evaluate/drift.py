"""What training has changed: features of held-out images before, by the run's first weights, and after.

N images, D features.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.errors import UserError
from jaxcl.evaluate.base import Evaluator, Metric, Metrics, NotApplicable, Panels, from_files
from jaxcl.evaluate.collapse import collapse_metrics
from jaxcl.evaluate.context import EvalContext

Array = jax.Array
MOST = 10_000  # images that are compared; of more, the first ones
TILE = 1024  # rows of similarities in memory at one time


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Linear centred kernel alignment of features [N,D] and [N,E] of the same images, in [0, 1].

    |Y'X|^2 / (|X'X| |Y'Y|) of the centred features, in Frobenius norms; 1 for equal features up to rotation and scale.
    NaN where the features of one are all equal. Source: Kornblith et al. 2019, arXiv 1905.00414, eq. 3.
    """
    x, y = (np.asarray(a, np.float64) - np.asarray(a, np.float64).mean(0) for a in (x, y))
    across, own_x, own_y = (np.linalg.norm(a.T @ b) for a, b in ((y, x), (x, x), (y, y)))
    return float(across**2 / (own_x * own_y)) if own_x * own_y > 0 else float("nan")


def nearest_others(features: np.ndarray) -> np.ndarray:
    """int [N]: for each row of features [N,D] the other row of the largest cosine."""
    unit = _unit(features)
    return np.concatenate([_nearest(unit[i : i + TILE], unit, np.int32(i)) for i in range(0, len(unit), TILE)])


@jax.jit
def _nearest(rows: Array, unit: Array, first: Array) -> Array:
    similarity = jnp.matmul(rows, unit.T, precision="highest")
    own = first + jnp.arange(len(rows))
    return jnp.where(jnp.arange(len(unit)) == own[:, None], -jnp.inf, similarity).argmax(1)


def _unit(features: np.ndarray) -> np.ndarray:
    x = np.asarray(features, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def drift_metrics(before: np.ndarray, after: np.ndarray, labels: np.ndarray | None = None) -> dict[str, float]:
    """Compares features [N,D] of the same images by two states of an encoder; N at least 2.

    Args:
      before, after: float.
      labels: int [N]; negative: none.

    Returns:
      "cosine": mean cosine of an image's two features, 1 where nothing moved (a rotation of all features lowers it);
      "cka": `linear_cka`, which a rotation or a scale does not change;
      "nearest_agreement": share of the images whose nearest other image is the same one;
      "rank_before", "rank_after": effective ranks (`collapse_metrics`), "rank_kept", their ratio: low at collapse;
      "nearest_accuracy_before", "..._after": share of the labelled images whose nearest other labelled image has their
        class. These two only with labels.

    Raises:
      UserError: shapes that do not match, or one image.
    """
    before, after = np.asarray(before), np.asarray(after)
    if before.ndim != 2 or len(before) != len(after) or len(before) < 2:
        raise UserError(f"drift_metrics: features are {before.shape} and {after.shape}; expected [N,D], of two images")
    nearest = [nearest_others(x) for x in (before, after)]
    ranks = [float(collapse_metrics(x)["effective_rank"]) for x in (before, after)]
    out = {
        "cosine": float((_unit(before) * _unit(after)).sum(1).mean()) if before.shape == after.shape else float("nan"),
        "cka": linear_cka(before, after),
        "nearest_agreement": float((nearest[0] == nearest[1]).mean()),
        "rank_before": ranks[0],
        "rank_after": ranks[1],
        "rank_kept": ranks[1] / ranks[0] if ranks[0] else float("nan"),
    }
    known = np.full(len(before), False) if labels is None else np.asarray(labels) >= 0
    if known.sum() > 1:
        own = np.asarray(labels)[known]
        for when, x in (("before", before), ("after", after)):
            out[f"nearest_accuracy_{when}"] = float((own[nearest_others(x[known])] == own).mean())
    return out


class Drift(Evaluator):
    """`drift_metrics` of the test images, from the state that the run began with to the one that is evaluated."""

    metrics: ClassVar[dict[str, Metric]] = {
        "cka": Metric(
            "Likeness to the first features",
            "",
            percent=False,
            meaning="linear CKA of the features before and after training; 1 if only rotated or scaled",
        ),
        "nearest_agreement": Metric(
            "Nearest images kept", "", meaning="share of test images whose nearest test image is the same as before"
        ),
        "rank_kept": Metric(
            "Effective rank kept",
            "",
            percent=False,
            meaning="dimensions that the features use, after by before training; far below 1 is collapse",
        ),
        "nearest_accuracy_before": Metric(
            "Nearest image, before",
            "",
            meaning="share of test images whose nearest one had their class before training",
        ),
        "nearest_accuracy_after": Metric(
            "Nearest image, after", meaning="share of test images whose nearest one has their class"
        ),
    }

    def __call__(self, context: EvalContext) -> tuple[Metrics, Panels]:
        if len(context.test) < 2:
            raise NotApplicable("there are fewer than two test images")
        with from_files():
            before = context.first_features("test")[:MOST]
        after = context.features("test", "h")[:MOST]
        found = drift_metrics(before, after, context.test.labels[:MOST])
        # Where all features are equal, some cannot be measured.
        return {"images": len(after)} | {k: v for k, v in found.items() if not np.isnan(v)}, {}
