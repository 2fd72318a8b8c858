"""Whole CLAE steps of the real update against the authors' numbers, and the same on any number of devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxcl import config as base
from jaxcl.errors import UserError
from jaxcl.method import sharding
from jaxcl.method.inputs import make_views, run_stages
from jaxcl.method.recipe import Phase
from jaxcl.method.state import TrainState
from jaxcl.method.update import compile_update

LAYERS = {"conv1": "stem_conv", "bn1": "stem_bn", "block1": "stages_0_0", "block2": "stages_1_0"}
DENSE = {
    "simclr": {"dense1": ("hidden0", "dense"), "dense2": ("out", "dense")},
    "uel": {"dense": ("out", "dense")},
    "plain": {"dense": ("out", "dense")},
}
TERMS = {"simclr": "nt_xent", "uel": "instance_spread", "plain": "one_way_infonce"}


def config(method, d):
    c = base.default()
    c.size, c.batch_size, c.duration = 8, 8, "2 steps"
    c.model.stage_sizes, c.model.stage_widths = (1, 1), (4, 8)
    c.model.head_features, c.model.head_hidden_layers = 6, int(method == "simclr")
    c.model.norm_sets = ("adv",)
    c.views.view1 = base.view("standard")
    c.views.view2 = base.view("standard")
    c.stages = (base.stage("adversary", epsilon=(float(d["epsilon"]),), clip=False, commit_updates=True),)
    c.passes = (base.encode("view1"), base.encode("view2"), base.encode("adversarial", norm_set="adv"))
    kind, temperature = TERMS[method], float(d["temperature"])
    c.terms.clean = base.term(kind, views=("view1", "view2"), temperature=temperature)
    c.terms.adversarial = base.term(
        kind, views=("view1", "adversarial"), temperature=temperature, weight=float(d["alpha"])
    )
    if method == "simclr":
        c.optimizer = base.options(base.OptimizerOptions, kind="adamw", lr=3e-4, weight_decay=0.0, schedule="constant")
    else:
        c.optimizer = base.options(base.OptimizerOptions, kind="sgd", lr=0.03, weight_decay=5e-4, schedule="constant")
    return c


@dataclasses.dataclass(frozen=True)
class Given:
    """A pipeline that "draws" the images of a golden file; the step's number is in the index of every image."""

    images: np.ndarray  # [S, B, H, W, 3]

    def __call__(self, keys, pixels):
        step = jnp.round(pixels[0, 0, 0, 0] * 255).astype(jnp.int32)
        return jnp.asarray(self.images, jnp.float32)[step], {}


def nested(d, prefix):
    """The arrays under a prefix as a tree named like our network: {"encoder": ..., "head": ...}, float32."""
    method, tree = str(d["method"]), {"encoder": {}, "head": {}}
    for key in d:
        if not key.startswith(prefix + "/"):
            continue
        first, *rest = key.removeprefix(prefix + "/").split("/")
        adv = first.endswith("_adv")
        if first.removesuffix("_adv") in LAYERS:
            path = ("encoder", LAYERS[first.removesuffix("_adv")] + "_adv" * adv, *rest)
        else:
            path = ("head", *DENSE[method][first], *rest)
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = jnp.asarray(d[key], jnp.float32)
    return tree


def assert_trees_close(got, want, rtol, what):
    paths = jax.tree_util.tree_flatten_with_path(want)[0]
    got = dict((jax.tree_util.keystr(p), x) for p, x in jax.tree_util.tree_flatten_with_path(got)[0])
    assert set(got) == {jax.tree_util.keystr(p) for p, _ in paths}
    for path, w in paths:
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(got[name], w, atol=rtol * max(np.abs(w).max(), 1e-3), err_msg=f"{what} {name}")


def recipe_of(method, d, devices=1):
    recipe = tiny.recipe(
        config(method, d), image_shape=(8, 8, 3), mean=(0.5,) * 3, std=(1.0,) * 3, num_devices=devices, labelled=False
    )
    return dataclasses.replace(recipe, views={"view1": Given(d["view_1"]), "view2": Given(d["view_2"])})


def batch_of(step):
    image = np.full((8, 8, 8, 3), step, np.uint8)
    return {"image": image, "label": np.full(8, -1, np.int32), "index": np.arange(8, dtype=np.int32)}


