"""The update as a whole: padding, devices, phases, randomness, and what never moves."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxcl import losses
from jaxcl.errors import UserError
from jaxcl.losses.common import total
from jaxcl.method import sharding
from jaxcl.method.init_state import init_state
from jaxcl.method.inputs import make_views, run_stages
from jaxcl.method.recipe import Phase
from jaxcl.method.terms import Embedding, Term
from jaxcl.method.update import compile_update, make_update
from jaxcl.method.views import view_keys

PLAIN, EXPLAINED, PROBE = Phase("encoder"), Phase("encoder", (0,)), Phase("probe")


def start_state(recipe, seed=0):
    """A state with random parameters and a classifier that knows something, so that masks are accepted and rejected."""
    state = tiny.fill(jax.eval_shape(lambda: init_state(recipe)), seed)
    zero = functools.partial(jax.tree.map, np.zeros_like)
    memory = {k: {**m, "opt_state": zero(m["opt_state"])} for k, m in state.memory.items()}
    return state.replace(
        key=jax.random.key(recipe.seed), step=np.int32(0), opt_state=zero(state.opt_state), memory=memory
    )


def leaves(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree) if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)]


def assert_same(a, b):
    for x, y in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def assert_close(a, b, tolerance):
    """Relative to the largest number of each array."""
    for x, y in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * max(1e-3, float(np.abs(y).max())))


def differ(a, b):
    return any((x != y).any() for x, y in zip(leaves(a), leaves(b), strict=True))


METHODS = {
    "supcon": dict(stage=False),
    "exconb": dict(),
    "exconb with room for 14": dict(background_capacity=14 / 16),
    "exconb from the middle": dict(start="50%"),
    "alternating": dict(schedule="alternating", stage=False),
}


@functools.cache
def recipe_of(method):
    c = tiny.config(**METHODS[method])
    c.optimizer.lr = 0.05
    return tiny.recipe(c, num_devices=2 if "room" in method else 8)


@functools.cache
def compiled(method, phase, devices=1):
    """-> (update, replicated, rows), compiled once for all tests."""
    mesh = sharding.make_mesh(devices)
    replicated, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    return compile_update(recipe_of(method), phase, replicated, rows), replicated, rows


def run(method, phase, *, steps=1, devices=1):
    """-> (state after some steps, metrics of each), on the host."""
    update, replicated, rows = compiled(method, phase, devices)
    state, values = sharding.device_put(start_state(recipe_of(method)), replicated), []
    for step in range(steps):
        state, metrics = update(state, sharding.device_put(tiny.batch(seed=step), rows))
        values.append(jax.device_get(metrics))
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state))
    assert len(state.step.sharding.device_set) == devices and int(state.step) == steps
    return state, values


@pytest.fixture(scope="module")
def exconb():
    return recipe_of("exconb")


# ---- padding


def test_padding_changes_nothing_of_the_update(exconb):
    """With room for 16 backgrounds, against the same update written out on the K that there are."""
    state, batch = start_state(exconb), tiny.batch()
    new, (metrics,) = run("exconb", EXPLAINED)
    K = int(metrics["saliency/backgrounds"])
    assert 0 < K < tiny.BATCH

    @jax.jit
    def drawn(state, batch):
        views = make_views(exconb, state, batch, exconb.view_names(EXPLAINED))
        return run_stages(exconb, EXPLAINED, state, batch, views)[0]

    views = drawn(state, batch)
    rows = np.flatnonzero(views["background"].where)
    assert len(rows) == K
    images = jnp.concatenate([views["view1"].image, views["view2"].image, views["background"].image[rows]])
    B, model = tiny.BATCH, exconb.model

    @jax.jit
    def written_out(state, images, label):
        def objective(params):
            h, stats = model.encode(params, state.batch_stats, images, train=True)
            z = model.project(params, {}, h)
            pair = jnp.stack([z[:B], z[B : 2 * B]], axis=1)
            twice = jnp.repeat(z[2 * B :, None], 2, axis=1)
            labels = jnp.concatenate([label, jnp.full(K, tiny.CLASSES)])
            loss = losses.supcon(jnp.concatenate([pair, twice]), labels, background=labels == tiny.CLASSES)
            return loss, (stats, h[B : 2 * B])

        (loss, (stats, h)), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
        updates, opt_state = exconb.tx.update(grads, state.opt_state, state.params)
        return loss, optax.apply_updates(state.params, updates), stats, opt_state, h

    loss, params, stats, opt_state, h = written_out(state, images, batch["label"])
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert_close(new.params, params, 1e-5)
    assert_close(new.batch_stats, stats, 1e-5)
    assert_close(new.opt_state, opt_state, 2e-4)
    assert differ(new.params, state.params) and differ(new.batch_stats, state.batch_stats)

    # The probe took one step on view2's features of the same pass.
    probe = state.memory["probe"]["params"]["dense"]
    logits = h @ probe["kernel"] + probe["bias"]
    error = (jax.nn.softmax(logits) - jax.nn.one_hot(batch["label"], tiny.CLASSES)) / B
    rate = exconb.memory_schedule["probe"](0)
    moved = new.memory["probe"]["params"]["dense"]
    np.testing.assert_allclose(moved["kernel"], probe["kernel"] - rate * (h.T @ error), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(moved["bias"], probe["bias"] - rate * error.sum(0), rtol=1e-4, atol=1e-5)


# ---- devices


def assert_agree(a, b):
    """The order of the sums is all that differs: 1e-4 of each array's largest number (float32)."""
    for m, n in zip(a[1], b[1], strict=True):
        assert m.keys() == n.keys()
        for k in m:
            np.testing.assert_allclose(m[k], n[k], rtol=1e-4, atol=1e-5, err_msg=k)
    for part in ("params", "batch_stats", "memory", "opt_state"):
        assert_close(getattr(a[0], part), getattr(b[0], part), 1e-4)


