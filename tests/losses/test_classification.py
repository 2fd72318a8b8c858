"""Cross-entropy against a written-out loop, and rows that must be ignored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from loss_checks import assert_user_error, mesh_of

from jaxcl.losses.classification import cross_entropy


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


@pytest.mark.parametrize("wide", [True, False], ids=["float64", "float32"])
def test_golden(golden, wide):
    d = golden("thanos", "classifier_loss")
    rtol, atol = (1e-9, 1e-12) if wide else (1e-5, 1e-7)
    with jax.enable_x64(wide):
        logits = jnp.asarray(d["logits"], jnp.float64 if wide else jnp.float32)
        loss = jax.jit(jax.value_and_grad(lambda x, e: cross_entropy(x, d["labels"], label_smoothing=e)))
        want = zip(d["smoothing"], d["loss"], d["grad"], strict=True)
        results = [(*loss(logits, e), value, grad, rtol) for e, value, grad in want]
        soft = jax.jit(jax.value_and_grad(lambda x: cross_entropy(x, d["soft_targets"])))
        # The authors' code rounds soft targets to float32.
        results.append((*soft(logits), d["soft_loss"], d["soft_grad"], max(rtol, 1e-6)))
    for value, grad, want, want_grad, rtol in results:
        assert value.dtype == grad.dtype == logits.dtype
        np.testing.assert_allclose(value, want, rtol=rtol)
        np.testing.assert_allclose(grad, want_grad, rtol=rtol, atol=atol)


def test_soft_targets():
    rng = np.random.default_rng(3)
    logits, labels = rng.normal(size=(5, 4)).astype(np.float32), np.array([3, 1, 0, 0, 2])
    hard = jnp.eye(4, dtype=jnp.bfloat16)[labels]
    for smoothing in (0.0, 0.3):
        want = slow_cross_entropy(logits, labels, label_smoothing=smoothing)
        np.testing.assert_allclose(cross_entropy(logits, hard, label_smoothing=smoothing), want, rtol=1e-6)
    targets = rng.dirichlet(np.ones(4), size=5).astype(np.float32)
    where = np.array([True, True, False, True, True])
    logits[2], targets[2] = np.nan, np.nan
    value, grad = jax.value_and_grad(lambda x: cross_entropy(x, targets, where=where))(logits)
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    np.testing.assert_allclose(value, -(targets * log_probs).sum(1)[where].mean(), rtol=1e-6)
    np.testing.assert_allclose(grad[where], (np.exp(log_probs) - targets)[where] / 4, atol=1e-6)
    np.testing.assert_array_equal(grad[2], 0)


@pytest.mark.parametrize("kind", ["labels", "distributions"])
def test_mean_over_all_devices(kind):
    rng = np.random.default_rng(4)
    logits, where = rng.normal(size=(16, 3)).astype(np.float32), np.arange(16) % 5 != 1
    labels = rng.integers(-1, 3, size=16)
    labels[:2] = -1  # one device without a labelled row: the mean over devices of their means is a different number
    if kind == "distributions":
        labels = rng.dirichlet(np.ones(3), size=16).astype(np.float32)
        where[:2] = False
    local = lambda x, y, w: cross_entropy(x, y, where=w, axis_name="data")  # noqa: E731
    loss = jax.shard_map(local, mesh=mesh_of(8), in_specs=P("data"), out_specs=P())
    got = jax.jit(jax.value_and_grad(loss))(logits, labels, where)
    want = jax.value_and_grad(cross_entropy)(logits, labels, where=where)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    np.testing.assert_allclose(got[1], want[1], atol=1e-7)


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


@pytest.mark.parametrize("labels", [np.zeros(4, int), np.zeros(3), np.zeros((3, 4), int), np.zeros((3, 3))], ids=str)
def test_shapes_that_do_not_match(labels):
    assert_user_error(lambda: cross_entropy(np.ones((3, 4)), labels), "cross_entropy: ", "labels")


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_masked_classes(soft):
    """cases A.3: -inf masks a class; torch gives the same loss and gradient."""
    logits, labels = [[2, 1, -np.inf], [0.5, 1, -np.inf]], np.array([0, 1])
    target = np.eye(3, dtype=np.float32)[labels] if soft else labels
    value, grad = jax.value_and_grad(lambda x: cross_entropy(x, target))(jnp.array(logits))
    np.testing.assert_allclose(value, 0.39366946, rtol=1e-6)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(grad, (p - np.eye(3)[labels]) / 2, atol=1e-7)
    # A target above 0 of a masked class costs infinitely much, as in torch; it is not NaN.
    assert cross_entropy(logits, target, label_smoothing=0.1) == np.inf
    assert cross_entropy(logits, np.array([2, 1])) == np.inf


def test_logits_whose_difference_overflows():
    """cases A.3"""
    logits = [[3e38, -3e38]]
    for target in (np.array([0]), np.array([[1.0, 0.0]])):
        value, grad = jax.value_and_grad(lambda x, t=target: cross_entropy(x, t))(jnp.array(logits))
        assert value == 0 and not grad.any()
    assert cross_entropy(logits, np.array([1])) == np.inf


def test_the_gradient_of_soft_targets_is_kept():
    """cases A.3"""
    logits, target = jnp.array([[2.0, 1.0, 0.0]]), jnp.array([[1.0, 0.0, 0.0]])
    grad = jax.grad(lambda t: cross_entropy(logits, t))(target)
    np.testing.assert_allclose(grad, -jax.nn.log_softmax(logits), rtol=1e-6)
