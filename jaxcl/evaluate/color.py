"""How much of an image's colour the frozen features keep.

N images, D features.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl import augment
from jaxcl.augment import to_float
from jaxcl.augment.color import PROPERTIES
from jaxcl.evaluate.base import Evaluator, Metric, Metrics, NotApplicable, Panels, accuracy
from jaxcl.evaluate.context import EvalContext
from jaxcl.evaluate.invariance import IMAGES, JITTER
from jaxcl.evaluate.linear_probe import fit_linear_probe, probe_logits
from jaxcl.method.state import TrainState
from jaxcl.method.views import view_keys

Array = jax.Array
BINS = 10  # of the range of a jitter factor
RIDGE = 1e-3


class Color(Evaluator):
    """Colour jitter, predicted from the frozen features of two jittered copies of an image; and the object's tint.

    A linear classifier reads the features of both copies, side by side. It predicts the distance of their jitter
    factors, in tenths of the factor's range. The protocol follows Zhang and Ma 2022 (arXiv 2206.00227), who do not say
    which distance they mean.

    Metrics: accuracies for "brightness", "contrast", "saturation" and "hue"; "accuracy", their mean; "majority", the
    mean accuracy of always predicting the most frequent distance; "r2" (ours), the share of variance of the signed
    difference that a linear regression explains, the mean of the four; "tint", where the data has tints: the accuracy
    of a linear probe for the tint.
    """

    metrics = {
        "accuracy": Metric("Colour jitter", "", meaning="a linear probe for the difference in colour of two copies"),
        "tint": Metric("Tint of the object", "", meaning="a linear probe for it on the frozen features"),
    }

    def __call__(self, context: EvalContext) -> tuple[Metrics, Panels]:
        if context.recipe.image_shape[2] != 3:
            raise NotApplicable("the images have no colour")
        size, seed = context.recipe.eval_size, context.recipe.seed
        pipeline = augment.Pipeline((augment.Resize(size=size), augment.ColorJitter(**JITTER, p=1.0)))

        def two(state: TrainState, batch: dict[str, Array]) -> dict[str, list[Array]]:
            key, out = jax.random.key(seed, impl="threefry2x32"), {"h": [], "jitter": []}
            for name in ("color1", "color2"):
                keys = view_keys(key, jnp.zeros((), jnp.int32), batch["index"], name)
                image, drawn = pipeline(keys, to_float(batch["image"]))
                out["h"].append(context.encode(state, context.normalize(image))[0])
                out["jitter"].append(drawn["jitter"])
            return out

        sides = {}
        for split, most in (("train", 5 * IMAGES), ("test", IMAGES)):
            if not len(context.source(split)):
                raise NotApplicable(f"there are no {'training' if split == 'train' else 'test'} images")
            out = context.first(context.source(split), most, "color", two)
            sides[split] = (np.concatenate(out["h"], axis=1), np.stack(out["jitter"]))
        (train_x, train_a), (test_x, test_a) = sides["train"], sides["test"]
        labels, test_labels = _distances(train_a), _distances(test_a)
        metrics: Metrics = {}
        majority = []
        for i, name in enumerate(PROPERTIES):
            probe = fit_linear_probe(train_x, labels[:, i], num_classes=BINS, max_steps=100)
            predicted = np.asarray(probe_logits(probe, test_x)).argmax(-1)
            metrics[name] = accuracy(predicted, test_labels[:, i])
            majority.append(float((test_labels[:, i] == np.bincount(labels[:, i]).argmax()).mean()))
        metrics = {"accuracy": float(np.mean(list(metrics.values()))), "majority": float(np.mean(majority))} | metrics
        metrics["r2"] = float(np.mean(_explained(train_x, train_a[0] - train_a[1], test_x, test_a[0] - test_a[1])))
        if (kept := _tint(context)) is not None:
            metrics["tint"] = kept
        return metrics, {}


class Tint(Evaluator):
    """The tint of `color` alone: a linear probe on the frozen features for the tint of the object."""

    metrics = {
        "accuracy": Metric("Tint of the object", "", meaning="a linear probe for it on the frozen features"),
    }

    def __call__(self, context: EvalContext) -> tuple[Metrics, Panels]:
        if (kept := _tint(context)) is None:
            raise NotApplicable("the data does not know the tints of its objects (garments does)")
        return {"accuracy": kept}, {}


def _tint(context: EvalContext) -> float | None:
    tints = [context.source(split).extras.get("tint") for split in ("train", "test")]
    if any(t is None for t in tints):
        return None
    probe = fit_linear_probe(context.features("train"), tints[0], num_classes=int(max(t.max() for t in tints)) + 1)
    return accuracy(np.asarray(probe_logits(probe, context.features("test"))).argmax(-1), tints[1])


def _distances(jitter_2xNx4: np.ndarray) -> np.ndarray:
    """The distance in bins between the factors of two copies, int [N,4] in 0..BINS - 1."""
    strength = np.array([JITTER[name] for name in PROPERTIES])
    low = np.array([1, 1, 1, 0]) - strength
    bins = np.clip(((jitter_2xNx4 - low) / (2 * strength) * BINS).astype(np.int64), 0, BINS - 1)
    return np.abs(bins[0] - bins[1])


def _explained(x_NxD: np.ndarray, y_Nx4: np.ndarray, test_x: np.ndarray, test_y: np.ndarray) -> np.ndarray:
    """Share of the variance [4] of each test target that ridge regression on standardised features explains."""
    mean, std = x_NxD.mean(0), np.maximum(x_NxD.std(0), 1e-6)
    x, test_x = ((v - mean).astype(np.float64) / std for v in (x_NxD, test_x))
    offset = y_Nx4.mean(0)
    weights = np.linalg.solve(x.T @ x + RIDGE * len(x) * np.eye(x.shape[1]), x.T @ (y_Nx4 - offset))
    rest = test_y - offset - test_x @ weights
    varies = test_y.var(0) > 1e-12
    return np.where(varies, 1 - (rest**2).mean(0) / np.where(varies, test_y.var(0), 1), 0.0)
