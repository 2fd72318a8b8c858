"""Instance spreading against golden numbers, a written-out loop, and itself on several devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_checks import ENGINES, assert_close, assert_user_error, on_devices, value_and_grads

from jaxcl.losses.instance_spread import instance_spread


@pytest.mark.parametrize("wide", [True, False], ids=["float64", "float32"])
@pytest.mark.parametrize("name", ["uel_b8_d16_t01", "uel_b16_d32_t05", "uel_b32_d128_t01"])
def test_golden(golden, name, wide):
    d = golden("clae", name)
    options = dict(temperature=float(d["temperature"]), negative_multiplier=float(d["neg_m"]))
    with jax.enable_x64(wide):
        features = jnp.asarray(d["features"], jnp.float64 if wide else jnp.float32)
        for how in ENGINES if wide else ("tiled",):
            value, (grad,) = value_and_grads(instance_spread, features, implementation=how, **options)
            assert value.dtype == grad.dtype == features.dtype
            assert_close(value, d["loss"], 1e-9 if wide else 1e-4)
            assert_close(grad, d["grad_features"], 1e-9 if wide else 1e-4)


# ---- the definition, element by element


def slow_instance_spread(features, keys=None, *, temperature=0.1, negative_multiplier=1.0):
    x = np.asarray(features, np.longdouble)
    y = x if keys is None else np.asarray(keys, np.longdouble)
    n, m, total = len(x), negative_multiplier, 0.0
    for i in range(n):
        p = (i + n // 2) % n
        e = {j: np.exp(x[i] @ y[j] / temperature) for j in range(n) if j != i}
        negatives = [j for j in e if j != p]
        z = e[p] + m * sum(e[j] for j in negatives)
        total -= np.log(e[p] / z)
        for j in negatives:
            # 1 - P_ij as a sum of positive terms
            left = e[p] + m * sum(e[k] for k in negatives if k != j) + (m - 1) * e[j]
            total -= m * np.log(left / z)
    return float(total / n)


def make(seed=0, b=4, d=5):
    """Rows of about unit length, with similar partners."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(b, d))
    z = np.concatenate([z, z + 0.7 * rng.normal(size=(b, d))])
    return z / np.linalg.norm(z, axis=1, keepdims=True) * rng.uniform(0.8, 1.2, size=(2 * b, 1))


