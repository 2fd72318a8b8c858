"""Schedules against the authors' numbers and the formulas written out; optimisers against hand-made steps."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcl.errors import UserError
from jaxcl.method.memory import InitContext, LinearProbe
from jaxcl.method.optimizers import OptimizerOptions, epoch_cosine, epoch_steps, make_optimizer, make_schedule
from jaxcl.method.terms.base import Embedding
from jaxcl.runtime.options import construct


def values(schedule, steps):
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(steps)))


def written_out(*, lr, epochs, per_epoch, cosine, rate=0.1, milestones=(), warm_epochs=0, warm_from=0.0):
    """golden/excon/README.md, section 6, as a loop."""
    eta = lr * rate**3

    def base(e):
        if cosine:
            return eta + (lr - eta) * (1 + math.cos(math.pi * e / epochs)) / 2
        return lr * rate ** sum(m < e for m in milestones)

    warm_to = base(warm_epochs) if cosine else lr
    out = []
    for e in range(1, epochs + 1):
        for b in range(per_epoch):
            if e <= warm_epochs:
                out.append(warm_from + ((b + (e - 1) * per_epoch) / (warm_epochs * per_epoch)) * (warm_to - warm_from))
            else:
                out.append(base(e))
    return np.array(out)


def test_golden_cosine(golden):
    d = golden("excon", "lr_cosine_200")
    schedule = epoch_cosine(float(d["base_lr"]), epochs=int(d["epochs"]), steps_per_epoch=int(d["steps_per_epoch"]))
    got = values(schedule, 200)
    np.testing.assert_allclose(got, d["expected_lr"].ravel(), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(got[-1], 0.5 / 1000, rtol=1e-3)
    assert got[0] < 0.5


@pytest.mark.parametrize("warm_epochs", [0, 1, 3])
def test_epoch_cosine_is_the_formula(warm_epochs):
    options = OptimizerOptions(lr=0.5, schedule="epoch_cosine", warmup=f"{warm_epochs} epochs", warmup_from=0.01)
    schedule = make_schedule(options, name="optimizer", steps=8 * 5, steps_per_epoch=5, batch_size=4)
    want = written_out(lr=0.5, epochs=8, per_epoch=5, cosine=True, warm_epochs=warm_epochs, warm_from=0.01)
    np.testing.assert_allclose(values(schedule, 40), want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("warm_epochs", [0, 2])
@pytest.mark.parametrize("milestones", [(), (3, 5), (1, 2, 8)])
def test_epoch_steps_is_the_formula(milestones, warm_epochs):
    options = OptimizerOptions(
        lr=0.2,
        schedule="epoch_steps",
        decay_epochs=milestones,
        decay_rate=0.2,
        warmup=f"{warm_epochs} epochs",
        warmup_from=0.01,
    )
    schedule = make_schedule(options, name="optimizer", steps=8 * 5, steps_per_epoch=5, batch_size=4)
    settings = dict(lr=0.2, epochs=8, per_epoch=5, cosine=False, rate=0.2, milestones=milestones)
    want = written_out(**settings, warm_epochs=warm_epochs, warm_from=0.01)
    np.testing.assert_allclose(values(schedule, 40), want, rtol=1e-5, atol=1e-7)


def test_golden_factors(golden):
    """CLAE's stairs for Plain and UEL, whose epochs count from 0; two steps an epoch."""
    d = golden("clae", "lr_schedule_plain_uel")
    options = OptimizerOptions(
        lr=float(d["base_lr"]),
        schedule="epoch_factors",
        decay_epochs=(120, 160, 200),
        decay_factors=(0.1, 0.05, 0.01),
    )
    schedule = make_schedule(options, name="optimizer", steps=2 * 301, steps_per_epoch=2, batch_size=4)
    assert (d["epoch"] == np.arange(301)).all()
    np.testing.assert_allclose(values(schedule, 2 * 301), np.repeat(d["lr"], 2), rtol=1e-6)


