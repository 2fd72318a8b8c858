"""Barlow Twins against a written-out loop and itself on several devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_checks import assert_user_error, on_devices, value_and_grads

from jaxcl.losses.barlow_twins import barlow_twins


def slow_barlow_twins(z1, z2, *, off_diagonal_weight=3.9e-3, scale=1 / 32):
    (n, d), total = z1.shape, 0.0
    for j in range(d):
        for k in range(d):
            a = (z1[:, j] - z1[:, j].mean()) / np.sqrt(z1[:, j].var() + 1e-5)
            b = (z2[:, k] - z2[:, k].mean()) / np.sqrt(z2[:, k].var() + 1e-5)
            c = sum(a[i] * b[i] for i in range(n)) / n
            total += (c - 1) ** 2 if j == k else off_diagonal_weight * c**2
    return scale * total


def make(seed=0, n=8, d=5):
    rng = np.random.default_rng(seed)
    z1 = rng.normal(size=(n, d)) * np.exp(rng.normal(size=d)) + rng.normal(size=d)
    return [z1, 0.5 * z1 @ rng.normal(size=(d, d)) + rng.normal(size=(n, d))]


@pytest.mark.parametrize("options", [{}, dict(off_diagonal_weight=0.3, scale=1.0)], ids=["defaults", "other"])
def test_written_out_loop_and_finite_differences(wide, options):
    arrays = make()
    value, grads = value_and_grads(barlow_twins, *arrays, **options)
    np.testing.assert_allclose(value, slow_barlow_twins(*arrays, **options), rtol=1e-12)
    for which in range(2):
        for index in list(np.ndindex(8, 5))[::3]:
            ends = []
            for step in (1e-6, -1e-6):
                moved = [a.copy() for a in arrays]
                moved[which][index] += step
                ends.append(slow_barlow_twins(*moved, **options))
            np.testing.assert_allclose(grads[which][index], (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-9)


def test_float32():
    arrays = make(n=64, d=16)
    with jax.enable_x64(True):
        want, want_grads = value_and_grads(barlow_twins, *arrays)
    for offset in (0, 1000):  # an offset costs only the digits that it needs
        value, grads = value_and_grads(barlow_twins, *((a + offset).astype(np.float32) for a in arrays))
        rtol = 1e-5 if offset == 0 else 1e-3
        np.testing.assert_allclose(value, want, rtol=rtol)
        for got, expected in zip(grads, want_grads, strict=True):
            np.testing.assert_allclose(got, expected, atol=10 * rtol * np.abs(expected).max())


# ---- properties


def test_invariances(wide):
    z1, z2 = make()
    value = barlow_twins(z1, z2)
    order = np.random.default_rng(1).permutation(8)
    np.testing.assert_allclose(barlow_twins(z2, z1), value, rtol=1e-12)
    np.testing.assert_allclose(barlow_twins(z1[order], z2[order]), value, rtol=1e-12)
    np.testing.assert_allclose(barlow_twins(z1[:, ::-1], z2[:, ::-1]), value, rtol=1e-12)
    np.testing.assert_allclose(barlow_twins(z1 + 7, z2 - 5), value, rtol=1e-9)
    np.testing.assert_allclose(barlow_twins(1e4 * z1, 1e4 * z2), barlow_twins(1e5 * z1, 1e5 * z2), rtol=1e-9)
    np.testing.assert_allclose(barlow_twins(z1, z2, scale=2.0), 64 * value, rtol=1e-12)


def test_best_and_worst(wide):
    hadamard = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) * 1e3
    np.testing.assert_allclose(barlow_twins(hadamard, hadamard), 0, atol=1e-12)
    np.testing.assert_allclose(barlow_twins(hadamard, -hadamard, scale=1.0), 3 * 4, rtol=1e-9)
    same = np.repeat(hadamard[:, :1], 3, axis=1)
    np.testing.assert_allclose(barlow_twins(same, same, scale=1.0, off_diagonal_weight=0.1), 0.1 * 6, rtol=1e-9)


def test_vmap_and_traced_scalars(wide):
    batch = [np.stack(a) for a in zip(*(make(seed=s) for s in range(3)), strict=True)]
    want = [slow_barlow_twins(*make(seed=s)) for s in range(3)]
    np.testing.assert_allclose(jax.vmap(barlow_twins)(*batch), want, rtol=1e-12)
    traced = jax.jit(lambda w, s: barlow_twins(*make(), off_diagonal_weight=w, scale=s))(1, 0.5)
    np.testing.assert_allclose(traced, slow_barlow_twins(*make(), off_diagonal_weight=1, scale=0.5), rtol=1e-12)


# ---- numbers at the edge


@pytest.mark.parametrize("case", ["zero", "constant", "one_feature", "tiny", "large"])
def test_odd_cases_are_finite(case):
    z1, z2 = (a.astype(np.float32) for a in make())
    if case == "zero":
        z1[:], z2[:] = 0, 0
    elif case == "constant":
        z1[:], z2[:, 1] = 3, -1e4
    elif case == "one_feature":
        z1, z2 = z1[:, :1], z2[:, :1]
    elif case == "tiny":
        z1, z2 = z1 * 1e-20, z2 * 1e-20
    elif case == "large":
        z1, z2 = z1 * 1e15, z2 * 1e15
    value, grads = value_and_grads(barlow_twins, z1, z2)
    assert np.isfinite(value) and value >= 0
    assert all(np.isfinite(g).all() for g in grads)
    if case in ("zero", "constant"):
        np.testing.assert_allclose(value, 5 / 32, rtol=1e-6)  # no correlation anywhere


def test_half_precision_inputs_are_widened_first():
    arrays = [jnp.asarray(a, jnp.bfloat16) for a in make()]
    value, grads = value_and_grads(barlow_twins, *arrays)
    assert value.dtype == jnp.float32 and all(g.dtype == jnp.bfloat16 for g in grads)
    np.testing.assert_allclose(value, barlow_twins(*(a.astype(jnp.float32) for a in arrays)), rtol=1e-6)


def test_divergence_shows():
    z1, z2 = make()
    z1[1, 2] = np.nan
    assert np.isnan(barlow_twins(z1, z2))


# ---- several devices


@pytest.mark.parametrize("devices,inside", [(1, False), (2, False), (8, False), (8, True)])
def test_same_on_1_2_and_8_devices(wide, devices, inside):
    arrays = make(n=16)
    want, want_grads = value_and_grads(barlow_twins, *arrays)
    value, grads = on_devices(devices, functools.partial(barlow_twins, axis_name="data"), arrays, inside=inside)
    np.testing.assert_allclose(value, want, rtol=1e-12)
    for got, expected in zip(grads, want_grads, strict=True):
        assert np.abs(expected).max() > 1e-4
        np.testing.assert_allclose(got, expected, atol=1e-14)


def test_one_row_on_each_of_8_devices_is_a_batch_of_8(wide):
    arrays = make(n=8)
    value, _ = on_devices(8, functools.partial(barlow_twins, axis_name="data"), arrays)
    np.testing.assert_allclose(value, slow_barlow_twins(*arrays), rtol=1e-12)


# ---- mistakes


@pytest.mark.parametrize(
    "z1,z2,key",
    [
        (np.ones((6, 5), np.int32), np.ones((6, 5), np.float32), "z1"),
        (np.ones((6, 5), np.float32), np.ones((6, 4), np.float32), "z2"),
        (np.ones((6, 5), np.float32), np.ones((5, 5), np.float32), "z2"),
        (np.ones(5, np.float32), np.ones(5, np.float32), "z1"),
        (np.ones((1, 5), np.float32), np.ones((1, 5), np.float32), "z1"),
        (np.ones((0, 5), np.float32), np.ones((0, 5), np.float32), "z1"),
    ],
    ids=lambda a: a if isinstance(a, str) else f"{a.dtype}{a.shape}",
)
def test_mistakes_are_one_line(z1, z2, key):
    assert_user_error(lambda: barlow_twins(z1, z2), "barlow_twins: ", key)
