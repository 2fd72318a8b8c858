"""All five papers in one update: what is left of each by itself is its own file's update, bit for bit."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
from test_configs import config

from jaxcl import config as base
from jaxcl.errors import UserError
from jaxcl.method import sharding, update
from jaxcl.method.init_state import init_state
from jaxcl.method.recipe import Phase
from jaxcl.method.update import compile_update
from jaxcl.models import Model

PARTS = ("saliency", "adversary", "spread", "autoencoder", "patches", "ladder", "supcon")
GARMENTS = dict(num_examples=10_000, num_classes=10, image_shape=(32, 32, 3))
# What stays on of all_in_one.py -> the smaller method's own file and preset.
ALONE = {
    ("saliency", "supcon"): ("excon", ""),
    ("adversary", "supcon"): ("clae", "supcon"),
    ("spread", "autoencoder"): ("thanos", "one"),
    ("patches",): ("nonsemantic", "simclr,patch,shared"),
    ("ladder", "supcon"): ("hierarchical", "supcon"),
}
# The keys in which the files differ by their choice of network, budget and views, and not by their method.
SIZE = ("stage_sizes", "stage_widths", "strides", "head_features")
VIEW = ("crop_area", "jitter", "blur", "blur_sigma")


def only(*on):
    return config("all_in_one", ",".join(f"no_{part}" for part in PARTS if part not in on))


def same_settings(c, like):
    """The smaller method with the hyper-parameters of `like`."""
    for key in ("duration", "optimizer", "eval", "collapse_every"):
        c[key] = like[key]
    c.data.labels = like.data.labels
    for key in SIZE:
        c.model[key] = like.model[key]
    for name in ("view1", "view2"):
        for key in VIEW:
            c.views[name][key] = like.views[name][key]
    for stage in c.stages:
        if stage.kind == "saliency":
            stage.tap = like.eval.tap
    first, *rest = c.passes
    if first.views[:2] == ("view1", "view2"):  # one batch norm for both views, or one each
        c.passes = (base.encode("view1", *first.views[2:]), base.encode("view2"), *rest)
    if "clean" in c.terms:  # as clae.py calls it
        c.terms.supcon = c.terms.clean
        del c.terms.clean
    return c


@pytest.mark.parametrize("on", ALONE, ids="+".join)
def test_what_is_left_is_the_smaller_method(on):
    left = only(*on)
    small = same_settings(config(*ALONE[on]), left)
    small.name = left.name
    assert base.to_dict(small) == base.to_dict(left)


def shrink(c):
    c.batch_size, c.duration, c.size = tiny.BATCH, "4 steps", tiny.SIDE
    c.model.stage_widths, c.model.head_features, c.model.head_embed_features = (4, 4, 8, 8), 12, 4
    for view in c.views.values():
        if view.kind == "random":
            view.jitter_p = view.grayscale = view.blur = 0.0  # colour compiles slowly
    if "decoder" in c.heads:
        c.heads.decoder.widths = (8, 8, 8)
    for stage in c.stages:
        stage.start = "0"
    sgd = base.options(base.OptimizerOptions, kind="sgd", lr=0.05, schedule="constant")
    c.optimizer = c.memory.probe.optimizer = sgd
    return c


def last_phase(recipe):
    return Phase("encoder", tuple(range(len(recipe.stages))))


def steps(c, count=2):
    """-> (metrics of each update, the state after them), as NumPy arrays."""
    recipe = tiny.recipe(shrink(c))
    mesh = sharding.make_mesh(1)
    replicated, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    state = sharding.device_put(tiny.fill(jax.eval_shape(lambda: init_state(recipe))), replicated)
    compiled, metrics = compile_update(recipe, last_phase(recipe), replicated, rows), []
    for seed in range(count):
        state, figures = compiled(state, sharding.device_put(tiny.batch(seed=seed), rows))
        metrics.append(jax.device_get(figures))
    state = state.replace(key=jax.random.key_data(state.key))
    return metrics, jax.device_get(state)


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


# All five take two minutes of compiling: one by default, whose terms have other names in the smaller method.
SLOWLY = [pytest.param(on, marks=pytest.mark.slow) for on in ALONE if "adversary" not in on]


@pytest.mark.parametrize("on", [("adversary", "supcon"), *SLOWLY], ids="+".join)
def test_two_updates_of_it_are_the_smaller_methods(on):
    left = only(*on)
    small = same_settings(config(*ALONE[on]), left)
    (few, state), (ours, our_state) = steps(small), steps(left)
    few = [{k.replace("loss/clean", "loss/supcon"): v for k, v in m.items()} for m in few]
    assert_same_bits((few, state), (ours, our_state))


# ---- a part that is off, and the rest

# What a part has to itself: views, and the heads and terms that read them or were added with it.
OWN_VIEWS = {"saliency": {"standard", "background"}, "adversary": {"adversarial"}, "patches": {"negatives"}}
OWN_TERMS = {
    "adversary": {"adversarial"}, "spread": {"contrast"}, "autoencoder": {"reconstruction"}, "patches": {"nt_xent"},
    "ladder": {"stage1", "stage2", "stage3"}, "supcon": {"supcon"},
}  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_the_rest_is_the_same_parts(part):
    """Draws are keyed by name (tests/test_update.py), so equal pipelines of equal names draw the same numbers."""
    full, rest = (tiny.recipe(c, **GARMENTS) for c in (config("all_in_one"), config("all_in_one", f"no_{part}")))
    gone = OWN_VIEWS.get(part, set()) | ({v for v in full.views if v[:5] == "stage"} if part == "ladder" else set())
    assert rest.views == {n: v for n, v in full.views.items() if n not in gone}
    assert set(rest.terms) == set(full.terms) - OWN_TERMS.get(part, set())
    for name, term in rest.terms.items():
        if (part, name) == ("saliency", "supcon"):
            term = dataclasses.replace(term, background="background")
        assert term == full.terms[name], name
    stages = [s for s in full.stages if not set(s.creates) & gone and not (part == "saliency" and s.of == "standard")]
    if part == "supcon":  # which alone has a place for backgrounds
        gone, stages = {"background"}, [dataclasses.replace(s, **_no_background(s)) for s in stages]
    assert list(rest.stages) == stages
    passes = [dataclasses.replace(p, views=tuple(v for v in p.views if v not in gone)) for p in full.passes]
    assert list(rest.passes) == [p for p in passes if p.views]
    heads = {"decoder"} if part == "autoencoder" else set()
    assert rest.heads == {n: h for n, h in full.heads.items() if n not in heads} and rest.memory == full.memory
    assert rest.model.encoder.norm_sets == (() if part == "adversary" else ("adv",))
    assert bool(rest.model.branches) == bool(rest.model.head.embeds) == (part != "ladder")


def _no_background(stage):
    return {"rejected": ""} if hasattr(stage, "rejected") else {}


def test_a_memory_part_does_not_change_another_ones_start(monkeypatch):
    """Nor has its place among the others a part in it."""
    nothing = {"encoder": {}, "head": {}}, {}
    monkeypatch.setattr(Model, "init", lambda self, key, image_shape: nothing)  # it compiles slowly

    def probe(**others):
        c = tiny.config(background=False, stage=False)
        c.memory.update(others)
        return init_state(tiny.recipe(c), 3).memory["probe"]

    assert_same_bits(probe(), probe(before=base.memory("queue", of="view1", length=16)))


def test_what_a_pass_draws_does_not_depend_on_the_passes_before_it(monkeypatch):
    """Dropout, and the shuffle of MoCo's keys, are drawn by the name of what is encoded."""
    seen = {}

    def record(recipe, params, stats, views, spec, mesh, key):
        seen.setdefault(spec.embeddings[0], []).append(np.asarray(jax.random.key_data(key)))
        if spec is recipe.passes[-1]:
            raise StopIteration
        return {}, stats

    monkeypatch.setattr(update, "run_pass", record)
    monkeypatch.setattr(update, "make_views", lambda *args: {})
    for names in (("view1", "view2"), ("view2", "view1")):
        c = tiny.config(background=False, stage=False)
        c.passes = tuple(base.encode(name) for name in names)
        recipe = tiny.recipe(c)
        state = tiny.fill(jax.eval_shape(lambda r=recipe: init_state(r)))
        with pytest.raises(StopIteration):
            update.make_update(recipe, Phase("encoder"))(state, tiny.batch())
    assert all(np.array_equal(*keys) for keys in seen.values()) and not np.array_equal(seen["view1"], seen["view2"])


