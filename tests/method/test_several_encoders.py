"""Several encoders and heads in one update: nobody's gradient reaches another's encoder, on any number of devices."""

import jax
import numpy as np
import pytest
import tiny

from jaxcl import config as base
from jaxcl import losses
from jaxcl.errors import UserError
from jaxcl.method import sharding
from jaxcl.method.forward import represent
from jaxcl.method.init_state import init_state
from jaxcl.method.inputs import make_views
from jaxcl.method.recipe import Phase
from jaxcl.method.update import compile_update

VIEWS = ("view1", "view2")
AUTO = ("auto/view1", "auto/view2")


def config(contrast=True, auto=True, **changes):
    """The two encoders of Thanos, or one of them by itself (as the main encoder)."""
    c = tiny.config(background=False, stage=False)
    c.model.head_features = 0
    c.passes, c.terms = (), type(c.terms)()
    del c.memory.probe
    second = "auto" if contrast else ""
    if contrast:
        c.passes += (base.encode(*VIEWS),)
        c.heads.classifier = base.head("classifier")
        c.terms.ce = base.term("cross_entropy")
        c.terms.spread = base.term("spread")
    if auto:
        if contrast:
            c.encoders.auto = c.model.copy_and_resolve_references()
        views = AUTO if contrast else VIEWS
        c.passes += (base.encode(*VIEWS, encoder=second),)
        c.heads.decoder = base.head("decoder", encoders=(second,), widths=(8, 4, 4), blocks=1)
        c.heads.auto_classifier = base.head("classifier", encoders=(second,))
        c.terms.auto_ce = base.term("cross_entropy", views=views, head="auto_classifier", weight=0.5)
        c.terms.reconstruction = base.term("reconstruction", views=views, weight=2.0)
        c.representation = ("", "auto") if contrast else ("",)
    c.optimizer = base.options(base.OptimizerOptions, kind="sgd", lr=0.1, momentum=0.0, schedule="constant")
    c.update(changes)
    return c


def fresh(recipe):
    return tiny.fill(jax.eval_shape(lambda: init_state(recipe)))


def update_once(c, devices=1, state=None):
    recipe = tiny.recipe(c, num_devices=devices)
    mesh = sharding.make_mesh(devices)
    replicated, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    state = sharding.device_put(fresh(recipe) if state is None else state, replicated)
    new, metrics = compile_update(recipe, Phase("encoder"), replicated, rows)(
        state, sharding.device_put(tiny.batch(), rows)
    )
    return {k: float(v) for k, v in metrics.items()}, jax.device_get(new)


def assert_trees_close(got, want, rtol=1e-5):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6)


@pytest.fixture(scope="module")
def both():
    return update_once(config())


def test_the_parameters_and_the_loss(both):
    metrics, state = both
    assert set(state.params) == {"encoder", "head", "encoders", "heads"}
    assert set(state.params["encoders"]) == {"auto"} and set(state.params["heads"]) == {
        "classifier",
        "decoder",
        "auto_classifier",
    }
    parts = {k: metrics[f"loss/{k}"] for k in ("ce", "spread", "auto_ce", "reconstruction")}
    want = parts["ce"] + parts["spread"] + 0.5 * parts["auto_ce"] + 2 * parts["reconstruction"]
    assert metrics["loss"] == pytest.approx(want, rel=1e-5) and min(parts.values()) > 0.1


def test_two_in_one_update_are_two_by_themselves(both):
    """The way of the authors: one run each. Same start, same views, so the same step."""
    _, joint = both
    start = fresh(tiny.recipe(config()))
    alone = config(auto=False)
    own = fresh(tiny.recipe(alone))
    own = own.replace(
        params={k: start.params[k] for k in ("encoder", "head")}
        | {"heads": {"classifier": start.params["heads"]["classifier"]}},
        batch_stats={k: v for k, v in start.batch_stats.items() if k not in ("encoders", "heads")}
        | {"heads": {"classifier": {}}},
    )
    _, first = update_once(alone, state=own)
    assert_trees_close(first.params["encoder"], joint.params["encoder"])
    assert_trees_close(first.params["heads"]["classifier"], joint.params["heads"]["classifier"])
    assert_trees_close(first.batch_stats["stem_bn"], joint.batch_stats["stem_bn"])

    alone = config(contrast=False)
    own = fresh(tiny.recipe(alone))
    own = own.replace(
        params=start.params["encoders"]["auto"]
        | {"heads": {k: start.params["heads"][k] for k in ("decoder", "auto_classifier")}},
        batch_stats=start.batch_stats["encoders"]["auto"]
        | {"heads": {k: start.batch_stats["heads"][k] for k in ("decoder", "auto_classifier")}},
    )
    _, second = update_once(alone, state=own)
    assert_trees_close(second.params["encoder"], joint.params["encoders"]["auto"]["encoder"])
    assert_trees_close(second.params["heads"]["decoder"], joint.params["heads"]["decoder"])
    assert_trees_close(second.batch_stats["heads"]["decoder"], joint.batch_stats["heads"]["decoder"])
    # And it moved: equal trees that nothing touched would prove nothing.
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), start.params["heads"], joint.params["heads"])
    assert min(jax.tree.leaves(moved)) > 1e-5


