"""Moving averages, queues and grouped batch norm in the real update, against the authors' MoCo and a slow loop."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxcl import config as base
from jaxcl.errors import UserError
from jaxcl.method import sharding
from jaxcl.method.init_state import init_state
from jaxcl.method.memory import EMA, enqueue
from jaxcl.method.recipe import Phase
from jaxcl.method.update import compile_update
from jaxcl.models import Encoder, Model, ProjectionHead

NAMES = ("conv", "bn_scale", "bn_bias", "fc1_w", "fc1_b", "fc2_w", "fc2_b")


class GoldenEncoder(Encoder):
    """conv 3x3 - batch norm - ReLU - pool: the encoder of the golden files."""

    features: int = 6
    norm: str = "batch"
    norm_sets: tuple = ()
    norm_set_momentum: float = 0.99
    momentum: float = 0.9
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train=False, where=None, norm_set=""):
        x = nn.Conv(self.features, (3, 3), padding=1, use_bias=False, name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=self.momentum, epsilon=1e-5, name="bn")(x)
        return nn.relu(x).mean((1, 2))


def nested(d, prefix, at=...):
    """The arrays prefix + name as our tree {"encoder", "head"}."""
    w = {n: jnp.asarray(d[prefix + n][at], jnp.float32) for n in NAMES}
    encoder = {"conv": {"kernel": w["conv"]}, "bn": {"scale": w["bn_scale"], "bias": w["bn_bias"]}}
    hidden, out = ({"dense": {"kernel": w[f"fc{i}_w"], "bias": w[f"fc{i}_b"]}} for i in (1, 2))
    return {"encoder": encoder, "head": {"hidden0": hidden, "out": out}}


@dataclasses.dataclass(frozen=True)
class Given:
    """A pipeline that "draws" the images of a golden file: the step's number is in every image."""

    images: np.ndarray  # [T, B, S, S, 3]

    def __call__(self, keys, pixels):
        return jnp.asarray(self.images, jnp.float32)[jnp.round(pixels[0, 0, 0, 0] * 255).astype(jnp.int32)], {}


def moco_recipe(d, *, devices=1, groups=1):
    images = {k: d[k] if d[k].ndim > 4 + (k == "im_n") else d[k][None] for k in ("im_q", "im_k", "im_n")}
    B, S = images["im_q"].shape[1:3]
    c = tiny.tiny_model(base.default())
    c.batch_size, c.duration, c.size = B, "4 steps", S
    for name in ("view1", "view2", "negatives"):
        c.views[name] = base.view("standard")
    grouped = dict(encoder="target", bn_groups=groups, shuffle=groups > 1)
    c.passes = (
        base.encode("view1", bn_groups=groups),
        base.encode("view2", **grouped),
        base.encode("negatives", **grouped),
    )
    c.terms.moco = base.term(
        "moco", negatives="target/negatives", alpha=float(d["alpha"]), temperature=float(d["temperature"])
    )
    c.memory.target = base.memory("ema", decay=float(d["m"]))
    c.memory.queue = base.memory("queue", length=d["queue0"].shape[1])
    c.optimizer = base.options(base.OptimizerOptions, kind="sgd", lr=0.05, weight_decay=1e-4, schedule="constant")
    recipe = tiny.recipe(c, image_shape=(S, S, 3), labelled=False, num_devices=devices)
    views = dict(zip(("view1", "view2", "negatives"), (Given(images[k]) for k in ("im_q", "im_k")), strict=False))
    views["negatives"] = Given(images["im_n"][:, :, 0])
    # In the golden files' precision of nothing: the recipe is ours, the network theirs.
    model = Model(GoldenEncoder(), ProjectionHead(features=5, hidden_layers=1))
    return dataclasses.replace(recipe, views=views, model=model)


def initial(recipe, d, query="init_", key="init_"):
    state = jax.eval_shape(lambda: init_state(recipe))
    params, target = nested(d, query), nested(d, key)

    def stats():  # each its own arrays: the state is donated
        return {"bn": {"mean": jnp.zeros(6), "var": jnp.ones(6)}}

    return state.replace(
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key(0, impl="threefry2x32"),
        params=params,
        batch_stats=stats(),
        opt_state=recipe.tx.init(params),
        memory={
            "target": {"params": target, "batch_stats": stats()},
            "queue": {"columns": jnp.asarray(d["queue0"], jnp.float32), "pointer": jnp.asarray(int(d["ptr0"]))},
        },
    )


def batch_of(step, B, S):
    index = np.arange(B, dtype=np.int32)
    return {"image": np.full((B, S, S, 3), step, np.uint8), "label": np.full(B, -1, np.int32), "index": index}


