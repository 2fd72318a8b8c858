"""Evaluators: one frozen encoder -> (figures, panels of the report). What lacks its labels says so by `NotApplicable`.

N images, S side, K classes.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl import saliency
from jaxcl.evaluate import attacked, ood
from jaxcl.evaluate.base import Metrics, accuracy, bins, needs_classifier, needs_labels
from jaxcl.evaluate.calibration import expected_calibration_error
from jaxcl.evaluate.collapse import collapse
from jaxcl.evaluate.dense import dense
from jaxcl.evaluate.explanation import drop_increase, mask_agreement
from jaxcl.evaluate.invariance import color, invariance, tint
from jaxcl.evaluate.knn import knn_predict
from jaxcl.evaluate.linear_probe import fit_linear_probe, probe_logits
from jaxcl.evaluate.linear_sgd import linear_sgd
from jaxcl.evaluate.logistic import fit_logistic
from jaxcl.evaluate.neighbours import check_neighbours, neighbours
from jaxcl.evaluate.shape_bias import check_stimuli, cue_conflict
from jaxcl.evaluate.transfer import transfer, transfer_augmented
from jaxcl.evaluate.worst_group import worst_group
from jaxcl.method.state import TrainState
from jaxcl.method.update import represent, to_pixels

if TYPE_CHECKING:
    from jaxcl.evaluate.suite import EvalContext, Evaluation

Array = jax.Array
PICTURED = 200  # test images from which the shown explanations are taken


def knn(f: "EvalContext") -> tuple[Metrics, dict]:
    """Weighted nearest neighbours in the training features."""
    needs_labels(f, "train", "test")
    kind = f.options.knn_features or f.options.features
    probabilities = knn_predict(
        f.features("train", kind),
        f.source("train").labels,
        f.features("test", kind),
        k=f.options.knn_k,
        temperature=f.options.knn_temperature,
        num_classes=f.recipe.num_classes,
    )
    right = accuracy(np.asarray(probabilities).argmax(-1), f.test.labels)
    return {"accuracy": right, "k": f.options.knn_k}, {}


def linear(f: "EvalContext") -> tuple[Metrics, dict]:
    """Multinomial logistic regression on frozen features, fitted to its optimum."""
    needs_labels(f, "train", "test")
    logits = np.asarray(probe_logits(f.fitted_probe(), f.features("test")))
    return {"accuracy": accuracy(logits.argmax(-1), f.test.labels)}, {}


def logistic(f: "EvalContext") -> tuple[Metrics, dict]:
    """The same by Adam for many epochs, the protocol of CLAE (papers/clae.md d); the accuracy is the last epoch's."""
    needs_labels(f, "train", "test")
    fit = fit_logistic(
        f.features("train"),
        f.source("train").labels,
        test=(f.features("test"), f.test.labels),
        num_classes=f.recipe.num_classes,
        epochs=f.options.logistic_epochs,
        batch_size=f.options.logistic_batch_size,
        learning_rate=f.options.logistic_lr,
        seed=f.recipe.seed,
    )
    accuracies = np.asarray(fit.test_accuracy)
    best = int(accuracies.argmax())
    figures = {"accuracy": float(accuracies[-1]), "epochs": len(accuracies)}
    # Chosen on the images it is measured on, hence not the first figure: the papers' protocol, and optimistic.
    return figures | {"best_epoch_accuracy": float(accuracies[best]), "best_epoch": best + 1}, {}


def raw_pixels(f: "EvalContext") -> tuple[Metrics, dict]:
    """The same regression on the pixels themselves, with a penalty that suits them: what an encoder has to beat."""
    needs_labels(f, "train", "test")
    train = f.source("train")
    if not (train.in_memory and f.test.in_memory):
        return {}, {}
    flat = [np.asarray(s.images, np.float32).reshape(len(s), -1) / 255 for s in (train, f.test)]
    probe = fit_linear_probe(flat[0], train.labels, num_classes=f.recipe.num_classes, l2=1.0, max_steps=60)
    return {"accuracy": accuracy(np.asarray(probe_logits(probe, flat[1])).argmax(-1), f.test.labels)}, {}


def classifier(f: "EvalContext") -> tuple[Metrics, dict]:
    """The classifier trained along with the encoder."""
    needs_classifier(f)
    needs_labels(f, "test")
    predicted, labels = f.probabilities("test").argmax(-1), f.test.labels
    known = labels >= 0
    matrix = np.zeros((f.recipe.num_classes,) * 2, np.int64)
    np.add.at(matrix, (labels[known], predicted[known]), 1)
    panel = {"confusion": {"matrix": matrix, "class_names": f.test.class_names}}
    return {"accuracy": accuracy(predicted, labels)}, panel


