"""FGSM on a classifier: the reference's images, pixel units, rows that are not attacked."""

import golden_net
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.errors import UserError
from jaxcl.evaluate import fgsm_examples
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
