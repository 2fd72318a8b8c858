"""GradCache: the same update in less memory, and what batch norm makes of it."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxcl.errors import Preempted, UserError
from jaxcl.losses.common import total
from jaxcl.method import grad_cache, sharding
from jaxcl.method.init_state import init_state
from jaxcl.method.recipe import Phase
from jaxcl.method.terms import PairTerm
from jaxcl.method.update import compile_update
from jaxcl.models import ResNetOptions, make_model
from jaxcl.report import read_metrics
from jaxcl.train import loop as train
from jaxcl.train.checkpoint import Preemption

PLAIN, EXPLAINED = Phase("encoder"), Phase("encoder", (0,))
MICRO = 4


@dataclasses.dataclass(frozen=True)
class CrossCorrelation(PairTerm):
    """A term that knows nothing of GradCache and needs every row of the batch."""

    weight: float = dataclasses.field(default=0.5, kw_only=True)

    def __call__(self, e, label, *, memory=None, axis_name=None):
        a, b = (e[n].z for n in self.reads)
        c, rows = total((a.T @ b, len(a)), axis_name)
        return jnp.sum((c / rows) ** 2)


def make_config(norm="group", micro=MICRO, batch_norm="first_pass", **options):
    c = tiny.config(**options)
    c.model.norm, c.grad_cache.batch_norm = norm, batch_norm
    c.grad_cache.micro_batch = micro
    c.optimizer.kind, c.optimizer.momentum, c.optimizer.weight_decay = "sgd", 0.9, 0.0
    c.optimizer.lr = 0.05
    return c


def make_recipe(c, devices=1, double=False):
    recipe = tiny.recipe(c, num_devices=devices)
    terms = recipe.terms | {"correlation": CrossCorrelation()}
    model = recipe.model
    if double:
        model = dataclasses.replace(
            model, encoder=model.encoder.clone(dtype=jnp.float64), head=model.head.clone(dtype=jnp.float64)
        )
    return dataclasses.replace(recipe, model=model, terms=terms)


def start_state(recipe, double=False):
    state = tiny.fill(jax.eval_shape(lambda: init_state(recipe)))
    if double:
        wide = functools.partial(jax.tree.map, lambda x: x.astype(np.float64) if x.dtype == np.float32 else x)
        state = state.replace(params=wide(state.params), batch_stats=wide(state.batch_stats))
    memory = {k: {**m, "opt_state": jax.tree.map(np.zeros_like, m["opt_state"])} for k, m in state.memory.items()}
    return state.replace(key=jax.random.key(0), step=np.int32(0), opt_state=recipe.tx.init(state.params), memory=memory)


def compiled(recipe, phase, devices=1, batch=tiny.BATCH):
    mesh = sharding.make_mesh(devices)
    replicated, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    update = compile_update(recipe, phase, replicated, rows)
    return update, replicated, rows


def one_update(recipe, phase, devices=1, double=False):
    """-> (state, metrics) after one update; with SGD's first step the momentum is the gradient."""
    update, replicated, rows = compiled(recipe, phase, devices)
    state = sharding.device_put(start_state(recipe, double), replicated)
    return jax.device_get(update(state, sharding.device_put(tiny.batch(), rows)))


def gradient(state):
    return next(s.trace for s in jax.tree.leaves(state.opt_state, is_leaf=_is_trace) if _is_trace(s))


def _is_trace(x):
    return isinstance(x, optax.TraceState)


def assert_same_update(got, want, tolerance):
    """Relative to each array's largest number."""
    parts = lambda r: (gradient(r[0]), r[0].params, r[0].batch_stats, r[0].memory, r[1])  # noqa: E731
    for x, y in zip(jax.tree.leaves(parts(got)), jax.tree.leaves(parts(want)), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * max(1e-2, float(np.abs(y).max())))
    assert max(float(np.abs(g).max()) for g in jax.tree.leaves(gradient(want[0]))) > 1e-2


METHODS = {"supcon": dict(stage=False), "exconb with room for half": dict(background_capacity=0.5)}


@functools.cache
def plain_update(method):
    phase = PLAIN if method == "supcon" else EXPLAINED
    return one_update(make_recipe(make_config(micro=0, **METHODS[method])), phase)


# ---- no batch norm: nothing changes


