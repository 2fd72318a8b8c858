"""Non-semantic negatives on MoCo, SimCLR and BYOL: what the config adds, the authors' settings, and real updates."""

import functools
import io
import itertools

import jax
import numpy as np
import pytest
import tiny
from test_configs import config, shrink
from test_momentum_update import assert_trees_close

from jaxcl import config as base
from jaxcl import losses
from jaxcl.commands import textures
from jaxcl.data import make_source
from jaxcl.errors import UserError
from jaxcl.losses.common import unit
from jaxcl.method import sharding
from jaxcl.method.init_state import init_state
from jaxcl.method.recipe import Phase
from jaxcl.method.terms import Embedding
from jaxcl.method.terms.momentum import BYOL
from jaxcl.method.terms.similarity import similarity_metrics
from jaxcl.method.update import compile_update
from jaxcl.report import read_metrics
from jaxcl.train import config_diff, runs
from jaxcl.train import loop as train

FACTS = {
    "garments": dict(num_examples=10_000, image_shape=(32, 32, 3)),
    "cifar10": dict(num_examples=50_000, image_shape=(32, 32, 3)),
    "tiny_imagenet": dict(num_examples=100_000, num_classes=200, image_shape=(64, 64, 3)),
    "stl10": dict(num_examples=105_000, labelled=False, image_shape=(96, 96, 3)),
    "imagenet100": dict(num_examples=126_689, num_classes=100, image_shape=(224, 224, 3)),
}
TERM = {"moco": "moco", "simclr": "nt_xent", "byol": "byol"}


@pytest.mark.parametrize("dataset, sizes", [
    ("cifar10", (2, 10)), ("tiny_imagenet", (5, 21)), ("stl10", (7, 31)), ("imagenet100", (16, 72)),
])  # fmt: skip
@pytest.mark.parametrize("method", TERM)
def test_presets_by_size(method, dataset, sizes):
    words = f"{method},{dataset}" + (",unlabelled" if dataset == "stl10" else "")
    recipe = tiny.recipe(config("nonsemantic", words), **FACTS[dataset])
    side = FACTS[dataset]["image_shape"][0]
    assert recipe.image_shape == (side, side, 3) and recipe.stages[0].sizes(side) == sizes
    assert recipe.model.encoder.stem == ("imagenet" if side > 64 else "cifar")


@pytest.mark.parametrize(
    "setting, values", [("published", (0.03, 128, 0.999, 16384)), ("ifm", (0.8, 512, 0.99, 16384))]
)
def test_the_authors_presets(setting, values):
    """papers/non_semantic_negatives.md (d): what is MoCo's own is tested with moco.py."""
    c = config("nonsemantic", f"imagenet100,{setting}")
    got = c.optimizer.lr, c.batch_size, c.memory.target.decay, c.memory.queue.length
    assert got == values and c.terms.moco.alpha == 2.0 and c.stages[0].count == 1
    assert c.terms.moco.negatives == "target/negatives"
    plain = base.to_dict(config("moco", f"imagenet100,{setting}"))
    same = base.to_dict(config("nonsemantic", f"imagenet100,none,{setting}"))
    assert plain | {"name": ""} == same | {"name": ""}


@pytest.mark.parametrize("words", ["", "texture", "shared"])
@pytest.mark.parametrize("method", TERM)
def test_it_is_the_method_and_negatives(method, words):
    c, plain = config("nonsemantic", f"{method},{words}"), config("nonsemantic", f"{method},none")
    changed = {
        line.split(":")[0].split(".")[0].split("[")[0]
        for line in config_diff.differences(*map(base.to_dict, (plain, c)))
    }
    assert changed == {"name", "stages", "passes", "terms"}
    recipe = tiny.recipe(c, **FACTS["garments"])
    two = method != "moco" and "shared" not in words
    assert [(s.of, s.into) for s in recipe.stages] == (
        [("view1", "negatives1"), ("view2", "negatives2")] if two else [("view1", "negatives")]
    )
    # Encoded apart from the views, by whom the method says.
    last, names = recipe.passes[-1], ("negatives1", "negatives2") if two else ("negatives",)
    assert last.views == names and last.encoder == ("" if method == "simclr" else "target")
    assert (last.bn_groups, last.shuffle) == ((4, True) if method == "moco" else (1, False))
    assert recipe.terms[TERM[method]].optional == last.embeddings
    assert c.terms[TERM[method]].alpha == (0.2 if method == "byol" else 2.0)