@pytest.mark.parametrize("warm_epochs", [0, 2])
def test_factors_are_of_the_first_rate(warm_epochs):
    options = OptimizerOptions(
        lr=0.2,
        schedule="epoch_factors",
        decay_epochs=(3, 5),
        decay_factors=(0.5, 2.0),
        warmup=f"{warm_epochs} epochs",
        warmup_from=0.1,
    )
    got = values(make_schedule(options, name="optimizer", steps=21, steps_per_epoch=3, batch_size=4), 21)
    want = np.repeat([0.2, 0.2, 0.2, 0.1, 0.1, 0.4, 0.4], 3)
    if warm_epochs:
        want[:6] = 0.1 + np.arange(6) / 6 * 0.1
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_no_stairs_is_constant():
    options = OptimizerOptions(lr=0.2, schedule="epoch_factors")
    got = values(make_schedule(options, name="optimizer", steps=6, steps_per_epoch=3, batch_size=4), 6)
    np.testing.assert_allclose(got, 0.2, rtol=1e-6)


def test_milestones_count_strictly():
    """The rate falls in the epoch after the milestone."""
    schedule = epoch_steps(1.0, decay_epochs=(2,), steps_per_epoch=3)
    np.testing.assert_allclose(values(schedule, 9), [1] * 6 + [0.1] * 3, rtol=1e-6)


def test_an_epoch_begun_counts_as_one():
    """12 steps of 5 an epoch are three epochs of the cosine, the last one cut short."""
    options = OptimizerOptions(lr=1.0, schedule="epoch_cosine")
    schedule = make_schedule(options, name="optimizer", steps=12, steps_per_epoch=5, batch_size=4)
    want = written_out(lr=1.0, epochs=3, per_epoch=5, cosine=True)[:12]
    np.testing.assert_allclose(values(schedule, 12), want, rtol=1e-5)


@pytest.mark.parametrize("warmup", ["0", "25%"])
def test_cosine_by_steps(warmup):
    options = OptimizerOptions(lr=0.4, schedule="cosine", warmup=warmup, warmup_from=0.1)
    got = values(make_schedule(options, name="optimizer", steps=40, steps_per_epoch=5, batch_size=4), 40)
    w = 10 if warmup != "0" else 0
    want = [0.1 + 0.3 * t / w if t < w else 0.2 * (1 + math.cos(math.pi * (t - w) / (40 - w))) for t in range(40)]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_constant_with_warmup():
    options = OptimizerOptions(lr=0.4, schedule="constant", warmup="4 steps")
    got = values(make_schedule(options, name="optimizer", steps=8, steps_per_epoch=5, batch_size=4), 8)
    np.testing.assert_allclose(got, [0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4], rtol=1e-6)


# ---- optimisers


PARAMS = {"kernel": np.array([[1.0, -2.0], [3.0, 0.5]]), "bias": np.array([0.5, -1.0]), "scale": np.array([1.0])}


def gradients(step):
    return {k: np.cos(step + np.arange(v.size)).reshape(v.shape) for k, v in PARAMS.items()}


