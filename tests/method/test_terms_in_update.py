"""Terms of every sort in the one update: nothing changes with GradCache or with more devices."""

import jax
import numpy as np
import pytest
import tiny

from jaxcl import config as base
from jaxcl.method import sharding
from jaxcl.method.init_state import init_state
from jaxcl.method.recipe import Phase
from jaxcl.method.update import compile_update

KINDS = ("nt_xent", "instance_spread", "spread", "barlow_twins")


def update_once(devices=1, micro_batch=0):
    """-> (metrics, parameters) after an update on the sum of these terms."""
    c = tiny.config(background=False, stage=False)
    c.model.norm = "group"  # batch norm by micro-batches is another function
    c.grad_cache.micro_batch = micro_batch
    c.passes = (base.encode("view1"), base.encode("view2"))
    del c.terms.supcon
    for kind in KINDS:
        c.terms[kind] = base.term(kind, weight=0.1)
    c.optimizer = base.options(base.OptimizerOptions, kind="sgd", lr=0.1, momentum=0.0, schedule="constant")
    recipe = tiny.recipe(c, num_devices=devices)
    mesh = sharding.make_mesh(devices)
    replicated, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    state = sharding.device_put(tiny.fill(jax.eval_shape(lambda: init_state(recipe))), replicated)
    update = compile_update(recipe, Phase("encoder"), replicated, rows)
    state, metrics = update(state, sharding.device_put(tiny.batch(), rows))
    return {k: float(v) for k, v in metrics.items()}, jax.tree.map(np.asarray, state.params)


@pytest.fixture(scope="module")
def plain():
    return update_once()


def test_the_loss_is_the_weighted_sum(plain):
    metrics, _ = plain
    values = {kind: metrics[f"loss/{kind}"] for kind in KINDS}
    np.testing.assert_allclose(metrics["loss"], 0.1 * sum(values.values()), rtol=1e-5)
    assert all(v > 1e-3 for v in values.values()) and len({round(v, 4) for v in values.values()}) == len(KINDS)


@pytest.mark.parametrize("options", [dict(micro_batch=8, devices=8)], ids=str)
def test_it_is_the_same_update(options, plain):
    metrics, params = update_once(**options)
    for name, value in plain[0].items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
    for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(plain[1]), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
