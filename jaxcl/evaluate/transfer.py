"""Coarse-to-fine transfer: what an encoder trained on coarse classes has kept of the fine ones.

Letters: N rows, D features, C fine classes, B batch, S steps of an epoch.
"""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxcl.data import Source
from jaxcl.data.label_levels import coarse_of_fine
from jaxcl.evaluate.base import Metrics, NotApplicable, accuracy
from jaxcl.evaluate.knn import knn_predict
from jaxcl.evaluate.linear_probe import LinearProbe, fit_linear_probe, probe_logits
from jaxcl.losses import cross_entropy

if TYPE_CHECKING:
    from jaxcl.evaluate.suite import EvalContext

SHOWN = 1500  # test images of the panel


def transfer(f: "EvalContext") -> tuple[Metrics, dict]:
    """A linear probe on the fine labels, fitted to its optimum on frozen features without augmentation.

    This is the cheap, exact variant of the protocol of "Perfectly Balanced" (arXiv:2204.07596), which is
    `transfer_augmented`; its figures need not be equal to these. Of an encoder trained on the fine labels themselves
    it is the ceiling that transfer can reach.

    Metrics: "accuracy" on the fine labels; "coarse_accuracy" of the coarse class of the predicted fine one;
    "balanced_accuracy", the mean over the fine classes of the test images; "knn_accuracy" on the fine labels by
    weighted nearest neighbours (`eval.knn_k`), which, unlike the probe, cannot amplify directions of little variance.
    """
    fine, coarse = _levels(f.source("train"), "training")
    test_fine, test_coarse = _levels(f.test, "test")
    names = f.test.fine_names or f.test.class_names
    probe = fit_linear_probe(f.features("train"), fine, num_classes=len(names))
    predicted = np.asarray(probe_logits(probe, f.features("test"))).argmax(-1)
    neighbours = knn_predict(
        f.features("train"),
        fine,
        f.features("test"),
        k=f.options.knn_k,
        temperature=f.options.knn_temperature,
        num_classes=len(names),
    )
    figures = {
        "accuracy": accuracy(predicted, test_fine),
        "coarse_accuracy": accuracy(coarse_of_fine(fine, coarse, len(names))[predicted], test_coarse),
        "balanced_accuracy": balanced_accuracy(predicted, test_fine),
        "knn_accuracy": accuracy(np.asarray(neighbours).argmax(-1), test_fine),
    }
    panel: dict[str, Any] = {
        "features": f.features("test")[:SHOWN],
        "labels": test_fine[:SHOWN],
        "coarse": test_coarse[:SHOWN],
        "class_names": names,
        "coarse_names": f.test.coarse_names,
    }
    return figures, {"transfer": panel}


def transfer_augmented(f: "EvalContext") -> tuple[Metrics, dict]:
    """The protocol of "Perfectly Balanced": one linear layer, AdamW, on the training views of the images.

    Each of `eval.transfer_epochs` encodes the training set anew, one view an image, in inference mode (the released
    code leaves dropout on and lets batch statistics drift), and passes over it in batches of 128: rate 1e-3 along a
    cosine by epoch, decay 0.01. Encodes the training set as often as there are epochs.

    Metrics: "accuracy" on the fine labels of the epoch that is best on the validation split, or without one of the
    last epoch; "last_accuracy"; "best_epoch", from 1, where there is a validation split.
    """
    fine, _ = _levels(f.source("train"), "training")
    test_fine, _ = _levels(f.test, "test")
    num_classes = len(f.test.fine_names or f.test.class_names)
    held = f.held_out
    chosen_by = None if held is None else (f.features(held), _levels(f.source(held), held)[0])
    epochs = f.options.transfer_epochs
    probe, opt_state = _start(f.features("test").shape[1], num_classes, f.recipe.seed)
    best = (-1.0, 0, probe)  # accuracy on the validation split, epoch, what it was then
    for epoch in range(epochs):
        h_NxD = f.augmented_features("train", epoch)
        probe, opt_state = _epoch(probe, opt_state, h_NxD, fine, epoch, epochs, f.recipe.seed)
        if chosen_by is not None:
            score = accuracy(np.asarray(probe_logits(probe, chosen_by[0])).argmax(-1), chosen_by[1])
            best = max(best, (score, epoch + 1, probe), key=lambda b: b[0])
    last = accuracy(np.asarray(probe_logits(probe, f.features("test"))).argmax(-1), test_fine)
    if chosen_by is None:
        return {"accuracy": last, "last_accuracy": last}, {}
    _, best_epoch, probe = best
    right = accuracy(np.asarray(probe_logits(probe, f.features("test"))).argmax(-1), test_fine)
    return {"accuracy": right, "last_accuracy": last, "best_epoch": best_epoch}, {}


_BATCH = 128
_TX = optax.inject_hyperparams(optax.adamw)(learning_rate=0.0, weight_decay=0.01)


def _start(num_features: int, num_classes: int, seed: int) -> tuple[LinearProbe, Any]:
    bound = num_features**-0.5
    weights_key, bias_key = jax.random.split(jax.random.key(seed))
    probe = LinearProbe(
        jax.random.uniform(weights_key, (num_features, num_classes), minval=-bound, maxval=bound),
        jax.random.uniform(bias_key, (num_classes,), minval=-bound, maxval=bound),
    )
    return probe, _TX.init(probe)


@jax.jit
def _epoch(probe: LinearProbe, opt_state: Any, h_NxD, fine_N, epoch, epochs, seed) -> tuple[LinearProbe, Any]:
    """One pass over the rows in an order of its own; drops the last partial batch, unlabelled rows do not count."""
    size = min(_BATCH, len(fine_N))
    order_N = jax.random.permutation(jax.random.fold_in(jax.random.key(seed), epoch), len(fine_N))
    rows_SxB = order_N[: len(fine_N) // size * size].reshape(-1, size)
    opt_state.hyperparams["learning_rate"] = 1e-3 * (1 + jnp.cos(jnp.pi * epoch / epochs)) / 2

    def step(carry, rows_B):
        probe, state = carry
        grads = jax.grad(lambda p: cross_entropy(probe_logits(p, h_NxD[rows_B]), fine_N[rows_B]))(probe)
        updates, state = _TX.update(grads, state, probe)
        return (optax.apply_updates(probe, updates), state), None

    return lax.scan(step, (probe, opt_state), rows_SxB)[0]


def balanced_accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Mean over classes of the share of a class's rows that are right; negative labels do not count, NaN for none."""
    classes = np.unique(labels[labels >= 0])
    return float(np.mean([(predicted[labels == c] == c).mean() for c in classes])) if len(classes) else float("nan")


def _levels(source: Source, which: str) -> tuple[np.ndarray, np.ndarray]:
    """Fine and coarse labels, int [N] each, whichever of them are the source's own."""
    if "coarse" not in source.extras:
        raise NotApplicable("the data has one level of labels")
    fine = source.extras["fine"] if "fine" in source.extras else source.labels
    if not (fine >= 0).any():
        raise NotApplicable(f"no {which} image has a fine label")
    return fine, source.extras["coarse"]
