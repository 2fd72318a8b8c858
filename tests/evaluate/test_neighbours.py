"""Neighbours and near-duplicates against loops over all pairs, and what the report is told of them."""

import dataclasses
import json

import numpy as np
import pytest
from evaluations import encoded, evaluation, source

from jaxcl.errors import UserError
from jaxcl.evaluate import duplicates as module
from jaxcl.evaluate import near_duplicates, nearest_neighbours
from jaxcl.evaluate.beginnings import at_the_beginning
from jaxcl.evaluate.context import EvalContext
from jaxcl.evaluate.duplicates import thumbnail
from jaxcl.report.explorer import explorer
from jaxcl.report.neighbours import neighbour_grid


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_nearest_by_a_loop(monkeypatch):
    rng = np.random.default_rng(0)
    bank, queries = rng.normal(size=(40, 6)), rng.normal(size=(9, 6))
    for entries in (2**24, 120):  # at once, and three queries at a time
        monkeypatch.setattr("jaxcl.evaluate.knn.CHUNK_ENTRIES", entries)
        cosine, rows = nearest_neighbours(bank * 3, queries[: 9 if entries > 120 else 8], k=5)
        for q in range(len(rows)):
            all_of_them = unit(bank) @ unit(queries[q])
            np.testing.assert_array_equal(rows[q], np.argsort(-all_of_them)[:5])
            np.testing.assert_allclose(cosine[q], np.sort(all_of_them)[::-1][:5], rtol=1e-5)
    cosine, rows = nearest_neighbours(bank[:3], queries, k=5)
    assert cosine.shape == rows.shape == (9, 3)
    with pytest.raises(UserError, match="k=0"):
        nearest_neighbours(bank, queries, k=0)


def heaps(count, seed=0):
    """Images of which some are others with a little noise; features that say the same. -> (features, images, group)"""
    rng = np.random.default_rng(seed)
    group = rng.integers(0, 0.8 * count, count)
    images = rng.integers(0, 256, (count, 12, 12, 3))[group].astype(int)
    images = np.clip(images + rng.integers(-8, 9, images.shape), 0, 255).astype(np.uint8)
    features = rng.normal(size=(count, 8))[group] + 0.01 * rng.normal(size=(count, 8))
    return features, images, group


def small(images):
    return np.asarray(thumbnail(images.astype(np.float32) / 255))


def joined(pairs, count):
    """Labels of what hangs together by pairs."""
    label = np.arange(count)
    for i, j in pairs:
        label[label == label[j]] = label[i]
    return label


def same_partition(a, b):
    return ((a[:, None] == a) == (b[:, None] == b)).all()


@pytest.mark.parametrize("tile", [1024, 16])
def test_near_duplicates_by_a_loop(tile, monkeypatch):
    monkeypatch.setattr(module, "TILE", tile)
    features, images, group = heaps(90)
    found = near_duplicates(features, small(images), lambda rows: images[rows], cosine=0.98, pixels=0.08)
    expected, x = [], images / 255
    for i in range(90):
        for j in range(i):
            alike = unit(features)[i] @ unit(features)[j]
            if alike >= 0.98 and np.sqrt(np.mean((x[i] - x[j]) ** 2)) <= 0.08:
                expected.append((i, j))
    assert found.complete and expected
    assert same_partition(joined([p[:2] for p in found.pairs], 90), joined(expected, 90))
    assert same_partition(
        joined(expected, 90), joined([(i, int(np.argmax(group == g))) for i, g in enumerate(group)], 90)
    )
    assert len(found.pairs) == 90 - len(set(group.tolist()))  # none more than it takes
    for p in found.pairs:
        assert p.first < p.second and p.cosine == pytest.approx(
            unit(features)[p.first] @ unit(features)[p.second], abs=1e-5
        )
        assert p.pixels == pytest.approx(np.sqrt(np.mean((x[p.first] - x[p.second]) ** 2)), abs=1e-5)
    assert [p.cosine for p in found.pairs] == sorted((p.cosine for p in found.pairs), reverse=True)


def test_both_features_and_pixels_must_be_alike():
    features, images, _ = heaps(40)
    rng = np.random.default_rng(1)
    for x, y in ((features, rng.permuted(images, axis=0)), (rng.normal(size=(40, 8)), images)):
        assert not near_duplicates(x, small(y), lambda rows, y=y: y[rows], cosine=0.98, pixels=0.05).pairs