@pytest.mark.parametrize("implementation", ENGINES)
@pytest.mark.parametrize("m", [1.0, 1.5, 3.0])
def test_written_out_loop_and_finite_differences(wide, m, implementation):
    features = make()
    for temperature in (0.05, 0.1, 0.7):
        options = dict(temperature=temperature, negative_multiplier=m)
        value, (grad,) = value_and_grads(instance_spread, features, implementation=implementation, **options)
        np.testing.assert_allclose(value, slow_instance_spread(features, **options), rtol=1e-10)
        for index in list(np.ndindex(*features.shape))[::7]:
            ends = []
            for step in (1e-6, -1e-6):
                moved = features.copy()
                moved[index] += step
                ends.append(slow_instance_spread(moved, features, **options))  # the keys are constant
            np.testing.assert_allclose(grad[index], (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-7)


# ---- properties


def test_order_and_scale(wide):
    features = make()
    value, (grad,) = value_and_grads(instance_spread, features)
    order = np.array([2, 0, 3, 1])
    order = np.concatenate([order, order + 4])
    swapped = np.roll(np.arange(8), 4)
    for rows in (order, swapped):
        got, (got_grad,) = value_and_grads(instance_spread, features[rows])
        np.testing.assert_allclose(got, value, rtol=1e-12)
        np.testing.assert_allclose(got_grad, grad[rows], atol=1e-12)
    # The rows are not scaled inside: doubling the temperature equals dividing the features by the root of two.
    got = instance_spread(features, temperature=0.2)
    np.testing.assert_allclose(got, instance_spread(features / np.sqrt(2)), rtol=1e-12)


@pytest.mark.parametrize("m", [1, 2.5])
def test_identical_rows(m):
    others = m * 6  # of 8 rows, without the row and its partner
    want = np.log(1 + others) - others * np.log(1 - 1 / (1 + others))
    for how in ENGINES:
        got = instance_spread(jnp.ones((8, 4)) / 2, negative_multiplier=m, implementation=how)
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_vmap_and_traced_scalars(wide):
    batch = np.stack([make(seed=s) for s in range(3)])
    want = [instance_spread(f) for f in batch]
    for how in ENGINES:
        loss = functools.partial(instance_spread, implementation=how)
        np.testing.assert_allclose(jax.vmap(loss)(batch), want, rtol=1e-12)
    traced = jax.jit(lambda t, m: instance_spread(batch[0], temperature=t, negative_multiplier=m))(0.2, 2)
    np.testing.assert_allclose(traced, instance_spread(batch[0], temperature=0.2, negative_multiplier=2), rtol=1e-13)


# ---- numbers at the edge


@pytest.mark.parametrize("m", [1.0, 2.0])
@pytest.mark.parametrize("implementation", ENGINES)
@pytest.mark.parametrize("case", ["aligned", "confused", "tied"])
def test_a_chance_that_rounds_to_one(case, implementation, m):
    """log(1 - P) of the reference is -inf here. The value is that of the definition, and the gradient is finite."""
    rng = np.random.default_rng(0)
    z = np.eye(4, 6)
    partners = {"aligned": z, "confused": np.roll(z, 1, axis=0), "tied": z[[1, 1, 3, 3]]}[case]
    features = np.concatenate([z, partners + 0.01 * rng.normal(size=z.shape)]).astype(np.float32)
    # float32 loses 1 - P at a gap of 17 between logits. A temperature of 1/50 exceeds it; long doubles still suffice.
    for temperature in (0.05, 0.02):
        options = dict(temperature=temperature, negative_multiplier=m)
        value, (grad,) = value_and_grads(instance_spread, features, implementation=implementation, **options)
        np.testing.assert_allclose(value, slow_instance_spread(features, **options), rtol=1e-5, atol=1e-15)
        assert np.isfinite(grad).all()
        with jax.enable_x64(True):
            wide = value_and_grads(
                instance_spread, features.astype(np.float64), implementation=implementation, **options
            )
        assert_close(grad, wide[1][0], 1e-4)
        assert case == "aligned" or np.abs(grad).max() > 1  # the gradient does not vanish


@pytest.mark.parametrize("temperature", [5e-4, 100.0])
@pytest.mark.parametrize("case", ["zero", "large", "duplicates", "two_images"])
def test_odd_cases_are_finite(case, temperature):
    features = make(b=6).astype(np.float32)
    if case == "zero":
        features[2] = 0
    elif case == "large":
        features *= 100
    elif case == "duplicates":
        features[:] = features[:1]
    elif case == "two_images":
        features = features[[0, 1, 6, 7]]
    for how in ENGINES:
        value, (grad,) = value_and_grads(instance_spread, features, temperature=temperature, implementation=how)
        assert np.isfinite(value) and value >= 0 and np.isfinite(grad).all()


def test_half_precision_inputs_are_widened_first():
    features = jnp.asarray(make(b=8), jnp.bfloat16)
    value, (grad,) = value_and_grads(instance_spread, features)
    assert value.dtype == jnp.float32 and grad.dtype == jnp.bfloat16
    np.testing.assert_allclose(value, instance_spread(features.astype(jnp.float32)), rtol=1e-6)


def test_divergence_shows():
    features = make()
    features[1, 2] = np.nan
    assert np.isnan(instance_spread(features))


# ---- several devices


def by_device(features, devices):
    """Order of the rows on the devices: each device holds its first views, then its second views."""
    half = len(features) // 2
    rows = np.arange(half).reshape(devices, -1)
    return np.concatenate([rows, rows + half], axis=1).reshape(-1)


@pytest.mark.parametrize("implementation,counts", [("dense", (2,)), ("tiled", (8,)), ("ring", (1, 2, 8))])
def test_same_on_1_2_and_8_devices(wide, implementation, counts):
    features = make(b=16)
    options = dict(temperature=0.2, negative_multiplier=1.5)
    want, (want_grad,) = value_and_grads(instance_spread, features, **options)
    for devices in counts:
        rows = by_device(features, devices)
        loss = functools.partial(instance_spread, implementation=implementation, axis_name="data", **options)
        value, (grad,) = on_devices(devices, loss, [features[rows]])
        np.testing.assert_allclose(value, want, rtol=1e-12)
        np.testing.assert_allclose(grad, want_grad[rows], atol=1e-13)


def test_gradient_inside_shard_map_is_that_of_the_global_loss(wide):
    features = make(b=16)
    rows = by_device(features, 8)
    value, (grad,) = on_devices(8, functools.partial(instance_spread, axis_name="data"), [features[rows]], inside=True)
    want, (want_grad,) = value_and_grads(instance_spread, features)
    np.testing.assert_allclose(value, want, rtol=1e-12)
    np.testing.assert_allclose(grad, want_grad[rows], atol=1e-12)


# ---- mistakes


@pytest.mark.parametrize(
    "options",
    [
        dict(features=np.ones((6, 5), np.int32)),
        dict(features=np.ones((5, 5), np.float32)),
        dict(features=np.ones((2, 5), np.float32)),
        dict(features=np.ones((0, 5), np.float32)),
        dict(features=np.ones((3, 2, 5), np.float32)),
        dict(temperature=0.0),
        dict(negative_multiplier=0.5),
        dict(negative_multiplier=float("nan")),
        dict(implementation="fast"),
        dict(implementation="ring"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(options):
    options = dict(options)
    key = next(iter(options))
    features = options.pop("features", np.ones((6, 5), np.float32))
    assert_user_error(lambda: instance_spread(features, **options), "instance_spread: ", key)
