"""Weighted k-NN against the authors' votes and a loop over neighbours."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.errors import UserError
from jaxcl.evaluate import knn_predict, nearest_neighbours


def slow_knn(bank, labels, queries, k, temperature, num_classes):
    bank = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    probs = np.zeros((len(queries), num_classes))
    for q, query in enumerate(queries):
        s = bank @ query
        order = [i for i in np.argsort(-s) if labels[i] >= 0][:k]
        for i in order:
            probs[q, labels[i]] += np.exp((s[i] - s[order[0]]) / temperature)
        probs[q] /= probs[q].sum()
    return probs


def data(seed=0, n=40, q=7, d=6, classes=4):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)), rng.integers(0, classes, n), rng.normal(size=(q, d))


@pytest.mark.parametrize("name", ["knn_n256_k20_t05", "knn_n512_k200_t01"])
@pytest.mark.parametrize("wide", [True, False])
def test_golden(golden, name, wide):
    d = golden("clae", name)
    with jax.enable_x64(wide):
        dtype = jnp.float64 if wide else jnp.float32
        probs = knn_predict(
            jnp.asarray(d["bank"], dtype),
            d["bank_labels"],
            jnp.asarray(d["queries"], dtype),
            k=int(d["k"]),
            temperature=float(d["temperature"]),
            num_classes=int(d["num_classes"]),
        )
    assert probs.dtype == dtype
    np.testing.assert_allclose(probs, d["class_probs"], atol=1e-12 if wide else 2e-5)
    np.testing.assert_array_equal(np.argmax(probs, 1), d["predictions"])
    accuracy = 100 * np.mean(np.argmax(probs, 1) == d["query_labels"])
    np.testing.assert_allclose(accuracy, d["accuracy_percent"])


def test_loop_with_unlabelled_rows_and_a_class_nobody_has():
    bank, labels, queries = data()
    labels[::3] = -1
    got = knn_predict(bank * 5, labels, queries * 0.1, k=9, temperature=0.2, num_classes=6)
    np.testing.assert_allclose(got, slow_knn(bank, labels, queries, 9, 0.2, 6), atol=1e-5)
    np.testing.assert_array_equal(got[:, 4:], 0)


def test_k_larger_than_the_bank_and_than_the_labelled_part():
    bank, labels, queries = data()
    whole = slow_knn(bank, labels, queries, 40, 0.1, 4)
    np.testing.assert_allclose(knn_predict(bank, labels, queries, num_classes=4), whole, atol=1e-5)
    labels[5:] = -1
    few = slow_knn(bank, labels, queries, 5, 0.1, 4)
    np.testing.assert_allclose(knn_predict(bank, labels, queries, k=20, num_classes=4), few, atol=1e-5)


@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 1e3])
def test_stable_at_any_temperature(temperature):
    bank, labels, queries = data()
    probs = knn_predict(bank, labels, queries, k=10, temperature=temperature, num_classes=4)
    np.testing.assert_allclose(probs.sum(1), 1, rtol=1e-5)
    if temperature < 1e-5:  # the nearest neighbour decides
        unit = bank / np.linalg.norm(bank, axis=1, keepdims=True)
        np.testing.assert_array_equal(np.argmax(probs, 1), labels[np.argmax(queries @ unit.T, 1)])


def test_chunks_change_nothing(monkeypatch):
    bank, labels, queries = data(n=41, q=23)  # shapes no other test uses: the constant is read when tracing
    monkeypatch.setattr(importlib.import_module("jaxcl.evaluate.knn"), "CHUNK_ENTRIES", 41 * 5)
    got = knn_predict(bank, labels, queries, k=9, num_classes=4)
    np.testing.assert_allclose(got, slow_knn(bank, labels, queries, 9, 0.1, 4), atol=1e-5)


def test_memory_is_bounded():
    module = importlib.import_module("jaxcl.evaluate.knn")
    shapes = [(20000, 16), (20000,), (20000, 16)]  # 400 million similarities
    types = [jnp.float32, jnp.int32, jnp.float32]
    args = [jax.ShapeDtypeStruct(s, t) for s, t in zip(shapes, types, strict=True)]
    lowered = module._knn.lower(*args, 0.1, k=200, num_classes=10)
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 400 * 2**20


def test_zero_rows_empty_labels_and_half_precision():
    bank, labels, queries = data()
    bank[3], queries[2] = 0, 0
    probs = knn_predict(jnp.asarray(bank, jnp.bfloat16), labels, jnp.asarray(queries, jnp.bfloat16), num_classes=4)
    assert probs.dtype == jnp.float32 and np.isfinite(probs).all()
    nobody = knn_predict(bank, np.full(40, -1), queries, k=5, num_classes=4)
    np.testing.assert_array_equal(nobody, 0)


def test_mistakes():
    bank, labels, queries = data()
    with pytest.raises(UserError, match="at least one bank row"):
        knn_predict(bank[:0], labels[:0], queries, num_classes=4)
    with pytest.raises(UserError, match="as many features"):
        knn_predict(bank, labels, queries[:, :3], num_classes=4)
    with pytest.raises(UserError, match="bank_labels of shape"):
        knn_predict(bank, labels[:5], queries, num_classes=4)
    with pytest.raises(UserError, match="k=0"):
        knn_predict(bank, labels, queries, k=0, num_classes=4)


def test_labels_that_are_no_class():
    """cases A.2"""
    bank, labels, queries = data()
    for bad in (labels + 3, labels.astype(np.int64) + 2**32):
        with pytest.raises(UserError, match="bank_labels"):
            knn_predict(bank, bad, queries, k=5, num_classes=4)
    traced = jax.jit(lambda y: knn_predict(bank, y, queries, k=5, num_classes=4))
    assert np.isnan(traced(np.full(40, 4))).all()


def test_a_row_that_is_not_finite():
    """cases A.7: it would be the nearest neighbour of every query."""
    bank, labels, queries = data()
    want = knn_predict(np.delete(bank, 7, 0), np.delete(labels, 7), queries, k=5, num_classes=4)
    bank[7, 2] = np.nan
    for call in (
        lambda: knn_predict(bank, np.maximum(labels, 0), queries, k=5, num_classes=4),
        lambda: nearest_neighbours(bank, queries, k=5),
        lambda: knn_predict(queries, np.zeros(len(queries), int), bank, k=5, num_classes=4),
    ):
        with pytest.raises(UserError, match="row 7"):
            call()
    labels[7] = -1
    np.testing.assert_allclose(knn_predict(bank, labels, queries, k=5, num_classes=4), want, rtol=1e-6)


def test_temperature_is_checked():
    """cases A.14"""
    bank, labels, queries = data()
    with pytest.raises(UserError, match="temperature"):
        knn_predict(bank, labels, queries, temperature=np.float32(0), num_classes=4)