def run(options, steps=4):
    tx = make_optimizer(options, optax.constant_schedule(options.lr))
    params = {k: jnp.asarray(v, jnp.float32) for k, v in PARAMS.items()}
    state = tx.init(params)
    step = jax.jit(lambda g, s, p: tx.update(g, s, p))
    for t in range(steps):
        updates, state = step({k: jnp.asarray(v, jnp.float32) for k, v in gradients(t).items()}, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_sgd_decays_every_parameter():
    """torch's SGD: the decay joins the gradient of biases and scales as well, before the momentum."""
    got = run(OptimizerOptions(kind="sgd", lr=0.1, momentum=0.9, weight_decay=0.02))
    params, velocity = {k: v.copy() for k, v in PARAMS.items()}, {k: 0.0 for k in PARAMS}
    for t in range(4):
        for k, g in gradients(t).items():
            velocity[k] = 0.9 * velocity[k] + g + 0.02 * params[k]
            params[k] = params[k] - 0.1 * velocity[k]
    for k, want in params.items():
        np.testing.assert_allclose(got[k], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.8)])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_adam_decays_every_parameter(betas, decay):
    """torch's Adam: the decay joins the gradient of biases and scales as well, so both means see it."""
    got = run(OptimizerOptions(kind="adam", lr=0.1, betas=betas, weight_decay=decay))
    params = {k: v.copy() for k, v in PARAMS.items()}
    m, v = {k: 0.0 for k in PARAMS}, {k: 0.0 for k in PARAMS}
    for t in range(4):
        for k, g in gradients(t).items():
            g = g + decay * params[k]
            m[k] = betas[0] * m[k] + (1 - betas[0]) * g
            v[k] = betas[1] * v[k] + (1 - betas[1]) * g**2
            corrected = (v[k] / (1 - betas[1] ** (t + 1))) ** 0.5
            params[k] = params[k] - 0.1 * m[k] / (1 - betas[0] ** (t + 1)) / (corrected + 1e-8)
    for k, want in params.items():
        np.testing.assert_allclose(got[k], want, rtol=1e-4, atol=1e-5)


def test_adamw_takes_its_betas():
    one, other = (run(OptimizerOptions(kind="adamw", lr=0.1, betas=b)) for b in ((0.9, 0.999), (0.5, 0.8)))
    assert np.abs(np.asarray(one["kernel"]) - np.asarray(other["kernel"])).max() > 1e-3


