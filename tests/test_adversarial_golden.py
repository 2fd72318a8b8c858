"""Attacks against gradients, signs and images from the code of CLAE's authors, and against foolbox."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.adversarial import fgsm, pgd
from jaxcl.losses import cross_entropy, instance_spread, nt_xent, one_way_infonce


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


METHODS = {
    "simclr": lambda a, q, T: nt_xent(a, q, temperature=T),
    "uel": lambda a, q, T: instance_spread(jnp.concatenate([a, q]), temperature=T),
    "plain": lambda a, q, T: one_way_infonce(a, q, temperature=T),
}
WIDTHS = pytest.mark.parametrize("dtype", ["float64", "float32"])


def attacked(d, x):
    """The loss of a batch against the features of the clean batch."""
    encode = encoder({k: v.astype(x.dtype) if v.dtype == np.float64 else v for k, v in d.items()})
    anchor, temperature = jax.jit(encode)(x), float(d["temperature"])
    return lambda v: METHODS[str(d["method"])](anchor, encode(v), temperature)


def same_gradient(got, want, sign):
    """Values within the tolerance of the dtype; signs exactly."""
    np.testing.assert_allclose(got, want, atol=(1e-9 if got.dtype == jnp.float64 else 1e-4) * np.abs(want).max())
    np.testing.assert_array_equal(np.sign(got), sign)


def same_images(got, want, start, epsilon):
    """Values up to rounding, with every value moved in the same direction."""
    wide = got.dtype == jnp.float64
    np.testing.assert_allclose(got, want, atol=1e-12 if wide else 2e-6)
    steps = [np.round((np.asarray(v, np.float64) - start) / epsilon, 3) for v in (got, want)]
    np.testing.assert_allclose(*steps, atol=1e-9 if wide else 2e-3)


@WIDTHS
@pytest.mark.parametrize("name", ["simclr_linear", "simclr_conv", "uel_conv", "plain_conv"])
def test_golden_fgsm(golden, name, dtype):
    d = golden("clae", f"attack_fgsm_{name}")
    with jax.enable_x64(dtype == "float64"):
        x, eps = jnp.asarray(d["x"], dtype), float(d["epsilon"])
        loss_fn = attacked(d, x)

        @jax.jit
        def run(x):
            free, clipped = (fgsm(loss_fn, x, epsilon=eps, bounds=b) for b in (None, (0.0, 1.0)))
            return jax.grad(loss_fn)(x), free, clipped, [loss_fn(v) for v in (x, free, clipped)]

        gradient, free, clipped, losses = run(x)
    same_gradient(gradient, d["grad"], d["grad_sign"])
    same_images(free, d["x_adv_noclip"], d["x"], eps)
    same_images(clipped, d["x_adv"], d["x"], eps)
    want = [d[k] for k in ("loss_before", "loss_after_noclip", "loss_after")]
    np.testing.assert_allclose(losses, want, rtol=1e-9 if dtype == "float64" else 1e-4)


@WIDTHS
def test_golden_pgd(golden, dtype):
    d = golden("clae", "attack_pgd5_simclr_conv")
    with jax.enable_x64(dtype == "float64"):
        x, eps = jnp.asarray(d["x"], dtype), float(d["epsilon"])
        loss_fn = attacked(d, x)
        options = dict(epsilon=eps, step_size=float(d["step_size"]), delta0=d.get("delta0"))
        # Every length of the trajectory with one program, then the loop of known length.
        steps = jax.jit(lambda x, k: pgd(loss_fn, x, num_steps=k, **options))
        value_and_grad = jax.jit(jax.value_and_grad(loss_fn))
        for k in range(int(d["num_steps"]) + 1):
            v = steps(x, k)
            value, gradient = value_and_grad(v)
            np.testing.assert_allclose(value, d["loss_steps"][k], rtol=1e-9 if dtype == "float64" else 1e-4)
            if k:
                same_images(v, d["x_adv_steps"][k - 1], d["x"], eps)
            if k < int(d["num_steps"]):
                np.testing.assert_array_equal(np.sign(gradient), d["grad_sign_steps"][k])
        known = jax.jit(lambda x: pgd(loss_fn, x, num_steps=int(d["num_steps"]), **options))(x)
    same_images(known, d["x_adv"], d["x"], eps)


@WIDTHS
def test_golden_normalised_units(golden, dtype):
    """A step of epsilon in normalised units is a step of epsilon * std in pixels, one number per channel."""
    d = golden("clae", "attack_fgsm_simclr_normalised_space")
    with jax.enable_x64(dtype == "float64"):
        mean, std, pixels = (jnp.asarray(d[k], dtype) for k in ("mean", "std", "x01"))
        normalised = (pixels - mean) / std
        loss_fn = attacked(d, normalised)

        @jax.jit
        def run(normalised, pixels):
            epsilon = float(d["epsilon_normalised"])
            black, white = (0 - mean) / std, (1 - mean) / std
            return (
                jax.grad(loss_fn)(normalised),
                fgsm(loss_fn, normalised, epsilon=epsilon, bounds=None),
                fgsm(loss_fn, normalised, epsilon=epsilon, bounds=(black, white)) * std + mean,
                fgsm(lambda p: loss_fn((p - mean) / std), pixels, epsilon=d["epsilon_01"]),
            )

        gradient, free, *clipped = run(normalised, pixels)
    same_gradient(gradient, d["grad_wrt_normalised"], d["grad_sign"])
    same_images(free, d["x_adv_normalised"], (d["x01"] - d["mean"]) / d["std"], float(d["epsilon_normalised"]))
    for got in clipped:
        same_images(got, d["x_adv_01_clipped"], d["x01"], d["epsilon_01"])


# ---- another library's attacks


@pytest.fixture(scope="module")
def foolbox():
    return pytest.importorskip("foolbox", reason="pip install foolbox, to compare with its attacks")


@functools.cache
def small_classifier():
    """-> (images -> logits [N,5], images [8,6,6,3], labels [8]); the labels are its own predictions."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 3, 3, 8)).astype(np.float32) / 4
    dense = rng.normal(size=(8 * 36, 5)).astype(np.float32) / 8

    @jax.jit
    def logits(x):
        h = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.tanh(h).reshape(len(x), -1) @ dense

    x = jnp.asarray(rng.random((8, 6, 6, 3)), jnp.float32)
    return logits, x, jnp.argmax(logits(x), -1)


