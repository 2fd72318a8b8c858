"""Neighbours against loops over all pairs, and what the report is told of them and of near-duplicates."""

import dataclasses
import json

import numpy as np
import pytest
from evaluations import encoded, evaluation, source

from jaxcl.errors import UserError
from jaxcl.evaluate import nearest_neighbours
from jaxcl.evaluate.beginnings import at_the_beginning
from jaxcl.evaluate.context import EvalContext
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
    options = dict(neighbours=3, duplicate_score=0.99, report=True, probe=False)
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
    assert pair["images"] == ["train/<3>.jpg", "test/<0>.jpg"] and pair["score"] == 1
    assert json.loads(json.dumps(results)) == results
    shown = panels["neighbours"]
    q = int(shown["names"][0].split("<")[1].split(">")[0])
    np.testing.assert_array_equal(shown["found"][0], source("train").images[order[q]])
    assert shown["found_names"][0] == [f"train/<{i}>.jpg" for i in order[q]]
    assert [row.file for row in panels["near_duplicates"]["rows"]] == ["train/<3>.jpg", "test/<0>.jpg"]
    assert panels["near_duplicates"]["shown"] == [["train/<3>.jpg", "test/<0>.jpg"]]
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
    for option, value in (("neighbours", 0), ("duplicate_score", 2.0), ("duplicate_score", 0.0)):
        e, _, _ = evaluation(final=("neighbours",), **{option: value})
        with pytest.raises(UserError, match=f"eval.{option} is {value}; expected"):
            e.check_options()
