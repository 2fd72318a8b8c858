"""What is kept of colour, on images and encoders whose answers are known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from evaluations import evaluation, source

from jaxcl.augment.base import Op
from jaxcl.evaluate import EvalContext
from jaxcl.evaluate import color as module


def test_distances_are_in_tenths_of_the_range():
    one = np.array([[0.6, 1.0, 1.4, -0.1], [1.0, 1.0, 1.0, 0.0]])
    two = np.array([[1.4, 1.0, 1.31, 0.099], [1.0, 0.91, 1.0, -0.021]])
    np.testing.assert_array_equal(module._distances(np.stack([one, two])), [[9, 0, 1, 9], [0, 2, 0, 2]])


def test_explained_variance():
    x, test_x = tiny.normal(400, 5), tiny.normal(200, 5, seed=1)
    mix = tiny.normal(5, 4, seed=2)
    mix[:, 3] = 0
    noise = lambda n, s: np.array([0, 0, 0, 1]) * tiny.normal(n, 4, seed=s)  # noqa: E731
    r2 = module._explained(x, x @ mix + 3 + noise(400, 3), test_x, test_x @ mix + 3 + noise(200, 4))
    np.testing.assert_allclose(r2[:3], 1, atol=1e-4)
    assert abs(r2[3]) < 0.1


def tinted(split, labelled):
    s = source(split, labelled)
    return dataclasses.replace(s, extras={"tint": s.labels.copy()})


@pytest.mark.parametrize("sees", [True, False])
def test_an_encoder_that_sees_colour_and_one_that_does_not(sees, monkeypatch):
    """Features are mean and spread of each channel, or always the same."""

    def encode(self, state, images):
        h = jnp.concatenate([images.mean((1, 2)), images.std((1, 2))], -1) if sees else jnp.ones((len(images), 6))
        return h, h

    # Brightness alone: the whole jitter compiles slowly.
    jitter = lambda p, **strength: DimmedOnly()  # noqa: E731
    monkeypatch.setattr(EvalContext, "encode", encode)
    monkeypatch.setattr(module.augment, "ColorJitter", jitter)
    e, state, mesh = evaluation(final=("color", "tint"), sources=tinted)
    results = e.final(state, mesh)[0]
    metrics = results["color"]
    assert metrics["tint"] == (1 if sees else pytest.approx(0.25)) == results["tint"]["accuracy"]
    # All but brightness never differ: distance 0 is always right.
    assert metrics["contrast"] == metrics["hue"] == metrics["saturation"] == 1
    assert metrics["accuracy"] == pytest.approx((metrics["brightness"] + 3) / 4) and metrics["majority"] < 1
    assert metrics["r2"] < 0.05 if not sees else metrics["r2"] > 0.15  # of four, the others' is 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DimmedOnly(Op):
    name: str = "jitter"

    def __call__(self, keys, images):
        factor = 0.6 + 0.8 * jax.vmap(lambda k: jax.random.uniform(k))(keys)
        ones = jnp.ones_like(factor)
        return images * factor[:, None, None, None], {"jitter": jnp.stack([factor, ones, ones, 0 * ones], 1)}
