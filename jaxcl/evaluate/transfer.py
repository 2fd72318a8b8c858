"""Coarse-to-fine transfer: how well the features of an encoder trained on coarse classes tell the fine ones apart.

N rows, D features, C fine classes, B batch, S steps of an epoch.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxcl.data import Source
from jaxcl.data.label_levels import coarse_of_fine
from jaxcl.evaluate.base import Evaluator, Metric, Metrics, NotApplicable, Panels, accuracy
from jaxcl.evaluate.context import EvalContext
from jaxcl.evaluate.knn import knn_predict, neighbours_for
from jaxcl.evaluate.linear_probe import LinearFit, fit_linear_probe, probe_logits
from jaxcl.losses import cross_entropy

SHOWN = 1500  # test images of the panel


class Transfer(Evaluator):
    """A linear probe on the fine labels, fitted to its optimum on frozen features without augmentation.

    It is the cheap, exact variant of `transfer_augmented`, the protocol of Thanos (Chen et al. 2022, arXiv 2204.07596);
    the numbers of the two may differ. For an encoder trained on the fine labels it gives the ceiling of transfer.

    Metrics: "accuracy" on the fine labels; "coarse_accuracy" of the coarse class of the predicted fine class;
    "balanced_accuracy", the mean over the fine classes of the test images; "knn_accuracy" on the fine labels by
    weighted nearest neighbours (`eval.knn_k`). Unlike the probe, neighbours cannot amplify directions of low variance.
    """

    features_only = True
    intervals = ("accuracy", "knn_accuracy")
    metrics = {
        "accuracy": Metric(
            "Fine classes, from coarse labels",
            meaning="a linear probe for the fine classes, of which the encoder may only have seen the coarse ones",
        ),
        "knn_accuracy": Metric("Fine classes, kNN", meaning="the fine class of the most similar training features"),
    }

    def __call__(self, context: EvalContext) -> tuple[Metrics, Panels]:
        test, options = context.test, context.options
        fine, coarse = _levels(context.source("train"), "training")
        test_fine, test_coarse = _levels(test, "test")
        names = test.fine_names or test.class_names
        probe = fit_linear_probe(context.features("train"), fine, num_classes=len(names))
        predicted = np.asarray(probe_logits(probe, context.features("test"))).argmax(-1)
        neighbours = knn_predict(
            context.features("train"),
            fine,
            context.features("test"),
            k=neighbours_for(fine, options.knn_k),
            temperature=options.knn_temperature,
            num_classes=len(names),
        )
        metrics = {
            "accuracy": accuracy(predicted, test_fine),
            "coarse_accuracy": accuracy(coarse_of_fine(fine, coarse, len(names))[predicted], test_coarse),
            "balanced_accuracy": balanced_accuracy(predicted, test_fine),
            "knn_accuracy": accuracy(np.asarray(neighbours).argmax(-1), test_fine),
        }
        panel: dict[str, Any] = {
            "features": context.features("test")[:SHOWN],
            "labels": test_fine[:SHOWN],
            "coarse": test_coarse[:SHOWN],
            "class_names": names,
            "coarse_names": test.coarse_names,
        }
        return metrics, {"transfer": panel}


class TransferAugmented(Evaluator):
    """The protocol of Thanos (arXiv 2204.07596): one linear layer, trained by AdamW on augmented images.

    Each of the `eval.transfer_epochs` epochs encodes the training set once more, one training view an image, in
    inference mode, and passes over it in batches of 128; the rate is 1e-3 along a cosine by epoch, the decay 0.01. The
    released code leaves dropout on and lets batch statistics drift.

    Metrics: "accuracy" on the fine labels after the epoch that is best on the validation split, or after the last epoch
    without one; "last_accuracy"; "best_epoch", from 1, with a validation split.
    """

    features_only = True
    metrics = {
        "accuracy": Metric(
            "Fine classes, augmented", meaning="a linear layer for the fine classes, trained on augmented images"
        )
    }

    def __call__(self, context: EvalContext) -> tuple[Metrics, Panels]:
        test, seed, epochs = context.test, context.recipe.seed, context.options.transfer_epochs
        fine, _ = _levels(context.source("train"), "training")
        test_fine, _ = _levels(test, "test")
        num_classes = len(test.fine_names or test.class_names)
        held = context.held_out
        validation = None if held is None else (context.features(held), _levels(context.source(held), held)[0])
        probe, opt_state = _start(context.features("test").shape[1], num_classes, seed)
        best = (-1.0, 0, probe)  # accuracy on the validation split, epoch, the probe after it
        for epoch in range(epochs):
            h_NxD = context.augmented_features("train", epoch)
            probe, opt_state = _epoch(probe, opt_state, h_NxD, fine, epoch, epochs, seed)
            if validation is not None:
                score = accuracy(np.asarray(probe_logits(probe, validation[0])).argmax(-1), validation[1])
                best = max(best, (score, epoch + 1, probe), key=lambda b: b[0])
        last = accuracy(np.asarray(probe_logits(probe, context.features("test"))).argmax(-1), test_fine)
        if validation is None:
            return {"accuracy": last, "last_accuracy": last}, {}
        _, best_epoch, probe = best
        right = accuracy(np.asarray(probe_logits(probe, context.features("test"))).argmax(-1), test_fine)
        return {"accuracy": right, "last_accuracy": last, "best_epoch": best_epoch}, {}


_BATCH = 128
_TX = optax.inject_hyperparams(optax.adamw)(learning_rate=0.0, weight_decay=0.01)


def _start(num_features: int, num_classes: int, seed: int) -> tuple[LinearFit, Any]:
    bound = num_features**-0.5
    weights_key, bias_key = jax.random.split(jax.random.key(seed))
    probe = LinearFit(
        jax.random.uniform(weights_key, (num_features, num_classes), minval=-bound, maxval=bound),
        jax.random.uniform(bias_key, (num_classes,), minval=-bound, maxval=bound),
    )
    return probe, _TX.init(probe)


@jax.jit
def _epoch(probe: LinearFit, opt_state: Any, h_NxD, fine_N, epoch, epochs, seed) -> tuple[LinearFit, Any]:
    """One pass over the rows in a new order, without the last partial batch; unlabelled rows do not count."""
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
    """Mean over the classes of the accuracy on their rows.

    Args:
      predicted, labels: int [N]; rows with a negative label do not count.

    Returns:
      A number in [0, 1]; NaN where no row has a label.
    """
    classes = np.unique(labels[labels >= 0])
    return float(np.mean([(predicted[labels == c] == c).mean() for c in classes])) if len(classes) else float("nan")


def _levels(source: Source, which: str) -> tuple[np.ndarray, np.ndarray]:
    """Fine and coarse labels, int [N] each; the source's own labels may be either."""
    if "coarse" not in source.extras:
        raise NotApplicable("the data has one level of labels")
    fine = source.extras["fine"] if "fine" in source.extras else source.labels
    if not (fine >= 0).any():
        raise NotApplicable(f"no {which} image has a fine label")
    return fine, source.extras["coarse"]
