"""Hidden groups: found where they are separate, robust training against a shortcut, and the metrics by hand."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.data import ArraySource
from jaxcl.data.selection import hold_out
from jaxcl.errors import UserError
from jaxcl.evaluate import (
    cluster_quality,
    find_groups,
    fit_linear_probe,
    group_accuracies,
    group_dro,
    probe_logits,
    robust_probe,
)
from jaxcl.evaluate import worst_group as module
from jaxcl.evaluate.base import NotApplicable
from jaxcl.evaluate.linear_probe import LinearFit
from jaxcl.evaluate.worst_group import FITTED_ROWS, WorstGroup


def blobs(sizes, seed=0, noise=0.3):
    """-> (features, labels, groups): class c in len(sizes[c]) separate blobs of these sizes, in random order."""
    rng = np.random.default_rng(seed)
    labels, groups, points = [], [], []
    for c, own in enumerate(sizes):
        for n in own:
            centre = 3 * rng.normal(size=5)
            points.append(centre + noise * rng.normal(size=(n, 5)))
            labels += [c] * n
            groups += [len(points) - 1] * n
    order = rng.permutation(len(labels))
    return np.concatenate(points)[order], np.array(labels)[order], np.array(groups)[order]


def shortcut(n, agree, seed):
    """A clear cue that agrees with the label for a share of the rows, and a weaker feature that always does.

    -> (features, labels, groups 2 * label + disagrees)
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    agrees = rng.random(n) < agree
    sign, cue = 2 * labels - 1, (2 * labels - 1) * (2 * agrees - 1)
    x = np.stack([0.8 * sign + 0.6 * rng.normal(size=n), 3 * cue + 0.3 * rng.normal(size=n), rng.normal(size=n)], 1)
    return x, labels, 2 * labels + ~agrees


# ---- groups found


@pytest.mark.parametrize("method", ["gmm", "kmeans"])
def test_separate_groups_are_found(method):
    x, labels, groups = blobs([(60, 40, 50), (80, 30)])
    found = find_groups(x, labels, method=method, overcluster=1)
    assert found.dtype == np.int32 and sorted(set(found.tolist())) == list(range(found.max() + 1))
    quality = cluster_quality(found, groups)
    assert quality["f1"] > 0.99
    for g in set(found.tolist()):
        assert len(set(labels[found == g].tolist())) == 1
    # The names of classes and the scale of features do not matter; unlabelled rows are in no group.
    other = labels * 7 + 3
    other[:9] = -1
    again = find_groups(x * [1e-3, 1, 1e3, 1, 1], other, method=method, overcluster=1)
    assert (again[:9] == -1).all() and (again[9:] >= 0).all()
    assert cluster_quality(again, groups)["f1"] > 0.99


def test_the_second_cut_finds_a_small_group_inside_a_large_one():
    """Two far halves of a class hide that one of them is two: the silhouette stops at two clusters."""
    rng = np.random.default_rng(0)
    centres = np.array([[0.0, 0], [10, 0], [10, 1.6]])
    groups = np.repeat([0, 1, 2], [120, 100, 20])
    x = centres[groups] + 0.15 * rng.normal(size=(240, 2))
    labels = np.zeros(240, int)
    one_cut, two_cuts = (find_groups(x, labels, overcluster=k, max_clusters=2) for k in (1, 3))
    assert len(set(one_cut.tolist())) == 2
    assert cluster_quality(two_cuts, groups)["by_group"][2]["f1"] > 0.9 > cluster_quality(one_cut, groups)["f1"]


def test_finding_is_deterministic_and_takes_large_classes():
    x, labels, groups = blobs([(FITTED_ROWS, 600)])
    a, b = (find_groups(x, labels, max_clusters=3, overcluster=1, seed=4) for _ in range(2))
    np.testing.assert_array_equal(a, b)
    assert cluster_quality(a, groups)["f1"] > 0.99