@pytest.mark.parametrize("method, devices", [("supcon", 8), ("exconb with room for half", 2)])
def test_it_is_the_plain_update(method, devices):
    """All embeddings, terms, the probe, the gradient: on one device and on several, views of unequal length too."""
    c = make_config(micro=8 if devices == 8 else MICRO, **METHODS[method])
    got = one_update(make_recipe(c, devices), PLAIN if method == "supcon" else EXPLAINED, devices)
    assert {"loss/supcon", "loss/correlation"} <= got[1].keys()
    if method != "supcon":
        assert 0 < got[1]["saliency/backgrounds"]
    assert got[0].batch_stats == {}
    assert_same_update(got, plain_update(method), 1e-4)


def test_it_is_the_plain_update_in_float64():
    with jax.enable_x64(True):
        results = []
        for micro in (0, MICRO):
            recipe = make_recipe(make_config(micro=micro, background_capacity=0.5), double=True)
            results.append(one_update(recipe, EXPLAINED, double=True))
    assert jax.tree.leaves(gradient(results[0][0]))[0].dtype == np.float64
    assert_same_update(results[1], results[0], 1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_the_norm_that_is_logged_is_that_of_the_gradient(method):
    """Of all parameters, before any clip, decay or momentum; the loss is the weighted sum of the terms; cases F."""
    state, metrics = plain_update(method)
    norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(gradient(state))))
    assert norm > 1e-2
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], metrics["loss/supcon"] + 0.5 * metrics["loss/correlation"], rtol=1e-5)


# ---- memory


@pytest.fixture(scope="module")
def large():
    """A convolution net whose activations are most of what the update needs: batch 64, micro-batch 0 or 8."""
    out = {}
    for micro in (0, 8):
        c = make_config(micro=micro, stage=False)
        c.batch_size, c.model.stem = 64, "cifar"
        recipe = make_recipe(c)
        update, replicated, rows = compiled(recipe, PLAIN)
        state = sharding.device_put(start_state(recipe), replicated)
        batch = sharding.device_put(tiny.batch(64), rows)
        program = update.lower(state, batch).compile()
        out[micro] = program.memory_analysis().temp_size_in_bytes, jax.device_get(program(state, batch))
    return out


def test_temporary_memory_falls(large):
    assert large[8][0] < 0.4 * large[0][0]


def test_and_the_large_batch_has_the_same_gradient(large):
    assert_same_update(large[8][1], large[0][1], 1e-4)


# ---- devices


def collectives(text):
    """[(in a loop, operation, shapes)] of a compiled program."""
    found, entry = [], False
    for line in text.splitlines():
        if line and not line.startswith(" ") and line.endswith("{"):
            entry = line.startswith("ENTRY")
        match = re.search(r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\S*\(", line)
        if match:
            shapes = [tuple(map(int, filter(None, s.split(",")))) for s in re.findall(r"\w+\[([\d,]*)\]", match[1])]
            found.append((not entry, match[2], shapes))
    return found


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_no_image_moves_and_gradients_are_summed_once(norm):
    c = make_config(norm=norm, micro=8, stage=False)
    c.batch_size = 32
    recipe = make_recipe(c, devices=8)
    update, _, _ = compiled(recipe, PLAIN, 8)
    shapes = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)  # noqa: E731
    text = update.lower(shapes(start_state(recipe)), shapes(tiny.batch(32))).compile().as_text()
    assert re.search(r" while\(", text)
    found = collectives(text)
    assert ("all-gather", [(32, 2, 12)]) in [f[1:] for f in found]  # embeddings do: the parser sees what there is
    for in_loop, operation, shapes in found:
        if operation != "all-reduce":
            assert not in_loop and all(len(s) < 4 for s in shapes), (operation, shapes)
        if in_loop:  # statistics of the first pass, one number a channel
            assert norm == "batch" and all(len(s) <= 1 for s in shapes)
    kernels = [s for _, _, shapes in found for s in shapes if len(s) == 4]
    assert len(kernels) == sum(x.ndim == 4 for x in jax.tree.leaves(start_state(recipe).params))
    assert any(f[0] for f in found) == (norm == "batch")


def test_first_pass_on_eight_devices_is_that_on_one():
    """Which images share a micro-batch does not depend on the devices, so neither do the statistics."""
    c = make_config(norm="batch", micro=8, stage=False)
    one, eight = (one_update(make_recipe(c, n), PLAIN, n) for n in (1, 8))
    assert_same_update(eight, one, 1e-4)


# ---- batch norm


@pytest.fixture(scope="module")
def net():
    model = make_model(ResNetOptions(stage_sizes=(1, 1), stage_widths=(8, 16), head_features=12))
    images = tiny.normal(32, 8, 8, 3) + np.repeat(tiny.normal(16, 1, 1, 3, seed=5), 2, axis=0)
    return model, *tiny.model_variables(model, side=8), images


def pairs(h):
    """SimCLR-like: two rows an image, logits over the whole batch."""
    z = h / jnp.linalg.norm(h, axis=1, keepdims=True)
    s = jnp.where(jnp.eye(len(z), dtype=bool), -1e9, z @ z.T / 0.2)
    return -jnp.mean(jax.nn.log_softmax(s)[jnp.arange(len(z)), jnp.arange(len(z)) ^ 1])


def cached(net, chunks, where=None, images=None):
    """-> (features, statistics, gradient) with a first pass."""
    model, params, stats, own = net

    def objective(params, images):
        h, new = grad_cache.encode(model, params, stats, images, where=where, chunks=chunks, groups=16)
        return pairs(h), (h, new)

    run = jax.jit(jax.grad(objective, has_aux=True))
    grads, (h, new) = run(params, own if images is None else images)
    return h, new, grads["encoder"]


@pytest.fixture(scope="module")
def in_four(net):
    return cached(net, 4)


@pytest.fixture(scope="module")
def whole(net):
    """Batch norm as it is, on the batch at once."""
    model, params, stats, images = net

    def objective(params):
        h, new = model.encode(params, stats, images, train=True)
        return pairs(h), (h, new)

    grads, (h, new) = jax.jit(jax.grad(objective, has_aux=True))(params)
    return h, new, grads["encoder"]


def close(a, b, tolerance=1e-4):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * max(1e-3, float(np.abs(y).max())))


