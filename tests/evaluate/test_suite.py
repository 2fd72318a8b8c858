"""The suites on a small frozen network: which features, which attacks, and what data without labels leaves out."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from evaluations import EVERYTHING, encoded, evaluation, source

from jaxcl import config as base
from jaxcl.adversarial import pgd
from jaxcl.errors import UserError
from jaxcl.evaluate import (
    collapse_metrics,
    expected_calibration_error,
    fit_linear_probe,
    fit_logistic,
    knn_predict,
    probe_logits,
)
from jaxcl.evaluate.context import EvalContext
from jaxcl.evaluate.ood import shuffle_patches
from jaxcl.evaluate.registry import EVALUATORS, make_evaluator
from jaxcl.evaluate.suite import Evaluation, check_split
from jaxcl.losses import cross_entropy
from jaxcl.method import sharding
from jaxcl.method.init_state import init_state

# ---- features


@pytest.mark.parametrize(
    "options", [{}, dict(features="z"), dict(knn_features="z"), dict(features="z", knn_features="h")]
)
def test_the_choice_of_features(options):
    e, state, mesh = evaluation(final=("knn", "logistic", "classifier"), **options)
    features, labels, test_labels = {}, source("train").labels, source("test").labels
    for split in ("train", "test"):
        h, z = encoded(e, state, split)
        features[split] = {"h": h, "z": z / np.linalg.norm(z, axis=1, keepdims=True)}
    results, panels = e.final(state, mesh)
    assert panels == {}

    kind = options.get("features", "h")
    near = options.get("knn_features", kind)
    votes = knn_predict(features["train"][near], labels, features["test"][near], k=5, num_classes=4)
    assert results["knn"]["accuracy"] == pytest.approx(np.mean(np.argmax(votes, 1) == test_labels))

    train, test = features["train"][kind], features["test"][kind]
    fit = fit_logistic(train, labels, test=(test, test_labels), num_classes=4, epochs=12, seed=e.recipe.seed)
    accuracy = np.asarray(fit.test_accuracy)
    assert 0 <= results["logistic"].pop("accuracy_interval")[0] <= accuracy[-1]
    assert results["logistic"] == {
        "accuracy": pytest.approx(accuracy[-1], abs=1e-6),
        "epochs": 12,
        "best_epoch_accuracy": pytest.approx(accuracy.max(), abs=1e-6),
        "best_epoch": int(accuracy.argmax()) + 1,
    }
    # The classifier reads h, whatever the others see.
    probe = jax.device_get(state.memory["probe"])
    predicted = np.argmax(e.recipe.memory["probe"].logits(probe, features["test"]["h"]), 1)
    assert results["classifier"]["accuracy"] == pytest.approx(np.mean(predicted == test_labels))


@pytest.mark.parametrize("key", ["features", "knn_features"])
def test_features_nobody_has(key):
    with pytest.raises(UserError) as error:
        evaluation(**{key: "y"})
    text = str(error.value)
    assert f"eval.{key} is 'y'; expected 'h' (pooled features) or 'z' (the embedding" in text and "\n" not in text


# ---- attacks


def test_robust_accuracy_is_that_of_the_attack():
    """Both attacks in pixels, on the network in inference mode, in batches that do not fill up."""
    attacks = ("fgsm", "pgd", "linear_fgsm", "linear_pgd")
    e, state, mesh = evaluation(final=("linear", *attacks), fgsm=(0, 3), pgd=(0, 3), pgd_steps=4)
    results, panels = e.final(state, mesh)
    own, mean, std = jax.device_get(state), jnp.asarray(tiny.MEAN), jnp.asarray(tiny.STD)
    pixels, labels = source("test").images / np.float32(255), source("test").labels

    train_h, _ = encoded(e, state, "train")
    fitted = fit_linear_probe(train_h, source("train").labels, num_classes=4)
    probes = (lambda h: e.recipe.memory["probe"].logits(own.memory["probe"], h), lambda h: probe_logits(fitted, h))

    @jax.jit
    def attacked(pixels):
        def logits(x, probe):
            h, _ = e.recipe.model.encode(own.params, own.batch_stats, (x - mean) / std, train=False)
            return probe(h)

        def moved(probe, n):
            return pgd(lambda x: cross_entropy(logits(x, probe), labels), pixels, epsilon=3 / 255, num_steps=n)

        return [[logits(moved(probe, n), probe) for n in (0, 1, 4)] for probe in probes]

    assert {k: len(v) for k, v in panels.items()} == {}  # no report, no pictures
    # The fit stops when it is near enough to the optimum: rounding moves where.
    for name, logits, close in zip(("", "linear_"), attacked(pixels), (1e-5, 2e-3), strict=True):
        clean, one, many = (np.mean(np.argmax(x, 1) == labels) for x in logits)
        # Confidence moves with every step, where accuracy need not.
        errors = [expected_calibration_error(jax.nn.softmax(x), labels) for x in logits]
        by_fgsm, by_pgd = results[f"{name}fgsm"], results[f"{name}pgd"]
        assert by_fgsm["0"]["accuracy"] == by_pgd["0"]["accuracy"] == pytest.approx(clean)
        assert by_fgsm["3"]["accuracy"] == pytest.approx(one)
        assert by_pgd["3"]["accuracy"] == pytest.approx(many)
        assert clean > one >= many  # otherwise the numbers above say little
        assert by_fgsm["3"]["ece"] == pytest.approx(float(errors[1]), abs=close)
        assert by_pgd["3"]["ece"] == pytest.approx(float(errors[2]), abs=close)
        assert abs(errors[1] - errors[2]) > 2 * close
    assert results["linear_fgsm"]["0"]["accuracy"] == results["linear"]["accuracy"]


def test_pgd_is_not_in_the_default_suite():
    assert "pgd" in EVALUATORS and "pgd" not in base.default().eval.final
    assert base.default().eval.pgd_steps == 20


# ---- without labels, without a classifier


def left_out(caplog):
    """[(reason, names of the evaluators that are left out), ...] of the log."""
    lines = [r.message for r in caplog.records if r.name == "jaxcl" and r.message.startswith("evaluation: ")]
    split = [line.removeprefix("evaluation: ").split(", so there is no ") for line in lines]
    return [(reason, names.split(", ")) for reason, names in split]


def test_nothing_is_labelled_and_nothing_classifies(caplog):
    """Every evaluator is left out with its reason; the report still has its pictures."""
    e, state, mesh = evaluation(probe=False, train_labels=False, test_labels=False, report=True, quick=("knn",))
    with caplog.at_level("INFO", logger="jaxcl"):
        assert e.quick(state, mesh) == {} == e.quick(state, mesh)
        results, panels = e.final(state, mesh)
    assert set(results) == {"collapse", "neighbours", "clusters"}  # what needs no label
    # The map of images stands for the one of points.
    assert set(panels) == {"views", "neighbours", "map", "clusters", "odd", "table"}
    kinds = {"effective_rank", "uniformity"}  # what needs no label
    assert set(results["collapse"]) == {f"{k}_{name}" for k in "hz" for name in kinds}
    made = {name: make_evaluator(name) for name in EVERYTHING}
    classifier = [name for name, evaluator in made.items() if evaluator.needs_classifier]
    labels = [name for name, evaluator in made.items() if evaluator.needs_labels and name not in classifier]
    assert {"knn", "ood", "worst_group", "linear_pgd"} < set(labels) and {"fgsm", "explanation"} < set(classifier)
    reasons, names = zip(*left_out(caplog), strict=True)
    assert list(names) == [
        ["knn"],  # of the quick suite, logged once
        labels,
        classifier,
        ["adversary"],
        ["transfer", "transfer_augmented"],
        ["drift"],
        ["tint"],
        ["dense"],
    ]
    for reason, word in zip(
        reasons, ("label", "label", "classifier", "adversary", "level", "began", "tint", "pixel"), strict=True
    ):
        assert word in reason


def test_labels_on_one_side_only(caplog):
    with caplog.at_level("INFO", logger="jaxcl"):
        e, state, mesh = evaluation(probe=False, train_labels=False, final=("knn", "classifier"))
        assert e.final(state, mesh)[0] == {}
        e, state, mesh = evaluation(test_labels=False, final=("knn", "linear", "classifier", "fgsm", "calibration"))
        assert e.final(state, mesh)[0] == {}
    assert [reason.partition(" (")[0] for reason, _ in left_out(caplog)] == [
        "no training image has a label",
        "the config trains no classifier",
        "no test image has a label",
    ]


def test_explanations_need_no_labels_but_their_pictures_do():
    e, state, mesh = evaluation(test_labels=False, final=("explanation",))
    results, panels = e.final(state, mesh)
    assert {"average_drop", "rate_of_increase"} <= results["explanation"].keys() and panels == {}


def test_labels_without_a_classifier():
    e, state, mesh = evaluation(probe=False, final=("knn", "linear", "classifier", "pgd"))
    assert set(e.final(state, mesh)[0]) == {"knn", "linear"}


def test_the_split_of_the_final_suite():
    """The validation images may be what the last metrics are of; which then are not those of the test images."""
    metrics = {}
    for split in ("test", "validation"):
        e, state, mesh = evaluation(final=("linear", "collapse"), validation=0.2, split=split)
        metrics[split] = e.final(state, mesh)[0]
        fitted = fit_linear_probe(encoded(e, state, "train")[0], source("train").labels, num_classes=4)
        right = np.argmax(probe_logits(fitted, encoded(e, state, split)[0]), 1) == source(split).labels
        assert metrics[split]["linear"]["accuracy"] == pytest.approx(right.mean())
    assert metrics["test"]["collapse"] != metrics["validation"]["collapse"]
    for options, message in (
        (dict(split="validation"), "eval.split is 'validation', but nothing is held out; set data.validation"),
        (dict(split="train"), "eval.split is 'train'; expected 'test' or 'validation'"),
    ):
        with pytest.raises(UserError, match=message):
            evaluation(**options)


# ---- two levels of labels, groups, collapse


def test_transfer_worst_group_and_collapse_are_of_the_frozen_features(caplog):
    names = ("transfer", "worst_group", "collapse")
    e, state, mesh = evaluation(final=names, report=True)
    with caplog.at_level("INFO", logger="jaxcl"):
        assert set(e.final(state, mesh)[0]) == {"collapse"}
    assert [names for _, names in left_out(caplog)] == [["transfer"], ["worst_group"]]

    def levels(split, labelled):
        s = source(split, labelled)
        extras = {"coarse": s.labels // 2, "group": np.arange(len(s), dtype=np.int32) % 3}
        return dataclasses.replace(s, extras=extras, coarse_names=("ab", "cd"), group_names=tuple("xyz"))

    e, _, _ = evaluation(final=names, report=True, sources=levels)
    results, panels = e.final(state, mesh)
    h, z = encoded(e, state, "test")
    labels = source("test").labels
    for kind, x in (("h", h), ("z", z)):
        for key, value in collapse_metrics(x, labels).items():
            assert results["collapse"][f"{kind}_{key}"] == pytest.approx(float(value), rel=1e-4, abs=1e-5)
    fitted = fit_linear_probe(encoded(e, state, "train")[0], source("train").labels, num_classes=4)
    predicted = np.argmax(probe_logits(fitted, h), 1)
    assert results["transfer"]["accuracy"] == pytest.approx(np.mean(predicted == labels))
    assert results["transfer"]["coarse_accuracy"] == pytest.approx(np.mean(predicted // 2 == labels // 2))
    np.testing.assert_allclose(panels["transfer"]["features"], h, atol=1e-5)
    by_group = [np.mean((predicted == labels)[np.arange(20) % 3 == g]) for g in range(3)]
    assert results["worst_group"]["erm_worst"] == pytest.approx(min(by_group))
    assert {g: v["erm"] for g, v in results["worst_group"]["by_group"].items()} == {
        g: pytest.approx(v) for g, v in zip("xyz", by_group, strict=True)
    }
    assert json.loads(json.dumps(results)) == results  # as they go to results.json


# ---- out of domain


def test_images_made_anew_go_through_the_same_network(caplog):
    """Shuffled by hand, encoded by the model itself, classified by a probe of its own; what is not there is said."""
    names = ("ood", "shape_bias")
    e, state, mesh = evaluation(final=names, report=True, severities=(), shuffle_grids=(2,))
    e.check_options()
    with caplog.at_level("INFO", logger="jaxcl"):
        results, panels = e.final(state, mesh)
    assert [(reason.partition(" (")[0], names) for reason, names in left_out(caplog)] == [
        ("the data has no cue-conflict images", ["shape_bias"])
    ]
    fitted = fit_linear_probe(encoded(e, state, "train")[0], source("train").labels, num_classes=4)
    shuffled = functools.partial(shuffle_patches, index=np.arange(20), grid=2)
    for metrics, change in ((results["ood"], np.asarray), (results["ood"]["shuffled"]["2"], shuffled)):
        predicted = np.argmax(probe_logits(fitted, encoded(e, state, "test", change)[0]), 1)
        assert metrics["accuracy"] == pytest.approx(np.mean(predicted == source("test").labels))
    assert set(results["ood"]) == {"accuracy", "shuffled", "texture"} and "ood" in panels
    assert e.evaluate(("ood",), EvalContext(e, state, mesh, "test")) == {"ood": results["ood"]}
    assert json.loads(json.dumps(results)) == results


def test_options_are_checked_of_the_evaluators_that_run():
    e, state, mesh = evaluation(final=("linear",), corruptions=("rain",))
    e.check_options()
    with pytest.raises(UserError, match="eval.corruptions has 'rain'"):
        e.evaluate(("ood",), EvalContext(e, state, mesh, "test"))


# ---- adversarial views


def _check_adversary(metrics, panel):
    """The picture of the attack: within epsilon, most confusable first, similarities in line with the metrics."""
    assert {len(v) for v in panel.values()} == {8} and set(panel["names"]) <= set("abcd")
    np.testing.assert_allclose(panel["clean"] + panel["perturbation"], panel["adversarial"], atol=1e-6)
    assert 0.029 < np.abs(panel["perturbation"]).max() < 0.0301
    gain = panel["after"] - panel["before"]
    assert (gain[:-1] >= gain[1:]).all() and gain[0] > 0
    # It starts where an image equals its anchor; then the anchor goes away more than the others do.
    assert metrics["positive_before"] == pytest.approx(1, abs=1e-4) and metrics["positive_after"] < 0.9999
    before, after = (metrics[f"hardest_negative_{k}"] - metrics[f"positive_{k}"] for k in ("before", "after"))
    assert after > before + 0.01
    assert 0 <= metrics["hardest_negative_changed"] <= 1


def test_evaluation_of_adversarial_training_is_clean():
    """The report shows the adversarial view; no figure depends on its batch norms."""
    c = tiny.tiny_model(base.default())
    c.batch_size, c.duration, c.size, c.model.norm_sets = tiny.BATCH, "1 epoch", tiny.SIDE, ("adv",)
    c.views.view1 = c.views.view2 = base.view("standard")
    c.stages = (base.stage("adversary", epsilon=(0.03,), num_steps=2),)
    c.passes = (base.encode("view1"), base.encode("view2"), base.encode("adversarial", norm_set="adv"))
    c.terms.clean = base.term("nt_xent", views=("view1", "view2"))
    c.terms.adversarial = base.term("nt_xent", views=("view1", "adversarial"))
    c.eval.final, c.eval.batch_size, c.eval.knn_k, c.eval.tap, c.eval.features = (), 16, 5, "stage1", "z"
    c.eval.final = ("knn", "adversary")
    recipe = tiny.recipe(c, num_devices=2)
    mesh = sharding.make_mesh(2)
    plain = tiny.fill(jax.eval_shape(lambda: init_state(recipe)))

    def noisy(path, x):
        return x + 1 if any("_adv" in str(getattr(k, "key", k)) for k in path) else x

    other = plain.replace(
        params=jax.tree_util.tree_map_with_path(noisy, plain.params),
        batch_stats=jax.tree_util.tree_map_with_path(noisy, plain.batch_stats),
    )
    e = Evaluation(c, recipe, train=source("train"), make_source=source)
    shown, features = [], []
    for state in (plain, other):
        state = sharding.device_put(state, sharding.replicated(mesh))
        results, panels = e.final(state, mesh)
        _check_adversary(results["adversary"], panels["adversary"])
        images = panels["views"]["images"]
        assert set(images) == {"image", "view1", "view2", "adversarial"}
        moved = np.abs(images["adversarial"] - images["view1"])
        assert 0.029 < moved.max() < 0.0301
        shown.append(images["adversarial"])
        features.append(panels["embedding"]["features"])
    np.testing.assert_array_equal(*features)
    assert not np.array_equal(*shown)


def test_a_validation_part_that_the_data_brings_along():
    c = tiny.config(stage=False)
    for name, own in (("garments", False), ("npz:a.npz", False), ("nothing", False), ("waterbirds:a", True)):
        c.data.source = name
        if own:
            check_split("eval.split", "validation", c)
        else:
            with pytest.raises(UserError, match="nothing is held out; set data.validation"):
                check_split("eval.split", "validation", c)
    c.data.source, c.eval.split, c.eval.tap = "folder:a", "validation", "stage1"

    def make_source(split):
        raise UserError(f"no {split} part")

    with pytest.raises(UserError, match="no validation part"):  # before anything is compiled
        Evaluation(c, tiny.recipe(c), train=source("train"), make_source=make_source)


def test_an_image_whose_features_are_not_finite(caplog):
    """cases A.7: it is named, and what would be measured on it is left out."""
    caplog.set_level("INFO", logger="jaxcl")

    def named(split, labelled=True):
        made = source(split, labelled)
        return dataclasses.replace(made, extras={"name": np.array([f"{split}/{i}.png" for i in range(len(made))])})

    e, state, mesh = evaluation(final=("knn", "linear", "collapse"), sources=named)
    context = EvalContext(e, state, mesh, "test")
    context.features("train"), context.features("test")
    context._features["train", "h"][17, 2] = np.nan
    context._finite.clear()
    results = e.evaluate(("knn", "linear", "collapse"), context)
    assert set(results) == {"collapse"}  # it reads the test images only
    ((reason, names),) = left_out(caplog)
    assert "train/17.png" in reason and names == ["knn", "linear"]
