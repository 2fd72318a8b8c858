"""Passes that end at a stage, in the real update: what they reach, what they are told, and what they cost."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from test_momentum_update import assert_trees_close

from jaxcl import config as base
from jaxcl.errors import UserError
from jaxcl.method import forward, sharding
from jaxcl.method.init_state import init_state
from jaxcl.method.inputs import make_views
from jaxcl.method.memory import EMA
from jaxcl.method.optimizers import make_optimizer, rate_labels
from jaxcl.method.recipe import Phase
from jaxcl.method.update import compile_update

STAGE1 = ("stage1_view1", "stage1_view2")
ALL = (*STAGE1, "view1", "view2")
KINDS = ("simsiam", "byol", "barlow_twins")


def config(kind="simsiam"):
    """Two stages, two views each; the last one's head is told the crop (colour compiles slowly)."""
    c = tiny.config(background=False, stage=False)
    for name in STAGE1:
        c.views[name] = base.view("random", jitter_p=0.0, grayscale=0.0, flip=0.0)
    c.model.branches, c.model.head_embeds, c.model.head_embed_features = (1,), ("crop",), 4
    c.model.head_norm = c.model.head_out_norm = "batch"
    encoders = ("", "target") if kind == "byol" else ("",)
    c.passes = tuple(
        base.encode(name, encoder=e, depth=int(name in STAGE1)) for views in (STAGE1, ALL[2:]) for e in encoders
        for name in views
    )  # fmt: skip
    del c.terms.supcon
    for name, views, number in (("stage1", STAGE1, 1), ("last", ALL[2:], 2)):
        options = {}
        if kind != "barlow_twins":
            options = dict(head=f"predictor{number}")
            c.heads[f"predictor{number}"] = base.head("mlp", features=12, hidden=8)
        c.terms[name] = base.term(kind, views=views, **options)
    if kind == "byol":
        c.memory.target = base.memory("ema", decay=0.5, order="after", average_embeds=False)
    c.memory.probe.views = ("view1",)
    c.optimizer = base.options(base.OptimizerOptions, kind="sgd", lr=0.1, momentum=0.0, schedule="constant")
    return c


def update_once(c, devices=1):
    recipe = tiny.recipe(c, num_devices=devices)
    mesh = sharding.make_mesh(devices)
    replicated, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    state = sharding.device_put(tiny.fill(jax.eval_shape(lambda: init_state(recipe))), replicated)
    before = jax.device_get(state)
    update = compile_update(recipe, Phase("encoder"), replicated, rows)
    new, metrics = update(state, sharding.device_put(tiny.batch(), rows))
    return before, jax.device_get(new), {k: float(v) for k, v in metrics.items()}


@pytest.mark.parametrize(
    "kind, devices",
    [
        ("simsiam", (8,)),
        *(pytest.param(k, (2, 8), marks=pytest.mark.slow) for k in ("simsiam", "byol", "barlow_twins")),
    ],
)
def test_one_and_more_devices(kind, devices):
    before, one, metrics = update_once(config(kind))
    assert metrics["loss"] == pytest.approx(metrics["loss/stage1"] + metrics["loss/last"], rel=1e-5)
    if kind == "simsiam":
        assert all(-1 <= metrics[k] <= 1 for k in ("loss/stage1", "loss/last"))
    for n in devices:
        _, many, others = update_once(config(kind), devices=n)
        for name, value in metrics.items():
            assert others[name] == pytest.approx(value, rel=1e-4), name
        for part in ("params", "batch_stats", "memory"):
            assert_trees_close(getattr(many, part), getattr(one, part), part, rtol=1e-3)
    if kind == "byol":
        # The target has averages of adapters and heads too, but what it makes of the crop is the encoder's own.
        target, new = one.memory["target"]["params"], one.params
        head = target["branches"]["stage1"]
        mean = jax.tree.map(lambda a, b: (a + b) / 2, before.memory["target"]["params"]["branches"], new["branches"])
        assert_trees_close(head, mean["stage1"], "branch", rtol=1e-5)
        for name in ("embed_crop", "embed_crop_bn"):
            jax.tree.map(np.testing.assert_array_equal, target["head"][name], new["head"][name])
        assert np.abs(target["head"]["out"]["dense"]["kernel"] - new["head"]["out"]["dense"]["kernel"]).max() > 1e-4