def cosine(a, b):
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (a, b))
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_one_micro_batch_has_the_features_and_statistics_of_batch_norm(net, whole):
    h, new, _ = cached(net, 1)
    close((h, new), whole[:2])


def test_statistics_are_constants_pooled_over_micro_batches(net, in_four):
    """Written out: four strided parts, each encoded as in training, pooled, then one plain pass on constants."""
    model, params, stats, images = net

    @jax.jit
    def written_out(params):
        parts = [images.reshape(4, 4, 2, 8, 8, 3)[:, c].reshape(8, 8, 8, 3) for c in range(4)]
        # What moved statistics hold of the batch's own: new = 0.9 old + 0.1 batch.
        moved = [model.encode(params, stats, p, train=True)[1] for p in parts]
        own = [jax.tree.map(lambda new, old: (new - 0.9 * old) / 0.1, m, stats) for m in moved]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *own)

        def layer(s):
            mean = s["mean"].mean(0)
            return {"mean": mean, "var": s["var"].mean(0) + s["mean"].var(0)}

        pooled = jax.tree.map(layer, stacked, is_leaf=lambda x: isinstance(x, dict) and "var" in x)

        def objective(params):
            h, _ = model.encode(params, pooled, images, train=False)
            return pairs(h), h

        grads, h = jax.grad(objective, has_aux=True)(params)
        return h, jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, stats, pooled), grads["encoder"]

    close(in_four, written_out(params), 1e-3)


def test_how_far_first_pass_is_from_batch_norm(in_four, whole):
    """Measured, so that a change is noticed: the features nearly those of batch norm, the gradient only akin."""
    features = cosine(in_four[0], whole[0])
    angle = cosine(in_four[2], whole[2])
    print(f"cosine of features {features:.4f}, of gradients {angle:.4f}")
    assert features > 0.99
    assert 0.3 < angle < 0.99


def test_rows_that_do_not_exist_do_not_count(net):
    """Rubbish in the last four images and in all of the second micro-batch."""
    images = net[-1].copy()
    gone = np.zeros((4, 4, 2), bool)
    gone[3:] = gone[:, 1] = True
    gone = gone.reshape(-1)
    h1, new1, _ = cached(net, 4, jnp.asarray(~gone), images)
    images[gone] = 100 + 50 * tiny.normal(int(gone.sum()), 8, 8, 3, seed=3)
    h2, new2, _ = cached(net, 4, jnp.asarray(~gone), images)
    close((h1[~gone], new1), (h2[~gone], new2), 1e-5)
    unmasked = cached(net, 4, None, images)
    assert np.abs(unmasked[0][~gone] - h2[~gone]).max() > 0.1


