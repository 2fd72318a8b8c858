"""The adversary in methods other than those of its paper: ExCon's masks, and MoCo's queue."""

import jax
import numpy as np
import pytest
import tiny

from jaxcl import config as base
from jaxcl.method import sharding
from jaxcl.method.init_state import init_state
from jaxcl.method.inputs import make_views, run_stages
from jaxcl.method.recipe import Phase
from jaxcl.method.update import compile_update

EPSILON = 0.02


def moco():
    c = tiny.config(background=False, stage=False)
    c.model.norm_sets = ("adv",)
    c.stages = (base.stage("adversary", epsilon=(EPSILON,)),)
    c.passes = (
        base.encode("view1"),
        base.encode("view2", encoder="target"),
        base.encode("adversarial", norm_set="adv"),
    )
    del c.terms.supcon
    c.terms.clean = base.term("moco")
    c.terms.adversarial = base.term("moco", query="adversarial")
    c.memory.target = base.memory("ema")
    c.memory.queue = base.memory("queue", length=24)
    c.memory.probe.views = ("view1",)
    return c


def excon():
    c = tiny.config(stage=True)
    c.model.norm_sets = ("adv",)
    # The first view may be a masked one by the time it is attacked.
    c.stages += (base.stage("adversary", epsilon=(EPSILON,)),)
    c.passes += (base.encode("adversarial", norm_set="adv"),)
    c.terms.adversarial = base.term("supcon", views=("view1", "adversarial"))
    return c


def attacked(c, devices):
    """-> (views after the stages, metrics, state) of one update, and the attacked term's value before the attack."""
    recipe = tiny.recipe(c, num_devices=devices)
    mesh = sharding.make_mesh(devices)
    replicated, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    phase = Phase("encoder", tuple(range(len(recipe.stages))))
    state = sharding.device_put(tiny.fill(jax.eval_shape(lambda: init_state(recipe))), replicated)
    batch = sharding.device_put(tiny.batch(), rows)

    @jax.jit
    def views(state, batch):
        made = make_views(recipe, state, batch, recipe.view_names(phase))
        return {n: v.image for n, v in run_stages(recipe, phase, state, batch, made, mesh)[0].items()}

    images = jax.device_get(views(state, batch))
    state, metrics = compile_update(recipe, phase, replicated, rows)(state, batch)
    return images, {k: float(v) for k, v in metrics.items()}


@pytest.mark.parametrize("make", [moco, excon])
def test_the_adversary_composes(make):
    images, metrics = attacked(make(), 1)
    moved = np.abs(images["adversarial"] - images["view1"]) * np.asarray(tiny.STD)
    assert EPSILON * 0.99 < moved.max() < EPSILON * 1.01 and (moved > 0).mean() > 0.5
    assert metrics["loss"] == pytest.approx(metrics["loss/adversarial"] + metrics["loss/" + _clean(metrics)], rel=1e-5)
    if make is moco:
        many, others = attacked(make(), 8)
        np.testing.assert_allclose(many["adversarial"], images["adversarial"], atol=1e-6)
        for name, value in metrics.items():
            assert others[name] == pytest.approx(value, rel=1e-4), name


def _clean(metrics):
    (name,) = (k.removeprefix("loss/") for k in metrics if k.startswith("loss/") and k != "loss/adversarial")
    return name


def test_the_queue_is_what_the_attack_runs_to():
    """With a larger weight of the negatives than of its key, the attacked query's own loss must have risen."""
    c = moco()
    images, metrics = attacked(c, 1)
    c.stages[0].epsilon = (0.0,)
    same, unmoved = attacked(c, 1)
    np.testing.assert_allclose(same["adversarial"], same["view1"], atol=1e-6)
    assert metrics["loss/adversarial"] > unmoved["loss/adversarial"] + 1e-3
    assert metrics["loss/clean"] == pytest.approx(unmoved["loss/clean"], rel=1e-5)
