"""CLAE and its baselines: the authors' settings, what CLAE adds to a method and no more, and runs without labels."""

import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest
import tiny

from jaxcl import config as base
from jaxcl.errors import UserError
from jaxcl.method import sharding
from jaxcl.method.init_state import init_state
from jaxcl.method.recipe import Phase
from jaxcl.method.update import compile_update
from jaxcl.train import config_diff
from jaxcl.train import loop as train

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"
FACTS = {
    "cifar10": dict(num_examples=50_000, num_classes=10, image_shape=(32, 32, 3)),
    "tiny_imagenet": dict(num_examples=100_000, num_classes=200, image_shape=(64, 64, 3)),
}
KINDS = {
    "simclr": "nt_xent",
    "plain": "one_way_infonce",
    "uel": "instance_spread",
    "supcon": "supcon",
}


def config(name, preset=""):
    spec = importlib.util.spec_from_file_location(f"config_{name}", CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(preset)


# ---- papers/clae.md (c), (g)


def size(tree):
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    "preset, encoder, head",
    [
        ("simclr,cifar10", (11_168_832, 11_178_432), 295_488),
        ("plain,cifar10", (11_168_832, 11_178_432), 512 * 128 + 128),
        ("uel,cifar10", (11_168_832, 11_178_432), 512 * 128 + 128),
        ("simclr,tiny_imagenet", (11_176_512, 11_186_112), 295_488),
        ("uel,tiny_imagenet", (11_176_512, 11_186_112), 512 * 128 + 128),
    ],
)
def test_parameters_are_as_many_as_the_authors_have(preset, encoder, head):
    method, dataset = preset.split(",")
    for c, count in ((config(method, dataset), encoder[0]), (config("clae", preset), encoder[1])):
        recipe = tiny.recipe(c, **FACTS[dataset])
        params, _ = jax.eval_shape(lambda r=recipe: r.model.init(jax.random.key(0), r.image_shape))
        assert (size(params["encoder"]), size(params["head"])) == (count, head)


def test_settings_at_the_authors_scale():
    for method, dataset, steps, batch, temperature in (
        ("simclr", "cifar10", 100 * 195, 256, 0.5),
        ("simclr", "tiny_imagenet", 100 * 781, 128, 0.5),
        ("plain", "cifar10", 301 * 390, 128, 0.1),
        ("uel", "cifar10", 301 * 390, 128, 0.1),
        ("uel", "tiny_imagenet", 100 * 781, 128, 0.1),
    ):
        c = config(method, dataset)
        recipe = tiny.recipe(c, **FACTS[dataset])
        assert (recipe.encoder_steps, recipe.batch_size) == (steps, batch)
        assert recipe.image_shape[0] == (224 if dataset == "tiny_imagenet" else 32)
        ((name, term),) = recipe.terms.items()
        assert (name, c.terms[name].kind, term.temperature, term.needs_labels) == (KINDS[method],) * 2 + (
            temperature,
            False,
        )
        rates = [float(recipe.schedule(int(share * steps))) for share in (0, 0.45, 0.6, 0.9)]
        stairs = method != "simclr" and dataset == "cifar10"
        first = 3e-4 if method == "simclr" else 0.03
        np.testing.assert_allclose(rates, [first * f for f in ((1, 0.1, 0.05, 0.01) if stairs else (1,) * 4)], 1e-5)
        assert [p.views for p in recipe.passes] == [("view1",), ("view2",)]  # each normalised by itself

    for method, crop, jitter, p in (
        ("simclr", (0.08, 1.0), (0.8, 0.8, 0.8, 0.2), 0.8),
        ("plain", (0.2, 1.0), (0.4, 0.4, 0.4, 0.4), 1.0),
        ("uel", (0.2, 1.0), (0.4, 0.4, 0.4, 0.4), 1.0),
    ):
        for view in config(method, "cifar10").views.values():
            assert (view.crop_area, view.jitter, view.jitter_p) == (crop, jitter, p)
            assert (view.flip, view.grayscale, view.blur, view.solarize) == (0.5, 0.2, 0.0, 0.0)
    for method, kind, decay in (("simclr", "adam", 0.0), ("plain", "sgd", 5e-4), ("uel", "sgd", 5e-4)):
        optimizer = config(method, "cifar10").optimizer
        assert (optimizer.kind, optimizer.weight_decay) == (kind, decay)


@pytest.mark.parametrize(
    "preset, epsilon, clip",
    [
        ("simclr,cifar10", (3.825,) * 3, False),
        ("plain,cifar100", (1.548, 1.525, 1.538), False),
        ("uel,cifar10", (1.548, 1.525, 1.538), False),
        ("simclr,tiny_imagenet", (1.752, 1.714, 1.721), False),
        ("simclr,cifar10,cpu", (3.825,), True),
        ("uel", (3.825,), True),
    ],
)
def test_how_far_pixels_may_move(preset, epsilon, clip):
    """In 1/255 of the range; papers/clae.md A.5."""
    (stage,) = config("clae", preset).stages
    np.testing.assert_allclose(np.array(stage.epsilon) * 255, epsilon, atol=1e-3)
    assert (stage.clip, stage.num_steps, stage.random_start, stage.attack_view) == (clip, 1, False, "same")


# ---- what CLAE adds