def assert_trees_close(got, want, what, rtol=1e-4):
    for (path, w), g in zip(jax.tree_util.tree_flatten_with_path(want)[0], jax.tree.leaves(got), strict=True):
        name = f"{what} {jax.tree_util.keystr(path)}"
        np.testing.assert_allclose(g, w, atol=rtol * max(np.abs(w).max(), 1e-3), err_msg=name)


@pytest.mark.parametrize("devices", [1, 4])
def test_golden_steps(golden, devices):
    """Whole steps: loss, parameters, moving average, both running averages, queue and pointer."""
    d = golden("non_semantic_negatives", "moco_train_steps")
    recipe = moco_recipe(d, devices=devices)
    mesh = sharding.make_mesh(devices)
    replicated, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    update = compile_update(recipe, Phase("encoder"), replicated, rows)
    state = sharding.device_put(initial(recipe, d), replicated)
    for t in range(len(d["loss"])):
        state, metrics = update(state, sharding.device_put(batch_of(t, 4, 8), rows))
        np.testing.assert_allclose(metrics["loss"], d["loss"][t], rtol=1e-5)
        assert_trees_close(state.params, nested(d, "q_", t), f"query after {t}")
        assert_trees_close(state.memory["target"]["params"], nested(d, "k_", t), f"target after {t}")
        np.testing.assert_allclose(state.memory["queue"]["columns"], d["queue_steps"][t], atol=1e-5)
        assert int(state.memory["queue"]["pointer"]) == int(d["ptr_steps"][t])
        for who, stats, moves in (
            ("q", state.batch_stats, t + 1),
            ("k", state.memory["target"]["batch_stats"], 2 * (t + 1)),  # by the keys, then by the negatives
        ):
            np.testing.assert_allclose(stats["bn"]["mean"], d[f"{who}_bn_running_mean"][t], atol=1e-5)
            # Ours are of the biased variance, theirs of the unbiased: of 4 images of 64 pixels.
            kept, n = 0.9**moves, 4 * 64
            want = kept + (d[f"{who}_bn_running_var"][t] - kept) * (n - 1) / n
            np.testing.assert_allclose(stats["bn"]["var"], want, rtol=1e-5)


def test_golden_shuffled_groups(golden, monkeypatch):
    """Two batch norms of half the batch each, keys and negatives dealt to them in the authors' order."""
    d = golden("non_semantic_negatives", "moco_shuffle_bn")
    recipe = dataclasses.replace(moco_recipe(d, groups=2), tx=optax.sgd(1.0))
    given = iter(d["perms"])
    monkeypatch.setattr(jax.random, "permutation", lambda key, n: jnp.asarray(next(given)))
    update = compile_update(recipe, Phase("encoder"), *_on_one())
    state, metrics = update(initial(recipe, d, "q_", "k_"), batch_of(0, 8, 6))
    np.testing.assert_allclose(metrics["loss"], d["loss"], rtol=1e-5)
    gradient = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), nested(d, "q_"), state.params)
    assert_trees_close(gradient, nested(d, "grad_"), "gradient", rtol=1e-3)
    assert_trees_close(state.memory["target"]["params"], nested(d, "k_after_"), "target")
    np.testing.assert_allclose(state.memory["queue"]["columns"], d["queue_after"], atol=1e-5)
    assert int(state.memory["queue"]["pointer"]) == int(d["ptr_after"])
    assert next(given, None) is None  # each was asked for once


def _on_one():
    mesh = sharding.make_mesh(1)
    return sharding.replicated(mesh), sharding.batch_sharding(mesh)


@pytest.mark.parametrize("name", ["queue_wrap", "queue_wrap_uneven_extension"])
def test_golden_queue(golden, name):
    d = golden("non_semantic_negatives", name)
    memory = {"columns": jnp.asarray(d["queue0"], jnp.float32), "pointer": jnp.asarray(int(d["ptr0"]))}
    step = jax.jit(enqueue)
    for keys, queue, pointer in zip(d["keys"], d["queue_steps"], d["ptr_steps"], strict=True):
        memory = step(memory, jnp.asarray(keys, jnp.float32))
        np.testing.assert_allclose(memory["columns"], queue, rtol=1e-6)
        assert int(memory["pointer"]) == int(pointer)


def test_golden_moving_average(golden):
    d = golden("non_semantic_negatives", "ema_update")
    part = EMA(decay=float(d["m"]))
    memory = {"params": {x: d[f"k0_{x}"].astype(np.float32) for x in "abc"}, "batch_stats": {}}
    for t in range(len(d["q_steps_a"])):
        memory = part.before(memory, lambda _, t=t: {x: d[f"q_steps_{x}"][t] for x in "abc"}, jnp.float32(0))
        for x in "abc":
            np.testing.assert_allclose(memory["params"][x], d[f"k_steps_{x}"][t], rtol=1e-5)


