"""Collapse metrics against loops over pairs, at the optima of theory, and where there is nothing to measure."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.errors import UserError
from jaxcl.evaluate.collapse import collapse_metrics
from jaxcl.method import sharding

RNG = np.random.default_rng(0)


def slow(z, labels, where):
    """Loops over images and views, in float64."""
    z = np.asarray(z, np.float64)
    length = np.linalg.norm(z, axis=-1, keepdims=True)
    z = (z / np.where(length > 0, length, 1))[where]
    labels = labels[where]
    within, between, kernel = [], [], []
    for i in range(len(z)):
        for a in z[i]:
            for j in range(len(z)):
                if i == j:
                    continue
                for b in z[j]:
                    kernel.append(np.exp(-2 * np.sum((a - b) ** 2)))
                    if labels[i] >= 0 and labels[j] >= 0:
                        (within if labels[i] == labels[j] else between).append(a @ b)
    classes = [z[labels == c] for c in set(labels.tolist()) if c >= 0]
    spread = [1 - np.sum(c.mean((0, 1)) ** 2) for c in classes if len(c) > 1]
    flat = z.reshape(-1, z.shape[-1])
    s = np.linalg.svd(flat - flat.mean(0), compute_uv=False)
    p = s[s > 1e-9] / s.sum()
    metrics = {
        "within_class_cosine": np.mean(within),
        "between_class_cosine": np.mean(between),
        "class_spread": np.mean(spread),
        "effective_rank": np.exp(-np.sum(p * np.log(p))),
        "uniformity": np.log(np.mean(kernel)),
    }
    if z.shape[1] > 1:
        metrics["alignment"] = np.mean([np.sum((v[s] - v[t]) ** 2) for v in z for s in range(len(v)) for t in range(s)])
    return metrics


def simplex(k):
    """[k, k] vertices of a regular simplex, unit rows."""
    x = np.eye(k) - 1 / k
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("wide", [True, False])
def test_loops(views, wide):
    z = RNG.normal(size=(23, views, 7)) + RNG.normal(size=(23, 1, 7))
    labels, where = RNG.choice([-1, 3, 4, 900, 77], 23), RNG.random(23) < 0.8
    labels[5], where[5] = 12, True  # alone in its class
    z[3] *= 1e-3
    with jax.enable_x64(wide):
        got = collapse_metrics(jnp.asarray(z, jnp.float64 if wide else jnp.float32), labels, where=where)
        assert {v.dtype for v in got.values()} == {jnp.dtype(jnp.float64 if wide else jnp.float32)}
    expected = slow(z, labels, where)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(got[key], value, rtol=1e-9 if wide else 2e-5, atol=1e-6, err_msg=key)


def test_one_view_needs_no_axis():
    z, labels = RNG.normal(size=(23, 7)), RNG.integers(0, 3, 23)
    a, b = collapse_metrics(z, labels), collapse_metrics(z[:, None], labels, where=np.ones(23, bool))
    assert a == b and "alignment" not in a


def test_class_collapse():
    """Each class at a vertex of the simplex, which is where SupCon leads."""
    for K, n in ((2, 20), (5, 8)):
        labels = np.repeat(np.arange(K), n)
        z = simplex(K)[labels] @ np.eye(K, 7) * RNG.uniform(0.1, 10, (K * n, 1))
        m = collapse_metrics(z, labels)
        assert float(m["within_class_cosine"]) == pytest.approx(1, abs=1e-6)
        assert float(m["between_class_cosine"]) == pytest.approx(-1 / (K - 1), abs=1e-6)
        assert 0 <= float(m["class_spread"]) < 1e-6
        assert float(m["effective_rank"]) == pytest.approx(K - 1, rel=1e-4)


def test_a_little_spread_keeps_its_digits():
    labels = np.repeat(np.arange(2), 2000)
    z = simplex(2)[labels] @ np.eye(2, 7) + 1e-3 * RNG.normal(size=(4000, 7))
    exact = slow_spread(z, labels)
    assert exact < 1e-5
    assert float(collapse_metrics(z, labels)["class_spread"]) == pytest.approx(exact, rel=0.05)


def slow_spread(z, labels):
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    return np.mean([1 - np.sum(z[labels == c].mean(0) ** 2) for c in np.unique(labels)])


def test_the_family_between_collapse_and_too_much_spread(golden):
    """sqrt(1-t) class vertex + sqrt(t) private vertex: cosines 1 - t n/(n-1) within and -(1-t)/(K-1) between."""
    d = golden("thanos", "theory_spread_curve")
    K, n = int(d["K"][0]), int(d["n"][0])
    labels = np.repeat(np.arange(K), n)
    for t in d["t"][[0, 7, 20]]:
        private = np.zeros((K * n, K * n))
        for c in range(K):
            private[c * n : c * n + n, c * n : c * n + n] = simplex(n)
        z = np.concatenate([np.sqrt(1 - t) * simplex(K)[labels], np.sqrt(t) * private], axis=1)
        m = collapse_metrics(np.stack([z, z], 1), labels)
        assert float(m["within_class_cosine"]) == pytest.approx(1 - t * n / (n - 1), abs=1e-5)
        assert float(m["between_class_cosine"]) == pytest.approx(-(1 - t) / (K - 1), abs=1e-5)
        assert float(m["class_spread"]) == pytest.approx(t, abs=1e-5)
        assert float(m["alignment"]) == 0


def test_complete_collapse_and_none():
    same = np.tile(RNG.normal(size=7), (40, 1)) * RNG.uniform(0.5, 2, (40, 1))
    m = collapse_metrics(same, np.arange(40) % 3)
    assert float(m["effective_rank"]) == 0 and float(m["uniformity"]) == pytest.approx(0, abs=1e-5)
    assert float(m["within_class_cosine"]) == pytest.approx(1) == pytest.approx(float(m["between_class_cosine"]))
    many = collapse_metrics(np.tile(RNG.normal(size=7), (4000, 1)), np.arange(4000) % 3)
    assert float(many["effective_rank"]) == 0  # though their mean is not exactly any of them
    two = np.zeros((40, 7))
    two[7, 3], two[12, 3] = 1, -5
    assert float(collapse_metrics(two, where=two.any(1))["uniformity"]) == pytest.approx(-8)
    free = collapse_metrics(RNG.normal(size=(4000, 7)), np.arange(4000) % 3)
    assert float(free["effective_rank"]) > 6.9 and abs(float(free["within_class_cosine"])) < 0.01


def test_tiles_change_nothing(monkeypatch):
    z, where = RNG.normal(size=(29, 2, 5)), RNG.random(29) < 0.9
    whole = collapse_metrics(z, where=where)
    module = importlib.import_module("jaxcl.evaluate.collapse")
    monkeypatch.setattr(module, "TILE_ENTRIES", 2 * 58 * 4)
    module._metrics.clear_cache()
    tiled = collapse_metrics(z, where=where)
    module._metrics.clear_cache()
    assert float(tiled["uniformity"]) == pytest.approx(float(whole["uniformity"]), abs=1e-6)


def test_memory_is_bounded():
    module = importlib.import_module("jaxcl.evaluate.collapse")
    shapes = ((20000, 1, 16), jnp.float32), ((20000,), jnp.int32), ((20000,), jnp.bool)
    lowered = module._metrics.lower(*(jax.ShapeDtypeStruct(*s) for s in shapes))
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 100 * 2**20  # 20000^2 floats are 1600


def test_sharded_batches():
    z, labels = RNG.normal(size=(24, 2, 7)).astype(np.float32), RNG.integers(-1, 3, 24)
    mesh = sharding.make_mesh(8)
    placed = sharding.device_put((z, labels), sharding.batch_sharding(mesh))
    a, b = collapse_metrics(z, labels), jax.jit(collapse_metrics)(*placed)
    for key, value in a.items():
        np.testing.assert_allclose(b[key], value, rtol=1e-5, atol=1e-6)


def test_nothing_to_measure():
    z = RNG.normal(size=(40, 7))
    m = collapse_metrics(z)
    assert {k for k, v in m.items() if np.isnan(v)} == {"within_class_cosine", "between_class_cosine", "class_spread"}
    m = collapse_metrics(z, np.arange(40))
    assert {k for k, v in m.items() if np.isnan(v)} == {"within_class_cosine", "class_spread"}
    m = collapse_metrics(z, np.zeros(40, int))
    assert {k for k, v in m.items() if np.isnan(v)} == {"between_class_cosine"}
    for rows in (0, 1):
        assert all(np.isnan(v) for v in collapse_metrics(z, np.zeros(40, int), where=np.arange(40) < rows).values())


def test_zero_rows_and_half_precision():
    z = RNG.normal(size=(23, 1, 7))
    z[4] = 0
    got = collapse_metrics(jnp.asarray(z, jnp.bfloat16), np.arange(23) % 3)
    expected = slow(z, np.arange(23) % 3, np.ones(23, bool))
    for key, value in expected.items():
        assert got[key].dtype == jnp.float32
        np.testing.assert_allclose(got[key], value, atol=0.01, rtol=0.01)


@pytest.mark.parametrize(
    "arguments, match",
    [
        ((np.zeros(4),), "expected floats .images, dimensions."),
        ((np.zeros((4, 2), int),), "expected floats"),
        ((np.zeros((4, 2)), np.zeros(3, int)), r"labels of shape \(3,\), expected \(4,\)"),
    ],
)
def test_mistakes(arguments, match):
    with pytest.raises(UserError, match=match) as error:
        collapse_metrics(*arguments)
    assert "\n" not in str(error.value)
