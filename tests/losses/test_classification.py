"""Cross-entropy against a written-out loop, and rows that must not count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.errors import UserError
from jaxcl.losses import cross_entropy


def slow_cross_entropy(logits, labels, where=None, label_smoothing=0.0):
    losses = []
    for i, (row, label) in enumerate(zip(np.asarray(logits, np.float64), labels, strict=True)):
        if label < 0 or (where is not None and not where[i]):
            continue
        log_probs = row - np.log(np.exp(row).sum())
        target = np.full(len(row), label_smoothing / len(row))
        target[label] += 1 - label_smoothing
        losses.append(-(target * log_probs).sum())
    return np.mean(losses) if losses else 0.0


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("where", [None, [True, True, False, True, True]])
def test_written_out_loop(where, label_smoothing):
    logits = np.random.default_rng(0).normal(size=(5, 4))
    labels = np.array([3, -1, 0, 0, 2])
    got = cross_entropy(
        logits, labels, where=None if where is None else np.array(where), label_smoothing=label_smoothing
    )
    np.testing.assert_allclose(got, slow_cross_entropy(logits, labels, where, label_smoothing), rtol=1e-6)


def test_gradient_is_probability_minus_target_over_the_rows_that_count():
    logits = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)
    logits[2] = np.nan  # padding may hold anything
    labels, where = np.array([0, 2, 1, -1]), np.array([True, True, False, True])
    value, grad = jax.jit(jax.value_and_grad(lambda x: cross_entropy(x, labels, where=where)))(logits)
    np.testing.assert_allclose(value, slow_cross_entropy(logits[:2], labels[:2]), rtol=1e-6)
    want = (np.asarray(jax.nn.softmax(logits[:2])) - np.eye(3)[labels[:2]]) / 2
    np.testing.assert_allclose(grad[:2], want, atol=1e-6)
    np.testing.assert_array_equal(grad[2:], 0)


def test_no_row_counts_gives_zero():
    value, grad = jax.value_and_grad(cross_entropy)(jnp.ones((3, 2)), jnp.full(3, -1))
    assert value == 0 and not grad.any()


def test_huge_logits_and_half_precision():
    assert cross_entropy(np.array([[1e6, -1e6]]), np.array([0])) == 0
    half = cross_entropy(jnp.ones((2, 7), jnp.bfloat16), jnp.array([1, 2]))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, np.log(7), rtol=1e-6)


def test_more_axes():
    logits, labels = np.random.default_rng(2).normal(size=(2, 3, 4)), np.array([[0, 1, 2], [3, -1, 0]])
    flat = cross_entropy(logits.reshape(6, 4), labels.reshape(6))
    np.testing.assert_allclose(cross_entropy(logits, labels), flat, rtol=1e-6)


def test_shapes_that_do_not_match():
    with pytest.raises(UserError, match="one label a row"):
        cross_entropy(np.ones((3, 4)), np.zeros(4, int))
