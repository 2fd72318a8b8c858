"""Calibration error against the reference library's numbers and a loop over bins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.errors import UserError
from jaxcl.evaluate import expected_calibration_error, reliability


@pytest.mark.parametrize("wide", [True, False], ids=["float64", "float32"])
def test_golden(golden, wide):
    d = golden("excon", "ece_10bins")
    n_bins = int(d["n_bins"])
    with jax.enable_x64(wide):
        probs = jnp.asarray(d["probs"], jnp.float64 if wide else jnp.float32)
        error = expected_calibration_error(probs, d["labels"], num_bins=n_bins)
        bins = reliability(probs, d["labels"], n_bins)
    tolerance = dict(rtol=1e-7, atol=1e-12) if wide else dict(rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(error, d["expected_ece"], **tolerance)
    np.testing.assert_array_equal(bins["count"], d["bin_count"])
    np.testing.assert_array_equal(bins["count"], np.bincount(d["bin_index"], minlength=n_bins))
    np.testing.assert_allclose(bins["accuracy"], d["bin_accuracy"], **tolerance)
    np.testing.assert_allclose(bins["confidence"], d["bin_confidence"], **tolerance)


def test_bins_are_closed_on_the_left():
    tenths = np.arange(1, 10) / 10
    probs = np.stack([tenths, np.zeros(9)], axis=1)  # the top label's confidence is exactly an edge
    for wide in (True, False):
        with jax.enable_x64(wide):
            count = reliability(jnp.asarray(probs), np.zeros(9, int))["count"]
        np.testing.assert_array_equal(count, [0] + [1] * 9)
    certain = reliability(np.array([[1.0, 0.0]]), np.array([0]))
    np.testing.assert_array_equal(certain["count"], [0] * 9 + [1])
    np.testing.assert_allclose(certain["confidence"][9], 1, rtol=1e-6)


def test_loop_with_rows_that_do_not_count():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(4) * 0.5, 200).astype(np.float32)
    labels = rng.integers(-1, 4, 200)
    where = rng.random(200) < 0.8
    for num_bins in (1, 7, 15):
        total = used = 0
        for b in range(num_bins):
            inside = [
                i
                for i in range(200)
                if where[i] and labels[i] >= 0 and b / num_bins <= probs[i].max() < (b + 1) / num_bins
            ]
            used += len(inside)
            if inside:
                accuracy = np.mean([probs[i].argmax() == labels[i] for i in inside])
                total += len(inside) * abs(accuracy - np.mean([probs[i].max() for i in inside]))
        got = expected_calibration_error(probs, labels, num_bins=num_bins, where=where)
        np.testing.assert_allclose(got, total / used, rtol=1e-5)


def test_perfect_worst_and_empty():
    probs = np.eye(3)[[0, 1, 2, 1]]
    np.testing.assert_allclose(expected_calibration_error(probs, np.array([0, 1, 2, 1])), 0, atol=1e-6)
    np.testing.assert_allclose(expected_calibration_error(probs, np.array([1, 2, 0, 0])), 1, rtol=1e-6)
    assert expected_calibration_error(probs, np.full(4, -1)) == 0
    with pytest.raises(UserError, match="calibration: probs of shape"):
        reliability(probs, np.zeros(3, int))


@pytest.mark.parametrize("num_bins", [0, -1, 2.5])
def test_a_number_of_bins_that_is_none(num_bins):
    """cases A.14"""
    for call in (expected_calibration_error, reliability):
        with pytest.raises(UserError, match="num_bins"):
            call(np.full((4, 2), 0.5), np.zeros(4, int), num_bins=num_bins)


def test_a_label_that_is_no_class():
    """cases A.2; cases A.1: 2**32 would be class 0."""
    for bad in (2, 2**32):
        with pytest.raises(UserError, match="row 1"):
            expected_calibration_error(np.full((4, 2), 0.5), np.array([0, bad, 1, -1]))