@pytest.mark.parametrize("method", ["supcon", "exconb"])
def test_one_two_and_eight_devices_agree(method):
    phase = PLAIN if method == "supcon" else EXPLAINED
    one, two, eight = (run(method, phase, steps=3, devices=n) for n in (1, 2, 8))
    assert_agree(two, one)
    assert_agree(eight, one)


def test_rows_gathered_over_two_devices_agree():
    """Less room than images: the backgrounds are gathered, and views of unequal length share a pass."""
    less, full = run("exconb with room for 14", EXPLAINED, steps=3, devices=2), run("exconb", EXPLAINED, steps=3)
    assert all(0 < m["saliency/backgrounds"] <= 14 and m["saliency/backgrounds_dropped"] == 0 for m in less[1])
    assert_agree(less, full)


@dataclasses.dataclass(frozen=True)
class Spy(Term):
    """A term that records how it is called."""

    calls: list = dataclasses.field(default_factory=list)

    @property
    def reads(self):
        return ("view1",)

    def __call__(self, e, label, *, memory=None, axis_name=None):
        self.calls.append((axis_name, {n: v.z.shape for n, v in e.items()}, label.shape))
        return total(jnp.sum(e["view1"].z) + jnp.sum(label), axis_name)


@pytest.mark.parametrize("devices", [1, 8])
def test_terms_are_told_the_axis_and_given_the_rows_of_their_device(devices):
    recipe, spy = recipe_of("supcon"), Spy([])
    recipe = dataclasses.replace(recipe, terms={"spy": spy})
    state = jax.eval_shape(lambda: init_state(recipe))
    batch = jax.eval_shape(lambda: {k: jnp.asarray(v) for k, v in tiny.batch().items()})
    update = make_update(recipe, PLAIN, sharding.make_mesh(devices))
    _, metrics = jax.eval_shape(update, state, batch)
    rows = tiny.BATCH // devices
    z = {"view1": (rows, 12), "view2": (rows, 12)}
    assert spy.calls == [(None if devices == 1 else sharding.AXIS, z, (rows,))]
    assert metrics["loss"].shape == ()


def test_a_term_that_forgets_the_axis_is_noticed():
    """The sum over one device's rows is not the loss of the batch, and a vector is no loss. Cases D.1."""

    class Forgetful(Spy):
        def __call__(self, e, label, *, memory=None, axis_name=None):
            return jnp.sum(e["view1"].z)

    class Vector(Spy):
        def __call__(self, e, label, *, memory=None, axis_name=None):
            return e["view1"].z[:, 0]

    batch = jax.eval_shape(lambda: {k: jnp.asarray(v) for k, v in tiny.batch().items()})
    for term, devices, words in ((Forgetful, 8, "differs between devices"), (Vector, 1, "expected a scalar")):
        recipe = dataclasses.replace(recipe_of("supcon"), terms={"spy": term()})
        state = jax.eval_shape(lambda r=recipe: init_state(r))
        with pytest.raises(UserError, match=f"terms.spy returned .*{words}"):
            jax.eval_shape(make_update(recipe, PLAIN, sharding.make_mesh(devices)), state, batch)