@pytest.fixture(scope="module")
def losses():
    """-> (params, views, (params, views) -> losses, embeddings and gradients, place of each loss), on one device."""
    recipe = tiny.recipe(config())
    state = tiny.fill(jax.eval_shape(lambda: init_state(recipe)))
    views = make_views(recipe, state, tiny.batch(), ALL)
    heads = recipe.head_views(tuple(recipe.terms))

    def values(params, views):
        embeddings, stats = {}, state.batch_stats
        for spec in recipe.passes:
            encoded, stats = forward.run_pass(recipe, params, stats, views, spec)
            embeddings.update(encoded)
        embeddings, _ = forward.run_heads(recipe, params, stats, embeddings, heads)
        return jnp.stack([term(embeddings, jnp.zeros(16, jnp.int32)) for term in recipe.terms.values()]), embeddings

    @jax.jit
    def everything(params, views):
        losses, back, e = jax.vjp(lambda p: values(p, views), params, has_aux=True)
        return losses, e, [back(jnp.eye(2)[i])[0] for i in range(2)]

    order = list(recipe.terms)
    return state.params, views, everything, {n: order.index(n) for n in ("stage1", "last")}


def test_a_loss_reaches_no_stage_above_its_own(losses):
    params, views, everything, at = losses
    grads = everything(params, views)[2]
    size = {n: jax.tree.map(lambda g: float(np.abs(g).max()), grads[i]) for n, i in at.items()}
    own, last = size["stage1"], size["last"]
    largest = lambda tree: max(jax.tree.leaves(tree))  # noqa: E731
    assert largest(own["encoder"]["stages_1_0"]) == 0 == largest(own["head"]) == largest(own["heads"]["predictor2"])
    assert min(largest(own["encoder"][k]) for k in ("stem_conv", "stages_0_0")) > 1e-6
    assert min(largest(own[k]) for k in ("branches", "encoder")) > 1e-6 and largest(own["heads"]["predictor1"]) > 0
    assert min(largest(last["encoder"][k]) for k in ("stem_conv", "stages_0_0", "stages_1_0")) > 1e-6
    assert largest(last["branches"]) == 0 == largest(last["heads"]["predictor1"])


def test_only_heads_that_are_told_know_what_was_drawn(losses):
    params, views, everything, at = losses

    def values(params, views):
        return everything(params, views)[:2]

    def with_crops(name, crops):
        return {**views, name: views[name]._replace(params={**views[name].params, "crop": crops})}

    before, e = values(params, views)
    for name, changed in ((STAGE1[0], set()), ("view1", {"last"})):
        after, _ = values(params, with_crops(name, views[name].params["crop"][::-1]))
        assert {n for n, i in at.items() if abs(float(after[i] - before[i])) > 1e-6} == changed
    # Own by own: the views' parameters exchanged are not the same thing.
    one, two = (views[n].params["crop"] for n in ("view1", "view2"))
    swapped, _ = values(params, {**with_crops("view1", two), "view2": with_crops("view2", one)["view2"]})
    assert abs(float(swapped[at["last"]] - before[at["last"]])) > 1e-6
    # No collapse: unit embeddings vary, by about 1 / sqrt(E) in each of E directions.
    for name in ALL:
        z = np.asarray(e[name].z)
        assert z.shape == (16, 12) and (z / np.linalg.norm(z, axis=1, keepdims=True)).std(0).mean() > 0.5 / 12**0.5


def test_views_encoded_together_are_told_apart():
    """Rows of two views lie side by side in a pass: each goes with its own parameters."""
    recipe = tiny.recipe(config())
    state = tiny.fill(jax.eval_shape(lambda: init_state(recipe)))
    views = make_views(recipe, state, tiny.batch(), ALL[2:])

    @jax.jit
    def run(views):
        spec = forward.ForwardPass(("view1", "view2"))
        both, _ = forward.run_pass(recipe, state.params, state.batch_stats, views, spec)
        rows = [jnp.concatenate([getattr(both[n], k) for n in ALL[2:]]) for k in "hz"]
        drawn = {"crop": jnp.concatenate([views[n].params["crop"] for n in ALL[2:]])}
        z, _ = recipe.model.embed(state.params, state.batch_stats, rows[0], train=True, aug_params=drawn)
        return rows[1], z

    np.testing.assert_allclose(*run(views), rtol=1e-4, atol=1e-5)