def test_no_row_at_all_keeps_the_running_statistics(net):
    _, new, grads = cached(net, 4, jnp.zeros(32, bool))
    close(new, net[2], 1e-6)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_pool_is_the_statistics_of_all_rows():
    x = tiny.normal(30, 5) * 3 + 100
    parts = np.split(x, [10, 12, 12, 25])
    with np.errstate(invalid="ignore"), pytest.warns(RuntimeWarning):
        s = {k: jnp.stack([f(p, axis=0) for p in parts]) for k, f in (("mean", np.mean), ("var", np.var))}
    assert np.isnan(s["mean"]).any()
    got = grad_cache.pool({"layer": {"bn": s}}, jnp.array([len(p) for p in parts]))["layer"]["bn"]
    np.testing.assert_allclose(got["mean"], x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(got["var"], x.var(0), rtol=1e-4)


# ---- mistakes


@pytest.mark.parametrize(
    "change, devices, words",
    [
        (dict(micro=5), 1, "grad_cache.micro_batch 5 does not divide batch_size 16; use a divisor of it"),
        (dict(micro=4), 8, "grad_cache.micro_batch 4 does not divide over 8 devices; use a multiple of 8"),
        (dict(micro=-4), 1, "grad_cache.micro_batch is -4; expected a whole number"),
        (dict(micro=2.5), 1, "grad_cache.micro_batch is 2.5"),
        (dict(batch_norm="ignore"), 1, "grad_cache.batch_norm is 'ignore'; expected one of refuse, first_pass"),
        (dict(norm="batch", batch_norm="refuse"), 1, "use model.norm=group, or accept fixed statistics"),
        (dict(norm="batch", batch_norm="refuse"), 1, "grad_cache.batch_norm=first_pass"),
        (
            dict(background_capacity=6 / 16),
            1,
            "stages[0].background_capacity gives 6 rows, which do not divide into 4 micro-batches over 1 devices; "
            "use a multiple of 4 rows",
        ),
    ],
)
def test_mistakes_are_one_line(change, devices, words):
    c = make_config()
    with c.ignore_type():
        for key, value in change.items():
            if key == "background_capacity":
                c.stages[0].background_capacity = value
            elif key == "norm":
                c.model.norm = value
            else:
                c.grad_cache[{"micro": "micro_batch"}.get(key, key)] = value
    with pytest.raises(UserError) as error:
        tiny.recipe(c, num_devices=devices)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_misspelt_option():
    c = make_config()
    with c.unlocked():
        c.grad_cache.microbatch = 4
    with pytest.raises(UserError, match="grad_cache has no option 'microbatch'; did you mean 'micro_batch'"):
        tiny.recipe(c)


def test_batch_norm_without_grad_cache_is_not_refused():
    tiny.recipe(make_config(norm="batch", batch_norm="refuse", micro=0))


def test_a_view_of_another_length_is_refused_when_traced(net):
    model, params, stats, images = net
    with pytest.raises(UserError, match="a pass of 32 rows .* does not divide into 4 micro-batches"):
        grad_cache.encode(model, params, stats, images, chunks=4, groups=2)


# ---- the trainer


class _PreemptedAtTwo(Preemption):
    def reached(self, step):
        return step == 2


def test_a_run_stops_and_goes_on(tmp_path, monkeypatch):
    """On two devices, with no batch statistics to save, restore or evaluate with."""
    arrays = {}
    for split, n in (("train", 32), ("test", 16)):
        batch = tiny.batch(n, seed=n)
        arrays |= {f"{split}_images": batch["image"], f"{split}_labels": batch["label"]}
    np.savez(tmp_path / "data.npz", **arrays)

    c = make_config(stage=False, micro=8)
    c.duration, c.devices, c.report = "4 steps", 2, False
    c.log_every, c.checkpoint.every, c.eval.every = "1 step", "2 steps", "2 steps"
    c.eval.quick = c.eval.final = ("classifier",)
    c.eval.batch_size = 16
    with c.ignore_type():
        c.data.source = f"npz:{tmp_path / 'data.npz'}"
    with monkeypatch.context() as m, pytest.raises(Preempted):
        m.setattr(train, "Preemption", _PreemptedAtTwo)
        train.run(c, tmp_path / "run")
    results = train.run(c, tmp_path / "run")
    losses = {r["step"]: r["loss"] for r in read_metrics(tmp_path / "run") if "loss" in r}
    assert sorted(losses) == [1, 2, 3, 4] and np.isfinite(list(losses.values())).all()
    assert results["steps"] == 4 and "classifier" in results
