"""Coarse-to-fine transfer on features whose geometry says what must come out."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxcl.data import ArraySource
from jaxcl.evaluate import transfer as module
from jaxcl.evaluate.base import NotApplicable
from jaxcl.evaluate.linear_probe import LinearFit
from jaxcl.evaluate.transfer import Transfer, TransferAugmented, balanced_accuracy

FINE, COARSE = tuple("abcd"), ("A", "B")
OF_CLASS = np.array([0, 1, 0, 1])


def source(fine, *, labels="coarse", levels=True):
    n = len(fine)
    coarse = np.where(fine >= 0, OF_CLASS[fine], -1)
    by = {"coarse": (coarse, COARSE), "fine": (fine, FINE)}[labels]
    extras = {"coarse": coarse} if levels else {}
    return ArraySource(
        images=np.zeros((n, 2, 2, 3), np.uint8),
        labels=by[0],
        class_names=by[1],
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        extras=extras | ({"fine": fine} if labels == "coarse" and levels else {}),
        coarse_names=COARSE if levels else (),
        fine_names=FINE if labels == "coarse" and levels else (),
    )


def context(features, fine, test_features, test_fine, **options):
    sources = {"train": source(fine, **options), "test": source(test_fine, **options)}
    by_split = {"train": features, "test": test_features}
    options = SimpleNamespace(knn_k=5, knn_temperature=0.1)
    return SimpleNamespace(source=sources.get, test=sources["test"], features=by_split.get, options=options)


def data(collapsed, seed=0):
    """Points about one place a fine class, or, collapsed, a coarse class; 60 to train on, 200 to test."""
    rng = np.random.default_rng(seed)
    fine, test_fine = rng.permutation(np.arange(60) % 4), rng.permutation(np.arange(200) % 4)
    centres = rng.normal(size=(4, 6))
    if collapsed:
        centres = centres[OF_CLASS]
    noisy = lambda y: centres[y] + 1e-2 * rng.normal(size=(len(y), 6))  # noqa: E731
    return noisy(fine), fine, noisy(test_fine), test_fine


@pytest.mark.parametrize("labels", ["coarse", "fine"])
def test_what_is_kept_and_what_is_lost(labels):
    metrics, panels = Transfer()(context(*data(collapsed=False), labels=labels))
    assert metrics == {"accuracy": 1, "coarse_accuracy": 1, "balanced_accuracy": 1, "knn_accuracy": 1}
    metrics, panels = Transfer()(context(*data(collapsed=True), labels=labels))
    assert metrics["coarse_accuracy"] == 1  # within a coarse class the fine one is a guess
    assert 0.3 < metrics["accuracy"] < 0.7 and metrics["balanced_accuracy"] == pytest.approx(metrics["accuracy"])
    assert 0.3 < metrics["knn_accuracy"] < 0.7
    panel = panels["transfer"]
    np.testing.assert_array_equal(panel["labels"], data(True)[3])
    np.testing.assert_array_equal(panel["coarse"], OF_CLASS[panel["labels"]])
    assert panel["features"].shape == (200, 6) and panel["class_names"] == FINE and panel["coarse_names"] == COARSE


def test_a_mistake_within_the_coarse_class_is_none_at_the_coarse_level():
    """The probe learns c as a: every test image of c is wrong on the fine level and right on the coarse one."""
    train, fine, test, test_fine = data(collapsed=False)
    train[fine == 2] = -train[fine == 2]  # elsewhere when training
    centre = train[fine == 0].mean(0)
    test[test_fine == 2] = centre
    metrics, _ = Transfer()(context(train, fine, test, test_fine))
    assert metrics["accuracy"] == pytest.approx(0.75) and metrics["coarse_accuracy"] == 1
    rare = np.concatenate([np.flatnonzero(test_fine != 2), np.flatnonzero(test_fine == 2)[:1]])
    metrics, _ = Transfer()(context(train, fine, test[rare], test_fine[rare]))
    assert metrics["accuracy"] == pytest.approx(150 / 151) and metrics["balanced_accuracy"] == pytest.approx(0.75)


def test_unlabelled_rows_do_not_count():
    train, fine, test, test_fine = data(collapsed=False)
    fine, test_fine = fine.copy(), test_fine.copy()
    train[:5], test[:50] = 100, 100
    fine[:5] = test_fine[:50] = -1
    assert Transfer()(context(train, fine, test, test_fine))[0]["accuracy"] == 1


def test_the_panel_shows_so_many():
    train, fine, test, test_fine = data(collapsed=False)
    panel = Transfer()(context(train, fine, np.tile(test, (10, 1)), np.tile(test_fine, 10)))[1]["transfer"]
    assert {len(panel[k]) for k in ("features", "labels", "coarse")} == {1500}


def test_left_out():
    with pytest.raises(NotApplicable, match="the data has one level of labels"):
        Transfer()(context(*data(False), levels=False))
    train, fine, test, test_fine = data(False)
    with pytest.raises(NotApplicable, match="no test image has a fine label"):
        Transfer()(context(train, fine, test, np.full_like(test_fine, -1)))
    with pytest.raises(NotApplicable, match="no training image has a fine label"):
        Transfer()(context(train, np.full_like(fine, -1), test, test_fine))


def test_balanced_accuracy():
    labels, predicted = np.array([0, 0, 0, 2, 2, -1]), np.array([0, 0, 1, 2, 0, 0])
    assert balanced_accuracy(predicted, labels) == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert np.isnan(balanced_accuracy(predicted, np.full(6, -1)))


# ---- the protocol with augmented views


def augmented(f, *, epochs, held_out=None, noise=0.0):
    """`f` with what `transfer_augmented` asks for; a draw moves every feature a little."""
    f.options, f.recipe, f.held_out = SimpleNamespace(transfer_epochs=epochs), SimpleNamespace(seed=3), held_out
    f.drawn = []

    def features(split, draw):
        f.drawn.append((split, draw))
        x = f.features(split)
        return (x + noise * np.random.default_rng(draw).normal(size=x.shape)).astype(np.float32)

    f.augmented_features = features
    return f


def test_augmented_probe_learns_what_was_kept():
    def measured(collapsed):
        train, fine, test, test_fine = data(collapsed)
        # Often enough for the protocol's small steps: each moves a weight by a thousandth at most.
        f = augmented(context(np.tile(train, (43, 1)), np.tile(fine, 43), test, test_fine), epochs=80, noise=0.01)
        return TransferAugmented()(f), f.drawn

    (metrics, panels), drawn = measured(collapsed=False)
    assert metrics == {"accuracy": 1, "last_accuracy": 1} and panels == {}
    assert drawn == [("train", e) for e in range(80)]
    assert 0.3 < measured(collapsed=True)[0][0]["accuracy"] < 0.7


def test_the_epoch_is_chosen_on_the_validation_split(monkeypatch):
    """Probes that get worse: the first epoch's is measured, though the last one's is what training ends with."""
    train, fine, test, test_fine = data(collapsed=False)
    f = augmented(context(train, fine, test, test_fine), epochs=3, held_out="validation")
    held = source(fine[:20])
    f.source, features = {"train": f.source("train"), "validation": held}.get, f.features
    f.features = lambda split: train[:20] if split == "validation" else features(split)
    good = module.fit_linear_probe(train, fine, num_classes=4)
    bad = LinearFit(-good.weights, -good.bias)
    made = iter([(good, None), (bad, None), (bad, None)])
    monkeypatch.setattr(module, "_epoch", lambda *_: next(made))
    assert TransferAugmented()(f)[0] == {"accuracy": 1, "last_accuracy": pytest.approx(0, abs=0.5), "best_epoch": 1}


def test_the_epoch_is_the_first_of_the_best_on_the_rows_held_out(monkeypatch):
    """Not on the test images, where another epoch is best, nor on the training ones; cases F."""
    train, fine, test, test_fine = data(collapsed=False)
    good = module.fit_linear_probe(train, fine, num_classes=4)
    # A feature more, which is what the probe goes by: each split has its own, so each has its own best epoch.
    where_right = {"train": 0, "validation": 1, "test": 2}

    def split(x, name):
        return np.concatenate([x, np.eye(3)[np.full(len(x), where_right[name])]], axis=1)

    def probe(right):
        """Knows the classes on the splits of these numbers, and says the last class on the others."""
        last = np.full((3, 4), 0.0)
        last[[i for i in range(3) if i not in right], 3] = 1e4
        return LinearFit(np.concatenate([good.weights, last]).astype(np.float32), good.bias)

    f = augmented(context(split(train, "train"), fine, split(test, "test"), test_fine), epochs=4, held_out="validation")
    sources, features = f.source, f.features
    f.source = lambda name: source(fine[:20]) if name == "validation" else sources(name)
    f.features = lambda name: split(train[:20], "validation") if name == "validation" else features(name)
    made = iter([(probe(right), None) for right in ((0, 2), (1,), (0, 1), (2,))])
    monkeypatch.setattr(module, "_epoch", lambda *_: next(made))
    metrics = TransferAugmented()(f)[0]
    chance = (test_fine == 3).mean()
    assert metrics == {"accuracy": pytest.approx(chance), "last_accuracy": 1, "best_epoch": 2}


def test_an_epoch_is_adamw_written_out():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(300, 5)).astype(np.float32), np.arange(300) % 4
    y[7] = -1
    probe, state = module._start(5, 4, 11)
    w, b = (np.asarray(p, np.float64) for p in probe)
    assert np.abs(w).max() <= 5**-0.5 and np.abs(w).max() > 0.3
    m, v, count = [0, 0], [0, 0], 0
    for epoch in range(2):
        probe, state = module._epoch(probe, state, x, y, epoch, 3, 11)
        rate = 1e-3 * (1 + np.cos(np.pi * epoch / 3)) / 2
        order = np.asarray(jax.random.permutation(jax.random.fold_in(jax.random.key(11), epoch), 300))
        for rows in (order[:128], order[128:256]):  # the last 44 are dropped
            logits = x[rows] @ w + b
            p = np.exp(logits - logits.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            known = y[rows] >= 0
            g = np.where(known[:, None], p - np.eye(4)[y[rows]], 0) / known.sum()
            count += 1
            for i, grad in enumerate((x[rows].T @ g, g.sum(0))):
                m[i] = 0.9 * m[i] + 0.1 * grad
                v[i] = 0.999 * v[i] + 0.001 * grad**2
                step = m[i] / (1 - 0.9**count) / (np.sqrt(v[i] / (1 - 0.999**count)) + 1e-8)
                value = (w, b)[i]
                value -= rate * (step + 0.01 * value)
    np.testing.assert_allclose(probe.weights, w, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(probe.bias, b, rtol=1e-4, atol=1e-6)