def test_sgd_is_the_chain_of_the_paper():
    options = OptimizerOptions(kind="sgd", lr=0.1, weight_decay=1e-4)
    ours = make_optimizer(options, optax.constant_schedule(0.1))
    chain = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, momentum=0.9))
    params = {k: jnp.asarray(v, jnp.float32) for k, v in PARAMS.items()}
    grads = {k: jnp.asarray(v, jnp.float32) for k, v in gradients(0).items()}
    for a, b in zip(
        *(jax.tree.leaves(tx.update(grads, tx.init(params), params)[0]) for tx in (ours, chain)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["adamw", "lars"])
def test_decay_of_matrices_only(kind):
    with_decay, without = (run(OptimizerOptions(kind=kind, lr=0.1, weight_decay=w), steps=2) for w in (0.5, 0.0))
    assert np.abs(np.asarray(with_decay["kernel"]) - np.asarray(without["kernel"])).max() > 1e-4
    for k in ("bias", "scale"):
        np.testing.assert_array_equal(with_decay[k], without[k])


def test_lars_has_no_trust_ratio_for_vectors():
    """The first step: lr (g + decay w) 0.001 |w| / |g + decay w| of matrices, lr g of biases and norms."""
    got, g = run(OptimizerOptions(kind="lars", lr=0.4, weight_decay=0.1), steps=1), gradients(0)
    for k, p in PARAMS.items():
        step = g[k]
        if p.ndim > 1:
            step = g[k] + 0.1 * p
            step = step * 0.001 * np.linalg.norm(p) / np.linalg.norm(step)
        np.testing.assert_allclose(got[k], p - 0.4 * step, rtol=1e-5, atol=1e-7, err_msg=k)


def test_golden_schedules_of_moco(golden):
    d = golden("non_semantic_negatives", "schedules")
    step = dict(decay_epochs=(120, 160), decay_factors=(0.1, 0.01))
    linear = dict(decay_epochs=(30, 40, 50), decay_factors=(0.1, 0.01, 0.001))
    assert tuple(d["step_milestones"]) == step["decay_epochs"] and tuple(d["linear_milestones"]) == (30, 40, 50)
    for name, options in (
        ("cosine_lr", OptimizerOptions(lr=0.03, schedule="released")),
        ("step_lr", OptimizerOptions(lr=0.03, schedule="epoch_factors", **step)),
        ("linear_lr", OptimizerOptions(lr=10.0, schedule="epoch_factors", **linear)),
    ):
        epochs = len(d[name])
        schedule = make_schedule(options, name="optimizer", steps=3 * epochs, steps_per_epoch=3, batch_size=4)
        np.testing.assert_allclose(values(schedule, 3 * epochs), np.repeat(d[name], 3), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_the_gradient_is_clipped_not_the_update(kind):
    """Three steps written out: the clip comes before the decay, the momentum and the rate; cases F."""
    options = dict(kind=kind, lr=0.1, momentum=0.9, betas=(0.8, 0.9), weight_decay=0.02, clip_norm=0.5)
    got, params = run(OptimizerOptions(**options), steps=3), {k: v.copy() for k, v in PARAMS.items()}
    m, v = {k: 0.0 for k in PARAMS}, {k: 0.0 for k in PARAMS}
    for t in range(3):
        norm = math.sqrt(sum((g**2).sum() for g in gradients(t).values()))
        for k, g in gradients(t).items():
            g = g * min(1, 0.5 / norm) + 0.02 * params[k]
            if kind == "sgd":
                m[k] = 0.9 * m[k] + g
                params[k] = params[k] - 0.1 * m[k]
                continue
            m[k], v[k] = 0.8 * m[k] + 0.2 * g, 0.9 * v[k] + 0.1 * g**2
            root = (v[k] / (1 - 0.9 ** (t + 1))) ** 0.5
            params[k] = params[k] - 0.1 * m[k] / (1 - 0.8 ** (t + 1)) / (root + 1e-8)
    for k, want in params.items():
        np.testing.assert_allclose(got[k], want, rtol=1e-4, atol=1e-6)


def test_a_gradient_within_the_norm_is_not_clipped():
    """cases F."""
    options = dict(kind="sgd", lr=0.1, weight_decay=0.02)
    for k, want in run(OptimizerOptions(**options)).items():
        np.testing.assert_array_equal(run(OptimizerOptions(**options, clip_norm=100.0))[k], want)


def test_clipping_is_of_the_global_norm():
    options = OptimizerOptions(kind="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, clip_norm=0.5)
    got = run(options, steps=1)
    norm = math.sqrt(sum((g**2).sum() for g in gradients(0).values()))
    assert norm > 0.5
    for k, g in gradients(0).items():
        np.testing.assert_allclose(got[k], PARAMS[k] - g * 0.5 / norm, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(schedule="cosin"), "optimizer.schedule is 'cosin'; expected one of constant, cosine"),
        (dict(lr=0.0), "optimizer.lr is 0.0; expected a number above 0"),
        (dict(lr=float("nan")), "optimizer.lr is nan"),
        (dict(warmup="5 weeks"), "optimizer.warmup is '5 weeks'"),
        (dict(kind="adan"), "optimizer.kind is 'adan'; expected one of sgd, adam, adamw, torch_adamw, lars"),
        (dict(kind="adam", betas=(0.9,)), "optimizer.betas is (0.9,)"),
        (dict(kind="adam", betas=(0.9, 1.0)), "optimizer.betas is (0.9, 1.0)"),
        (dict(schedule="epoch_factors", decay_epochs=(1, 2), decay_factors=(0.1,)), "one factor for each"),
        (dict(schedule="epoch_factors", decay_epochs=(2, 1), decay_factors=(0.1, 0.2)), "expected ascending epochs"),
    ],
)
def test_mistakes(options, words):
    with pytest.raises(UserError) as error:
        chosen = construct("optimizer", OptimizerOptions, options)
        schedule = make_schedule(chosen, name="optimizer", steps=40, steps_per_epoch=5, batch_size=4)
        make_optimizer(chosen, schedule)
    assert words in str(error.value) and "\n" not in str(error.value)


# ---- Thanos


@pytest.mark.parametrize("run, base", [("lr_pretrain", 0), ("lr_probe", 1)])
def test_golden_wave(golden, run, base):
    """The cosine of 100 epochs, which runs of 600 pass through three times up and down; three steps an epoch."""
    d = golden("thanos", "lr_schedule")
    lr, want = float(d["base_lr"][base]), d[run]
    options = OptimizerOptions(lr=lr, schedule="released", cosine_epochs=int(d["t_max"][base]))
    schedule = make_schedule(options, name="optimizer", steps=3 * len(want), steps_per_epoch=3, batch_size=4)
    np.testing.assert_allclose(values(schedule, 3 * len(want)), np.repeat(want, 3), rtol=1e-5, atol=1e-6 * lr)


def test_wave_over_the_whole_run():
    """12 steps of 5 an epoch are three epochs; the first has the rate itself, the last has not come to 0."""
    options = OptimizerOptions(lr=0.4, schedule="released")
    got = values(make_schedule(options, name="optimizer", steps=12, steps_per_epoch=5, batch_size=4), 12)
    np.testing.assert_allclose(got, np.repeat([0.4, 0.3, 0.1], 5)[:12], rtol=1e-5)


def test_wave_with_warmup():
    """Linear to the cosine's value in the last epoch of the warm-up."""
    options = OptimizerOptions(lr=0.4, schedule="released", cosine_epochs=3, warmup="2 epochs", warmup_from=0.1)
    got = values(make_schedule(options, name="optimizer", steps=24, steps_per_epoch=4, batch_size=4), 24)
    want = np.repeat([0.4, 0.3, 0.1, 0.0, 0.1, 0.3], 4)
    want[:8] = 0.1 + np.arange(8) / 8 * (0.3 - 0.1)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("eps", [1e-8, 0.1])
def test_torch_adamw_decays_every_parameter(eps):
    """The decay is lr * weight_decay * p, beside the step of Adam, on biases and scales as well."""
    got = run(OptimizerOptions(kind="torch_adamw", lr=0.1, betas=(0.8, 0.9), eps=eps, weight_decay=0.3))
    params = {k: v.copy() for k, v in PARAMS.items()}
    m, v = {k: 0.0 for k in PARAMS}, {k: 0.0 for k in PARAMS}
    for t in range(4):
        for k, g in gradients(t).items():
            m[k], v[k] = 0.8 * m[k] + 0.2 * g, 0.9 * v[k] + 0.1 * g**2
            root = (v[k] / (1 - 0.9 ** (t + 1))) ** 0.5
            params[k] = params[k] * (1 - 0.1 * 0.3) - 0.1 * m[k] / (1 - 0.8 ** (t + 1)) / (root + eps)
    for k, want in params.items():
        np.testing.assert_allclose(got[k], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(schedule="released", cosine_epochs=-1), "optimizer.cosine_epochs is -1"),
        (dict(kind="torch_adamw", eps=0.0), "optimizer.eps is 0.0; expected a number above 0"),
    ],
)
def test_mistakes_in_what_thanos_added(options, words):
    test_mistakes(options, words)