def test_mistakes():
    for words, text in (
        ("moco,simclr", "names both 'moco' and 'simclr'"),
        ("patches", "did you mean 'patch'"),
    ):
        with pytest.raises(UserError, match=text):
            config("nonsemantic", words)
    c = config("nonsemantic", "simclr")
    c.terms.nt_xent.negatives = ("negatives1", "")
    with pytest.raises(UserError, match="expected none, one for both views, or two"):
        tiny.recipe(c, **FACTS["garments"])


# ---- real updates on the tiny network


def small(preset, **changes):
    c = shrink(config("nonsemantic", f"{preset},unlabelled"))
    if "byol" in preset:
        c.model.head_hidden = c.heads.predictor.hidden = 8
        c.heads.predictor.features = 12
    if "moco" in preset:
        c.memory.queue.length = 24  # of which two batches of 16 go round
    flat = base.to_dict(c)
    with c.unlocked():
        for key, value in changes.items():
            *path, last = key.split("__")
            node = functools.reduce(lambda n, p: n[int(p)] if p.isdigit() else n[p], path, c)
            assert last in node, (key, flat)
            node[last] = value
    return c


@functools.cache
def updated(preset, devices=1, steps=1, **changes):
    """-> (the states before and after every step, metrics of the last)."""
    recipe = tiny.recipe(small(preset, **changes), num_devices=devices, labelled=False)
    mesh = sharding.make_mesh(devices)
    replicated, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    state = sharding.device_put(tiny.fill(jax.eval_shape(lambda: init_state(recipe))), replicated)
    states = [jax.device_get(state)]
    update = compile_update(recipe, Phase("encoder", tuple(range(len(recipe.stages)))), replicated, rows)
    for step in range(steps):
        state, metrics = update(state, sharding.device_put(tiny.batch(seed=step), rows))
        states.append(jax.device_get(state))
    return states, jax.device_get(metrics)


