"""Logistic regression by Adam for a fixed number of epochs: the protocol of CLAE's code.

N rows, D features, C classes, Q test rows, E epochs.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike

from jaxcl.errors import UserError
from jaxcl.evaluate.base import Evaluator, Metric, Metrics, Panels
from jaxcl.evaluate.context import EvalContext
from jaxcl.evaluate.linear_probe import LinearFit, probe_logits
from jaxcl.evaluate.rows import check_finite
from jaxcl.losses import cross_entropy
from jaxcl.losses.labels import as_array, class_numbers


class LogisticFit(NamedTuple):
    """The probe after the last epoch, and its course."""

    probe: LinearFit
    loss: jax.Array  # [E] mean training loss of the epoch's steps
    test_accuracy: jax.Array  # [E] in [0, 1], on all labelled test rows; NaN without any


def fit_logistic(
    features: ArrayLike,
    labels: ArrayLike,
    *,
    num_classes: int,
    test: tuple[ArrayLike, ArrayLike] | None = None,
    epochs: int = 1000,
    batch_size: int = 256,
    learning_rate: float = 3e-4,
    seed: int = 0,
) -> LogisticFit:
    """Minimises mean cross-entropy by Adam at a constant rate, without weight decay, on unscaled features.

    The fit may end before it converges: unlike `fit_linear_probe`, the result depends on the number of epochs and on
    the scale of the features. Each epoch visits the rows in a new order and drops the last partial batch. Weights and
    bias start uniform in +-1/sqrt(D).

    Args:
      features: [N, D], any float type; the fit runs in float32 at least.
      labels: [N] int in [0, num_classes); negative rows (unlabelled, padded) are removed first.
      num_classes: C.
      test: (features [Q, D], labels [Q]) to measure after every epoch; negative labels do not count.
      epochs: >= 1.
      batch_size: >= 1, rows a step; fewer rows are one batch.
      learning_rate: > 0.
      seed: for the first weights and the order of rows.

    Returns:
      LogisticFit.

    Raises:
      UserError: shapes that do not match, no labelled row, a label that is no class, a labelled row that is not finite,
        epochs or batch_size below 1.

    References:
      Ho and Vasconcelos 2020, arXiv 2010.12050. Their code reports the best epoch on the test set; the last epoch is
      the honest number.
    """
    features, labels = np.asarray(features), np.asarray(as_array(labels))
    test = (features[:0], labels[:0]) if test is None else tuple(np.asarray(t) for t in test)
    for x, y in ((features, labels), test):
        if x.ndim != 2 or y.shape != (len(x),) or x.shape[1] != features.shape[1]:
            raise UserError(
                f"logistic: features of shape {x.shape} and labels of shape {y.shape}, expected [rows, features] "
                "and [rows], with as many features in the test set as in the training set"
            )
    if epochs < 1 or batch_size < 1:
        raise UserError(f"logistic: epochs={epochs} and batch_size={batch_size}, expected 1 or more")
    known = labels >= 0
    if not known.any():
        raise UserError("logistic: no row has a label, expected at least one")
    class_numbers("logistic", labels, num_classes)
    class_numbers("logistic: test", test[1], num_classes)
    check_finite("logistic: features", features, known)
    check_finite("logistic: test features", test[0], test[1] >= 0)
    if not known.all():
        features, labels = features[known], labels[known]
    return _fit(
        jnp.asarray(features),
        jnp.asarray(labels),
        *map(jnp.asarray, test),
        learning_rate,
        seed,
        num_classes=num_classes,
        epochs=epochs,
        batch_size=min(batch_size, len(labels)),
    )


@functools.partial(jax.jit, static_argnames=("num_classes", "epochs", "batch_size"))
def _fit(x_NxD, labels_N, test_QxD, labels_Q, rate, seed, *, num_classes, epochs, batch_size):
    dtype = jnp.promote_types(x_NxD.dtype, jnp.float32)
    x_NxD, test_QxD = x_NxD.astype(dtype), test_QxD.astype(dtype)
    num_rows, num_features = x_NxD.shape
    steps = num_rows // batch_size
    tx = optax.adam(rate)
    weight_key, bias_key, order_key = jax.random.split(jax.random.key(seed), 3)
    bound = num_features**-0.5
    start = LinearFit(
        jax.random.uniform(weight_key, (num_features, num_classes), dtype, -bound, bound),
        jax.random.uniform(bias_key, (num_classes,), dtype, -bound, bound),
    )

    def step(carry, rows_B):
        probe, state = carry
        objective = lambda p: cross_entropy(probe_logits(p, x_NxD[rows_B]), labels_N[rows_B])  # noqa: E731
        loss, grads = jax.value_and_grad(objective)(probe)
        updates, state = tx.update(grads, state, probe)
        return (optax.apply_updates(probe, updates), state), loss

    def epoch(carry, e):
        order_N = jax.random.permutation(jax.random.fold_in(order_key, e), num_rows)
        carry, losses = lax.scan(step, carry, order_N[: steps * batch_size].reshape(steps, batch_size))
        hit_Q = (jnp.argmax(probe_logits(carry[0], test_QxD), axis=-1) == labels_Q) & (labels_Q >= 0)
        return carry, (jnp.mean(losses), jnp.sum(hit_Q) / jnp.sum(labels_Q >= 0))

    (probe, _), (losses, accuracy) = lax.scan(epoch, (start, tx.init(start)), jnp.arange(epochs))
    return LogisticFit(probe, losses, accuracy)


class Logistic(Evaluator):
    """Logistic regression on frozen features by Adam, the protocol of CLAE (arXiv 2010.12050).

    Metrics: "accuracy" after the last epoch; "best_epoch_accuracy", as the paper reports. The best epoch is chosen on
    the images it is measured on, which is optimistic.
    """

    needs_labels = ("train", "test")
    features_only = True
    intervals = ("accuracy",)
    metrics = {
        "accuracy": Metric("Logistic regression", meaning="a linear classifier on the frozen features, trained by Adam")
    }

    def __call__(self, context: EvalContext) -> tuple[Metrics, Panels]:
        options = context.options
        fit = fit_logistic(
            context.features("train"),
            context.source("train").labels,
            test=(context.features("test"), context.test.labels),
            num_classes=context.num_classes,
            epochs=options.logistic_epochs,
            batch_size=options.logistic_batch_size,
            learning_rate=options.logistic_lr,
            seed=context.recipe.seed,
        )
        accuracies = np.asarray(fit.test_accuracy)
        best = int(accuracies.argmax())
        metrics = {"accuracy": float(accuracies[-1]), "epochs": len(accuracies)}
        return metrics | {"best_epoch_accuracy": float(accuracies[best]), "best_epoch": best + 1}, {}
