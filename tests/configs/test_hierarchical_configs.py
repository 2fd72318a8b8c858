"""SimSiam, Barlow Twins and the ladder on top of them: the authors' settings, and parts that fit together."""

import itertools

import jax
import numpy as np
import pytest
import tiny
from test_configs import config, shrink

from jaxcl import config as base
from jaxcl.errors import UserError
from jaxcl.method import sharding
from jaxcl.method.init_state import init_state
from jaxcl.method.recipe import Phase
from jaxcl.method.update import compile_update
from jaxcl.train import config_diff

METHODS = ("simsiam", "byol", "barlow_twins")
IMAGENET = dict(num_examples=1_281_167, num_classes=1000, image_shape=(256, 256, 3))
GARMENTS = dict(num_examples=10_000, num_classes=10, image_shape=(32, 32, 3))
CIFAR = dict(num_examples=50_000, num_classes=10, image_shape=(32, 32, 3))


def kernels(tree):
    return [tree[k]["dense"]["kernel"].shape for k in sorted(tree, key=lambda k: (k == "out", k)) if "dense" in tree[k]]


def test_simsiam_at_the_authors_scale():
    for preset, facts, depth, epochs, batch, lr, decay, head in (
        ("imagenet", IMAGENET, 50, 100, 256, 0.05, 1e-4, [(2048, 2048)] * 3),
        ("cifar10", CIFAR, 18, 800, 512, 0.06, 5e-4, [(512, 2048), (2048, 2048)]),
    ):
        c = config("simsiam", preset)
        recipe = tiny.recipe(c, **facts)
        assert (recipe.batch_size, recipe.encoder_steps) == (batch, epochs * (facts["num_examples"] // batch))
        rates = [float(recipe.schedule(int(share * recipe.encoder_steps))) for share in (0, 0.5, 0.999)]
        np.testing.assert_allclose(rates, [lr, lr / 2, 0], atol=lr * 1e-2)
        assert (c.optimizer.kind, c.optimizer.weight_decay) == ("sgd", decay)
        assert c.optimizer.constant_lr == ("heads/predictor",)
        params, _ = jax.eval_shape(lambda r=recipe: r.model.init(jax.random.key(0), r.image_shape))
        assert kernels(params["head"]) == head and c.model.depth == depth
        predictor, _ = jax.eval_shape(
            lambda r=recipe: r.heads["predictor"].init(jax.random.key(0), r.head_input("predictor"))
        )
        assert kernels(predictor) == [(2048, 512), (512, 2048)]
        blurred = [any(op.name == "blur" for op in v.ops) for v in recipe.views.values()]
        assert blurred == [preset == "imagenet"] * 2


def test_barlow_twins_at_the_authors_scale():
    c = config("barlow_twins", "imagenet,unlabelled")
    recipe = tiny.recipe(c, **IMAGENET, labelled=False)
    term = recipe.terms["barlow_twins"]
    assert (term.scale, term.off_diagonal_weight) == (1 / 32, 3.9e-3)
    assert (c.optimizer.kind, c.optimizer.lr, c.optimizer.weight_decay) == (
        "lars",
        3.2,
        1e-6,
    ) and recipe.batch_size == 4096  # cases E.10
    assert (c.model.head_features, c.model.head_hidden, c.model.head_out_norm) == (8192, 8192, "none")
    assert recipe.encoder_steps == 300 * (IMAGENET["num_examples"] // recipe.batch_size) and not recipe.heads


TYPES_OF_RUNG = (
    {"crop", "jitter"},
    {"crop", "jitter", "grayscale"},
    {"crop", "jitter", "grayscale", "blur"},
    {"crop", "jitter", "grayscale", "blur", "flip"},
)


def rung_views(stage):
    return [name if stage == 4 else f"stage{stage}_{name}" for name in ("view1", "view2")]


@pytest.mark.parametrize("method, dataset", list(itertools.product(METHODS, ("", "imagenet"))))
def test_the_ladder_on_each_method(method, dataset):
    c = config("hierarchical", f"{method},{dataset}")
    recipe = tiny.recipe(c, **(IMAGENET if dataset else GARMENTS))
    depths = {name: p.depth for p in recipe.passes for name in p.embeddings}
    encoders = ("", "target/") if method == "byol" else ("",)
    assert depths == {f"{e}{name}": stage % 4 for stage in range(1, 5) for name in rung_views(stage) for e in encoders}
    assert [p.depth for p in recipe.passes] == sorted((p.depth for p in recipe.passes), key=lambda d: d or 4)
    assert all(len(p.views) == 1 for p in recipe.passes)  # each normalised by itself
    for stage, types in enumerate(TYPES_OF_RUNG, start=1):
        for name in rung_views(stage):
            assert {op.name for op in recipe.views[name].ops} == types | {"normalize"}
    assert {t.weight for t in recipe.terms.values()} == {1.0} and len(recipe.terms) == 4
    for stage in range(1, 5):
        term = recipe.terms[f"stage{stage}" if stage < 4 else method]
        assert list(term.views) == rung_views(stage) and type(term) is type(recipe.terms[method])
    assert recipe.model.head.embeds == ("jitter",)
    assert [(i, head.embeds) for i, _, head in recipe.model.branches] == [(1, ()), (2, ("jitter",)), (3, ("jitter",))]
    predictors = [] if method == "barlow_twins" else ["predictor", "predictor1", "predictor2", "predictor3"]
    assert sorted(recipe.heads) == predictors
    if method == "byol":
        assert recipe.memory["target"].order == "after" and not recipe.memory["target"].average_embeds
    if method == "simsiam" or (method == "byol" and dataset):
        assert c.optimizer.constant_lr == tuple(f"heads/{n}" for n in c.heads)
    if not dataset:
        return
    assert recipe.image_shape == (224, 224, 3)
    if method != "barlow_twins":
        assert (c.optimizer.lr, recipe.batch_size, c.optimizer.weight_decay) == (0.05, 256, 1e-4)
        assert recipe.encoder_steps == 200 * (IMAGENET["num_examples"] // 256)
        params, _ = jax.eval_shape(lambda: recipe.model.init(jax.random.key(0), recipe.image_shape))
        assert params["head"]["hidden0"]["dense"]["kernel"].shape == (2048 + 512, 2048)
        assert params["branches"]["stage1"]["head"]["hidden0"]["dense"]["kernel"].shape == (2048, 2048)
    if method == "byol":
        assert (recipe.memory["target"].decay, recipe.memory["target"].decay_schedule) == (0.99, "constant")


def test_controls_and_options():
    two, plain = config("hierarchical", "two_view,imagenet"), config("simsiam", "imagenet")
    changed = {line.split(":")[0] for line in config_diff.differences(*map(base.to_dict, (plain, two)))}
    assert changed == {"name", "duration", "model.head_out_norm"}  # 200 epochs, a last batch norm with scale and bias

    everywhere = tiny.recipe(config("hierarchical", "uniform,told=color_crop"), **GARMENTS)
    assert {frozenset(op.name for op in v.ops) for v in everywhere.views.values()} == {
        frozenset(TYPES_OF_RUNG[3] | {"normalize"})
    }
    assert everywhere.model.head.embeds == ("jitter", "crop")
    strength = tiny.recipe(config("hierarchical", "strength"), **GARMENTS)
    assert strength.model.head.embeds == () and len(strength.terms) == 4
    other = tiny.recipe(
        config("hierarchical", "order=flip-blur-grayscale-jitter,rotation=0.5,told=nothing"), **GARMENTS
    )
    names = [{op.name for op in other.views[f"stage{i}_view1"].ops} - {"crop", "normalize"} for i in (1, 2, 3)]
    assert names == [{"flip"}, {"flip", "blur"}, {"flip", "blur", "grayscale"}]
    assert "rotation" in {op.name for op in other.views["view2"].ops} and not other.model.head.embeds
    # Small images are not blurred, as in the authors' code, unless asked; garments are.
    for preset, blurred in (("cifar10", False), ("cifar10,blur=always", True), ("", True), ("blur=never", False)):
        recipe = tiny.recipe(config("hierarchical", preset), **(CIFAR if "cifar" in preset else GARMENTS))
        assert ("blur" in {op.name for op in recipe.views["view1"].ops}) == blurred
    named = config("hierarchical", "byol,cifar10,strength,cpu,told=color")
    assert named.name == "hierarchical byol cifar10 strength cpu told=color"


@pytest.mark.parametrize(
    "preset, text",
    [
        ("tell=color", "unknown option 'tell=color'; expected one of told, order, rotation, blur"),
        ("told=colour", "option 'told=colour': expected one of nothing, color"),
        ("rotation=often", "rotation=often: expected a probability"),
        ("order=jitter-hue", "expected some of jitter, grayscale"),
        ("unifrom", "unknown preset 'unifrom'; did you mean 'uniform'?"),
    ],
)
def test_mistakes_in_a_preset(preset, text):
    with pytest.raises(UserError) as error:
        config("hierarchical", preset)
    assert text in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name, preset", [("simclr", ""), ("moco", ""), ("supcon", "")])
def test_the_last_head_of_other_methods_can_be_told(name, preset):
    c = config(name, preset)
    c.model.head_embeds = ("jitter", "flip")
    recipe = tiny.recipe(c, **GARMENTS)
    drawn = {op.name for op in recipe.views["view1"].ops}
    assert recipe.model.head.embeds == ("jitter", "flip") and {"jitter", "flip"} <= drawn
    state = jax.eval_shape(lambda: init_state(recipe))
    assert state.params["head"]["embed_flip"]["dense"]["kernel"].shape == (1, 512)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_steps_of_it(method):
    c = config("hierarchical", f"{method},unlabelled")
    shrink(c)
    c.model.stage_sizes, c.model.stage_widths, c.model.strides = (1, 1, 1, 1), (4, 4, 8, 8), (1, 1, 2, 1)
    c.model.head_hidden = 8
    for head in c.heads.values():
        head.features = c.model.head_features
    recipe = tiny.recipe(c, labelled=False)
    mesh = sharding.make_mesh(1)
    replicated, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    state = sharding.device_put(tiny.fill(jax.eval_shape(lambda: init_state(recipe))), replicated)
    update = compile_update(recipe, Phase("encoder"), replicated, rows)
    before = jax.tree.map(np.array, state.params["branches"])
    for seed in range(2):
        state, metrics = update(state, sharding.device_put(tiny.batch(seed=seed), rows))
    parts = [float(metrics[f"loss/{n}"]) for n in (method, "stage1", "stage2", "stage3")]
    assert float(metrics["loss"]) == pytest.approx(sum(parts), rel=1e-5) and np.isfinite(parts).all()
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, jax.device_get(state.params["branches"]))
    assert min(max(jax.tree.leaves(moved[f"stage{i}"])) for i in (1, 2, 3)) > 0


@pytest.mark.parametrize("dataset, facts", [("", GARMENTS), ("cifar10", CIFAR), ("imagenet", IMAGENET)])
def test_the_ladder_on_supcon(dataset, facts):
    """Ours: SupCon's own settings, and its loss at every stage."""
    c, plain = config("hierarchical", f"supcon,{dataset}"), config("supcon", dataset.replace("imagenet", "imagenet100"))
    recipe = tiny.recipe(c, **facts)
    temperatures = {(t.temperature, t.base_temperature) for t in recipe.terms.values()}
    assert temperatures == {(plain.terms.supcon.temperature, plain.terms.supcon.base_temperature)}
    assert set(recipe.terms) == {"supcon", "stage1", "stage2", "stage3"} and not recipe.heads
    assert [p.views for p in recipe.passes][-2:] == [("view1",), ("view2",)] and len(recipe.passes) == 8
    assert (c.optimizer, c.batch_size, c.duration) == (plain.optimizer, plain.batch_size, plain.duration)
    assert c.data.source == ("tfds:imagenet2012" if dataset == "imagenet" else plain.data.source)
    with pytest.raises(UserError, match="the ladder on supcon needs labels"):
        config("hierarchical", "supcon,unlabelled")
