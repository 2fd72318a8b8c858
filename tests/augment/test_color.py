"""Colour operations against Pillow, colorsys and the sequential definition in NumPy; distributions of draws."""

import colorsys
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sample_images import BYTE, keys, ks, photo, unit

from jaxcl.augment import color
from jaxcl.errors import UserError

ORDERS = np.array(list(itertools.permutations(range(4))), np.int32)
LUMA = np.array([0.299, 0.587, 0.114])


def grey(image):
    return image @ LUMA


def turn_hue(image, shift):
    flat = [colorsys.rgb_to_hsv(*p) for p in image.reshape(-1, 3)]
    return np.array([colorsys.hsv_to_rgb((h + shift) % 1.0, s, v) for h, s, v in flat]).reshape(image.shape)


def sequential_jitter(image, factors, order):
    """Reference: one property after the other, in float64, clipped after each."""
    x = np.asarray(image, np.float64)
    b, c, s, h = np.asarray(factors, np.float64)
    for number in order:
        if number == 0:
            x = b * x
        elif number == 1:
            x = c * x + (1 - c) * grey(x).mean()
        elif number == 2:
            x = s * x + (1 - s) * grey(x)[..., None]
        else:
            x = turn_hue(x, h)
        x = np.clip(x, 0, 1)
    return x


def test_jitter_in_each_of_the_24_orders():
    images = unit(photo(24, 7, 6))
    rng = np.random.default_rng(1)
    factors = np.concatenate([rng.uniform(0.2, 1.8, (24, 3)), rng.uniform(-0.5, 0.5, (24, 1))], axis=1)
    got = np.asarray(jax.jit(color.color_jitter)(images, jnp.asarray(factors, jnp.float32), ORDERS))
    want = np.stack([sequential_jitter(*row) for row in zip(images, factors, ORDERS, strict=True)])
    np.testing.assert_allclose(got, want, atol=2e-5)
    # The order is visible in this data, so a wrong order cannot pass.
    other = np.stack([sequential_jitter(*r) for r in zip(images, factors, np.roll(ORDERS, 1, 0), strict=True)])
    assert (np.abs(other - want).max(axis=(1, 2, 3)) > 1e-2).sum() >= 22


@pytest.mark.parametrize(
    "properties",
    [
        ("brightness", "contrast", "saturation"),
        ("saturation", "hue"),
        ("contrast", "hue"),
        ("brightness", "hue"),
        ("brightness", "saturation", "hue"),
        ("brightness",),
        ("hue",),
        (),
    ],
)
def test_jitter_with_properties_left_out(properties):
    images = unit(photo(24, 5, 4, seed=2))
    factors = np.tile(np.float32([0.6, 1.5, 0.3, 0.2]), (24, 1))
    got = np.asarray(color.color_jitter(images, factors, ORDERS, properties=properties))
    kept = np.where([p in properties for p in color.PROPERTIES], factors, color.IDENTITY)
    want = np.stack([sequential_jitter(*row) for row in zip(images, kept, ORDERS, strict=True)])
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_identity_factors_change_no_bit():
    images = unit(photo(24))
    factors = jnp.tile(jnp.array(color.IDENTITY), (24, 1))
    np.testing.assert_array_equal(jax.jit(color.color_jitter)(images, factors, ORDERS), images)


def test_hue_against_colorsys():
    colours = np.array(list(itertools.product([0.0, 0.2, 0.5, 0.9, 1.0], repeat=3)), np.float32)
    shifts = np.float32([-0.5, -0.31, -0.1, 0.0, 1e-3, 1 / 6, 0.25, 0.5])
    images = np.tile(colours.reshape(1, 25, 5, 3), (len(shifts), 1, 1, 1))
    got = np.asarray(color.adjust_hue(jnp.asarray(images), jnp.asarray(shifts)))
    for shift, one, out in zip(shifts, images, got, strict=True):
        np.testing.assert_allclose(out, turn_hue(one.astype(np.float64), float(shift)), atol=3e-6)
    np.testing.assert_array_equal(got[3], images[3])


def test_colour_operations_against_pillow():
    image = pytest.importorskip("PIL.Image")
    enhance = pytest.importorskip("PIL.ImageEnhance")
    images = photo(1)
    for factor in (0.0, 0.6, 1.0, 1.4):
        row = jnp.array([factor])
        for ours, theirs in (
            (color.adjust_brightness, enhance.Brightness),
            (color.adjust_contrast, enhance.Contrast),
            (color.adjust_saturation, enhance.Color),
        ):
            want = np.asarray(theirs(image.fromarray(images[0])).enhance(factor)) / 255
            np.testing.assert_allclose(ours(unit(images), row)[0], want, atol=1.6 * BYTE)
    shift = 25 / 255  # whole steps of Pillow's 8-bit hue
    hsv = np.array(image.fromarray(images[0]).convert("HSV"))
    hsv[..., 0] += 25
    want = np.asarray(image.fromarray(hsv, "HSV").convert("RGB")) / 255
    # Hue in 256 steps: one step moves a channel by up to 6 bytes.
    assert np.abs(color.adjust_hue(unit(images), jnp.array([shift]))[0] - want).max() < 9 * BYTE


def test_grayscale():
    images = unit(photo(2))
    out = np.asarray(color.grayscale(images, jnp.array([True, False])))
    np.testing.assert_allclose(out[0], np.repeat(grey(np.asarray(images[0]))[..., None], 3, -1), atol=1e-6)
    np.testing.assert_array_equal(out[1], images[1])


def test_jitter_draws():
    strength = (0.4, 1.5, 0.2, 0.1)
    factors, order, applied = color.draw_color_jitter(keys(30000), strength=strength, p=0.8)
    factors, order, applied = np.asarray(factors), np.asarray(order), np.asarray(applied)
    assert abs(applied.mean() - 0.8) < 4 * math.sqrt(0.16 / 30000)
    np.testing.assert_array_equal(factors[~applied], np.tile(np.float32(color.IDENTITY), ((~applied).sum(), 1)))
    for column, (low, high) in enumerate([(0.6, 1.4), (0.0, 2.5), (0.8, 1.2), (-0.1, 0.1)]):
        cdf = lambda v, low=low, high=high: np.clip((v - low) / (high - low), 0, 1)  # noqa: E731
        assert ks(factors[applied, column], cdf) < 1
    np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(4), (30000, 1)))
    _, counts = np.unique(order, axis=0, return_counts=True)
    assert len(counts) == 24
    assert ((counts - 1250) ** 2 / 1250).sum() < 41.6  # chi-square, 23 degrees of freedom, 1%
    assert abs(np.corrcoef(factors[applied].T) - np.eye(4)).max() < 0.03
    # Nor does the order say anything about the factors (cases F).
    first = np.concatenate([factors, order], axis=1)[applied].T
    assert abs(np.corrcoef(first)[:4, 4:]).max() < 0.03


@pytest.mark.parametrize("op", ["adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue", "grayscale"])
def test_colour_needs_three_channels(op):
    with pytest.raises(UserError, match=r"\(2, 8, 8, 1\)"):
        getattr(color, op)(jnp.zeros((2, 8, 8, 1)), jnp.ones(2, bool))
