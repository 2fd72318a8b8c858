"""Groups and odd ones out, against loops and planted groups; what the report gets of them."""

import json

import numpy as np
import pytest
from evaluations import evaluation, source

from jaxcl.errors import UserError
from jaxcl.evaluate import clusters as module
from jaxcl.evaluate.clusters import clusters, oddness, usual_count
from jaxcl.evaluate.rows import normalized


def planted(sizes, seed=0, features=20):
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(len(sizes)), sizes)
    x = rng.normal(size=(len(sizes), features))[group] + 0.1 * rng.normal(size=(len(group), features))
    order = rng.permutation(len(group))
    return normalized(x[order]), group[order]


def test_planted_groups_are_found_the_largest_first():
    features, truth = planted((40, 25, 10, 5))
    group, apart, silhouette = clusters(features, 4)
    np.testing.assert_array_equal(group, truth)
    assert silhouette > 0.5
    for g in range(4):  # 20 features are kept whole: distances to the mean of the features themselves
        middle = features[group == g].mean(0)
        np.testing.assert_allclose(apart[group == g], np.linalg.norm(features[group == g] - middle, axis=1), atol=1e-4)


@pytest.mark.parametrize("images, expected", [(1, 2), (6, 2), (800, 20), (10**6, 48)])
def test_their_usual_number(images, expected):
    assert usual_count(images) == expected


def test_equal_images_are_one_group():
    group, apart, silhouette = clusters(np.ones((20, 5), np.float32) / 5**0.5)
    assert not group.any() and np.abs(apart).max() < 1e-5 and silhouette == -1


@pytest.mark.parametrize("bank", [20_000, 30])
def test_how_odd_an_image_is_by_a_loop(bank, monkeypatch):
    monkeypatch.setattr(module, "BANK", bank)
    features, _ = planted((30, 12))
    features[7] = features[8] = features[9]  # copies: the image itself may not come first
    odd, nearest = oddness(features)
    chosen = np.sort(np.random.default_rng(0).permutation(42)[:bank])
    for i in range(42):
        others = np.array([j for j in chosen if j != i])
        cosine = features[others] @ features[i]
        assert odd[i] == pytest.approx(1 - np.sort(cosine)[::-1][:5].mean(), abs=1e-5)
        assert features[nearest[i]] @ features[i] == pytest.approx(cosine.max(), abs=1e-5) and nearest[i] != i


@pytest.mark.parametrize("labelled", [True, False])
def test_results_and_the_table_of_all_images(labelled):
    e, state, mesh = evaluation(
        final=("neighbours", "clusters"), report=True, probe=labelled, train_labels=labelled, test_labels=labelled
    )
    results, panels = e.final(state, mesh)
    found = results["clusters"]
    assert found["count"] == len(panels["clusters"]["sizes"]) and 0 < found["largest"] <= 1
    assert ("nmi" in found) == labelled and json.loads(json.dumps(results)) == results
    count = len(source("train")) + len(source("test"))
    columns, rows = panels["table"]["columns"], panels["table"]["rows"]
    assert len(rows) == count and all(len(row) == len(columns) for row in rows)
    group = [row[columns.index("group")] for row in rows]
    assert sorted(np.bincount(group)[1:], reverse=True) == panels["clusters"]["sizes"]
    assert panels["map"]["groups"] == group  # all of so few images are on the map
    odd = [float(row[columns.index("odd")]) for row in rows]
    assert panels["odd"]["odd"][0] == pytest.approx(max(odd), abs=1e-4)


def test_a_number_of_groups_that_is_none():
    for count in (-1, 1):
        e, _, _ = evaluation(final=("clusters",), clusters=count)
        with pytest.raises(UserError, match="eval.clusters"):
            e.check_options()