def test_what_cannot_be_cut_is_one_group():
    x = np.ones((40, 3))
    labels = np.repeat([0, 1, 2, 3], [20, 9, 10, 1])
    x[20:29] = np.random.default_rng(0).normal(size=(9, 3))  # too few
    x[30:39, 0] = [0, 0, 0, 0, 0, 0, 1, 1, 1]  # two points, over and over
    found = find_groups(x, labels)
    assert [len(set(found[labels == c].tolist())) for c in range(4)] == [1, 1, 1, 1]
    assert len(find_groups(x[:0], labels[:0])) == 0


# ---- robust training


def test_dro_resists_a_shortcut_that_the_mean_loss_takes():
    x, labels, groups = shortcut(1200, 0.95, seed=0)
    test = shortcut(2000, 0.5, seed=1)
    erm = fit_linear_probe(x, labels, num_classes=2)
    dro = group_dro(x, labels, groups, num_classes=2, steps=600)
    even = group_dro(x, labels, np.zeros(1200, int), num_classes=2, steps=600)
    worst = [group_accuracies(np.argmax(probe_logits(p, test[0]), 1), *test[1:])["worst"] for p in (erm, dro, even)]
    assert worst[1] > worst[0] + 0.2 and worst[1] > 0.8
    assert worst[2] < worst[1] - 0.2  # one group: the mean loss, however it is minimised


def test_every_step_of_dro_draws_other_rows():
    """One row a step, no feature, both classes alike: the bias stays small unless one row comes again and again.

    cases F.
    """
    labels = np.arange(40) % 2
    probe = group_dro(np.zeros((40, 1)), labels, np.zeros(40, int), num_classes=2, batch_size=1, steps=400, eta=0.0)
    assert abs(float(probe.bias[1] - probe.bias[0])) < 1