@pytest.mark.parametrize("scale", ["cifar10", "garments"])
@pytest.mark.parametrize("method", KINDS)
def test_clae_is_the_method_and_a_third_view(method, scale):
    plain, clae = (base.to_dict(c) for c in (config(method, scale), config("clae", f"{method},{scale}")))
    changed = {line.split(":")[0].split(".")[0].split("[")[0] for line in config_diff.differences(plain, clae)}
    assert changed <= {"name", "stages", "passes", "terms", "model"}
    assert plain["model"] | {"norm_sets": clae["model"]["norm_sets"]} == clae["model"]

    (old,) = plain["terms"].values()
    clean, adversarial = clae["terms"]["clean"], clae["terms"]["adversarial"]
    assert clean == old and adversarial == clean | {"views": adversarial["views"]}
    assert list(adversarial["views"]) == ["view1", "adversarial"] and adversarial["weight"] == 1.0
    sets = [(list(p["views"]), p["norm_set"]) for p in clae["passes"]]
    assert sets == [(["view1"], ""), (["view2"], ""), (["adversarial"], "adv")]


@pytest.mark.parametrize("method", KINDS)
def test_the_control_has_a_clean_third_view(method):
    control, clae = (base.to_dict(config("clae", f"{method},{word}")) for word in ("clean_pair", "adversarial"))
    assert not control["stages"] and not control["model"]["norm_sets"]
    assert control["views"]["view3"] == control["views"]["view2"] == clae["views"]["view1"]
    assert [(list(p["views"]), p["norm_set"]) for p in control["passes"]] == [([f"view{i}"], "") for i in (1, 2, 3)]
    # The same two losses with the same weights; only what is read differs.
    assert control["terms"]["clean"] == clae["terms"]["clean"]
    third = control["terms"]["clean_pair"]
    assert list(third["views"]) == ["view1", "view3"]
    assert third | {"views": None} == clae["terms"]["adversarial"] | {"views": None}
    assert control["optimizer"] == clae["optimizer"] and control["duration"] == clae["duration"]


def shrink(c):
    tiny.tiny_model(c)
    c.model.depth, c.model.strides = 18, (1, 2)
    c.batch_size, c.duration, c.size = 16, "2 steps", 16
    sgd = base.options(base.OptimizerOptions, kind="sgd", lr=0.05, schedule="constant")  # whose state may be anything
    c.optimizer = sgd
    if "probe" in c.memory:
        c.memory.probe.optimizer = sgd
    for view in c.views.values():
        view.jitter_p = view.grayscale = 0.0  # colour compiles slowly
    return c


@pytest.mark.parametrize("preset", ["plain,clean_pair,unlabelled", "supcon"])
def test_two_steps_of_it(preset):
    recipe = tiny.recipe(shrink(config("clae", preset)), labelled="unlabelled" not in preset)
    mesh = sharding.make_mesh(1)
    replicated, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    abstract = jax.eval_shape(lambda: init_state(recipe))
    state = sharding.device_put(tiny.fill(abstract), replicated)
    phase = recipe.phase(0)
    assert phase == Phase("encoder", () if "clean_pair" in preset else (0,))
    update = compile_update(recipe, phase, replicated, rows)
    before = jax.tree.map(np.array, state.params)  # the state is donated
    for seed in range(2):
        state, metrics = update(state, sharding.device_put(tiny.batch(seed=seed), rows))
    metrics = {k: float(v) for k, v in metrics.items()}
    third = "clean_pair" if "clean_pair" in preset else "adversarial"
    assert all(np.isfinite(v) for v in metrics.values())
    np.testing.assert_allclose(metrics["loss"], metrics["loss/clean"] + metrics[f"loss/{third}"], rtol=1e-5)
    assert ("probe/accuracy" in metrics) == ("unlabelled" not in preset)
    moved = [k for k, a, b in leaves(before["encoder"], state.params["encoder"]) if np.abs(a - b).max() > 0]
    assert len(moved) == len(jax.tree.leaves(before["encoder"]))  # the further batch norms learn too
    assert any("_adv" in k for k in moved) == (third == "adversarial")


def leaves(a, b):
    pairs = zip(jax.tree_util.tree_flatten_with_path(a)[0], jax.tree.leaves(b), strict=True)
    return [(jax.tree_util.keystr(path), np.asarray(x), np.asarray(y)) for (path, x), y in pairs]


# ---- without labels


@pytest.mark.parametrize("name", ["simclr", "plain", "uel", "clae"])
def test_no_label_is_needed(name):
    recipe = tiny.recipe(config(name, "unlabelled"), num_examples=128, labelled=False, num_classes=0)
    assert not recipe.memory
    with pytest.raises(UserError, match=r"memory\.probe needs a label on every training image"):
        tiny.recipe(config(name), num_examples=128, labelled=False)
    # The supervised loss does need them, with or without a probe.
    with pytest.raises(UserError, match=r"terms\.(clean|adversarial) needs a label on every training image"):
        tiny.recipe(config("clae", "supcon,unlabelled"), num_examples=128, labelled=False)


def test_a_run_without_labels(tmp_path):
    images = np.concatenate([tiny.batch(seed=i)["image"] for i in range(4)])
    np.savez(tmp_path / "images.npz", images=images)
    c = shrink(config("clae", "unlabelled"))
    c.data.source = f"npz:{tmp_path / 'images.npz'}"
    c.log_every, c.devices = "1 step", 1
    results = train.run(c, tmp_path / "run")
    assert results["steps"] == 2 and not {"knn", "linear", "classifier"} & set(results)
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert "<html" in page and "Traceback" not in page and "adversarial" in page
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 2