@pytest.mark.slow
@pytest.mark.parametrize("part", ["adversary", "patches", "autoencoder"])
def test_the_rest_keeps_its_bits(part):
    """Parameters as they are drawn, and the first losses, of all that does not read what the part made."""
    (full_params, full), (params, rest) = (
        first_update(c) for c in (config("all_in_one"), config("all_in_one", f"no_{part}"))
    )
    drawn = {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(full_params)}
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        np.testing.assert_array_equal(x, drawn[jax.tree_util.keystr(path)], err_msg=jax.tree_util.keystr(path))
    assert set(rest) == set(full) - OWN_TERMS[part]
    for name, value in rest.items():
        np.testing.assert_array_equal(value, full[name], err_msg=name)


def first_update(c):
    """-> (parameters as they are drawn, losses by term in the first update)."""
    recipe = tiny.recipe(shrink(c))
    mesh = sharding.make_mesh(1)
    replicated, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    state = jax.jit(lambda seed: init_state(recipe, seed), out_shardings=replicated)(np.uint32(0))
    params = jax.device_get(state.params)
    compiled = compile_update(recipe, last_phase(recipe), replicated, rows)
    _, metrics = compiled(state, sharding.device_put(tiny.batch(), rows))
    return params, {k.removeprefix("loss/"): np.asarray(v) for k, v in metrics.items() if k.startswith("loss/")}


