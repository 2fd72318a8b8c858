"""The update as a whole: padding, devices, phases, randomness, and what never moves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxcl import losses, sharding
from jaxcl.recipe import Phase
from jaxcl.update import compile_update, init_state, make_update, make_views, run_stages
from jaxcl.views import view_keys

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


@pytest.fixture(scope="module")
def exconb():
    c = tiny.config()
    c.optimizer.lr = 0.05
    return tiny.recipe(c)


def on_one_device(recipe, phase):
    mesh = sharding.make_mesh(1)
    update = compile_update(recipe, phase, sharding.replicated(mesh), sharding.rows(mesh))

    def run(state, batch):
        if not isinstance(state.step, jax.Array):  # the fixture's own key must survive the donation
            state = state.replace(key=jax.random.wrap_key_data(np.array(jax.random.key_data(state.key))))
        return update(sharding.put(state, sharding.replicated(mesh)), sharding.put(batch, sharding.rows(mesh)))

    return run


# ---- padding


def test_padding_changes_nothing_of_the_update(exconb):
    """With room for 16 backgrounds, against the same update written out on the K that there are."""
    state, batch = start_state(exconb), tiny.batch()
    new, metrics = on_one_device(exconb, EXPLAINED)(state, batch)
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
            z = model.project(params, h)
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


@pytest.mark.parametrize("method", ["supcon", "exconb", "exconb with room for half"])
def test_one_two_and_eight_devices_agree(method):
    """Three steps; the order of the sums is all that differs, so 1e-4 of each array's largest number (float32)."""
    c = tiny.config(stage=method != "supcon", **({"background_capacity": 0.5} if "half" in method else {}))
    c.optimizer.lr = 0.02
    recipe = tiny.recipe(c, num_devices=8)
    phase = EXPLAINED if recipe.stages else PLAIN
    outcomes = []
    for devices in (1, 2, 8):
        mesh = sharding.make_mesh(devices)
        replicated, rows = sharding.replicated(mesh), sharding.rows(mesh)
        update = compile_update(recipe, phase, replicated, rows)
        state, values = sharding.put(start_state(recipe), replicated), []
        for step in range(3):
            state, metrics = update(state, sharding.put(tiny.batch(seed=step), rows))
            values.append(jax.device_get(metrics))
        assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state))
        assert len(state.step.sharding.device_set) == devices
        outcomes.append((values, jax.device_get(state.params), jax.device_get(state.batch_stats)))
    for other in outcomes[1:]:
        for a, b in zip(outcomes[0][0], other[0], strict=True):
            assert a.keys() == b.keys()
            for k in a:
                np.testing.assert_allclose(a[k], b[k], rtol=1e-4, atol=1e-5, err_msg=k)
        assert_close(other[1], outcomes[0][1], 1e-4)
        assert_close(other[2], outcomes[0][2], 1e-4)


# ---- a part that is switched off


def test_before_its_start_the_stage_changes_no_bit():
    with_stage = tiny.recipe(tiny.config(start="50%"))
    without = tiny.recipe(tiny.config(stage=False))
    phase = with_stage.phase(0)
    assert phase == PLAIN
    outcomes = []
    for recipe in (with_stage, without):
        state, update = start_state(recipe), on_one_device(recipe, phase)
        for step in range(2):
            state, metrics = update(state, tiny.batch(seed=step))
        outcomes.append((state, metrics))
    (a, m), (b, n) = outcomes
    assert m.keys() == n.keys() and not any(k.startswith("saliency") for k in m)
    assert_same(m, n)
    assert_same(a, b)
    explained, _ = on_one_device(with_stage, EXPLAINED)(start_state(with_stage), tiny.batch())
    plain, _ = on_one_device(with_stage, PLAIN)(start_state(with_stage), tiny.batch())
    assert differ(explained.params, plain.params)


# ---- compilation, donation, transfers


def test_compiled_once_donated_and_no_transfers(exconb, monkeypatch):
    mesh = sharding.make_mesh(2)
    replicated, rows = sharding.replicated(mesh), sharding.rows(mesh)
    update = compile_update(exconb, EXPLAINED, replicated, rows)
    state = sharding.put(start_state(exconb), replicated)
    batches = [sharding.put(tiny.batch(seed=i), rows) for i in range(3)]
    for batch in batches:
        before = state
        with jax.transfer_guard("disallow"):
            state, metrics = update(state, batch)
        assert all(x.is_deleted() for x in jax.tree.leaves(before.params))
        assert all(x.is_deleted() for x in jax.tree.leaves((before.opt_state, before.memory, before.batch_stats)))
        assert not batch["image"].is_deleted()
    assert update._cache_size() == 1
    assert int(state.step) == 3
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
    """With and without the probe the encoder ends in the same bits; and the probe does learn."""
    results = {}
    for rate in (1e-9, 10.0):
        c = tiny.config(stage=False)
        c.memory.probe.optimizer.lr = rate
        c.memory.probe.optimizer.schedule = "constant"
        recipe = tiny.recipe(c)
        results[rate] = on_one_device(recipe, PLAIN)(start_state(recipe), tiny.batch())
    (a, m), (b, n) = results.values()
    assert_same((a.params, a.batch_stats, a.opt_state), (b.params, b.batch_stats, b.opt_state))
    assert differ(a.memory, b.memory)
    np.testing.assert_array_equal(m["grad_norm"], n["grad_norm"])
    c = tiny.config(stage=False)
    del c.memory.probe
    recipe = tiny.recipe(c)
    alone, _ = on_one_device(recipe, PLAIN)(start_state(recipe), tiny.batch())
    assert_close((alone.params, alone.batch_stats), (a.params, a.batch_stats), 1e-6)


@pytest.fixture(scope="module")
def alternating():
    recipe = tiny.recipe(tiny.config(schedule="alternating", stage=False))
    return recipe, on_one_device(recipe, PROBE)


def test_a_probe_step_leaves_the_encoder_alone(alternating):
    recipe, update = alternating
    before = start_state(recipe)
    state = before
    for step in range(3):
        state, metrics = update(state, tiny.batch(seed=step))
    assert_same((state.params, state.batch_stats, state.opt_state), (before.params, before.batch_stats, before.opt_state))
    assert differ(state.memory, before.memory) and int(state.step) == 3
    assert set(metrics) == {"probe/loss", "probe/accuracy", "loss"}
    counts = [x for x in leaves(state.memory["probe"]["opt_state"]) if x.ndim == 0]
    assert counts and all(c == 3 for c in counts)  # its own schedule, by its own steps


def test_a_probe_step_is_the_step_on_frozen_features(alternating):
    recipe, update = alternating
    state, batch = start_state(recipe), tiny.batch()
    new, metrics = update(state, batch)

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


def test_an_encoder_step_leaves_a_resting_probe_alone(alternating):
    recipe, _ = alternating
    before = start_state(recipe)
    state, metrics = on_one_device(recipe, PLAIN)(before, tiny.batch())
    assert_same(state.memory, before.memory)
    assert differ(state.params, before.params) and "probe/loss" not in metrics


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