def test_of_a_sharded_batch_only_embeddings_are_gathered():
    """Every device compares its 2 images x 2 views with the 32 embeddings of all; no array of images is sent."""
    recipe = recipe_of("supcon")
    update, _, _ = compiled("supcon", PLAIN, 8)
    state = jax.eval_shape(lambda: init_state(recipe))
    batch = jax.eval_shape(lambda: {k: jnp.asarray(v) for k, v in tiny.batch().items()})
    text = update.lower(state, batch).compile().as_text()
    assert "f32[4,32]" in text and "f32[32,32]" not in text
    sent = re.findall(r"= (.*?) (?:all-gather|all-to-all|collective-permute)\S*\(", text)
    assert any("f32[16,2,12]" in s for s in sent)
    assert all(len(shape.split(",")) < 4 for s in sent for shape in re.findall(r"\[([\d,]*)\]", s))


# ---- a part that is switched off


def test_before_its_start_the_stage_changes_no_bit():
    assert recipe_of("exconb from the middle").phase(0) == PLAIN
    a, m = run("exconb from the middle", PLAIN, steps=2)
    b, n = run("supcon", PLAIN, steps=2)
    assert m[-1].keys() == n[-1].keys() and not any(k.startswith("saliency") for k in m[-1])
    assert_same(m, n)
    assert_same(a, b)
    explained, _ = run("exconb", EXPLAINED, steps=2)
    assert differ(explained.params, a.params)


# ---- compilation, donation, transfers


def test_compiled_once_donated_and_no_transfers(caplog):
    update, replicated, rows = compiled("exconb", EXPLAINED, 2)
    state, metrics = sharding.device_put(start_state(recipe_of("exconb")), replicated), {}
    for step in range(3):
        before, batch = state, sharding.device_put(tiny.batch(seed=step), rows)
        caplog.clear()
        with jax.log_compiles(), jax.transfer_guard("disallow"):
            state, metrics = update(state, batch)
        given = before.params, before.batch_stats, before.opt_state, before.memory
        assert all(x.is_deleted() for x in jax.tree.leaves(given))
        assert not batch["image"].is_deleted()
        compiles = [r for r in caplog.records if "Compiling jit(update)" in r.getMessage()]
        assert len(compiles) <= (step == 0)
    assert all(x.shape == () for x in metrics.values())
    with pytest.raises(Exception, match="transfer"), jax.transfer_guard("disallow"):  # the guard does guard
        update(state, tiny.batch())


def test_the_state_keeps_its_shape(exconb):
    state = jax.eval_shape(lambda: init_state(exconb))
    batch = jax.eval_shape(lambda: {k: jnp.asarray(v) for k, v in tiny.batch().items()})
    for phase in (PLAIN, EXPLAINED):
        new, _ = jax.eval_shape(make_update(exconb, phase), state, batch)
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True):
            assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)


# ---- what does not learn


def test_the_probe_does_not_teach_the_encoder():
    """The gradient of the probe's loss with respect to all that the encoder is: zero, not small."""
    recipe = recipe_of("supcon")
    state, part = start_state(recipe), recipe.memory["probe"]
    image, label = tiny.normal(tiny.BATCH, tiny.SIDE, tiny.SIDE, 3), tiny.batch()["label"]

    def probe_loss(params, memory):
        h, _ = recipe.model.encode(params, state.batch_stats, image, train=True)
        new, figures = part.learn(memory, [Embedding(h, h)], label, recipe.memory_tx["probe"])
        return figures["probe/loss"] + sum(jnp.sum(x) for x in jax.tree.leaves(new["params"]))

    grads, own = jax.jit(jax.grad(probe_loss, argnums=(0, 1), allow_int=True))(state.params, state.memory["probe"])
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(grads))
    assert any(np.asarray(g).any() for g in jax.tree.leaves(own["params"]))


