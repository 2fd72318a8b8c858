"""Micro-batches give the update of the whole batch where no loss and no norm couples images; elsewhere they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxcl import config as base
from jaxcl import losses
from jaxcl.errors import UserError
from jaxcl.method import sharding
from jaxcl.method.accumulate import gradients
from jaxcl.method.init_state import init_state
from jaxcl.method.recipe import Phase
from jaxcl.method.update import compile_update


def config(micro_batch=0, norm="group", **options):
    """BYOL, with a classifier and a decoder that shape the encoder too, and a probe."""
    c = tiny.config(stage=False)
    c.model.norm = norm
    del c.terms.supcon
    c.memory.target = base.memory("ema", decay=0.9, order="after")
    c.memory.queue = base.memory("queue", length=32)
    c.passes = (base.encode("view1", "view2"), base.encode("view1", "view2", encoder="target"))
    c.heads.predictor = base.head("mlp", features=12, hidden=16, norm="none")
    c.heads.classifier = base.head("classifier")
    c.terms.byol = base.term("byol")
    c.terms.moco = base.term("moco")
    c.terms.ce = base.term("cross_entropy", weight=0.5)
    c.optimizer = base.options(base.OptimizerOptions, kind="sgd", lr=0.1, momentum=0.0, schedule="constant")
    c.accumulate.micro_batch = micro_batch
    for key, value in options.items():
        setattr(c.accumulate, key, value)
    return c


@functools.cache
def update_once(micro_batch, devices, norm="group", batch=tiny.batch):
    how = {"batch_norm": "micro_batch"} if norm == "batch" else {}
    recipe = tiny.recipe(config(micro_batch, norm, **how), num_devices=devices)
    mesh = sharding.make_mesh(devices)
    replicated, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    state = tiny.fill(jax.eval_shape(lambda: init_state(recipe)))
    queue = {**state.memory["queue"], "pointer": np.int32(0)}
    state = state.replace(step=np.int32(0), key=jax.random.key(0), memory={**state.memory, "queue": queue})
    update = compile_update(recipe, Phase("encoder"), replicated, rows)
    new, metrics = update(sharding.device_put(state, replicated), sharding.device_put(batch(), rows))
    return jax.device_get((new.params, new.memory, metrics))


@pytest.mark.parametrize("micro_batch, devices", [(4, 1), (8, 4)])
def test_parts_give_the_gradient_of_the_whole(micro_batch, devices):
    got, want = update_once(micro_batch, devices), update_once(0, 1)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6 * max(1, np.abs(b).max()))


@pytest.mark.slow
def test_with_batch_norm_the_parts_are_others():
    """So the refusal is not idle."""
    got, want = update_once(4, 1, "batch"), update_once(0, 1, "batch")
    differ = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(got[0]), jax.tree.leaves(want[0]), strict=True)]
    assert max(differ) > 1e-3 and abs(got[2]["loss"] / want[2]["loss"] - 1) > 1e-3


def test_what_is_refused():
    def refuse(c, match, **facts):
        with pytest.raises(UserError, match=match):
            tiny.recipe(c, **facts)

    refuse(config(5), r"accumulate\.micro_batch 5 does not divide batch_size 16")
    refuse(config(4), r"does not divide batch_size 16 and over 8 devices", num_devices=8)
    refuse(config(-1), r"accumulate\.micro_batch is -1; expected a whole number")
    refuse(config(4, batch_norm="yes"), r"accumulate\.batch_norm is 'yes'; expected one of refuse, micro_batch")
    refuse(config(4, norm="batch"), r"with batch norm \(model\)")
    c = config(4)
    c.heads.predictor.norm = "batch"
    refuse(c, r"with batch norm \(heads\.predictor\)")
    c.accumulate.batch_norm = "micro_batch"
    tiny.recipe(c)
    c = config(4)
    c.terms.supcon = base.term("supcon")
    refuse(c, r"with terms\.supcon: images meet in its loss.*use grad_cache\.micro_batch, which is exact")
    c = config(4)
    c.grad_cache.micro_batch = 4
    refuse(c, r"both divide the batch; use one")
    c = config(4)
    c.views.standard = base.view("standard")
    c.stages = (base.stage("saliency", rejected=""),)
    refuse(c, r"accumulate\.micro_batch with stages")


@pytest.mark.parametrize("by_part", [False, True])
def test_unequal_numbers_of_labelled_rows(by_part):
    """cases A.9: the mean of the batch, not the mean of the micro-batches' means."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(12, 5)).astype(np.float32), rng.normal(size=(5, 3)).astype(np.float32)
    labels = np.array([0, 1, -1, -1, 2, -1, -1, -1, 1, -1, 0, 2], np.int32)

    def loss(w, rows, share=1.0):
        x, y = rows
        ce, square = losses.cross_entropy(x @ w, y), jnp.mean((x @ w) ** 2)
        return ce * share + (square if by_part else 0.0), ce * share

    def grad_fn(w, rows, stats, key, shares=None):
        (value, ce), grad = jax.value_and_grad(loss, has_aux=True)(w, rows, shares["ce"] if shares else 1.0)
        return (value, ({"ce": ce}, rows[1], stats)), grad

    count = lambda rows: jnp.sum(rows[1] >= 0)  # noqa: E731
    counts = (lambda rows: {"ce": count(rows)}) if by_part else count
    options = dict(micro_batches=4, mesh=None, counts=counts)
    value, metrics, outputs, _, grad = gradients(grad_fn, w, (x, labels), {}, jax.random.key(0), **options)
    (want, ce), want_grad = jax.value_and_grad(loss, has_aux=True)(w, (x, labels))
    np.testing.assert_allclose((value, metrics["ce"]), (want, ce), rtol=1e-5)
    np.testing.assert_allclose(grad, want_grad, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(outputs, labels)


def test_an_update_with_rows_without_label():
    """cases A.9, through a whole update."""
    batch = tiny.batch()
    batch["label"] = np.where(np.arange(len(batch["label"])) % 4 < 2, batch["label"], -1)
    batch["label"][0] = -1
    copy = batch.copy  # one object, since `update_once` keeps its results
    got, want = (update_once(m, 1, batch=copy) for m in (4, 0))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6 * max(1, np.abs(b).max()))
