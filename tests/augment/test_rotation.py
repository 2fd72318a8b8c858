"""Turns by quarters and by degrees, against NumPy; how often they are drawn, and what is refused."""

import jax
import numpy as np
import pytest

from jaxcl import augment
from jaxcl.augment import ops
from jaxcl.errors import UserError


def test_quarter_turns():
    images, turns = np.random.default_rng(0).random((8, 5, 5, 2)).astype(np.float32), np.arange(8) % 4
    got = ops.quarter_turns(images, turns)
    for image, k, out in zip(images, turns, np.asarray(got), strict=True):
        np.testing.assert_array_equal(out, np.rot90(image, k))
    with pytest.raises(UserError, match="4x5"):
        ops.quarter_turns(images[:, :4], turns)


def test_how_often():
    keys = jax.random.split(jax.random.key(0), 4000)
    turns = np.asarray(ops.draw_quarter_turns(keys, p=0.5))
    share = np.bincount(turns, minlength=4) / len(turns)
    np.testing.assert_allclose(share, [0.5 + 0.125, 0.125, 0.125, 0.125], atol=0.03)


def test_tilts():
    """90 degrees is a quarter turn, 0 is the identity, and pixels from outside the image are black."""
    images = np.random.default_rng(1).random((3, 5, 5, 1)).astype(np.float32) + 0.1
    got = np.asarray(jax.jit(ops.tilt)(images, np.array([0, np.pi / 2, np.pi / 4], np.float32)))
    np.testing.assert_allclose(got[0], images[0], atol=1e-6)
    np.testing.assert_allclose(got[1], np.rot90(images[1]), atol=1e-5)
    # The corner comes from 0.83 of a pixel beyond the middle of the edge.
    edges = [images[2, y, x, 0] for y, x in ((2, 0), (2, 4), (0, 2), (4, 2))]
    assert min(abs(got[2, 0, 0, 0] - (3 - 8**0.5) * edge) for edge in edges) < 1e-5
    assert got[2, 2, 2] == pytest.approx(float(images[2, 2, 2, 0]), abs=1e-5)


def test_tilts_are_uniform_both_ways():
    """Quarters of [-20, 20] degrees hold a quarter of the draws each; the image turns by what was drawn; cases F."""
    keys, images = jax.random.split(jax.random.key(0), 4000), np.ones((4000, 3, 3, 1), np.float32)
    tilts = np.asarray(augment.RandomTilt(degrees=20.0)(keys, images)[1]["tilt"])
    share = np.histogram(tilts, bins=4, range=(-20, 20))[0] / 4000
    np.testing.assert_allclose(share, 0.25, atol=0.03)
    images = np.random.default_rng(0).random((4, 5, 5, 1)).astype(np.float32)
    turned, params = augment.RandomTilt(degrees=20.0)(keys[:4], images)
    np.testing.assert_allclose(turned, ops.tilt(images, np.deg2rad(params["tilt"])), atol=1e-5)


def test_as_operations_of_a_view():
    view = augment.random_view(8, (0.5,) * 3, (0.25,) * 3, rotation=0.5, jitter_p=0.0, grayscale=0.0)
    names = [op.name for op in view.ops]
    assert names == ["crop", "flip", "rotation", "normalize"]
    with pytest.raises(UserError, match=r"rotation\.p"):
        augment.RandomRotation(p=2.0)
    pipeline = augment.Pipeline((augment.RandomTilt(degrees=20.0), augment.RandomRotation(p=1.0)))
    images, params = pipeline(jax.random.split(jax.random.key(0), 64), np.ones((64, 8, 8, 3), np.float32))
    assert images.shape == (64, 8, 8, 3) and params["rotation"].dtype == np.int32
    assert 10 < np.abs(params["tilt"]).max() <= 20 and set(np.asarray(params["rotation"])) == {0, 1, 2, 3}
    assert set(augment.IDENTITY) == {"jitter", "crop", "blur_sigma", "grayscale", "flip"}