def test_a_thousand_copies_of_one_image_and_a_limit(monkeypatch):
    monkeypatch.setattr(module, "TILE", 256)
    images = np.full((1000, 4, 4, 3), 7, np.uint8)
    features = np.ones((1000, 4))
    found = near_duplicates(features, small(images), lambda rows: images[rows], cosine=0.98, pixels=0.05)
    assert found.complete and len(found.pairs) == 999
    ((group),) = module.connected_groups(found.pairs)
    assert group == list(range(1000))
    monkeypatch.setattr(module, "COMPARED", 100)
    found = near_duplicates(features, small(images), lambda rows: images[rows], cosine=0.98, pixels=0.05)
    assert not found.complete and len(found.pairs) < 999
    for count in (0, 1):
        none = near_duplicates(features[:count], small(images[:1])[:count], lambda r: images[r], cosine=0.9, pixels=1.0)
        assert none == ([], True)


def named(split, labelled):
    """Of the test images, the first is the third training image once more."""
    s = source(split, labelled)
    images = s.images.copy()
    if split == "test":
        images[0] = source("train").images[3]
    names = np.array([f"{split}/<{i}>.jpg" for i in range(len(s))], object)
    return dataclasses.replace(s, images=images, extras={"name": names})


@pytest.mark.parametrize("labelled", [True, False])
def test_the_evaluator(labelled):
    options = dict(neighbours=3, duplicate_pixels=0.0, duplicate_cosine=0.999, report=True, probe=False)
    labels = dict(train_labels=labelled, test_labels=labelled)
    e, state, mesh = evaluation(final=("neighbours",), sources=named, **labels, **options)
    e.check_options()
    e._sources["train"] = named("train", labelled)
    results, panels = e.final(state, mesh)
    metrics = results["neighbours"]
    bank = unit(encoded(e, state, "train")[0])
    queries = unit(encoded(e, state, "test", lambda x: named("test", True).images)[0])
    cosines = queries @ bank.T
    order = np.argsort(-cosines, 1)[:, :3]
    assert metrics["k"] == 3
    assert metrics["cosine"] == pytest.approx(cosines.max(1).mean(), abs=1e-5)
    assert metrics["any_cosine"] == pytest.approx(cosines.mean(), abs=1e-5)
    if labelled:
        agree = source("train").labels[order] == source("test").labels[:, None]
        assert metrics["agreement"] == pytest.approx(agree.mean())
    else:
        assert "agreement" not in metrics and panels["neighbours"]["agree"] is None
        assert "embedding" not in panels  # grey dots, where there is a map
    assert metrics["copies"] == 1 and metrics["all_compared"]
    (pair,) = metrics["near_duplicates"]
    assert pair["images"] == ["train/<3>.jpg", "test/<0>.jpg"] and pair["pixels"] == 0
    assert json.loads(json.dumps(results)) == results
    shown = panels["neighbours"]
    q = int(shown["names"][0].split("<")[1].split(">")[0])
    np.testing.assert_array_equal(shown["found"][0], source("train").images[order[q]])
    assert shown["found_names"][0] == [f"train/<{i}>.jpg" for i in order[q]]
    assert panels["near_duplicates"]["names"] == [["train/<3>.jpg", "test/<0>.jpg"]]
    shown = panels["map"]
    assert len(shown["names"]) == 68 and list(shown["features"]) == ["trained", "untrained"]
    both = [encoded(e, state, split, *images)[0] for split, images in TRAIN_AND_TEST]
    np.testing.assert_allclose(shown["features"]["trained"], np.concatenate(both), rtol=1e-4, atol=1e-5)
    fresh = at_the_beginning(EvalContext(e, state, mesh, "test"), "untrained")
    both = np.concatenate([fresh.features("train"), fresh.features("test")])
    np.testing.assert_allclose(shown["features"]["untrained"], both, rtol=1e-4, atol=1e-5)
    assert (shown["classes"] is not None) == labelled


TRAIN_AND_TEST = (("train", ()), ("test", (lambda x: named("test", True).images,)))


def test_two_training_images_and_one_to_test_on():
    """As of a folder of three: fewer neighbours than asked for, pictures that say so, and no duplicates."""
    e, state, mesh = evaluation(final=("neighbours",), report=True, probe=False, sources=few)
    e._sources["train"] = e.training = few("train", False)
    results, panels = e.final(state, mesh)
    assert results["neighbours"]["k"] == 2 and results["neighbours"]["copies"] == 0
    assert "near_duplicates" not in panels and panels["neighbours"]["found"].shape[:2] == (1, 2)
    assert panels["neighbours"]["names"] == ["test image 0"]
    neighbour_grid(**panels["neighbours"])
    with pytest.raises(ValueError, match="too few"):
        explorer(**panels["map"])


def few(split, labelled):
    s = source(split, labelled)
    return s.take(np.arange(2 if split == "train" else 1))


def test_options_no_search_can_use():
    for option, value in (("neighbours", 0), ("duplicate_cosine", 2.0), ("duplicate_pixels", -0.1)):
        e, _, _ = evaluation(final=("neighbours",), **{option: value})
        with pytest.raises(UserError, match=f"eval.{option} is {value}; expected"):
            e.check_options()