def test_eight_devices(both):
    metrics, state = both
    got, new = update_once(config(), devices=8)
    for name in metrics:
        assert got[name] == pytest.approx(metrics[name], rel=1e-4), name
    assert_trees_close(new.params, state.params, rtol=1e-3)
    assert_trees_close(new.batch_stats, state.batch_stats, rtol=1e-3)


@pytest.mark.slow
def test_micro_batches():
    """GradCache keeps to the encoders; heads, with their batch norms, see the whole batch."""
    c = config()
    for model in (c.model, c.encoders.auto):
        model.norm = "group"
    metrics, state = update_once(c)
    c.grad_cache.micro_batch = 4
    got, new = update_once(c, devices=2)
    for name in metrics:
        assert got[name] == pytest.approx(metrics[name], rel=1e-4), name
    assert_trees_close(new.params, state.params, rtol=1e-3)


def test_reconstruction_is_of_the_view_itself():
    """Against the decoder and the loss by hand."""
    c = config(contrast=False)
    recipe = tiny.recipe(c)
    state = fresh(recipe)

    @jax.jit
    def by_hand(state, batch):
        views = make_views(recipe, state, batch, VIEWS)
        # One batch of the batch norms, image by image.
        image = jax.numpy.stack([views[v].image for v in VIEWS], 1).reshape(-1, tiny.SIDE, tiny.SIDE, 3)
        stats = {k: v for k, v in state.batch_stats.items() if k != "heads"}
        h, _ = recipe.model.encode(state.params, stats, image, train=True)
        head, name = recipe.heads["decoder"], "decoder"
        facts = recipe.head_input(name)
        y, _ = head.apply(facts, state.params["heads"][name], state.batch_stats["heads"][name], h, train=True)
        return losses.reconstruction(y, image)

    want = float(by_hand(state, tiny.batch()))
    metrics, _ = update_once(c, state=state)
    assert metrics["loss/reconstruction"] == pytest.approx(want, rel=1e-5)


def test_the_representation_joins_the_encoders():
    recipe = tiny.recipe(config())
    state, x = fresh(recipe), tiny.normal(3, tiny.SIDE, tiny.SIDE, 3)
    h, z = jax.jit(lambda s, x: represent(recipe, s.params, s.batch_stats, x))(state, x)
    main, _ = recipe.model.encode(state.params, state.batch_stats, x, train=False)
    auto, _ = recipe.model.encode(
        state.params["encoders"]["auto"], state.batch_stats["encoders"]["auto"], x, train=False
    )
    np.testing.assert_allclose(h, np.concatenate([main, auto], -1), rtol=2e-5, atol=1e-5)
    np.testing.assert_array_equal(h, z)  # no head


def test_one_classifier_on_both_encoders():
    c = config()
    del c.heads.auto_classifier
    del c.terms.auto_ce
    c.heads.classifier.encoders = ("", "auto")
    recipe = tiny.recipe(c)
    assert recipe.head_input("classifier").features == 2 * recipe.model.features
    metrics, state = update_once(c)
    assert metrics["loss/ce"] > 0.1
    assert state.params["heads"]["classifier"]["dense"]["kernel"].shape == (2 * recipe.model.features, tiny.CLASSES)


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda c: c.terms.ce.update(head="clasifier"), "did you mean 'classifier'"),
        (lambda c: c.terms.ce.update(views=AUTO), "that head is of 'view1'"),
        (lambda c: c.heads.classifier.update(encoders=("",) * 0), "heads.classifier.encoders is empty"),
        (lambda c: c.heads.update(spare=base.head("classifier")), "heads.spare is read by no term"),
        (lambda c: c.update(representation=("", "other")), "names encoder 'other'"),
        (lambda c: c.heads.decoder.update(widths=(8,) * 9), "heads.decoder: decoder: 8 stages make images of at least"),
        (lambda c: c.update(passes=(base.encode(*VIEWS),)), "names view 'auto/view1'"),
    ],
)
def test_mistakes(change, text):
    c = config()
    with c.unlocked():
        change(c)
    with pytest.raises(UserError) as error:
        tiny.recipe(c)
    assert text in str(error.value) and "\n" not in str(error.value)
