"""Training on from weights: what stays, to the bit, by how much the rest moves, and that frozen layers cost nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from compiled_updates import MESHES

from jaxcl import config as base
from jaxcl.errors import UserError
from jaxcl.method import sharding
from jaxcl.method.finetune import FineTune, merge
from jaxcl.method.init_state import init_state, state_shardings
from jaxcl.method.optimizers import OptimizerOptions, make_optimizer
from jaxcl.method.recipe import Phase
from jaxcl.method.update import compile_update, make_update
from jaxcl.models import make_model
from jaxcl.models.registry import MODELS
from jaxcl.runtime.registry import make_part


def config(**optimizer):
    """BYOL on the tiny ResNet, whose average follows the encoder."""
    c = tiny.config(stage=False, background=False)
    del c.terms.supcon
    c.memory.target = base.memory("ema", decay=0.9, order="after")
    c.passes = (base.encode("view1", "view2"), base.encode("view1", "view2", encoder="target"))
    c.heads.predictor = base.head("mlp", features=12, hidden=16, norm="none")
    c.terms.byol = base.term("byol")
    c.optimizer = base.options(base.OptimizerOptions, **dict(lr=0.1, schedule="constant") | optimizer)
    return c


def first_state(recipe):
    state = tiny.fill(jax.eval_shape(lambda: init_state(recipe)))
    zero = functools.partial(jax.tree.map, np.zeros_like)
    memory = {n: {**m, "opt_state": zero(m["opt_state"])} if "opt_state" in m else m for n, m in state.memory.items()}
    if "target" in memory:  # as it begins
        own = {k: state.params[k] for k in memory["target"]["params"]}
        memory["target"] = {"params": own, "batch_stats": {k: v for k, v in state.batch_stats.items() if k != "heads"}}
    key = jax.random.key(0, impl="threefry2x32")
    return state.replace(step=np.int32(0), opt_state=zero(state.opt_state), memory=memory, key=key)


def flat(tree):
    return {jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in jax.tree.leaves_with_path(tree)}


def same(a, b):
    """{path: whether it is equal to the bit}"""
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    return {k: np.array_equal(a[k], b[k]) for k in a}


# ---- the optimiser, against a loop written out


def tiny_finetune(**options):
    model = make_model(make_part("model", {"kind": "vit", "width": 8, "heads": 2, "depth": 2, "mlp_width": 8}, MODELS))
    return FineTune(model, **options)


def tree(seed):
    shapes = {
        "encoder": {
            "embedding": {"class_token": (3,)},
            "blocks_0": {"qkv": {"kernel": (3, 4)}},
            "blocks_1": {"qkv": {"kernel": (3, 4)}},
            "final_norm": {"scale": (3,)},
        },
        "head": {"dense": {"kernel": (4, 2)}},
    }
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: rng.normal(size=s).astype(np.float32), shapes, is_leaf=lambda s: isinstance(s, tuple))


@pytest.mark.parametrize("kind", ["sgd", "adamw", "lars"])
def test_rates_of_layers_and_a_warmup(kind):
    """Each layer as if it had an optimiser of its own, at the rate of its layer, that begins when it does."""
    layer = {"embedding": 0, "blocks_0": 1, "blocks_1": 2, "final_norm": 3}
    fine = tiny_finetune(layer_decay=0.5, encoder_lr=0.2, warmup_steps=2)
    options = OptimizerOptions(kind=kind, lr=0.1, weight_decay=0.01)

    def schedule(count):
        return 0.1 / (1.0 + count)

    tx, params = make_optimizer(options, schedule, fine), tree(0)
    state, expected = tx.init(params), flat(tree(0))
    own = {}
    for path in expected:
        late = 2 if path.startswith("encoder") else 0
        own[path] = make_optimizer(options, lambda count, late=late: schedule(count + late))
    states = {path: own[path].init(expected[path]) for path in expected}
    for step in range(5):
        grads, warms = tree(1 + step), step < 2
        if warms:
            grads["encoder"] = jax.tree.map(np.zeros_like, grads["encoder"])
        updates, state = tx.update(grads, state, params, **({"warms": True} if warms else {}))
        params = optax.apply_updates(params, updates)
        for path, g in flat(grads).items():
            encoder = path.startswith("encoder")
            if warms and encoder:
                continue
            update, states[path] = own[path].update(g, states[path], expected[path])
            factor = 0.2 * 0.5 ** (3 - layer[path.split("/")[1]]) if encoder else 1
            expected[path] = expected[path] + factor * update
        for path, value in flat(params).items():
            np.testing.assert_allclose(value, expected[path], rtol=2e-5, atol=1e-7, err_msg=f"{kind} {step} {path}")
    assert not any(same(params, tree(0)).values())


def test_what_learns():
    fine, params = tiny_finetune(frozen=1), tree(0)
    learns, others = fine.split(params)
    assert set(learns["encoder"]) == {"blocks_1", "final_norm"} and set(others) == {"encoder"}
    assert set(others["encoder"]) == {"embedding", "blocks_0"}
    assert all(same(merge(learns, others), params).values())
    assert set(fine.split(params, warms=True)[0]) == {"head"}
    assert tiny_finetune().split(params) == (params, {})
    empty = {**params, "head": {}}  # without a head
    assert all(same(merge(*fine.split(empty)), empty).values()) and "head" in merge(*fine.split(empty))


@pytest.mark.parametrize(
    "key, value",
    [
        ("freeze", "stage3"),
        ("freeze", "stage0"),
        ("freeze", "layer3"),
        ("freeze", "2"),
        ("layer_decay", 1.5),
        ("encoder_lr", 0.0),
        ("head_warmup", "100%"),
        ("head_warmup", "soon"),
    ],
)
def test_what_is_refused(key, value):
    with pytest.raises(UserError) as error:
        tiny.recipe(config(**{key: value}))
    assert str(error.value).startswith(f"optimizer.{key} ") and "\n" not in str(error.value)


def test_a_memory_part_has_no_layers():
    c = config()
    c.memory.probe.optimizer.freeze = "stem"
    with pytest.raises(UserError, match=r"^memory\.probe\.optimizer\.freeze is 'stem'"):
        tiny.recipe(c)


def test_lora_is_for_the_main_encoder():
    c = config()
    c.encoders.second = base.model("vit", lora_rank=2)
    with pytest.raises(UserError, match=r"^encoders\.second\.lora_rank is 2"):
        tiny.recipe(c)


# ---- in an update


@functools.cache
def updated(mesh, kind, freeze="stage1", warmup="1 step", steps=3):
    devices, hosts = MESHES[mesh]
    c = config(kind="lars", lr=1.0, freeze=freeze, layer_decay=0.5, head_warmup=warmup)
    c.sharding = kind
    recipe = tiny.recipe(c, num_devices=devices)
    over = sharding.make_mesh(devices, hosts)
    placed, rows = state_shardings(recipe, over), sharding.batch_sharding(over)
    first, states = first_state(recipe), []
    state = jax.device_put(first, placed)
    for step in range(steps):
        update = compile_update(recipe, recipe.phase(step), placed, rows)
        state, _ = update(state, sharding.device_put(tiny.batch(seed=step), rows))
        states.append(jax.device_get(state))
    return recipe, first, states


def is_frozen(path):
    return any(f"/{part}/" in f"/{path}" for part in ("stem_conv", "stem_bn", "stages_0_0"))


def test_frozen_layers_stay_and_the_others_move():
    recipe, first, (warm, *_, last) = updated("1", "data")
    assert [recipe.phase(i).warms for i in range(3)] == [True, False, False]
    for path, equal in same(first.params, warm.params).items():
        assert equal == path.startswith("encoder/"), path  # of the heads alone
    assert all(same(first.batch_stats, warm.batch_stats).values())
    for path, equal in same(first.params, last.params).items():
        assert equal == (path.startswith("encoder/") and is_frozen(path)), path
    for path, equal in same(first.batch_stats, last.batch_stats).items():
        assert equal == is_frozen(path), path
    # The average of what is frozen is the same, too, to the bit.
    for before, after in ((first.memory["target"], last.memory["target"]),):
        for path, equal in same(before, after).items():
            assert equal == (is_frozen(path) and "/head/" not in path), path
    # The optimiser keeps nothing for what never learns.
    assert not any(is_frozen(f"{path}/") for path in flat(last.opt_state))


@pytest.mark.parametrize("mesh, kind", [("2", "zero1"), ("8", "fsdp")])
def test_on_any_number_of_devices(mesh, kind, monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST", 64)
    _, first, one = updated("1", "data")
    _, _, many = updated(mesh, kind)
    for a, b in zip(one, many, strict=True):
        a, b = (flat((state.params, state.batch_stats)) for state in (a, b))
        for path in a:
            np.testing.assert_allclose(a[path], b[path], rtol=2e-4, atol=2e-5, err_msg=path)
    assert all(
        equal for path, equal in same(first.params["encoder"], many[-1].params["encoder"]).items() if is_frozen(path)
    )


def test_no_backward_pass_runs_through_what_is_frozen():
    def products(freeze, **model):
        c = config(freeze=freeze)
        c.model.update(model)
        recipe = tiny.recipe(c)
        state = jax.eval_shape(lambda: init_state(recipe))
        batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, tiny.batch()))
        text = str(jax.make_jaxpr(make_update(recipe, Phase("encoder"), runs_here=False))(state, batch))
        return text.count("conv_general_dilated[") + text.count("dot_general[")

    counts = [products(freeze) for freeze in ("", "stem", "stage1", "encoder")]
    assert counts == sorted(counts, reverse=True) and len(set(counts)) == 4
    assert counts[1] - counts[2] == 4  # of stage 1: two gradients of each of its two convolutions


def test_the_gradient_of_the_rest_is_the_same():
    """With norms that know no batch, frozen layers change nothing of the step of the others but its factor."""

    def step(**optimizer):
        c = tiny.config(stage=False, background=False)
        c.model.norm = "group"
        c.optimizer = base.options(base.OptimizerOptions, lr=0.1, schedule="constant", weight_decay=0.01, **optimizer)
        recipe = tiny.recipe(c)
        state = first_state(recipe)
        new, _ = jax.jit(make_update(recipe, Phase("encoder")))(state, tiny.batch())
        return {k: np.asarray(v) - flat(state.params)[k] for k, v in flat(new.params).items()}

    plain, frozen = step(), step(freeze="stem", layer_decay=0.5, encoder_lr=0.3)
    factors = {"stages_0_0": 0.3 * 0.5**2, "stages_1_0": 0.3 * 0.5}
    for path, moved in frozen.items():
        part = path.split("/")[1]
        if path.startswith("encoder/stem"):
            assert not moved.any()
        else:
            factor = factors[part] if path.startswith("encoder") else 1
            np.testing.assert_allclose(moved, factor * plain[path], rtol=1e-3, atol=1e-6, err_msg=path)
    assert sum(path.startswith("encoder/stem") for path in frozen) == 3