@pytest.mark.parametrize("devices", [2, 8])
def test_queue_and_target_on_1_2_and_8_devices(devices):
    (*_, one), metrics = updated("moco", steps=2)
    (*_, many), others = updated("moco", devices=devices, steps=2)
    assert int(one.memory["queue"]["pointer"]) == int(many.memory["queue"]["pointer"]) == 32 % 24
    np.testing.assert_allclose(many.memory["queue"]["columns"], one.memory["queue"]["columns"], atol=2e-5)
    np.testing.assert_allclose(np.linalg.norm(one.memory["queue"]["columns"], axis=0), 1, rtol=1e-5)
    for part in ("params", "batch_stats"):
        assert_trees_close(many.memory["target"][part], one.memory["target"][part], f"target {part}")
    assert set(others) == set(metrics)
    for name in metrics:
        np.testing.assert_allclose(others[name], metrics[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_the_target_is_an_average_and_nothing_else():
    """No gradient reaches the side of keys and negatives."""
    states, _ = updated("moco", steps=2)
    for before, after in itertools.pairwise(states):
        want = jax.tree.map(lambda k, q: 0.99 * k + 0.01 * q, before.memory["target"]["params"], before.params)
        assert_trees_close(after.memory["target"]["params"], want, "target", rtol=1e-6)


def test_similarities_are_logged():
    _, metrics = updated("moco", steps=2)
    kinds = ("positive", "own negative", "queue")
    assert {k for k in metrics if k.startswith("similarity/")} == {f"similarity/{k}" for k in kinds}
    for kind in kinds:
        shares = metrics[f"similarity_histogram/{kind}"]
        middles = np.linspace(-1, 1, 41)[:-1] + 1 / 40
        assert shares.sum() == pytest.approx(1, abs=1e-5) and shares.min() >= 0
        assert shares @ middles == pytest.approx(float(metrics[f"similarity/{kind}"]), abs=0.03)


def test_gradient_through_the_negatives_of_simclr():
    """Two an image: with and without their gradient the loss is the same, what is learned is not."""
    (before, on), metrics = updated("simclr,shared", stages__0__count=2)
    (_, off), same = updated("simclr,shared", stages__0__count=2, terms__nt_xent__negatives_gradient=False)
    assert float(metrics["loss"]) == pytest.approx(float(same["loss"]), rel=1e-6)
    moved = [jax.tree.map(lambda a, b: a - b, state.params, before.params) for state in (on, off)]
    kernels = [m["head"]["out"]["dense"]["kernel"] for m in moved]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-2 * np.abs(kernels[0]).max()
    assert {"similarity/another image", "similarity/own negative"} <= set(metrics)


def test_byol_with_a_shared_texture():
    (_, after), metrics = updated("byol,texture,shared", terms__byol__alpha=1.0)
    mean = {k: float(metrics[f"similarity/{k}"]) for k in ("positive", "own negative")}
    # 2 - 2 cos for each direction, the negatives' with the other sign.
    want = (4 - 4 * mean["positive"]) - (4 - 4 * mean["own negative"])
    assert float(metrics["loss"]) == pytest.approx(want, abs=1e-4)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after.params))


def test_byol_one_sided():
    def embedding(seed):
        return Embedding(None, tiny.normal(4, 6, seed=seed), out={"predictor": tiny.normal(4, 6, seed=seed + 10)})

    names = ("view1", "view2", "target/view1", "target/view2", "target/ns")
    e = {name: embedding(i) for i, name in enumerate(names)}
    term = BYOL(negatives=("target/ns", ""), alpha=0.3)
    assert term.optional == ("target/ns",)
    own = e["target/ns"].z[:, None]
    rows = (*(e[v].out["predictor"] for v in names[:2]), *(e[v].z for v in names[2:4]))
    want = losses.byol(*rows, negatives=(own, None), alpha=0.3)
    assert term(e, np.zeros(4, np.int32)) == want
    cosine = (unit(rows[0]) * unit(own[:, 0])).sum(-1).mean()
    figures = similarity_metrics({"byol": term}, e, 4, {})
    assert float(figures["similarity/own negative"]) == pytest.approx(float(cosine), abs=1e-6)


def test_a_run_with_a_texture_set(tmp_path):
    """Textures made beforehand come with training batches only; the record of the run has the similarities."""
    source = f"npz:{tiny.colours(tmp_path / 'images.npz')}"
    search = dict(exemplar=7, radius=2, randoms=2, passes=1)
    textures.build(make_source(source), tmp_path / "set", batch_size=64, search=search, stream=io.StringIO())
    c = small("simclr,texture,shared")
    c.data.source, c.data.textures = source, str(tmp_path / "set")
    c.log_every, c.devices, c.eval.final = "1 step", 1, ("knn",)
    results = train.run(c, tmp_path / "run")
    assert results["steps"] == 2 and "knn" in results
    rows = [row for row in read_metrics(tmp_path / "run") if "similarity/own negative" in row]
    assert [row["step"] for row in rows] == [1, 2]
    assert len(rows[0]["similarity_histogram/another image"]) == 40
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert 'id="similarities"' in page and "could not be drawn" not in page
    # A run is evaluated again without them, and trains no further than where they fit.
    (tmp_path / "set" / "part-00000.npy").unlink()
    assert "knn" in runs.evaluate_runs([runs.load_run(tmp_path / "run")], ("knn",))
    with pytest.raises(UserError, match="holds 0 of 1 parts"):
        train.run(c, tmp_path / "again")
