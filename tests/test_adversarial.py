"""FGSM and PGD against their definition, the authors' images, and mistakes in units."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.adversarial import fgsm, pgd
from jaxcl.errors import UserError


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
    """The attack itself carries no gradient, neither to what the loss closes over nor through the steps."""
    x = jnp.asarray(images())

    def outer(x, w):
        return jnp.sum(pgd(lambda v: jnp.sum(w * v**3), x, epsilon=0.1, num_steps=2, bounds=None))

    with_x, with_w = jax.grad(outer, argnums=(0, 1))(x, 2.0)
    assert with_w == 0
    assert np.isfinite(with_x).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_type_is_kept(dtype):
    assert fgsm(loss, jnp.asarray(images(), dtype), epsilon=0.1).dtype == jnp.dtype(dtype)


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(epsilon=-0.1), "epsilon=-0.1, expected 0 or more"),
        (dict(epsilon=4), "divide a value in 0..255 units by 255"),
        (dict(epsilon=np.array([0.1, 8.0, 0.1])), "divide a value in 0..255 units by 255"),
        (dict(epsilon=float("nan")), "expected 0 or more"),
        (dict(epsilon=0.1, step_size=-1.0), "step_size=-1.0, expected 0 or more"),
        (dict(epsilon=0.1, num_steps=-1), "num_steps=-1"),
    ],
)
def test_mistakes_are_one_line(options, message):
    with pytest.raises(UserError) as error:
        pgd(loss, images(), **options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_other_units():
    with pytest.raises(UserError, match="divide uint8 by 255"):
        fgsm(loss, np.zeros((1, 2, 2, 3), np.uint8), epsilon=0.1)
    fgsm(loss, images() * 255, epsilon=4, bounds=(0, 255))
    fgsm(loss, images(), epsilon=4, bounds=None)  # normalised units may be anything


# ---- the contrastive attacks' images (the losses written out here are those of the golden files)


def encoder(d):
    def unit(z):
        return z / jnp.linalg.norm(z, axis=-1, keepdims=True)

    if str(d["encoder"]) == "linear":
        return lambda x: unit(jnp.einsum("bhwc,hwcd->bd", x, d["enc_kernel"]) + d["enc_bias"])

    def conv(x):
        stride = int(d["enc_conv_stride"])
        h = jax.lax.conv_general_dilated(
            x,
            jnp.asarray(d["enc_conv_kernel"]),
            (stride, stride),
            [(1, 1), (1, 1)],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        h = jnp.tanh(h + d["enc_conv_bias"]).mean((1, 2))
        return unit(h @ d["enc_dense_kernel"] + d["enc_dense_bias"])

    return conv


def nt_xent(z_i, z_j, temperature):
    z = jnp.concatenate([z_i, z_j])
    s = jnp.where(jnp.eye(len(z), dtype=bool), -jnp.inf, z @ z.T / temperature)
    partner = jnp.roll(jnp.arange(len(z)), len(z_i))
    return jnp.mean(jax.nn.logsumexp(s, axis=1) - s[jnp.arange(len(z)), partner])


def attacked(d, x):
    encode = encoder(d)
    anchor = jax.jit(encode)(jnp.asarray(x))
    return lambda v: nt_xent(anchor, encode(v), float(d["temperature"]))


@pytest.mark.parametrize("name", ["attack_fgsm_simclr_linear", "attack_fgsm_simclr_conv", "attack_pgd5_simclr_conv"])
def test_golden_attacks(golden, name):
    d = golden("clae", name)
    with jax.enable_x64(True):
        x, loss_fn = jnp.asarray(d["x"]), attacked(d, d["x"])
        if "num_steps" in d:
            options = dict(epsilon=float(d["epsilon"]), step_size=float(d["step_size"]))
            if "delta0" in d:
                options["delta0"] = d["delta0"]
            for steps in (1, int(d["num_steps"])):
                got = jax.jit(lambda x, n=steps: pgd(loss_fn, x, num_steps=n, **options))(x)
                np.testing.assert_allclose(got, d["x_adv_steps"][steps - 1], atol=1e-12)
        else:
            eps = float(d["epsilon"])
            free, clipped = jax.jit(lambda x: [fgsm(loss_fn, x, epsilon=eps, bounds=b) for b in (None, (0.0, 1.0))])(x)
            np.testing.assert_allclose(free, d["x_adv_noclip"], atol=1e-12)
            np.testing.assert_allclose(clipped, d["x_adv"], atol=1e-12)


def test_golden_normalised_units(golden):
    """A step in normalised units is a step of epsilon * std in pixels, one number a channel."""
    d = golden("clae", "attack_fgsm_simclr_normalised_space")
    with jax.enable_x64(True):
        normalised = (d["x01"] - d["mean"]) / d["std"]
        loss_fn = attacked(d, normalised)

        @jax.jit
        def attack(normalised, pixels):
            in_pixels = lambda p: loss_fn((p - d["mean"]) / d["std"])  # noqa: E731
            return (
                fgsm(loss_fn, normalised, epsilon=float(d["epsilon_normalised"]), bounds=None),
                fgsm(in_pixels, pixels, epsilon=d["epsilon_01"]),
            )

        got = attack(normalised, d["x01"])
        np.testing.assert_allclose(got[0], d["x_adv_normalised"], atol=1e-12)
        np.testing.assert_allclose(got[1], d["x_adv_01_clipped"], atol=1e-12)
