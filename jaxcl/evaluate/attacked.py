"""Evaluators under attack: classifiers of the frozen encoder, and what the adversary of the training does to a batch.

B batch, D features.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.augment import standard_view
from jaxcl.evaluate.base import Metrics, NotApplicable, accuracy, bins, needs_classifier, needs_labels
from jaxcl.evaluate.calibration import expected_calibration_error
from jaxcl.evaluate.robustness import fgsm_examples, pgd_examples
from jaxcl.losses.common import inner, unit
from jaxcl.method import sharding
from jaxcl.method.recipe import Phase
from jaxcl.method.stages.adversary import Adversary
from jaxcl.method.state import TrainState
from jaxcl.method.update import make_views, run_stages, to_pixels

if TYPE_CHECKING:
    from jaxcl.evaluate.suite import EvalContext

Array = jax.Array
SHOWN = 8  # images of the adversary's picture


def fgsm(f: "EvalContext") -> tuple[Metrics, dict]:
    """Accuracy and calibration of the classifier under one-step white-box attacks (papers/excon.md d.3)."""
    needs_classifier(f)
    figures, by_epsilon = _attacked(f, "fgsm", f.options.fgsm, fgsm_examples, f.logits_fn)
    reliability = {f"FGSM {epsilon}/255": b for epsilon, b in by_epsilon.items()}
    return figures, {"robustness": {"classifier, FGSM": figures}, "reliability_fgsm": reliability}


def pgd(f: "EvalContext") -> tuple[Metrics, dict]:
    """The same under many smaller steps: 20 by default, of 2.5 * epsilon / 20, from the image itself."""
    needs_classifier(f)
    figures, _ = _attacked(f, "pgd", f.options.pgd, _pgd(f), f.logits_fn)
    return figures, {"robustness": {f"classifier, PGD-{f.options.pgd_steps}": figures}}


def linear_fgsm(f: "EvalContext") -> tuple[Metrics, dict]:
    """`fgsm` on the linear probe fitted to the frozen features, which every method has; only for labelled data."""
    figures, _ = _attacked(f, "linear_fgsm", f.options.fgsm, fgsm_examples, f.probe_fn, _probe(f))
    return figures, {"robustness": {"linear probe, FGSM": figures}}


def linear_pgd(f: "EvalContext") -> tuple[Metrics, dict]:
    """`pgd` on the same probe."""
    figures, _ = _attacked(f, "linear_pgd", f.options.pgd, _pgd(f), f.probe_fn, _probe(f))
    return figures, {"robustness": {f"linear probe, PGD-{f.options.pgd_steps}": figures}}


def _probe(f: "EvalContext") -> Any:
    needs_labels(f, "train", "test")
    return f.fitted_probe()


def _pgd(f: "EvalContext") -> Callable:
    return lambda *args, **options: pgd_examples(*args, num_steps=f.options.pgd_steps, **options)


def _attacked(
    f: "EvalContext", name: str, epsilons: tuple, make: Callable, logits_of: Callable, *weights: Any
) -> tuple[Metrics, dict]:
    """-> (accuracy and calibration, reliability) of logits_of(state, *weights), by epsilon in 1/255.

    `make` makes the attacked images, with the true labels.
    """
    needs_labels(f, "test")
    figures, by_epsilon = {}, {}
    mean, std = jnp.asarray(f.recipe.mean), jnp.asarray(f.recipe.std)
    resize = standard_view(f.recipe.image_shape[0], (0.0,) * len(mean), (1.0,) * len(mean))

    def attack(state: TrainState, batch: dict[str, Array], *weights: Any) -> Array:
        pixels = to_pixels(batch["image"])
        pixels = resize(jax.random.split(jax.random.key(0), pixels.shape[0]), pixels)[0]
        logits_fn = logits_of(state, *weights)
        # A row's own copy of epsilon: one compiled program serves every strength.
        adversarial = make(
            logits_fn,
            pixels,
            batch["label"],
            epsilon=batch["epsilon"][0] / 255,
            mean=mean,
            std=std,
            where=batch["where"],
        )
        return jax.nn.softmax(logits_fn((adversarial - mean) / std))

    for epsilon in epsilons:
        probabilities = f.collect(f.test, name, attack, *weights, epsilon=np.float32(epsilon))
        by_epsilon[epsilon] = bins(probabilities, f.test.labels)
        figures[str(epsilon)] = {
            "accuracy": accuracy(probabilities.argmax(-1), f.test.labels),
            "ece": float(expected_calibration_error(probabilities, f.test.labels)),
        }
    return figures, by_epsilon


def adversary(f: "EvalContext") -> tuple[Metrics, dict]:
    """What the training's adversary does to a batch: how far images move towards each other, and which.

    Similarities are cosines of embeddings as the attack sees them (training mode, its own batch norms), of the first
    batch of training images: an image's, clean and adversarial, to the clean views of the others.
    """
    stage = next((s for s in f.recipe.stages if isinstance(s, Adversary)), None)
    if stage is None:
        raise NotApplicable("the config has no adversary stage")
    recipe, model = f.recipe, f.recipe.model
    last = Phase("encoder", tuple(range(len(recipe.stages))))
    names = recipe.view_names(last)

    def attack(state: TrainState, batch: dict[str, Array]) -> dict[str, Array]:
        views, _, _ = run_stages(recipe, last, state, batch, make_views(recipe, state, batch, names), f.mesh)

        def embed(image: Array) -> Array:
            mode = dict(train=True, norm_set=stage.norm_set)
            h, _ = model.encode(state.params, state.batch_stats, image, **mode)
            return unit(model.embed(state.params, state.batch_stats, h, **mode)[0])

        clean, moved = views[stage.of].image, views[stage.into].image
        anchor_BxD, clean_BxD, moved_BxD = embed(views[stage.anchor].image), embed(clean), embed(moved)
        std, mean = jnp.asarray(recipe.std), jnp.asarray(recipe.mean)
        return {
            "clean": clean * std + mean,
            "adversarial": moved * std + mean,
            "perturbation": (moved - clean) * std,
            "before": inner(clean_BxD, anchor_BxD),
            "after": inner(moved_BxD, anchor_BxD),
        }

    train = f.evaluation.training
    count = min(len(train), recipe.batch_size) // f.mesh.size * f.mesh.size
    batch = train.batch(np.arange(count))
    # Replicated outputs: what is shown is read by the host.
    jitted = f.evaluation.compiled("adversary", lambda: jax.jit(attack, out_shardings=sharding.replicated(f.mesh)))
    out = jax.device_get(jitted(f.state, sharding.device_put(batch, sharding.batch_sharding(f.mesh))))

    others = np.where(np.eye(count, dtype=bool), -np.inf, 0)
    before, after = out["before"] + others, out["after"] + others
    partner = (out["after"] - out["before"] + others).argmax(-1)  # whom an image came closest to, by its gain
    rows = np.arange(count)
    figures = {
        "positive_before": float(np.diag(out["before"]).mean()),
        "positive_after": float(np.diag(out["after"]).mean()),
        "hardest_negative_before": float(before.max(-1).mean()),
        "hardest_negative_after": float(after.max(-1).mean()),
        "hardest_negative_changed": float((before.argmax(-1) != after.argmax(-1)).mean()),
    }
    shown = np.argsort(before[rows, partner] - after[rows, partner], kind="stable")[:SHOWN]  # the largest gains
    panel = {k: out[k][shown] for k in ("clean", "perturbation", "adversarial")}
    panel |= {
        "partner": out["clean"][partner[shown]],
        "before": before[shown, partner[shown]],
        "after": after[shown, partner[shown]],
    }
    label = np.asarray(batch["label"])
    named = lambda i: train.class_names[label[i]] if label[i] >= 0 else ""  # noqa: E731
    panel["names"] = [named(i) for i in shown]
    panel["partner_names"] = [named(i) for i in partner[shown]]
    return figures, {"adversary": panel}
