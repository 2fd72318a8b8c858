"""FGSM and PGD on a classifier: the reference's images, pixel units, rows that are not attacked."""

import functools

import golden_net
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.errors import UserError
from jaxcl.evaluate import fgsm_examples, pgd_examples
from jaxcl.losses import cross_entropy


@pytest.mark.parametrize("wide", [True, False], ids=["float64", "float32"])
def test_golden(golden, wide):
    d = golden("excon", "fgsm_cifar_eps4")
    with jax.enable_x64(wide):
        dtype = jnp.float64 if wide else jnp.float32
        images, mean, std = (jnp.asarray(d[k], dtype) for k in ("images_normalised", "mean", "std"))

        @jax.jit
        def attack(images):
            adversarial = fgsm_examples(
                lambda x: golden_net.logits(d, x),
                images * std + mean,
                d["labels"],
                epsilon=float(d["eps"]) / 255,
                mean=mean,
                std=std,
            )
            clean, attacked = (golden_net.logits(d, x) for x in (images, (adversarial - mean) / std))
            losses = [cross_entropy(x, d["labels"]) for x in (clean, attacked)]
            grad = jax.grad(lambda x: cross_entropy(golden_net.logits(d, x), d["labels"]))(images)
            return adversarial, clean, attacked, losses, grad

        adversarial, clean, attacked, losses, grad = attack(images)
    tolerance = dict(rtol=1e-7, atol=1e-10) if wide else dict(rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(adversarial, d["adversarial_pixels"], **tolerance)
    np.testing.assert_allclose(
        (adversarial - mean) / std, d["adversarial_normalised"], rtol=tolerance["rtol"], atol=1e-4
    )
    np.testing.assert_allclose(clean, d["logits"], **tolerance)
    np.testing.assert_allclose(attacked, d["logits_adversarial"], **tolerance)
    np.testing.assert_allclose(losses, [d["clean_loss"], d["adversarial_loss"]], **tolerance)
    np.testing.assert_allclose(grad, d["grad_images"], **tolerance)


def linear(weights):
    return lambda x: jnp.einsum("nhwc,hwck->nk", x, weights)


def test_padded_and_unlabelled_rows_are_left_alone():
    rng = np.random.default_rng(0)
    pixels = rng.random((5, 4, 4, 3)).astype(np.float32)
    weights = rng.normal(size=(4, 4, 3, 6)).astype(np.float32)
    labels, where = np.array([0, 5, -1, 2, 3]), np.array([True, True, True, False, True])
    options = dict(epsilon=0.05, mean=np.array([0.5, 0.4, 0.3]), std=np.array([0.2, 0.3, 0.4]))
    attack = jax.jit(lambda x, y, w=None: fgsm_examples(linear(weights), x, y, where=w, **options))
    got = attack(pixels, labels, where)
    np.testing.assert_array_equal(got[2], pixels[2])
    np.testing.assert_array_equal(got[3], pixels[3])
    alone = attack(pixels[:2], labels[:2])
    np.testing.assert_array_equal(got[:2], alone)
    assert got.min() >= 0 and got.max() <= 1
    moved = np.abs(got[4] - pixels[4])
    assert moved.max() <= 0.05 + 1e-6 and np.median(moved) > 0.049


def test_the_loss_rises_and_units_are_checked():
    rng = np.random.default_rng(1)
    pixels = rng.random((8, 4, 4, 3)).astype(np.float32)
    logits_fn = linear(rng.normal(size=(4, 4, 3, 4)).astype(np.float32))
    labels = rng.integers(0, 4, 8)

    @jax.jit
    def attacked_loss(eps):
        adversarial = fgsm_examples(logits_fn, pixels, labels, epsilon=eps / 255, mean=0.0, std=1.0)
        return cross_entropy(logits_fn(adversarial), labels)

    losses = [float(attacked_loss(eps)) for eps in (0, 1, 2, 4, 8)]
    assert np.all(np.diff(losses) > 0)
    with pytest.raises(UserError, match="divide a value in 0..255 units by 255"):
        fgsm_examples(logits_fn, pixels, labels, epsilon=4, mean=0.0, std=1.0)


def test_pgd_takes_its_steps_in_pixels():
    """Against the loop; for one step it is FGSM; rows that do not count stay as they are."""
    rng = np.random.default_rng(2)
    pixels = rng.random((4, 4, 4, 3)).astype(np.float32)
    weights = rng.normal(size=(4, 4, 3, 5)).astype(np.float32)
    labels, where = np.array([0, -1, 2, 3]), np.array([True, True, False, True])
    mean, std = np.array([0.5, 0.4, 0.3], np.float32), np.array([0.2, 0.3, 0.4], np.float32)
    options = dict(epsilon=0.05, mean=mean, std=std, where=where)
    logits_fn = lambda x: jnp.sin(3 * linear(weights)(x))  # noqa: E731

    @jax.jit
    def run(x):
        usual, chosen = (pgd_examples(logits_fn, x, labels, num_steps=6, step_size=s, **options) for s in (None, 0.02))
        return (
            usual,
            chosen,
            pgd_examples(logits_fn, x, labels, num_steps=1, **options),
            fgsm_examples(logits_fn, x, labels, **options),
        )

    usual, chosen, one, sign = run(pixels)
    np.testing.assert_array_equal(one, sign)
    gradient = jax.jit(jax.grad(lambda x: cross_entropy(logits_fn((x - mean) / std), labels, where=where)))
    for got, step in ((usual, 2.5 * 0.05 / 6), (chosen, 0.02)):
        v = pixels
        for _ in range(6):
            v = np.clip(np.clip(v + np.float32(step) * np.sign(gradient(v)), pixels - 0.05, pixels + 0.05), 0, 1)
        np.testing.assert_allclose(got, v, atol=1e-6)
        np.testing.assert_array_equal(got[1:3], pixels[1:3])
        assert np.abs(got[0] - pixels[0]).max() <= 0.05 + 1e-6
    with pytest.raises(UserError, match="divide a value in 0..255 units by 255"):
        pgd_examples(logits_fn, pixels, labels, **options | dict(epsilon=4))


def confident(margin, classes=4, seed=5):
    """A linear classifier that gives each image's class the logit `margin` above all others."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(4, 4, 3, classes)).astype(np.float32)
    pixels = rng.uniform(0.3, 0.7, size=(16, 4, 4, 3)).astype(np.float32)
    labels = rng.integers(0, classes, 16)
    lifted = np.eye(classes, dtype=np.float32)[labels]
    clean = np.einsum("nhwc,hwck->nk", pixels, weights)
    lift = lifted * (margin + clean.max(1, keepdims=True) - (clean * lifted).sum(1, keepdims=True))
    return (lambda x: linear(weights)(x) + lift), weights, pixels, labels, clean + lift


@pytest.mark.parametrize("margin", [1, 17, 50, 200, 1e4])
def test_a_confident_classifier_is_attacked(margin):
    """cases A.8: the own class's part of the gradient of the cross-entropy is 0 in float32, and then all of it."""
    logits_fn, weights, pixels, labels, logits = confident(margin)
    options = dict(epsilon=0.02, mean=0.0, std=1.0)
    own = np.eye(4)[labels]
    others = np.where(own > 0, -np.inf, logits.astype(np.float64))
    others = np.exp(others - others.max(1, keepdims=True))
    direction = np.einsum("nk,hwck->nhwc", others / others.sum(1, keepdims=True) - own, weights)
    want = np.clip(pixels + 0.02 * np.sign(direction), 0, 1)
    sure = np.abs(direction) > 1e-3
    for attack in (fgsm_examples, functools.partial(pgd_examples, num_steps=1)):
        got = np.asarray(attack(logits_fn, pixels, labels, **options))
        np.testing.assert_allclose(got[sure], want[sure], atol=1e-6)


def test_attack_on_labels_that_are_no_class_and_masked_classes():
    """cases A.2, A.3"""
    logits_fn, _, pixels, labels, _ = confident(1)
    options = dict(epsilon=0.02, mean=0.0, std=1.0)
    with pytest.raises(UserError, match="row 2"):
        fgsm_examples(logits_fn, pixels, np.where(np.arange(16) == 2, 4, labels), **options)
    masked = lambda x: jnp.where(jnp.arange(4) < 2, logits_fn(x), -jnp.inf)  # noqa: E731
    assert np.isfinite(fgsm_examples(masked, pixels, labels % 2, **options)).all()
    alone = lambda x: jnp.where(jnp.arange(4) < 1, logits_fn(x), -jnp.inf)  # noqa: E731
    np.testing.assert_array_equal(fgsm_examples(alone, pixels, labels * 0, **options), pixels)