def explanation(f: "EvalContext") -> tuple[Metrics, dict]:
    """Drop and increase in confidence for the predicted class (papers/excon.md d.2), and the true masks where known."""
    needs_classifier(f)
    S = f.recipe.image_shape[0]

    def explain(state: TrainState, batch: dict[str, Array]) -> dict[str, Array]:
        image, logits_fn = f.normalize(to_pixels(batch["image"])), f.logits_fn(state)
        probabilities = jax.nn.softmax(logits_fn(image))
        predicted = probabilities.argmax(-1)
        maps = _maps(f, state, image, predicted)
        kept = saliency.apply_mask(image, saliency.top_fraction_mask(maps, f.options.explanation_fraction))
        masked = jax.nn.softmax(logits_fn(kept))
        take = lambda p: jnp.take_along_axis(p, predicted[:, None], 1)[:, 0]  # noqa: E731
        return {"before": take(probabilities), "after": take(masked), "maps": maps}

    out = f.collect(f.test, "explanation", explain)
    figures = {k: float(v) for k, v in drop_increase(out["before"], out["after"]).items()}
    truth = f.test.extras.get("mask")
    if truth is not None and truth.shape[1:] == (S, S):
        keep = np.asarray(saliency.keep_mask(out["maps"], 0.5))
        figures |= {k: float(v) for k, v in mask_agreement(keep, out["maps"], truth).items()}
    # Pictures are of the maps for the true class.
    return figures, {"saliency": _explained(f, truth)} if (f.test.labels >= 0).any() else {}


def _maps(f: "EvalContext", state: TrainState, image: Array, target: Array) -> Array:
    """GradCAM maps [N,S,S] in [0,1] of the frozen network."""
    name = f.evaluation.classifier
    activations, tail, _ = f.recipe.model.split_at(state.params, state.batch_stats, image, f.options.tap, train=False)

    def logits(a: Array) -> Array:  # of the main encoder's activations, whatever other encoders say
        h, _ = represent(f.recipe, state.params, state.batch_stats, image, main=tail(a)[0])
        return f.recipe.memory[name].logits(state.memory[name], h)

    cam = saliency.grad_cam(logits, activations, target)
    return saliency.normalize_map(cam, image.shape[1])


def _explained(f: "EvalContext", truth: np.ndarray | None) -> dict[str, Any]:
    """Some test images, their map for the true class, the masked image, and whether that still passes as its class."""

    def explain(state: TrainState, batch: dict[str, Array]) -> dict[str, Array]:
        pixels = to_pixels(batch["image"])
        image = f.normalize(pixels)
        maps = _maps(f, state, image, batch["label"])
        keep = saliency.keep_mask(maps, 0.5)
        masked = saliency.apply_mask(image, keep)
        accepted = f.logits_fn(state)(masked).argmax(-1) == batch["label"]
        show = lambda x: jnp.clip(x * jnp.asarray(f.recipe.std) + jnp.asarray(f.recipe.mean), 0, 1)  # noqa: E731
        return {"image": show(image), "map": maps, "keep": keep, "masked": show(masked), "accepted": accepted}

    some = min(len(f.test), PICTURED)
    source = f.test.take(np.arange(some)) if f.test.in_memory else f.test
    parts = []
    for out, where in f.run(source, "explained", explain):
        parts.append(jax.tree.map(lambda x, w=where: x[w], out))
        if sum(len(p["map"]) for p in parts) >= some:
            break
    out = jax.tree.map(lambda *xs: np.concatenate(xs)[:some], *parts)
    chosen = np.sort(np.concatenate([np.flatnonzero(out["accepted"])[:8], np.flatnonzero(~out["accepted"])[:8]]))
    out = {k: v[chosen] for k, v in out.items()}
    out["true_mask"] = None if truth is None or truth.shape[1:] != out["map"].shape[1:] else truth[chosen]
    out["names"] = [f.test.class_names[i] if i >= 0 else "" for i in f.test.batch(chosen)["label"]]
    return out


def calibration(f: "EvalContext") -> tuple[Metrics, dict]:
    """Expected calibration error on the test split and, where the source has one, on its shifted form."""
    needs_classifier(f)
    needs_labels(f, "test")
    figures, diagrams = {}, {}
    for split in ("test", "test_shifted"):
        source = f.source(split)
        if source is None:
            continue
        probabilities = f.probabilities(split)
        name = "clean" if split == "test" else split
        figures[name] = {
            "accuracy": accuracy(probabilities.argmax(-1), source.labels),
            "ece": float(expected_calibration_error(probabilities, source.labels)),
        }
        diagrams[name] = bins(probabilities, source.labels)
    return figures, {"reliability": diagrams}


EVALUATORS: dict[str, Callable[["EvalContext"], tuple[Metrics, dict]]] = {
    "knn": knn,
    "linear": linear,
    "logistic": logistic,
    "linear_sgd": linear_sgd,
    "raw_pixels": raw_pixels,
    "classifier": classifier,
    "explanation": explanation,
    "fgsm": attacked.fgsm,
    "pgd": attacked.pgd,
    "linear_fgsm": attacked.linear_fgsm,
    "linear_pgd": attacked.linear_pgd,
    "adversary": attacked.adversary,
    "calibration": calibration,
    "transfer": transfer,
    "transfer_augmented": transfer_augmented,
    "worst_group": worst_group,
    "collapse": collapse,
    "neighbours": neighbours,
    "ood": ood.ood,
    "shape_bias": cue_conflict,
    "invariance": invariance,
    "color": color,
    "tint": tint,
    "dense": dense,
}

# What an evaluator's options say of files and names, known to be right before training begins.
CHECKS: dict[str, Callable[["Evaluation"], None]] = {
    "ood": ood.check,
    "shape_bias": check_stimuli,
    "neighbours": check_neighbours,
}