@pytest.mark.parametrize(
    "kind, warmup, low",
    [
        ("epoch_cosine", "10 epochs", True),
        ("epoch_cosine", "9 epochs", True),  # it ends at the cosine's value, which is low by then
        ("epoch_cosine", "10%", False),
        ("cosine", "30 epochs", True),
        ("cosine", "9 epochs", False),
    ],
)
def test_a_warmup_as_long_as_the_run(caplog, kind, warmup, low):
    """cases A.14: the rate would never come near lr."""
    options = OptimizerOptions(lr=0.5, warmup=warmup, warmup_from=0.01, schedule=kind)
    with caplog.at_level("WARNING", logger="jaxcl"):
        schedule = make_schedule(options, name="optimizer", steps=50, steps_per_epoch=5, batch_size=4)
    assert (values(schedule, 50).max() < 0.25) == low
    assert any("optimizer.warmup" in r.getMessage() for r in caplog.records) == low


def test_the_trust_coefficient_scales_the_step_of_matrices():
    """cases E.3."""
    plain, small = (run(OptimizerOptions(kind="lars", lr=0.4, **o), steps=1) for o in ({}, {"trust_coefficient": 0.02}))
    for k, p in PARAMS.items():
        factor = 20 if p.ndim > 1 else 1
        np.testing.assert_allclose(small[k] - p, factor * (np.asarray(plain[k]) - p), rtol=1e-3, atol=1e-6)


