"""A small network to evaluate on two devices, and its features without the suite, for tests of evaluators."""

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from jaxcl.data import ArraySource
from jaxcl.errors import UserError
from jaxcl.evaluate.registry import EVALUATORS
from jaxcl.evaluate.suite import Evaluation
from jaxcl.method import sharding
from jaxcl.method.init_state import init_state

EVERYTHING = tuple(n for n in EVALUATORS if n not in ("invariance", "color"))  # these two need nothing but images


def source(split, labelled=True, side=tiny.SIDE):
    """48 training or 20 other images in four classes."""
    batch = tiny.batch({"train": 48, "test": 20, "validation": 20}[split], seed=len(split), side=side)
    return ArraySource(
        images=batch["image"],
        labels=batch["label"] if labelled else np.full_like(batch["label"], -1),
        class_names=tuple("abcd"),
        mean=tiny.MEAN,
        std=tiny.STD,
        split=split,
    )


def evaluation(
    *,
    probe=True,
    train_labels=True,
    test_labels=True,
    final=EVERYTHING,
    report=False,
    sources=source,
    validation=0.0,
    **options,
):
    """-> (evaluation of the tiny network with these keys of config.eval, its state on two devices, mesh)."""
    c = tiny.config(stage=False)
    c.eval.final, c.eval.batch_size, c.eval.knn_k, c.eval.tap, c.report = final, 16, 5, "stage1", report
    c.eval.quick, c.eval.fgsm, c.eval.pgd, c.eval.logistic_epochs = (), (8,), (8,), 12
    c.eval.update(options)
    c.data.validation = validation
    if not probe:
        del c.memory.probe
        c.terms.supcon.labels = False
    recipe = tiny.recipe(c, num_devices=2, labelled=train_labels)
    mesh = sharding.make_mesh(2)
    state = sharding.device_put(tiny.fill(jax.eval_shape(lambda: init_state(recipe))), sharding.replicated(mesh))

    def make_source(split):
        if split not in ("test", "validation"):
            raise UserError(f"no split {split}")
        return sources(split, test_labels)

    return Evaluation(c, recipe, train=sources("train", train_labels), make_source=make_source), state, mesh


def encoded(e, state, split, change=np.asarray):
    """-> (h, z) of a split, directly by the model, in one batch, on one device."""
    state = jax.device_get(state)

    @jax.jit
    def encode(state, pixels):
        image = (pixels - jnp.asarray(tiny.MEAN)) / jnp.asarray(tiny.STD)
        h, _ = e.recipe.model.encode(state.params, state.batch_stats, image, train=False)
        return h, e.recipe.model.project(state.params, state.batch_stats, h)

    h, z = encode(state, change(source(split).images) / np.float32(255))
    return np.asarray(h), np.asarray(z)