def contradicting(count):
    """One feature, which says the class in group 0 and mostly the other class in group 1."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, 1))
    groups = np.arange(count) % 2
    labels = (x[:, 0] > 0).astype(int)
    flip = (groups == 1) & (rng.random(count) < 0.75)
    return x, np.where(flip, 1 - labels, labels), groups


def test_dro_gives_weight_to_the_group_that_loses():
    """Without balance in what is drawn to hide behind: the two groups contradict each other, one more noisily."""
    x, labels, groups = contradicting(400)
    slope = []
    for eta in (0.0, 0.2):
        probe = group_dro(x, labels, groups, num_classes=2, eta=eta, steps=600, l2=1e-2)
        slope.append(float(probe.weights[0, 1] - probe.weights[0, 0]))
    assert slope[0] > 0.3 and slope[1] < slope[0] - 0.2


def test_the_robust_probe_is_the_best_of_a_few_on_rows_held_out():
    """Written out: held-out rows are a fifth of each group, and the choice is fitted to all rows again."""
    x, labels, groups = contradicting(1000)
    probe, chosen = robust_probe(x, labels, groups, num_classes=2, seed=3)
    held = hold_out(groups, 0.2, seed=3)
    assert [held[groups == g].mean() for g in range(2)] == [0.2, 0.2]
    scores = {}
    for eta in (0.0, 0.01):
        for l2 in (1e-3, 1e-2, 1e-1):
            fit = group_dro(x[~held], labels[~held], groups[~held], num_classes=2, eta=eta, l2=l2, seed=3)
            right = np.asarray(probe_logits(fit, x[held])).argmax(1) == labels[held]
            scores[eta, l2] = min(float(right[groups[held] == g].mean()) for g in range(2))
    assert (chosen["eta"], chosen["l2"]) == max(scores, key=scores.get)
    assert scores[0.0, 1e-3] < max(scores.values())  # not just the first
    again = group_dro(x, labels, groups, num_classes=2, seed=3, **chosen)
    np.testing.assert_array_equal(probe.weights, again.weights)
    # Too few rows to hold any out: the first choice.
    _, few = robust_probe(x[:4], np.array([0, 0, 1, 1]), np.arange(4), num_classes=2)
    assert few == {"eta": 0.0, "l2": 1e-3}


def test_eta_and_l2_are_chosen_on_rows_that_no_fit_has_seen(monkeypatch):
    """One choice knows its own rows by heart and fails on others; another is right on four fifths of any; cases F."""
    rng = np.random.default_rng(0)
    groups, labels = np.arange(200) % 2, rng.integers(0, 2, 200)
    held, sign = hold_out(groups, 0.2, seed=5), 2 * labels - 1
    noisy = np.where(rng.random(200) < 0.8, sign, -sign)
    x = np.stack([sign, held * sign, noisy], 1).astype(np.float32)
    by_heart, honest, asked = np.array([1.0, -2, 0]), np.array([0.0, 0, 1]), []

    def fake(features, labels, groups, *, eta, l2, **options):
        asked.append((len(features), eta, l2))
        weight = honest if (eta, l2) == (0.01, 1e-2) else by_heart
        return LinearFit(jnp.asarray(np.stack([0 * weight, weight], 1), jnp.float32), jnp.zeros(2))

    monkeypatch.setattr(module, "group_dro", fake)
    probe, chosen = robust_probe(x, labels, groups, num_classes=2, seed=5)
    assert chosen == {"eta": 0.01, "l2": 1e-2}
    np.testing.assert_array_equal(probe.weights[:, 1], honest)
    # Every choice is fitted to the other rows, and only the last fit, of the choice, to all.
    assert [n for n, *_ in asked] == [160] * 6 + [200] and asked[-1][1:] == (0.01, 1e-2)


def test_dro_is_deterministic_and_ignores_what_is_unknown():
    x, labels, groups = shortcut(1200, 0.95, seed=0)
    options = dict(num_classes=2, steps=600)
    probe = group_dro(x, labels, groups, **options)
    again = group_dro(x, labels, groups * 10 + 3, **options)
    np.testing.assert_array_equal(probe.weights, again.weights)
    assert np.abs(probe.weights - group_dro(x, labels, groups, seed=1, **options).weights).max() > 0
    more = np.concatenate([x, np.full((2, 3), np.nan)])
    ignored = group_dro(more, np.append(labels, [-1, 0]), np.append(groups, [0, -1]), **options)
    np.testing.assert_array_equal(probe.weights, ignored.weights)


def test_dro_of_constant_features_and_half_precision():
    x, labels, groups = shortcut(1200, 0.95, seed=0)
    x[:, 2] = 7
    probe = group_dro(jnp.asarray(x, jnp.bfloat16), labels, groups, num_classes=2, steps=600)
    assert probe.weights.dtype == jnp.float32 and np.isfinite(probe.weights).all()
    test = shortcut(500, 0.5, seed=1)
    test[0][:, 2] = 7
    assert group_accuracies(np.argmax(probe_logits(probe, test[0]), 1), *test[1:])["worst"] > 0.75


# ---- metrics


def test_group_accuracies_by_hand():
    predicted = np.array([0, 1, 1, 0, 2, 2, 0, 0])
    labels = np.array([0, 1, 0, 0, 2, 1, -1, 0])
    groups = np.array([5, 5, 5, 9, 9, 9, 9, -1])
    got = group_accuracies(predicted, labels, groups)
    assert got == {
        "average": pytest.approx(4 / 6),
        "worst": pytest.approx(2 / 3),
        "by_group": {5: pytest.approx(2 / 3), 9: pytest.approx(2 / 3)},
    }
    nothing = group_accuracies(predicted, labels, np.full(8, -1))
    assert np.isnan(nothing["worst"]) and np.isnan(nothing["average"]) and nothing["by_group"] == {}


def test_cluster_quality_by_hand():
    true = np.array([0] * 6 + [1] * 4 + [2] * 2 + [-1])
    pseudo = np.array([7, 7, 7, 7, 8, 8] + [8, 8, 8, 8] + [8, 8] + [7])
    got = cluster_quality(pseudo, true)
    assert got["by_group"][0] == {"precision": 1, "recall": pytest.approx(4 / 6), "f1": pytest.approx(0.8), "pseudo": 7}
    assert got["by_group"][1] == {"precision": 0.5, "recall": 1, "f1": pytest.approx(2 / 3), "pseudo": 8}
    assert got["by_group"][2] == {"precision": 0, "recall": 0, "f1": 0, "pseudo": -1}  # nothing is left to match
    assert got["f1"] == pytest.approx((0.8 + 2 / 3) / 3) and got["recall"] == pytest.approx((4 / 6 + 1) / 3)
    assert cluster_quality(true, true)["f1"] == 1
    # The best matching as a whole, not the best for each: group 0 gives way.
    true, pseudo = np.repeat([0, 0, 1], [5, 4, 5]), np.repeat([0, 1, 0], [5, 4, 5])
    assert {g: v["pseudo"] for g, v in cluster_quality(pseudo, true)["by_group"].items()} == {0: 1, 1: 0}
    assert np.isnan(cluster_quality(true, np.full(14, -1))["f1"])


# ---- the evaluator


def context(train, test, *, groups=True):
    def source(labels, group):
        return ArraySource(
            images=np.zeros((len(labels), 2, 2, 3), np.uint8),
            labels=labels,
            class_names=("a", "b"),
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
            extras={"group": group} if groups else {},
            group_names=("a, own", "a, other", "b, own", "b, other"),
        )

    sources = {"train": source(*train[1:]), "test": source(*test[1:])}
    return SimpleNamespace(
        source=sources.get,
        test=sources["test"],
        features={"train": train[0], "test": test[0]}.get,
        recipe=SimpleNamespace(seed=0),
        num_classes=2,
        fitted_probe=lambda: fit_linear_probe(train[0], train[1], num_classes=2),
    )


def test_worst_group_without_knowing_the_groups():
    train, test = shortcut(1200, 0.95, seed=0), shortcut(2000, 0.5, seed=1)
    metrics, panels = WorstGroup()(context(train, test))
    assert panels == {} and metrics["dro_worst"] > metrics["erm_worst"] + 0.15
    assert set(metrics["by_group"]) == {"a, own", "a, other", "b, own", "b, other"}
    assert metrics["oracle_worst"] > metrics["erm_worst"] + 0.15
    assert {metrics[f"{name}_eta"] for name in ("dro", "oracle")} <= {0.0, 0.01}
    for name in ("erm", "dro", "oracle"):
        by_group = [g[name] for g in metrics["by_group"].values()]
        assert metrics[f"{name}_worst"] == min(by_group) < metrics[f"{name}_average"] < max(by_group)
    assert metrics["groups_found"] >= 4
    for key in ("precision", "recall", "f1"):
        assert 0.6 < metrics[f"cluster_{key}"] <= 1


def test_left_out():
    train, test = shortcut(50, 0.9, seed=0), shortcut(50, 0.5, seed=1)
    with pytest.raises(NotApplicable, match="the data has no groups"):
        WorstGroup()(context(train, test, groups=False))
    with pytest.raises(NotApplicable, match="the data has no groups"):
        WorstGroup()(context(train, (*test[:2], np.full(50, -1))))
    with pytest.raises(NotApplicable, match="no test image has a label"):
        WorstGroup().check_needs(context(train, (test[0], np.full(50, -1), test[2])))


# ---- mistakes


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda x, y: find_groups(x, y[:3]), r"find_groups: features of shape \(20, 3\) and \(3,\)"),
        (lambda x, y: find_groups(x, y, method="umap"), "method='umap', expected one of gmm, kmeans"),
        (lambda x, y: find_groups(x, y, max_clusters=1), "max_clusters=1"),
        (lambda x, y: group_dro(x, y, y[:3], num_classes=2), "group_dro: features of shape"),
        (lambda x, y: group_dro(x, y, y, num_classes=2, steps=0), "steps=0"),
        (lambda x, y: group_dro(x, y, y, num_classes=2, learning_rate=float("nan")), "learning_rate=nan"),
        (lambda x, y: group_dro(x, y, y - 5, num_classes=2), "no row has a label and a group"),
        (lambda x, y: group_accuracies(y, y, y[:3]), "expected .rows. three times"),
        (lambda x, y: cluster_quality(y, y[:3]), "expected .rows. twice"),
    ],
)
def test_mistakes(call, match):
    with pytest.raises(UserError, match=match) as error:
        call(np.zeros((20, 3)), np.arange(20) % 2)
    assert "\n" not in str(error.value)