def larc(lr, steps, *, coefficient, decay, momentum=0.9):
    """NVIDIA's LARC with clipping in front of torch's SGD, in float64; vectors by SGD without decay."""
    params, buffers = dict(PARAMS), {k: np.zeros_like(p) for k, p in PARAMS.items()}
    for step in range(steps):
        for k, p in params.items():
            g = gradients(step)[k]
            if p.ndim > 1:
                size, slope = np.linalg.norm(p), np.linalg.norm(g)
                local = coefficient * size / (slope + decay * size + 1e-8)
                g = min(local / lr[step], 1) * (g + decay * p)
            buffers[k] = momentum * buffers[k] + g
            params[k] = p - lr[step] * buffers[k]
    return params


@pytest.mark.parametrize("coefficient", [0.02, 50.0])  # below the clip and above it
def test_clipped_lars_is_larc(coefficient):
    """cases E.3."""
    options = OptimizerOptions(
        kind="lars", lr=0.4, weight_decay=0.1, clip_trust=True, trust_coefficient=coefficient, schedule="cosine"
    )
    schedule = make_schedule(options, name="optimizer", steps=4, steps_per_epoch=4, batch_size=1)
    tx = make_optimizer(options, schedule)
    params = {k: jnp.asarray(v, jnp.float32) for k, v in PARAMS.items()}
    state = tx.init(params)
    for step in range(3):
        grads = {k: jnp.asarray(v, jnp.float32) for k, v in gradients(step).items()}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    rates = [0.4 * (1 + math.cos(math.pi * s / 4)) / 2 for s in range(3)]
    want = larc(rates, 3, coefficient=coefficient, decay=0.1)
    for k in PARAMS:
        np.testing.assert_allclose(params[k], want[k], rtol=1e-5, atol=1e-6, err_msg=k)


def test_clipped_lars_at_a_rate_of_zero_is_finite():
    """cases E.3: a warm-up from 0, and a matrix of zeros."""
    options = OptimizerOptions(kind="lars", clip_trust=True)
    tx = make_optimizer(options, optax.constant_schedule(0.0))
    params = {"a": jnp.ones((2, 2)), "b": jnp.zeros((2, 2))}
    updates, _ = tx.update(params, tx.init(params), params)
    assert all(np.all(np.asarray(u) == 0) for u in jax.tree.leaves(updates))


def test_a_probe_takes_steps_on_parts_of_a_batch():
    """cases E.9: two steps of SGD on every second row, as two batches of half the size would be."""
    h = jax.random.normal(jax.random.key(0), (8, 5))
    label = jnp.arange(8) % 3
    tx = make_optimizer(OptimizerOptions(lr=0.5), optax.constant_schedule(0.5))
    halves = LinearProbe(schedule="sequential", batch_size=4)
    whole = LinearProbe(schedule="sequential")
    memory = halves.init(jax.random.key(1), InitContext(5, 3, None, None, tx))
    got, metrics = halves.learn(memory, [Embedding(h, h)], label, tx)
    want = memory
    for part in (slice(0, None, 2), slice(1, None, 2)):
        want, _ = whole.learn(want, [Embedding(h[part], h[part])], label[part], tx)
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert metrics["probe/loss"].shape == ()