@pytest.mark.parametrize(
    "attack,norm,epsilon,num_steps",
    [
        ("LinfFastGradientAttack", "linf", 8 / 255, 1),
        ("LinfPGD", "linf", 8 / 255, 20),
        ("L2FastGradientAttack", "l2", 0.5, 1),
        ("L2PGD", "l2", 0.5, 20),
    ],
)
def test_foolbox_finds_the_same_images(foolbox, attack, norm, epsilon, num_steps):
    logits, x, labels = small_classifier()
    options = {} if num_steps == 1 else dict(steps=num_steps, rel_stepsize=2.5 / num_steps)
    theirs = getattr(foolbox.attacks, attack)(random_start=False, **options)
    _, want, success = theirs(foolbox.JAXModel(logits, bounds=(0, 1)), x, labels, epsilons=epsilon)
    loss_fn = lambda v: cross_entropy(logits(v), labels)  # noqa: E731
    got = jax.jit(lambda x: pgd(loss_fn, x, epsilon=epsilon, num_steps=num_steps, norm=norm))(x)
    np.testing.assert_allclose(got, np.asarray(want), atol=2e-5)
    np.testing.assert_array_equal(np.argmax(logits(got), -1) != labels, np.asarray(success))
    assert loss_fn(got) > loss_fn(x) + 0.01