def initial(recipe, d):
    params = nested(d, "param_before")
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key(0),
        params=params,
        batch_stats=nested(d, "stats_before")["encoder"],
        opt_state=recipe.tx.init(params),
        memory={},
    )


@pytest.mark.parametrize("method,devices", [("simclr", 1), ("uel", 1), ("plain", 1), ("simclr", 8)])
def test_golden_steps(golden, method, devices):
    d = golden("clae", f"clae_step_{method}")
    recipe = recipe_of(method, d, devices)
    mesh = sharding.make_mesh(devices)
    replicated, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    state = sharding.device_put(initial(recipe, d), replicated)
    phase = Phase("encoder", (0,))
    update = compile_update(recipe, phase, replicated, rows)

    @jax.jit
    def attack(state, batch):
        views = make_views(recipe, state, batch, ("view1", "view2"))
        return run_stages(recipe, phase, state, batch, views, mesh)[0]["adversarial"].image

    for step in range(len(d["view_1"])):
        batch = sharding.device_put(batch_of(step), rows)
        adversarial = np.asarray(attack(state, batch))
        # Exactly in sign: a pixel moves up, down or not at all.
        moved = np.round((adversarial - d["view_1"][step]) / d["epsilon"])
        np.testing.assert_array_equal(moved, np.sign(d["attack_grad"][step]))
        np.testing.assert_allclose(adversarial, d["x_adv"][step], atol=1e-6)

        state, metrics = update(state, batch)
        for name, key in (("loss", "loss_total"), ("loss/clean", "loss_clean"), ("loss/adversarial", "loss_adv")):
            np.testing.assert_allclose(metrics[name], d[key][step], rtol=1e-4, err_msg=name)
        # Adam divides by the root of tiny second moments in its first step: errors of the gradient show whole.
        after = nested(d, f"param_after_{step}")
        assert_trees_close(state.params, after, 2e-4, f"parameters after step {step}")
        if method != "plain":  # the released Plain encodes its anchor twice and moves the clean averages once more
            stats = nested(d, f"stats_biased_after_{step}")["encoder"]
            assert_trees_close(state.batch_stats, stats, 1e-4, f"averages after step {step}")


def test_golden_gradients(golden):
    """Parameter gradients of both sets, which Adam hides."""
    d = golden("clae", "clae_step_simclr")
    # SGD with rate 1 and nothing else: what is subtracted is the gradient.
    recipe = dataclasses.replace(recipe_of("simclr", d), tx=optax.sgd(1.0))
    mesh = sharding.make_mesh(1)
    update = compile_update(recipe, Phase("encoder", (0,)), sharding.replicated(mesh), sharding.batch_sharding(mesh))
    before = nested(d, "param_before")
    state, _ = update(initial(recipe, d), batch_of(0))
    got = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), before, state.params)
    assert_trees_close(got, nested(d, "grad_0"), 1e-3, "gradient")


# ---- the stage


def stage_views(changes, d, devices=1, state_step=0):
    recipe = recipe_of("simclr", d, devices)
    stage = dataclasses.replace(recipe.stages[0], **changes)
    recipe = dataclasses.replace(recipe, stages=(stage,))
    mesh = sharding.make_mesh(devices)
    state = sharding.device_put(initial(recipe, d), sharding.replicated(mesh))
    batch = sharding.device_put(batch_of(0), sharding.batch_sharding(mesh))

    @jax.jit
    def run(state, batch):
        views = make_views(recipe, state, batch, ("view1", "view2"))
        return run_stages(recipe, Phase("encoder", (0,)), state, batch, views, mesh)

    views, stats, _ = run(state.replace(step=jnp.asarray(state_step)), batch)
    return {n: np.asarray(v.image) for n, v in views.items()}, stats, state


@pytest.fixture(scope="module")
def drawn():
    """Images and weights that come from no file."""
    rng = np.random.default_rng(0)
    recipe = tiny.recipe(
        config("simclr", dict(epsilon=0.03, temperature=0.5, alpha=1.0)), image_shape=(8, 8, 3), labelled=False
    )
    params, stats = tiny.model_variables(recipe.model, 8)
    d = dict(epsilon=0.03, temperature=0.5, alpha=1.0, method="simclr")
    d |= {f"view_{i}": rng.uniform(-0.5, 0.5, (1, 8, 8, 8, 3)) for i in (1, 2)}
    back = {v: k for k, v in LAYERS.items()}

    def flatten(prefix, tree, names):
        for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
            first, *rest = (str(p.key) for p in path)
            adv = first.endswith("_adv")
            d["/".join([prefix, names(first.removesuffix("_adv")) + "_adv" * adv, *rest])] = np.asarray(x)

    flatten("param_before", params["encoder"], back.__getitem__)
    flatten("stats_before", stats, back.__getitem__)
    for first, ours in (("dense1", "hidden0"), ("dense2", "out")):
        for k, x in params["head"][ours]["dense"].items():
            d[f"param_before/{first}/{k}"] = np.asarray(x)
    return d