@pytest.mark.slow
def test_one_and_eight_devices_agree():
    """Update by update, each from a state of its own that both are given. Not along a run: in so small a network the
    gradient has kinks close by, and on one device alone noise of 1e-6 in the parameters moves its length by up to 1 %.
    """
    updates = {n: compiled_update(config("all_in_one"), n) for n in (1, 8)}
    for seed in range(4):
        (one, state), (eight, other) = (updates[n](seed) for n in (1, 8))
        assert set(one) == set(eight)
        for name in one:
            np.testing.assert_allclose(eight[name], one[name], rtol=2e-4, atol=1e-5, err_msg=f"{name}, state {seed}")
        for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(y, x, rtol=2e-4, atol=5e-5, err_msg=jax.tree_util.keystr(path))


def compiled_update(c, devices):
    """-> seed -> (metrics, parameters) of one update of the state and batch of that seed."""
    recipe = tiny.recipe(shrink(c), num_devices=devices)
    mesh = sharding.make_mesh(devices)
    replicated, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    shapes = jax.eval_shape(lambda: init_state(recipe))
    compiled = compile_update(recipe, last_phase(recipe), replicated, rows)

    def run(seed):
        state = sharding.device_put(tiny.fill(shapes, seed), replicated)
        new, metrics = compiled(state, sharding.device_put(tiny.batch(seed=seed), rows))
        return jax.device_get(metrics), jax.device_get(new.params)

    return run


# ---- the file


def test_mistakes_in_a_preset():
    for preset, words in (
        (",".join(f"no_{part}" for part in PARTS), "leaves nothing to learn; leave one of saliency"),
        ("no_saliancy", "unknown preset 'no_saliancy'; did you mean 'no_saliency'?"),
        ("saliency,no_saliency", "names both 'saliency' and 'no_saliency'; choose one"),
        ("fashion_mnist", "unknown preset 'fashion_mnist'"),
    ):
        with pytest.raises(UserError) as error:
            config("all_in_one", preset)
        assert words in str(error.value) and "\n" not in str(error.value)


def test_at_the_papers_scale_too():
    facts = dict(num_examples=50_000, num_classes=10, image_shape=(32, 32, 3))
    for preset in ("cifar10", "cifar10,cpu"):
        recipe = tiny.recipe(config("all_in_one", preset), **facts)
        assert len(recipe.model.branches) == 3 and len(recipe.terms) == 9
        assert recipe.encoder_steps == (1000 * (50_000 // 1024) if preset == "cifar10" else 4 * 390)
    assert config("all_in_one", "cifar10,no_ladder").name == "all in one cifar10 no_ladder"