# ---- parts with a constant learning rate


@pytest.mark.parametrize("kind", ["sgd", "adamw", "lars"])
def test_parts_with_a_constant_rate(kind):
    """They move as under the constant schedule, all others as under the cosine, step by step."""
    options = base.OptimizerOptions(kind=kind, lr=0.1, clip_norm=5.0, constant_lr=("heads/predictor",))
    cosine = optax.cosine_decay_schedule(0.1, 6)
    params = {"encoder": {"k": tiny.normal(3, 3)}, "heads": {n: {"k": tiny.normal(3, 2)} for n in ("predictor", "x")}}
    assert rate_labels(params, ("heads/predictor",)) == {
        "encoder": {"k": "scheduled"},
        "heads": {"predictor": {"k": "constant"}, "x": {"k": "scheduled"}},
    }
    plain = base.OptimizerOptions(kind=kind, lr=0.1, clip_norm=5.0)
    txs = [make_optimizer(o, s) for o, s in (
        (options, cosine), (plain, cosine), (plain, optax.constant_schedule(0.1)))]  # fmt: skip
    states, trees = [tx.init(params) for tx in txs], [params] * 3
    for step in range(6):
        grads = jax.tree.map(lambda p, step=step: 0.1 * tiny.normal(*p.shape, seed=step), params)
        for i, tx in enumerate(txs):
            updates, states[i] = tx.update(grads, states[i], trees[i])
            trees[i] = optax.apply_updates(trees[i], updates)
    mixed, scheduled, constant = trees
    close = dict(rtol=1e-6)
    np.testing.assert_allclose(mixed["encoder"]["k"], scheduled["encoder"]["k"], **close)
    np.testing.assert_allclose(mixed["heads"]["x"]["k"], scheduled["heads"]["x"]["k"], **close)
    np.testing.assert_allclose(mixed["heads"]["predictor"]["k"], constant["heads"]["predictor"]["k"], **close)
    assert np.abs(np.subtract(mixed["heads"]["predictor"]["k"], scheduled["heads"]["predictor"]["k"])).max() > 1e-4


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda c: c.passes[0].update(depth=2), "passes[0].depth is 2; expected one of 0, 1; model.branches adds"),
        (lambda c: c.memory.probe.update(views=STAGE1[:1]), "reads view 'stage1_view1', which ends at a stage"),
        (
            lambda c: c.optimizer.update(constant_lr=("heads/pred",)),
            "optimizer.constant_lr holds 'heads/pred', which has no parameters; did you",
        ),
        (
            lambda c: c.memory.probe.optimizer.update(constant_lr=("encoder",)),
            "memory.probe.optimizer.constant_lr is ('encoder',); expected ()",
        ),
        (
            lambda c: c.grad_cache.update(micro_batch=8, batch_norm="first_pass"),
            "passes[0].depth with grad_cache.micro_batch",
        ),
        (lambda c: c.model.update(branches=()), "passes[0].depth is 1; expected one of 0;"),
    ],
)
def test_mistakes(change, text):
    c = config()
    tiny.recipe(c)  # before the mistake
    with c.unlocked():
        change(c)
    with pytest.raises(UserError) as error:
        tiny.recipe(c)
    assert text in str(error.value) and "\n" not in str(error.value)


def test_a_target_averages_embeds_unless_told_otherwise():
    params = {"head": {"embed_crop": {"k": np.ones(2, np.float32)}, "out": {"k": np.ones(2, np.float32)}}}
    memory = {"params": jax.tree.map(np.zeros_like, params)}
    for average, want in ((True, 0.25), (False, 1.0)):
        new = EMA(decay=0.75, average_embeds=average)._averaged(memory, params, jnp.float32(0))["params"]["head"]
        np.testing.assert_allclose(new["embed_crop"]["k"], want)
        np.testing.assert_allclose(new["out"]["k"], 0.25)
