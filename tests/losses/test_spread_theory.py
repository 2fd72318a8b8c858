"""Theory of L_spread: when a class collapses, how far it spreads, and which permutations do not change it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.losses.spread import spread


@functools.partial(jax.jit, static_argnames=("norm",))
def terms(views, labels, temperature, norm="unit"):
    _, parts = spread(views, labels, temperature=temperature, norm=norm)
    return jnp.stack([parts["attract"], parts["repel"]])


def simplex(n):
    """n unit vectors [n, n], each pair at cosine -1 / (n - 1)."""
    centred = np.eye(n) - 1 / n
    return centred / np.linalg.norm(centred, axis=1, keepdims=True)


def family_axes(K, n):  # noqa: N803 (the symbols of the theory)
    """Class direction and private direction of every point [K n, K + K n], and the labels."""
    labels = np.repeat(np.arange(K), n)
    class_axis = np.hstack([simplex(K)[labels], np.zeros((K * n, K * n))])
    private_axis = np.hstack([np.zeros((K * n, K)), np.kron(np.eye(K), simplex(n))])
    return class_axis, private_axis, labels


@jax.jit
def family_terms(class_axis, private_axis, labels, temperature, t):
    """A and R along the family sqrt(1 - t) class + sqrt(t) private, both views equal -> [len(t), 2]."""

    def at(t):
        z = jnp.sqrt(1 - t) * class_axis + jnp.sqrt(t) * private_axis
        return terms(jnp.stack([z, z]), labels, temperature)

    return jax.lax.map(at, t)


def test_collapse(wide, golden):
    d = golden("thanos", "theory_collapse")
    rng = np.random.default_rng(0)
    for K, n, temp, supcon, cnce in zip(*(d[k] for k in ("K", "n", "temp", "supcon", "cnce")), strict=True):  # noqa: N806
        labels = np.repeat(np.arange(K), n)
        z = simplex(K)[labels]
        bound = np.log1p(n * (K - 1) * np.exp(-K / ((K - 1) * temp)))
        got = terms(jnp.stack([z, z]), labels, temp)
        np.testing.assert_allclose(got, [supcon, cnce], rtol=1e-9)
        np.testing.assert_allclose(got, [bound, np.log(n)], rtol=1e-9)
        # The bounds hold for any two views, and noise moves both losses above them.
        for noise in (0.1, 1.0):
            views = np.stack([z, z]) + noise * rng.normal(size=(2, *z.shape))
            a, r = terms(jnp.asarray(views), labels, temp)
            assert a > bound
            assert r > np.log1p((n - 1) * np.exp(-n / ((n - 1) * temp)))


def test_spread_curve_and_thresholds(wide, golden):
    d = golden("thanos", "theory_spread_curve")
    step = 1 / 200
    near = 1e-6  # for the slopes at collapse
    grid = np.append(np.linspace(0, 1, 201), near)
    for k, (K, n, temp) in enumerate(zip(d["K"], d["n"], d["temp"], strict=True)):  # noqa: N806
        curve = np.asarray(family_terms(*family_axes(K, n), temp, grid))
        np.testing.assert_allclose(grid[:201:10], d["t"], atol=1e-15)
        np.testing.assert_allclose(curve[:201:10], np.stack([d["supcon"][k], d["cnce"][k]], 1), rtol=1e-8, atol=1e-12)
        # Collapse is the optimum exactly if alpha is above the weight at which the slopes cancel.
        slope_a, slope_r = (curve[-1] - curve[0]) / near
        e = n * (K - 1) * np.exp(-K / ((K - 1) * temp))
        q = e / (1 + e)
        np.testing.assert_allclose(d["alpha_threshold"][k], 1 / (1 + q * K / (K - 1)), rtol=1e-12)
        np.testing.assert_allclose(-slope_r / (slope_a - slope_r), d["alpha_threshold"][k], rtol=1e-4)
        for alpha, t_star in zip(d["alpha"], d["t_star"][k], strict=True):
            best = np.argmin(curve[:201] @ [alpha, 1 - alpha]) * step
            assert abs(best - t_star) <= step
            if abs(alpha - d["alpha_threshold"][k]) > 0.02:
                assert (best == 0) == (alpha > d["alpha_threshold"][k])


def test_permutations(wide, golden):
    d = golden("thanos", "theory_permutation")
    joint, other = d["perm_joint"], d["perm_view1"]

    def measure(views):
        a, r = terms(jnp.asarray(views), d["labels"], float(d["temp"]), norm="none")
        return [a, r, (a + r) / 2]

    first, second = d["views"]
    base = measure(d["views"])
    np.testing.assert_allclose(base, d["base"], rtol=1e-9)
    np.testing.assert_allclose(measure(d["views"][:, joint]), base, rtol=1e-12)
    apart = measure(np.stack([first[joint], second[other]]))
    np.testing.assert_allclose(apart, d["different_perm_per_view"], rtol=1e-9)
    np.testing.assert_allclose(apart[0], base[0], rtol=1e-12)
    assert apart[1] > base[1] + 1


@functools.partial(jax.jit, static_argnames=("steps", "clamp"))
def descend(init, labels, temperature, lr, alpha, *, steps, clamp):
    """Projected gradient descent on free unit vectors -> (final z, final loss, loss before every step)."""

    def loss(z):
        clip = 1.0 if clamp else None
        views = jnp.stack([z, z])
        options = dict(temperature=temperature, clip_positive=clip, norm="none")  # z is kept on the sphere
        return spread(views, labels, a_lc=alpha, a_spread=1 - alpha, **options)[0]

    def step(z, k):
        value, gradient = jax.value_and_grad(loss)(z)
        z = z - lr * (1 - 0.95 * k / steps) * gradient
        return z / jnp.linalg.norm(z, axis=1, keepdims=True), value

    z, losses = jax.lax.scan(step, init, jnp.arange(steps))
    return z, loss(z), losses


@pytest.mark.parametrize("clamp", [False, True])
def test_descent_lands_where_theory_says(wide, golden, clamp):
    d = golden("thanos", "theory_descent")
    cases = np.flatnonzero(d["clamp"] == clamp)
    run = functools.partial(descend, steps=int(d["steps"]), clamp=clamp)
    z, final, losses = jax.vmap(run, in_axes=(None, None, None, None, 0))(
        d["init"], d["labels"], float(d["temp"]), float(d["lr"]), d["alpha"][cases]
    )
    cosines = np.einsum("kid,kjd->kij", z, z)
    same = d["labels"][:, None] == d["labels"][None]
    within, cross = cosines[:, same & ~np.eye(len(same), dtype=bool)].mean(1), cosines[:, ~same].mean(1)
    if clamp:  # no collapse: the cosine settles at the temperature, on the kink
        np.testing.assert_allclose(within, float(d["temp"]), atol=1e-2)
        np.testing.assert_allclose(final, d["final_loss"][cases], atol=1e-2)
    else:
        np.testing.assert_allclose(losses[:, ::50], d["curve"][cases], rtol=1e-7)
        np.testing.assert_allclose(final, d["final_loss"][cases], rtol=1e-7)
        np.testing.assert_allclose(within, d["within"][cases], atol=1e-6)
        np.testing.assert_allclose(cross, d["cross"][cases], atol=1e-6)
        np.testing.assert_allclose(within, d["family_within"][cases], atol=2e-3)