def test_a_probe_makes_no_difference_to_the_encoder():
    """A run with the probe online and one with it at rest give the same encoder."""
    a, m = run("supcon", PLAIN, steps=2)
    b, n = run("alternating", PLAIN, steps=2)
    assert_close((a.params, a.batch_stats, a.opt_state), (b.params, b.batch_stats, b.opt_state), 1e-5)
    assert_same(b.memory, start_state(recipe_of("alternating")).memory)  # at rest
    assert differ(a.memory, b.memory) and differ(a.params, start_state(recipe_of("supcon")).params)
    assert "probe/loss" in m[0] and "probe/loss" not in n[0]


def test_a_probe_step_leaves_the_encoder_alone():
    before = start_state(recipe_of("alternating"))
    state, values = run("alternating", PROBE, steps=3)
    for part in ("params", "batch_stats", "opt_state"):
        assert_same(getattr(state, part), getattr(before, part))
    assert differ(state.memory, before.memory)
    assert set(values[0]) == {"probe/loss", "probe/accuracy"}
    counts = [x for x in leaves(state.memory["probe"]["opt_state"]) if x.ndim == 0]
    assert counts and all(c == 3 for c in counts)  # its own schedule, by its own steps


def test_a_probe_step_is_the_step_on_frozen_features():
    recipe = recipe_of("alternating")
    state, batch = start_state(recipe), tiny.batch()
    new, (metrics,) = run("alternating", PROBE)

    @jax.jit
    def features(state, batch):
        view = make_views(recipe, state, batch, ("classifier",))["classifier"]
        return recipe.model.encode(state.params, state.batch_stats, view.image, train=False)[0]

    h, dense = features(state, batch), state.memory["probe"]["params"]["dense"]
    logits = h @ dense["kernel"] + dense["bias"]
    error = (jax.nn.softmax(logits) - jax.nn.one_hot(batch["label"], tiny.CLASSES)) / tiny.BATCH
    want = dense["kernel"] - recipe.memory_schedule["probe"](0) * (h.T @ error)
    np.testing.assert_allclose(new.memory["probe"]["params"]["dense"]["kernel"], want, rtol=1e-4, atol=1e-5)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["label"][:, None], 1)
    np.testing.assert_allclose(metrics["probe/loss"], -picked.mean(), rtol=1e-5)


# ---- randomness


@pytest.fixture(scope="module")
def draw():
    recipe = tiny.recipe(tiny.config())

    @jax.jit
    def views(seed, step, batch):
        state = dataclasses.replace(start_state(recipe), key=jax.random.key(seed), step=step)
        made = make_views(recipe, state, batch, ("view1", "view2", "standard"))
        return {n: (v.image, v.params) for n, v in made.items()}

    return lambda batch, seed=0, step=3: jax.device_get(views(seed, step, batch))


def test_a_draw_does_not_depend_on_the_slot(draw):
    batch, order = tiny.batch(), np.random.default_rng(1).permutation(tiny.BATCH)
    here, there = draw(batch), draw({k: v[order] for k, v in batch.items()})
    for name in here:
        assert_same(jax.tree.map(lambda x: x[order], here[name]), there[name])


@pytest.mark.parametrize("change", ["seed", "step", "index"])
def test_a_draw_depends_on(draw, change):
    batch = tiny.batch()
    base = draw(batch)
    if change == "index":
        other = draw(batch | {"index": batch["index"] + np.int32(1)})
    else:
        other = draw(batch, **{change: 4})
    crops = [np.abs(v["view1"][1]["crop"] - w["view1"][1]["crop"]).max(1) for v, w in ((base, other),)]
    assert (crops[0] > 0).all()
    assert_same(base["standard"][0], other["standard"][0])


def test_each_view_draws_for_itself(draw):
    views = draw(tiny.batch())
    assert (np.abs(views["view1"][1]["crop"] - views["view2"][1]["crop"]).max(1) > 0).all()


def test_keys_are_of_seed_step_index_and_name():
    key = jax.random.key(0)
    index = jnp.array([5, 7, 5])
    keys = jax.random.key_data(view_keys(key, 3, index, "view1"))
    np.testing.assert_array_equal(keys[0], keys[2])
    others = [
        view_keys(key, 3, index, "view2"),
        view_keys(key, 4, index, "view1"),
        view_keys(jax.random.key(1), 3, index, "view1"),
    ]
    rows = np.concatenate([keys[:2], *(jax.random.key_data(k)[:2] for k in others)])
    assert len(np.unique(rows, axis=0)) == 8
