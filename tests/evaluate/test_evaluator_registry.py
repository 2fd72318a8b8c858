"""Evaluators by name, built-in or anybody's: their needs, their names, their declared results, and mistakes."""

import sys
import textwrap

import pytest
import tiny
from evaluations import EVERYTHING, evaluation, source

from jaxcl import config as base
from jaxcl.errors import UserError
from jaxcl.evaluate import EvalContext, Evaluator, Metric
from jaxcl.evaluate.registry import (
    EVALUATORS,
    declared_metrics,
    find_metric,
    main_results,
    make_evaluator,
    make_suite,
    result_name,
)
from jaxcl.evaluate.suite import Evaluation

PACKAGE = '''
"""A package outside the library."""
from jaxcl.errors import UserError
from jaxcl.evaluate import Evaluator, Metric, NotApplicable

class Spread(Evaluator):
    needs_labels = ("train",)
    features_only = True
    metrics = {"std": Metric("Spread", "", percent=False), "by_feature.*": Metric("Feature {}")}

    def check(self, setup):
        assert setup.options.knn_k  # options of the config are there

    def __call__(self, context):
        h = context.features("test", "h")
        return {"std": float(h.std()), "by_feature": {"0": float(h[:, 0].std())}}, {"spread": {"of": "test"}}

class Named(Spread):
    name = "spread_of_classes"
    needs_labels = ()
    needs_classifier = True
    features_only = False

class BothKinds(Evaluator):
    feature_kinds = ("z",)
    def __call__(self, context):
        return {"shapes": [context.features("test", kind).shape[1] for kind in "hz"]}, {}

class Picky(Evaluator):
    def check(self, setup):
        raise UserError("eval.picky is not set")
    def __call__(self, context):
        raise NotApplicable("it is picky")

class Taken(Spread):
    name = "knn"

class Validation(Spread):
    needs_labels = ("validation",)

class Thumbnails(Spread):
    feature_kinds = ("thumbnails",)

class Nothing(Evaluator):
    def call(self, context):
        return {}, {}

class Demanding(Spread):
    def __init__(self, k):
        self.k = k

def not_an_evaluator():
    raise SystemExit("a config called an arbitrary function")
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "measures.py").write_text(textwrap.dedent(PACKAGE))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "outside.measures"
    for name in ("outside", "outside.measures"):
        sys.modules.pop(name, None)


def one_line(kinds, where="eval.final"):
    with pytest.raises(UserError) as error:
        make_suite(where, kinds)
    text = str(error.value)
    assert "\n" not in text and where in text
    return text


# ---- the built-in ones


def test_every_built_in_evaluator_can_be_made():
    suite = make_suite("eval.final", EVALUATORS)
    assert list(suite) == list(EVALUATORS)
    assert len({type(e) for e in suite.values()}) == len(suite)
    for evaluator in suite.values():
        assert type(evaluator).__doc__


def test_which_evaluators_take_joined_runs():
    assert {name for name in EVALUATORS if make_evaluator(name).features_only} == {
        *("knn", "linear", "logistic", "raw_pixels", "majority", "transfer", "transfer_augmented"),
        *("worst_group", "collapse", "ood", "shape_bias"),
    }


# ---- anybody's


def test_an_evaluator_of_a_package_runs_beside_ours(package):
    kinds = ("knn", f"{package}:Spread", f"{package}:Named")
    e, state, mesh = evaluation(final=kinds, quick=(f"{package}:Spread",), report=True)
    e.check_options()
    results, panels = e.final(state, mesh)
    assert list(results) == ["knn", "Spread", "spread_of_classes"]
    assert panels["spread"] == {"of": "test"}
    assert e.quick(state, mesh) == {"eval/Spread_std": results["Spread"]["std"]}
    context = EvalContext(e, state, mesh, "test")
    assert e.evaluate((f"{package}:Spread",), context) == {"Spread": results["Spread"]}
    assert [result_name(kind) for kind in kinds] == list(results)


def test_its_needs_are_respected(package, caplog):
    kinds = (f"{package}:Spread", f"{package}:Named", f"{package}:BothKinds")
    e, state, mesh = evaluation(final=kinds, probe=False, train_labels=False)
    with caplog.at_level("INFO", logger="jaxcl"):
        assert list(e.final(state, mesh)[0]) == ["BothKinds"]
    lines = [r.message for r in caplog.records if r.message.startswith("evaluation: ")]
    assert [line.rpartition(" ")[2] for line in lines] == ["Spread", "spread_of_classes"]
    assert "label" in lines[0] and "classifier" in lines[1]


def test_kinds_of_features_come_from_one_pass(package, monkeypatch):
    passes = []
    run = EvalContext.run

    def counted(self, source, name, *args, **options):
        passes.append(name)
        return run(self, source, name, *args, **options)

    monkeypatch.setattr(EvalContext, "run", counted)
    e, state, mesh = evaluation(final=("linear", f"{package}:BothKinds"))
    results, _ = e.final(state, mesh)
    assert results["BothKinds"]["shapes"] == [16, 12]
    assert len(passes) == 2 and len(set(passes)) == 1  # one of the training and one of the test images


def test_options_are_checked_before_training(package, caplog):
    e, state, mesh = evaluation(final=(f"{package}:Picky",))
    with pytest.raises(UserError, match="eval.picky"):
        e.check_options()
    with caplog.at_level("INFO", logger="jaxcl"):
        assert e.final(state, mesh)[0] == {}
    assert "it is picky" in caplog.text


# ---- mistakes


def test_unknown_evaluators(package):
    assert "eval.final is 'knnn'; did you mean 'knn'?" in one_line(("knnn",))
    assert "eval.quick is 'lineer'; did you mean 'linear'?" in one_line(("lineer",), "eval.quick")
    assert "no_such_package" in one_line(("no_such_package.a:B",))
    assert "Sprad" in one_line((f"{package}:Sprad",))
    assert "no evaluator" in one_line((f"{package}:not_an_evaluator",))
    assert "no evaluator" in one_line(("subprocess:Popen",))
    for key in ("quick", "final"):
        with pytest.raises(UserError, match=f"eval.{key} is 'knnn'"):
            evaluation(**{"final": (), key: ("knnn",)})


def test_evaluators_that_cannot_be_made_or_told_apart(package):
    assert "Nothing" in one_line((f"{package}:Nothing",)) and "__call__" in one_line((f"{package}:Nothing",))
    assert "Demanding" in one_line((f"{package}:Demanding",))
    assert "'validation'" in one_line((f"{package}:Validation",))
    assert "did you mean 'thumbnail'?" in one_line((f"{package}:Thumbnails",))
    assert "'knn'" in one_line((f"{package}:Taken",))


@pytest.mark.parametrize("name, meant", [("needs_label", "needs_labels"), ("feature_only", "features_only")])
def test_a_misspelt_attribute_is_refused(name, meant):
    with pytest.raises(UserError, match=f"'{name}'; did you mean '{meant}'"):
        type("Mine", (Evaluator,), {name: (), "__call__": lambda self, context: ({}, {})})


# ---- the layer that explanations read


def of_a_vit(final, probe=True):
    c = tiny.config(stage=False)
    c.model = base.model("vit", patch=4, width=8, depth=2, heads=2, head_features=12)
    c.eval.final, c.eval.quick = final, ()
    if not probe:
        del c.memory.probe
        c.terms.supcon.labels = False
    return c


def test_the_tap_is_checked_only_for_evaluators_that_read_it():
    def check(c):
        Evaluation(c, tiny.recipe(c), train=source("train"), make_source=source).check_options()

    check(of_a_vit(("knn", "linear")))
    check(of_a_vit(("knn", "explanation"), probe=False))  # nothing to explain: it will be left out
    with pytest.raises(UserError, match="eval.tap.*'stage2'.*block") as error:
        check(of_a_vit(("knn", "explanation")))
    assert "\n" not in str(error.value)
    c = of_a_vit(("explanation",))
    c.eval.tap = "block1"
    check(c)


# ---- declared results


def test_declared_results_exist():
    """Whatever an evaluator declares, it returns, where the data has it."""
    kinds = tuple(k for k in EVERYTHING if k not in ("linear_sgd",))
    e, state, mesh = evaluation(final=kinds, severities=(), shuffle_grids=(2,), quick=())
    results, _ = e.final(state, mesh)
    found = main_results(results, kinds)
    assert {path.partition(".")[0] for path in found} == {name for name in results if make_evaluator(name).metrics}
    declared = declared_metrics()
    missing = {key for key in declared if key.partition(".")[0] in results and not _returned(results, key)}
    assert missing == {  # what this data does not have
        *("explanation.iou", "explanation.pointing_hit", "ood.shifted.accuracy", "ood.corruption.accuracy"),
        *("ood.sets.*.accuracy", "calibration.test_shifted.accuracy", "calibration.test_shifted.ece"),
    }
    value, metric = found["fgsm.8.accuracy"]
    assert value == results["fgsm"]["8"]["accuracy"] and "8/255" in metric.title and metric.better == "higher"


def _returned(tree, key):
    head, _, rest = key.partition(".")
    trees = tree.values() if head == "*" else [tree[head]] if head in tree else []
    return any(not rest or isinstance(t, dict) and _returned(t, rest) for t in trees)


def test_metrics_by_their_place_in_the_results(package):
    assert find_metric("linear.accuracy") == make_evaluator("linear").metrics["accuracy"]
    assert find_metric("calibration.clean.ece").better == "lower"
    assert find_metric("Spread.by_feature.3", (f"{package}:Spread",)) == Metric("Feature 3")
    assert not find_metric("neighbours.copies").percent
    for path, meant in (("linear.acuracy", "linear.accuracy"), ("Spread.std", "")):
        with pytest.raises(UserError) as error:
            find_metric(path)
        assert repr(path) in str(error.value) and meant in str(error.value)


def test_results_that_are_no_numbers_are_left_out(package):
    results = {
        "steps": 3,
        "knn": {"accuracy": float("nan"), "k": 5},
        "linear": {"accuracy": 0.5},
        "neighbours": {"copies": 2, "all_compared": True, "near_duplicates": []},
        "Spread": {"std": 1.5},
    }
    assert {k: v for k, (v, _) in main_results(results).items()} == {"linear.accuracy": 0.5, "neighbours.copies": 2}
    assert main_results(results, (f"{package}:Spread",))["Spread.std"] == (1.5, Metric("Spread", "", percent=False))
