"""Accuracy and calibration under white-box attacks, of the online classifier and of a linear probe.

B images of a batch, H W C of an image, K classes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.augment import standard_view, to_float
from jaxcl.evaluate.base import Evaluator, Metric, Metrics, Panels, accuracy
from jaxcl.evaluate.calibration import bins, expected_calibration_error
from jaxcl.evaluate.context import EvalContext
from jaxcl.evaluate.robustness import fgsm_examples, pgd_examples
from jaxcl.method.state import TrainState

Array = jax.Array


def _declared(title: str, how: str) -> dict[str, Metric]:
    return {
        "*.accuracy": Metric(f"{title}, {{}}/255", meaning=f"after every pixel moved by up to {{}}/255 {how}"),
        "*.ece": Metric(f"ECE, {title}, {{}}/255", "lower", meaning="the mean gap between confidence and accuracy"),
    }


_ONE_STEP, _MANY_STEPS = "in one step, in the direction that hurts most", "in many small steps"


class ClassifierFGSM(Evaluator):
    """The online classifier under one-step attacks of the strengths in `eval.fgsm` (ExCon, arXiv 2111.14271).

    Metrics: {epsilon in 1/255: {"accuracy", "ece"}}.
    """

    needs_classifier = True
    needs_labels = ("test",)
    metrics = _declared("Classifier under FGSM", _ONE_STEP)

    def __call__(self, context: EvalContext) -> tuple[Metrics, Panels]:
        metrics, by_epsilon = _attacked(context, "fgsm", context.options.fgsm, fgsm_examples, context.logits_fn)
        reliability = {f"FGSM {epsilon}/255": b for epsilon, b in by_epsilon.items()}
        return metrics, {"robustness": {"classifier, FGSM": metrics}, "reliability_fgsm": reliability}


class ClassifierPGD(Evaluator):
    """The online classifier under attacks of `eval.pgd_steps` steps, of 2.5 * epsilon / steps each, from the image.

    Metrics: as of `ClassifierFGSM`, for the strengths in `eval.pgd`.
    """

    needs_classifier = True
    needs_labels = ("test",)
    metrics = _declared("Classifier under PGD", _MANY_STEPS)

    def __call__(self, context: EvalContext) -> tuple[Metrics, Panels]:
        metrics, _ = _attacked(context, "pgd", context.options.pgd, _pgd(context), context.logits_fn)
        return metrics, {"robustness": {f"classifier, PGD-{context.options.pgd_steps}": metrics}}


class ProbeFGSM(Evaluator):
    """`fgsm` on the linear probe that is fitted to the frozen features, which every method has."""

    needs_labels = ("train", "test")
    metrics = _declared("Linear probe under FGSM", _ONE_STEP)

    def __call__(self, context: EvalContext) -> tuple[Metrics, Panels]:
        attack = (context.options.fgsm, fgsm_examples, context.probe_fn, context.fitted_probe())
        metrics, _ = _attacked(context, "linear_fgsm", *attack)
        return metrics, {"robustness": {"linear probe, FGSM": metrics}}


class ProbePGD(Evaluator):
    """`pgd` on the same linear probe."""

    needs_labels = ("train", "test")
    metrics = _declared("Linear probe under PGD", _MANY_STEPS)

    def __call__(self, context: EvalContext) -> tuple[Metrics, Panels]:
        attack = (context.options.pgd, _pgd(context), context.probe_fn, context.fitted_probe())
        metrics, _ = _attacked(context, "linear_pgd", *attack)
        return metrics, {"robustness": {f"linear probe, PGD-{context.options.pgd_steps}": metrics}}


def _pgd(context: EvalContext) -> Callable:
    return lambda *args, **options: pgd_examples(*args, num_steps=context.options.pgd_steps, **options)


def _attacked(
    context: EvalContext, name: str, epsilons: tuple, make: Callable, logits_of: Callable, *weights: Any
) -> tuple[Metrics, dict]:
    """-> (accuracy and calibration, reliability bins), both by epsilon in 1/255.

    name: of the compiled program. make: makes the attacked images, as `fgsm_examples` does. logits_of: (state,
    *weights) -> a function from normalised images to logits.
    """
    metrics, by_epsilon = {}, {}
    mean, std = jnp.asarray(context.recipe.mean), jnp.asarray(context.recipe.std)
    plain, how = ((0.0,) * len(mean), (1.0,) * len(mean)), context.recipe.model.input_interpolation
    resize = standard_view(context.recipe.eval_size, *plain, interpolation=how)

    def attack(state: TrainState, batch: dict[str, Array], *weights: Any) -> Array:
        pixels = to_float(batch["image"])
        pixels = resize(jax.random.split(jax.random.key(0), pixels.shape[0]), pixels)[0]
        logits_fn = logits_of(state, *weights)
        adversarial = make(
            logits_fn,
            pixels,
            batch["label"],
            epsilon=batch["epsilon"][0] / 255,  # every row holds the same one
            mean=mean,
            std=std,
            where=batch["where"],
        )
        return jax.nn.softmax(logits_fn((adversarial - mean) / std))

    for epsilon in epsilons:
        probabilities = context.collect(context.test, name, attack, *weights, epsilon=np.float32(epsilon))
        by_epsilon[epsilon] = bins(probabilities, context.test.labels)
        metrics[str(epsilon)] = {
            "accuracy": accuracy(probabilities.argmax(-1), context.test.labels),
            "ece": float(expected_calibration_error(probabilities, context.test.labels)),
        }
    return metrics, by_epsilon