def test_within_epsilon_and_bounds(drawn):
    changes = dict(num_steps=3, random_start=True, clip=True, epsilon=(0.01, 0.02, 0.03), commit_updates=False)
    views, stats, state = stage_views(changes, drawn)
    moved = np.abs(views["adversarial"] - views["view1"])
    assert np.all(moved <= np.array([0.01, 0.02, 0.03]) + 1e-6)
    assert np.all(moved.reshape(-1, 3).max(0) > np.array([0.009, 0.018, 0.027]))
    assert np.abs(views["adversarial"]).max() <= 0.5 + 1e-6  # mean 0.5, deviation 1: pixels in [0, 1]
    for a, b in zip(jax.tree.leaves(stats), jax.tree.leaves(state.batch_stats), strict=True):
        np.testing.assert_array_equal(a, b)


def test_random_start_is_of_the_step_and_the_image(drawn):
    first, *_ = stage_views(dict(random_start=True), drawn)
    again, *_ = stage_views(dict(random_start=True), drawn)
    later, *_ = stage_views(dict(random_start=True, num_steps=2), drawn, state_step=1)
    np.testing.assert_array_equal(first["adversarial"], again["adversarial"])
    assert np.any(first["adversarial"] != later["adversarial"])


def test_the_other_view(drawn):
    views, *_ = stage_views(dict(attack_view="other"), drawn)
    moved = np.abs(views["adversarial"] - views["view2"])
    np.testing.assert_allclose(moved.max(), 0.03, rtol=1e-4)
    assert np.abs(views["adversarial"] - views["view1"]).max() > 0.1


@pytest.mark.parametrize("devices", [2, 8])
def test_equal_on_any_number_of_devices(drawn, devices):
    """The attacked loss is that of the global batch, so nobody's image depends on where the others lie."""
    options = dict(num_steps=2)
    one, *_ = stage_views(options, drawn)
    many, *_ = stage_views(options, drawn, devices)
    np.testing.assert_allclose(many["adversarial"], one["adversarial"], atol=1e-6)


def test_it_is_the_loss_of_the_whole_batch(drawn):
    """Another image in slot 0 changes what happens to the others."""
    views, *_ = stage_views({}, drawn)
    other = dict(drawn)
    other["view_1"] = drawn["view_1"].copy()
    other["view_1"][0, 0] = -other["view_1"][0, 0]
    changed, *_ = stage_views({}, other)
    assert np.any(views["adversarial"][1:] != changed["adversarial"][1:])


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda c: c.stages[0].update(term="hard"), "stages[0].term is 'hard'"),
        (lambda c: c.stages[0].update(into="view2"), "makes view 'view2', which is a view already"),
        (lambda c: c.stages[0].update(norm_set="advers"), "norm_set is 'advers'"),
        (lambda c: c.stages[0].update(epsilon=(4.0,)), "stages[0].epsilon is (4.0,)"),
        (lambda c: c.stages[0].update(epsilon=(0.1, 0.2)), "epsilon has 2 values"),
        (lambda c: c.stages[0].update(attack_view="both"), "attack_view is 'both'"),
        (lambda c: c.stages[0].update(num_steps=0), "stages[0].num_steps is 0"),
        (lambda c: c.terms.adversarial.update(views=("view1", "view2")), "expected a term that reads the new view"),
        (lambda c: c.passes[2].update(norm_set="ad"), "passes[2].norm_set is 'ad'"),
    ],
)
def test_mistakes_are_one_line(change, message):
    c = config("simclr", dict(epsilon=0.03, temperature=0.5, alpha=1.0))
    change(c)
    with pytest.raises(UserError) as error:
        tiny.recipe(c, image_shape=(8, 8, 3), labelled=False)
    assert message in str(error.value) and "\n" not in str(error.value)
