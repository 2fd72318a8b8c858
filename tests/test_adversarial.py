"""FGSM and PGD against their definition, in both balls, from random starts, and mistakes in units."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.adversarial import fgsm, pgd
from jaxcl.errors import UserError
from jaxcl.method import sharding


def images(seed=0, shape=(3, 4, 4, 3)):
    return np.random.default_rng(seed).random(shape).astype(np.float32)


TARGET = images(1)


def loss(x):
    return jnp.sum((x - TARGET) ** 2)


def slow_pgd(x, epsilon, step_size, num_steps, delta0=None, bounds=(0, 1)):
    v = np.array(x, np.float64)
    if delta0 is not None:
        v = np.clip(v + delta0, *bounds)
    for _ in range(num_steps):
        v = v + step_size * np.sign(2 * (v - TARGET))
        v = np.minimum(np.maximum(v, x - epsilon), x + epsilon)
        if bounds is not None:
            v = np.clip(v, *bounds)
    return v


def test_fgsm_is_one_step_along_the_sign():
    x = images()
    np.testing.assert_allclose(fgsm(loss, x, epsilon=0.1), slow_pgd(x, 0.1, 0.1, 1), atol=1e-6)
    free = fgsm(loss, x, epsilon=0.1, bounds=None)
    np.testing.assert_allclose(free, slow_pgd(x, 0.1, 0.1, 1, bounds=None), atol=1e-6)
    assert free.max() > 1 and free.min() < 0
    np.testing.assert_allclose(np.abs(free - x), 0.1, atol=1e-6)


def test_sign_of_zero_is_zero():
    x = images()
    np.testing.assert_array_equal(fgsm(lambda v: jnp.sum(v[0]), x, epsilon=0.1)[1:], x[1:])


def test_epsilon_per_channel_and_zero():
    x = images()
    epsilon = np.array([0.0, 0.01, 0.2])
    moved = np.abs(fgsm(loss, x, epsilon=epsilon, bounds=None) - x)
    np.testing.assert_allclose(moved, np.broadcast_to(epsilon, x.shape), atol=1e-6)
    np.testing.assert_array_equal(fgsm(loss, x, epsilon=0.0), x)


@pytest.mark.parametrize("delta0", [None, 0.07])
def test_pgd_against_the_loop(delta0):
    x = images()
    start = None if delta0 is None else np.random.default_rng(2).uniform(-delta0, delta0, x.shape)
    got = pgd(loss, x, epsilon=0.1, step_size=0.04, num_steps=5, delta0=start)
    np.testing.assert_allclose(got, slow_pgd(x, 0.1, 0.04, 5, start), atol=1e-6)
    assert np.abs(got - x).max() <= 0.1 + 1e-6


def test_default_step_and_no_steps():
    x = images()
    got = pgd(loss, x, epsilon=0.1, num_steps=4)
    np.testing.assert_allclose(got, slow_pgd(x, 0.1, 2.5 * 0.1 / 4, 4), atol=1e-6)
    np.testing.assert_array_equal(pgd(loss, x, epsilon=0.1, num_steps=0), x)
    np.testing.assert_allclose(pgd(loss, x, epsilon=0.1, num_steps=0, delta0=np.full_like(x, 2.0)), np.ones_like(x))


def test_one_step_of_pgd_is_fgsm_and_the_loss_rises():
    x = images()
    one = pgd(loss, x, epsilon=0.05)
    np.testing.assert_array_equal(one, fgsm(loss, x, epsilon=0.05))
    many = pgd(loss, x, epsilon=0.05, num_steps=10)
    assert loss(many) >= loss(one) - 1e-4 and loss(one) > loss(x)


def test_traced_epsilon_under_jit():
    x = images()
    compiled = jax.jit(lambda e: pgd(loss, x, epsilon=e, num_steps=3))
    np.testing.assert_allclose(compiled(0.1), pgd(loss, x, epsilon=0.1, num_steps=3), atol=1e-6)


def test_only_the_images_are_differentiated():
    """The attack carries no gradient, neither to arrays in the closure of the loss nor through the steps."""
    x = jnp.asarray(images())

    def outer(x, w):
        return jnp.sum(pgd(lambda v: jnp.sum(w * v**3), x, epsilon=0.1, num_steps=2, bounds=None))

    with_x, with_w = jax.grad(outer, argnums=(0, 1))(x, 2.0)
    assert with_w == 0
    assert np.isfinite(with_x).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_type_is_kept(dtype):
    chex.assert_type(fgsm(loss, jnp.asarray(images(), dtype), epsilon=0.1), jnp.dtype(dtype))


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(epsilon=-0.1), "epsilon=-0.1"),
        (dict(epsilon=4), "epsilon=4"),
        (dict(epsilon=np.array([0.1, 8.0, 0.1])), "255"),
        (dict(epsilon=float("nan")), "epsilon=nan"),
        (dict(epsilon=0.1, step_size=-1.0), "step_size=-1.0"),
        (dict(epsilon=0.1, num_steps=-1), "num_steps=-1"),
        (dict(epsilon=60 / 255, bounds=(0.5, 0.6)), "[0.5, 0.6]"),
        (dict(epsilon=0.9, bounds=(np.zeros(3), np.array([1, 0.8, 1]))), "[0 0 0, 1 0.8 1]"),
        (dict(epsilon=0.1, bounds=(1.0, 0.0)), "bounds 1 to 0"),
        (dict(epsilon=np.full(4, 0.1)), "epsilon for 4 channels"),
        (
            dict(epsilon=0.1, step_size=np.full(4, 0.1), num_steps=4),
            "[num_steps, 1]",
        ),
        (dict(epsilon=0.1, step_size=np.full((4, 1), 0.1), num_steps=5), "num_steps=5"),
        (dict(epsilon=0.1, norm="l1"), "norm='l1'"),
        (dict(epsilon=np.full(3, 0.1), norm="l2"), "epsilon of shape (3,)"),
        (dict(epsilon=128.0, norm="l2"), "epsilon=128.0"),
        (dict(epsilon=0.1, restarts=0), "restarts=0"),
        (dict(epsilon=0.1, restarts=2), "restarts=2"),
        (dict(epsilon=0.1, delta0=0.1, key=jax.random.key(0)), "delta0"),
        (dict(epsilon=0.1, key=jax.random.split(jax.random.key(0), 2)), "(2,)"),
    ],
)
def test_mistakes_are_one_line(options, message):
    with pytest.raises(UserError) as error:
        pgd(loss, images(), **options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_loss_of_another_shape():
    with pytest.raises(UserError, match=r"loss of shape \(3, 4\)"):
        pgd(lambda v: v.sum((1, 2))[:, :1] * jnp.ones(4), images(), epsilon=0.1)


def test_other_units():
    with pytest.raises(UserError, match="uint8"):
        fgsm(loss, np.zeros((1, 2, 2, 3), np.uint8), epsilon=0.1)
    fgsm(loss, images() * 255, epsilon=4, bounds=(0, 255))
    fgsm(loss, images(), epsilon=4, bounds=None)  # without bounds, units are not known


# ---- bounds and steps per channel, schedules, loops of any length


def test_bounds_by_channel():
    """As for normalised images, where black and white have one value per channel."""
    low, high = np.array([-0.5, 0.1, 0.0], np.float32), np.array([0.9, 1.0, 0.4], np.float32)
    x = low + images() * (high - low)
    got = pgd(loss, x, epsilon=0.3, step_size=0.2, num_steps=3, bounds=(low, jnp.asarray(high)))
    np.testing.assert_allclose(got, slow_pgd(x, 0.3, 0.2, 3, bounds=(low, high)), atol=1e-6)
    assert (got == low).any() and (got == high).any()
    traced = jax.jit(lambda low, high: pgd(loss, x, epsilon=0.3, step_size=0.2, num_steps=3, bounds=(low, high)))
    np.testing.assert_array_equal(traced(low, high), got)
    half = pgd(loss, jnp.asarray(x, jnp.bfloat16), epsilon=0.3, num_steps=2, bounds=(low, high))
    assert half.dtype == jnp.bfloat16


@pytest.mark.parametrize("sizes", [[[0.05], [0.02], [0.01]], [[0.05, 0.01, 0], [0.02, 0, 0.03], [0.01, 0.1, 0.02]]])
def test_schedule_of_steps(sizes):
    x, want = images(), np.array(images(), np.float64)
    for size in np.array(sizes):
        want = np.clip(np.clip(want + size * np.sign(want - TARGET), x - 0.06, x + 0.06), 0, 1)
    np.testing.assert_allclose(pgd(loss, x, epsilon=0.06, step_size=sizes, num_steps=3), want, atol=1e-6)
    traced = jax.jit(lambda k: pgd(loss, x, epsilon=0.06, step_size=sizes, num_steps=k))
    np.testing.assert_allclose(traced(3), want, atol=1e-6)
    first = pgd(loss, x, epsilon=0.06, step_size=sizes[:1])
    np.testing.assert_allclose(traced(1), first, atol=1e-6)
    # Three sizes along one axis are one per channel, for any number of steps.
    got = pgd(loss, x, epsilon=0.06, step_size=np.array([0.05, 0.02, 0.01]), num_steps=3)
    np.testing.assert_allclose(got, slow_pgd(x, 0.06, np.array([0.05, 0.02, 0.01]), 3), atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_traced_number_of_steps(norm):
    x = images()
    chex.clear_trace_counter()
    traced_once = chex.assert_max_traces(lambda k: pgd(loss, x, epsilon=0.1, num_steps=k, norm=norm), n=1)
    compiled = jax.jit(traced_once)
    for k in (0, 1, 4):
        np.testing.assert_allclose(compiled(k), pgd(loss, x, epsilon=0.1, num_steps=k, norm=norm), atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_outer_gradient_sees_the_images_only(norm):
    """For loops of known and unknown length: the gradient is 1, and 0 for pixels at a bound."""
    x = jnp.asarray(images())

    def outer(x, w, steps):
        attacked = pgd(lambda v: jnp.sum(w * (v - TARGET) ** 2), x, epsilon=0.1, num_steps=steps, norm=norm)
        return jnp.sum(attacked), attacked

    gradient = jax.grad(outer, argnums=(0, 1), has_aux=True)
    for run in (jax.jit(gradient, static_argnums=2), jax.jit(gradient)):
        (with_x, with_w), attacked = run(x, 2.0, 3)
        assert with_w == 0
        inside = (attacked > 0) & (attacked < 1)
        assert inside.any() and not inside.all() or norm == "l2"
        np.testing.assert_allclose(with_x[inside], 1, atol=1e-6)
        np.testing.assert_allclose(with_x[~inside], 0, atol=1e-6)


# ---- the Euclidean ball


def lengths(v):
    return np.linalg.norm(np.asarray(v, np.float64).reshape(len(v), -1), axis=1)


def slow_l2(x, epsilon, size, steps, bounds=(0, 1), gradient=lambda v: 2 * (v - TARGET)):
    v = np.array(x, np.float64)
    for _ in range(steps):
        for i in range(len(v)):
            g = gradient(v)[i]
            norm = np.sqrt((g**2).sum())
            moved = v[i] + (size * g / norm if norm else 0) - x[i]
            length = np.sqrt((moved**2).sum())
            v[i] = x[i] + moved * (epsilon / length if length > epsilon else 1)
        v = v if bounds is None else np.clip(v, *bounds)
    return v


@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
def test_l2_against_the_loop(bounds):
    x = images()
    got = pgd(loss, x, epsilon=0.8, step_size=0.3, num_steps=5, norm="l2", bounds=bounds)
    np.testing.assert_allclose(got, slow_l2(x, 0.8, 0.3, 5, bounds), atol=2e-6)
    assert lengths(got - x).max() <= 0.8 + 1e-5
    if bounds is None:
        np.testing.assert_allclose(lengths(got - x), 0.8, rtol=1e-5)
        np.testing.assert_allclose(lengths(fgsm(loss, x, epsilon=0.8, norm="l2", bounds=None) - x), 0.8, rtol=1e-5)


def test_l2_without_a_gradient_and_with_a_tiny_one():
    """A zero gradient moves nothing; a gradient with a square that underflows still has a direction."""
    x = images()
    weight = np.array([0.0, 1e-30, 1e20], np.float32)[:, None, None, None]
    got = pgd(lambda v: jnp.sum(weight * v), x, epsilon=0.5, num_steps=2, norm="l2", bounds=None)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(lengths(got - x), [0, 0.5, 0.5], rtol=1e-4)
    np.testing.assert_array_equal(got[0], x[0])
    lost = pgd(lambda v: jnp.sum(np.float32(np.nan) * v), x, epsilon=0.5, norm="l2", bounds=None)
    assert np.isnan(lost).all()  # a NaN gradient stays visible


def test_l2_in_half_precision():
    x = jnp.asarray(images(), jnp.bfloat16)
    got = pgd(loss, x, epsilon=0.5, num_steps=2, norm="l2", bounds=None)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(lengths(got.astype(np.float32) - x.astype(np.float32)), 0.5, rtol=0.05)


# ---- random starts


def starts(norm, key, n=400, **options):
    x = np.full((n, 2, 2, 1), 0.5, np.float32)
    options = dict(epsilon=0.2, bounds=None) | options
    return np.asarray(pgd(jnp.sum, x, num_steps=0, norm=norm, key=key, **options) - x).reshape(n, -1)


def test_random_starts_are_uniform_in_the_ball():
    box = starts("linf", jax.random.key(1))
    assert np.abs(box).max() <= 0.2
    for share in (0.25, 0.5, 0.75):
        np.testing.assert_allclose(np.mean(box < -0.2 + 0.4 * share), share, atol=0.05)
    ball = starts("l2", jax.random.key(1))
    radius = np.linalg.norm(ball, axis=1)
    assert radius.max() <= 0.2 + 1e-6
    # In four dimensions, half the volume of a ball lies beyond 0.84 of its radius.
    for share in (0.25, 0.5, 0.75):
        np.testing.assert_allclose(np.mean(radius < 0.2 * share**0.25), share, atol=0.08)
    np.testing.assert_allclose(ball.mean(0), 0, atol=0.02)
    clipped = starts("linf", jax.random.key(1), bounds=(0.4, 0.6))
    assert np.abs(clipped).max() <= 0.1 + 1e-6


def test_keys_choose_the_start():
    keys = jax.random.split(jax.random.key(0), 400)
    own = starts("linf", keys)
    np.testing.assert_array_equal(own[::-1], starts("linf", keys[::-1]))  # the start depends on the key only
    np.testing.assert_array_equal(own[:7], starts("linf", keys[:7], n=7))
    assert len(np.unique(own[:, 0])) > 390
    assert not np.array_equal(starts("linf", jax.random.key(0)), starts("linf", jax.random.key(1)))
    np.testing.assert_array_equal(starts("linf", jax.random.key(0)), starts("linf", jax.random.PRNGKey(0)))


def hills(v):
    """One loss per image, with many maxima: the end of an attack depends on its start."""
    return jnp.sum(v * jnp.sin(40 * v), axis=(1, 2, 3))


@pytest.mark.parametrize("norm,epsilon", [("linf", 0.2), ("l2", 0.6)])
def test_restarts_keep_the_best_start(norm, epsilon):
    x, keys = images(shape=(8, 2, 2, 3)), jax.random.split(jax.random.key(3), 8)
    options = dict(epsilon=epsilon, step_size=epsilon / 10, num_steps=3, norm=norm, bounds=None)
    whole = lambda v: hills(v).sum()  # noqa: E731

    @jax.jit
    def run(x, keys):
        attack = lambda of, restarts: pgd(of, x, key=keys, restarts=restarts, **options)  # noqa: E731
        return attack(hills, 1), attack(hills, 6), attack(whole, 6)

    one, many, batch = run(x, keys)
    losses = [np.asarray(hills(v)) for v in (one, many, batch)]
    assert np.all(losses[1] >= losses[0]) and np.any(losses[1] > losses[0])
    # Choosing per image gives a higher loss than choosing for the batch, which gives a higher loss than one start.
    assert losses[1].sum() > losses[2].sum() > losses[0].sum()
    assert (lengths(many - x).max() if norm == "l2" else np.abs(many - x).max()) <= epsilon + 1e-6


@pytest.mark.parametrize("by_image", [True, False])
def test_starts_and_restarts_on_two_devices(by_image):
    """With one key per image, the result does not depend on the devices of the images."""
    x, keys = images(shape=(8, 2, 2, 3)), jax.random.split(jax.random.key(3), 8)
    mesh, rows = sharding.make_mesh(2), jax.sharding.PartitionSpec(sharding.AXIS)
    here = hills if by_image else lambda v: hills(v).sum()
    there = hills if by_image else lambda v: jax.lax.psum(hills(v).sum(), sharding.AXIS)

    def attack(of, x, keys):
        return pgd(of, x, epsilon=0.2, step_size=0.02, num_steps=3, key=keys, restarts=4)

    spread = jax.shard_map(functools.partial(attack, there), mesh=mesh, in_specs=rows, out_specs=rows)
    np.testing.assert_allclose(jax.jit(spread)(x, keys), jax.jit(functools.partial(attack, here))(x, keys), atol=1e-6)


def test_a_loss_by_image_is_the_sum():
    x = images()
    by_image = pgd(hills, x, epsilon=0.1, num_steps=3)
    np.testing.assert_array_equal(by_image, pgd(lambda v: jnp.sum(hills(v)), x, epsilon=0.1, num_steps=3))


# ---- in every precision


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("start", ["image", "random", "delta", "traced"])
def test_the_ball_in_every_type(dtype, norm, start):
    """cases A.5"""
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(4, 8, 8, 3)), dtype)
    epsilon = 1 / 255 if norm == "linf" else 0.05
    options = {
        "image": {},
        "random": dict(key=jax.random.key(0), restarts=2),
        "delta": dict(delta0=jnp.full_like(x, 0.02)),
        "traced": {},
    }[start]
    steps = jnp.int32(7) if start == "traced" else 7
    attack = lambda n: pgd(lambda v: -jnp.sum(v**2), x, epsilon=epsilon, num_steps=n, norm=norm, **options)  # noqa: E731
    got = jax.jit(attack)(steps) if start == "traced" else attack(steps)
    assert got.dtype == dtype and got.min() >= 0 and got.max() <= 1
    apart = np.asarray(got, np.float64) - np.asarray(x, np.float64)
    size = np.abs(apart).max() if norm == "linf" else lengths(apart).max()
    assert epsilon * 0.3 < size <= epsilon + 1e-7 * (1 if norm == "linf" else 8)


def test_half_precision_has_the_gradient_of_the_image():
    """cases A.5"""
    x = jnp.full((1, 2, 2, 1), 0.3, jnp.bfloat16)
    grad = jax.grad(lambda u: jnp.sum(fgsm(jnp.sum, u, epsilon=4 / 255).astype(jnp.float32)))(x)
    np.testing.assert_array_equal(grad, jnp.ones_like(x))


@pytest.mark.parametrize("bad", [-0.2, 1.1])
def test_images_outside_the_bounds(bad):
    """cases A.4"""
    x = np.full((2, 4, 4, 3), 0.5, np.float32)
    x[1, 2, 3, 1] = bad
    for epsilon in (0, 4 / 255):
        with pytest.raises(UserError, match="^attack: x from"):
            pgd(jnp.sum, x, epsilon=epsilon)
    np.testing.assert_array_equal(pgd(jnp.sum, x, epsilon=0, bounds=None), x)
    jax.jit(lambda v: pgd(jnp.sum, v, epsilon=0.1))(x)  # traced: not looked at
    mean, std = np.float32([0.49, 0.48, 0.45]), np.float32([0.2, 0.21, 0.22])
    normalised = (np.eye(4, dtype=np.float32)[None, :, :, None] - mean) / std
    fgsm(jnp.sum, normalised, epsilon=0.1, bounds=((0 - mean) / std, (1 - mean) / std))
    with pytest.raises(UserError, match="bounds"):
        fgsm(jnp.sum, normalised, epsilon=0.1)


@pytest.mark.parametrize("lost", [0, 1, 2])
@pytest.mark.parametrize("by_image", [False, True])
def test_a_nan_among_restarts_stays_visible(lost, by_image):
    """cases A.6: wherever it comes, it wins."""
    x, key = np.full((2, 2, 2, 1), 0.5, np.float32), jax.random.key(3)
    keys = jax.random.split(key, 2)
    starts = []
    for r in range(3):
        each = jax.vmap(jax.random.fold_in, (0, None))(keys, r)
        starts.append(jax.vmap(lambda k: jax.random.uniform(k, (2, 2, 1), jnp.float32, -1, 1))(each) * 0.1 + x)
    here = starts[lost]

    def one(v):
        values = jnp.sum(v, axis=(1, 2, 3))
        values = jnp.where(jnp.max(jnp.abs(v - here), axis=(1, 2, 3)) < 1e-6, jnp.nan, values)
        return values if by_image else jnp.sum(values)

    got = pgd(one, x, epsilon=0.1, num_steps=0, key=key, restarts=3)
    np.testing.assert_allclose(got, here, atol=1e-6)
