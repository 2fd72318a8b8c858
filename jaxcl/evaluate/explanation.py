"""Explanations by GradCAM: the change of confidence that they cause, and their overlap with the true object.

N images, S side, h w of a map, K classes.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxcl import saliency
from jaxcl.augment import denormalize, to_float
from jaxcl.data.selection import cut_down
from jaxcl.errors import UserError
from jaxcl.evaluate.base import Evaluator, Metric, Metrics, Panels
from jaxcl.evaluate.context import EvalContext, EvalSetup
from jaxcl.losses.labels import flags
from jaxcl.method.forward import represent
from jaxcl.method.state import TrainState

Array = jax.Array
PICTURED = 200  # test images from which the shown explanations are chosen
SHOWN = 8  # explanations shown that keep the class, and as many that do not


def drop_increase(
    p_original: ArrayLike, p_masked: ArrayLike, *, where: ArrayLike | None = None
) -> dict[str, jax.Array]:
    """Change of the predicted class's probability when only the pixels of the explanation are kept.

    With o = p_original and p = p_masked, these are means over the images of::

        average_drop     = max(0, o - p) / o    lower is better, in [0, 1]
        rate_of_drop     = [p < o]              lower is better
        average_increase = max(0, p - o) / o    higher is better, unbounded
        rate_of_increase = [p > o]              higher is better

    Args:
      p_original: [N] softmax probability of the class that is predicted for the whole image, in (0, 1].
      p_masked: [N] probability of the same class for the masked image.
      where: [N] bool, False for padded rows.

    Returns:
      A dict of four scalars, fractions rather than percent; 0 if no row counts.

    Raises:
      UserError: shapes that do not match.

    References:
      Chattopadhay et al. 2018 (Grad-CAM++), arXiv 1710.11063, section 4.1.
    """
    return _drop_increase(jnp.asarray(p_original), jnp.asarray(p_masked), flags(where))


@jax.jit
def _drop_increase(o, p, where):
    if o.ndim != 1 or o.shape != p.shape:
        raise UserError(f"drop_increase: shapes {o.shape} and {p.shape}, expected the same [images] twice")
    dtype = jnp.promote_types(jnp.promote_types(o.dtype, p.dtype), jnp.float32)
    o, p = o.astype(dtype), p.astype(dtype)
    valid = jnp.ones(o.shape, bool) if where is None else where.astype(bool)
    base = jnp.where(o > 0, o, 1)
    return {
        "average_drop": _mean(jnp.maximum(0, o - p) / base, valid, empty=0),
        "rate_of_drop": _mean(p < o, valid, empty=0),
        "average_increase": _mean(jnp.maximum(0, p - o) / base, valid, empty=0),
        "rate_of_increase": _mean(p > o, valid, empty=0),
    }


def mask_agreement(
    keep: ArrayLike, maps: ArrayLike, true_mask: ArrayLike, *, where: ArrayLike | None = None
) -> dict[str, jax.Array]:
    """Agreement of explanations with the true masks of the objects, averaged over the images that have an object.

    Args:
      keep: [N, H, W] bool, the pixels that the explanation keeps.
      maps: [N, H, W] saliency, >= 0 (negative values count as 0 energy).
      true_mask: [N, H, W] bool, the object. An image with an empty mask does not count.
      where: [N] bool, False for padded rows.

    Returns:
      {"iou": intersection over union of `keep` and the object,
       "pointing_hit": whether the maximum of the map (the first one in row order) is in the object,
       "energy_inside": the share of the map's sum that is inside the object, 0 for a map of zeros},
      scalars in [0, 1]; NaN if no image has an object.

    Raises:
      UserError: shapes that do not match.

    References:
      Zhang et al. 2016, arXiv 1608.00507 (pointing game).
    """
    return _mask_agreement(flags(keep), jnp.asarray(maps), flags(true_mask), flags(where))


@jax.jit
def _mask_agreement(keep, maps, true_mask, where):
    keep, true_mask = keep.astype(bool), true_mask.astype(bool)
    if keep.ndim != 3 or not keep.shape == maps.shape == true_mask.shape:
        raise UserError(
            f"mask_agreement: keep {keep.shape}, maps {maps.shape}, true_mask {true_mask.shape}, "
            "expected the same [images, height, width] three times"
        )
    n = len(keep)
    maps = maps.astype(jnp.promote_types(maps.dtype, jnp.float32)).reshape(n, -1)
    keep, inside = keep.reshape(n, -1), true_mask.reshape(n, -1)
    valid = jnp.any(inside, axis=1)
    if where is not None:
        valid &= where.astype(bool)
    iou = jnp.sum(keep & inside, axis=1) / jnp.maximum(jnp.sum(keep | inside, axis=1), 1)
    hit = jnp.take_along_axis(inside, jnp.argmax(maps, axis=1)[:, None], axis=1)[:, 0]
    energy = jnp.maximum(maps, 0)
    total = jnp.sum(energy, axis=1)
    share = jnp.sum(jnp.where(inside, energy, 0), axis=1) / jnp.where(total > 0, total, 1)
    return {
        "iou": _mean(iou, valid, empty=jnp.nan),
        "pointing_hit": _mean(hit, valid, empty=jnp.nan),
        "energy_inside": _mean(share, valid, empty=jnp.nan),
    }


def _mean(values, valid, *, empty):
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    count = jnp.sum(valid, dtype=jnp.int32)
    mean = jnp.sum(jnp.where(valid, values, 0)) / jnp.maximum(count, 1)
    return jnp.where(count > 0, mean, empty)


class Explanation(Evaluator):
    """Quality of GradCAM maps of the online classifier, at the layer `eval.tap`.

    Metrics: the results of `drop_increase` for the predicted class, where the most salient share of the pixels is kept
    (`eval.explanation_fraction`; ExCon, arXiv 2111.14271); and of `mask_agreement`, where the data has the true masks.
    """

    needs_classifier = True
    metrics = {
        "average_drop": Metric(
            "Average drop", "lower", meaning="confidence lost when only the most salient pixels are kept"
        ),
        "rate_of_increase": Metric(
            "Rate of increase", meaning="share of images that gain confidence when only the salient pixels are kept"
        ),
        "iou": Metric("Mask overlap (IoU)", meaning="overlap of the salient area with the true object; 100% is equal"),
        "pointing_hit": Metric(
            "Pointing hit", meaning="share of images where the most salient pixel lies on the object"
        ),
    }

    def check(self, setup: EvalSetup) -> None:
        try:
            setup.recipe.model.check_tap(setup.options.tap)
        except UserError as error:
            raise UserError(f"eval.tap: {error}; `explanation` in eval.final reads it") from None

    def __call__(self, context: EvalContext) -> tuple[Metrics, Panels]:
        S = context.recipe.eval_size

        def explain(state: TrainState, batch: dict[str, Array]) -> dict[str, Array]:
            image, logits_fn = context.normalize(to_float(batch["image"])), context.logits_fn(state)
            probabilities = jax.nn.softmax(logits_fn(image))
            predicted = probabilities.argmax(-1)
            maps = _maps(context, state, image, predicted)
            kept = saliency.apply_mask(image, saliency.top_fraction_mask(maps, context.options.explanation_fraction))
            masked = jax.nn.softmax(logits_fn(kept))
            take = lambda p: jnp.take_along_axis(p, predicted[:, None], 1)[:, 0]  # noqa: E731
            return {"before": take(probabilities), "after": take(masked), "maps": maps}

        out = context.collect(context.test, "explanation", explain)
        metrics = {k: float(v) for k, v in drop_increase(out["before"], out["after"]).items()}
        truth = context.test.extras.get("mask")
        if truth is not None and truth.shape[1:] == (S, S):
            keep = np.asarray(saliency.keep_mask(out["maps"], 0.5))
            metrics |= {k: float(v) for k, v in mask_agreement(keep, out["maps"], truth).items()}
        # The pictures need labels that the classifier knows: they explain the true class.
        pictured = (context.test.labels >= 0).any() and context.setup.has_trained_classes(context.test)
        return metrics, {"saliency": _explained(context, truth)} if pictured else {}


def _maps(context: EvalContext, state: TrainState, image: Array, target: Array) -> Array:
    """GradCAM maps [N,S,S] in [0,1] of the classes `target` [N]."""
    recipe, name = context.recipe, context.setup.classifier
    tap = context.options.tap
    activations, tail, _ = recipe.model.split_at(state.params, state.batch_stats, image, tap, train=False)

    def logits(a: Array) -> Array:  # a: activations of the main encoder; other encoders see the image
        h, _ = represent(recipe, state.params, state.batch_stats, image, main=tail(a)[0])
        return recipe.memory[name].logits(state.memory[name], h)

    cam = saliency.grad_cam(logits, activations, target)
    return saliency.normalize_map(cam, image.shape[1])


def _explained(context: EvalContext, truth: np.ndarray | None) -> dict[str, Any]:
    """The panel: test images, their maps for the true class, the masked images, and whether these keep the class."""
    recipe, test = context.recipe, context.test

    def explain(state: TrainState, batch: dict[str, Array]) -> dict[str, Array]:
        image = context.normalize(to_float(batch["image"]))
        maps = _maps(context, state, image, batch["label"])
        keep = saliency.keep_mask(maps, 0.5)
        masked = saliency.apply_mask(image, keep)
        accepted = context.logits_fn(state)(masked).argmax(-1) == batch["label"]
        show = lambda x: denormalize(x, recipe.mean, recipe.std).clip(0, 1)  # noqa: E731
        return {"image": show(image), "map": maps, "keep": keep, "masked": show(masked), "accepted": accepted}

    rows = cut_down(test.labels, PICTURED, seed=0)  # of all classes: files mostly come in the order of theirs
    out = context.collect(test.take(rows), "explained", explain)
    labels = test.labels[rows]
    of_each = [np.flatnonzero(out["accepted"] == accepted) for accepted in (True, False)]
    chosen = np.sort(np.concatenate([some[cut_down(labels[some], SHOWN, seed=0)] for some in of_each]))
    out = {k: v[chosen] for k, v in out.items()}
    out["true_mask"] = None if truth is None or truth.shape[1:] != out["map"].shape[1:] else truth[rows[chosen]]
    out["names"] = [test.class_names[i] if i >= 0 else "" for i in labels[chosen]]
    return out