def test_a_cosine_ends_at_one():
    part = EMA(decay=0.9, decay_schedule="cosine", order="after")
    memory = {"params": np.zeros(1, np.float32)}
    moved = [float(part._averaged(memory, np.ones(1), jnp.float32(p))["params"][0]) for p in (0, 0.5, 1)]
    np.testing.assert_allclose(moved, [0.1, 0.05, 0], atol=1e-6)
    assert part.before(memory, None, None) is memory


def test_a_cosine_ends_where_it_is_told():
    """cases E, ResNet-18 presets: MoCo-v2+ averages from 0.99 to 0.999."""
    part = EMA(decay=0.9, decay_schedule="cosine", decay_end=0.98, order="after")
    memory = {"params": np.zeros(1, np.float32)}
    moved = [float(part._averaged(memory, np.ones(1), jnp.float32(p))["params"][0]) for p in (0, 0.5, 1)]
    np.testing.assert_allclose(moved, [0.1, 0.06, 0.02], atol=1e-6)


# ---- BYOL and SimSiam, with a head and a predictor that have batch norms


def byol(kind="byol"):
    c = tiny.config(background=False, stage=False)
    c.model.head_norm, c.model.head_out_norm = "batch", "plain" if kind == "simsiam" else "none"
    c.passes = (base.encode("view1", "view2"),)
    c.heads.predictor = base.head("mlp", features=12, hidden=8)
    del c.terms.supcon
    del c.memory.probe
    if kind == "byol":
        c.passes += (base.encode("view1", "view2", encoder="target"),)
        c.memory.target = base.memory("ema", decay=0.5, decay_schedule="cosine", order="after")
    c.terms[kind] = base.term(kind)
    c.optimizer = base.options(base.OptimizerOptions, kind="sgd", lr=0.1, momentum=0.0, schedule="constant")
    return c


def update_once(c, devices=1):
    recipe = tiny.recipe(c, num_devices=devices, labelled=False)
    mesh = sharding.make_mesh(devices)
    replicated, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    state = sharding.device_put(tiny.fill(jax.eval_shape(lambda: init_state(recipe))), replicated)
    before = jax.device_get(state)
    update = compile_update(recipe, Phase("encoder"), replicated, rows)
    new, metrics = update(state, sharding.device_put(tiny.batch(), rows))
    return before, jax.device_get(new), {k: float(v) for k, v in metrics.items()}


@pytest.mark.parametrize("kind", ["byol", "simsiam"])
def test_one_and_eight_devices(kind):
    before, one, metrics = update_once(byol(kind))
    _, eight, others = update_once(byol(kind), devices=8)
    for name, value in metrics.items():
        assert others[name] == pytest.approx(value, rel=1e-4), name
    for part in ("params", "batch_stats", "memory"):
        assert_trees_close(getattr(eight, part), getattr(one, part), part, rtol=1e-3)
    assert set(one.batch_stats["head"]) == {"bn0", "out_bn"} if kind == "simsiam" else {"bn0"}
    if kind == "byol":  # after the optimiser's step: half way from the old target to the new encoder, at the start
        new = jax.tree.map(lambda k, q: 0.5 * k + 0.5 * q, before.memory["target"]["params"], _main(one.params))
        assert_trees_close(one.memory["target"]["params"], new, "target", rtol=1e-5)
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before.memory["target"], one.memory["target"])
        assert min(jax.tree.leaves(moved["batch_stats"])) > 0


def _main(params):
    return {k: params[k] for k in ("encoder", "head")}


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda c: c.memory.queue.update(length=8), "memory.queue.length is 8; expected at least batch_size, 16"),
        (lambda c: c.memory.queue.update(of="target/view3"), "memory.queue names view 'target/view3'"),
        (
            lambda c: delattr(c.memory, "queue"),
            "terms.moco reads memory.queue, which the config lacks",
        ),
        (lambda c: c.memory.target.update(of="other"), "memory.target.of is 'other'"),
        (lambda c: c.update(representation=("target",)), "names encoder 'target'"),
        (lambda c: c.passes[0].update(bn_groups=3), "bn_groups 3 does not divide batch_size 16"),
        (lambda c: c.passes[0].update(shuffle=True), "passes[0].shuffle is True"),
        (lambda c: c.memory.target.update(decay=2.0), "memory.target.decay is 2.0"),
    ],
)
def test_mistakes(change, text):
    c = byol()
    c.passes = (base.encode("view1"), base.encode("view2", encoder="target"))
    del c.heads.predictor
    del c.terms.byol
    c.terms.moco = base.term("moco")
    c.memory.queue = base.memory("queue", length=32)
    tiny.recipe(c, labelled=False)  # before the mistake
    with c.unlocked():
        change(c)
    with pytest.raises(UserError) as error:
        tiny.recipe(c, labelled=False)
    assert text in str(error.value) and "\n" not in str(error.value)
