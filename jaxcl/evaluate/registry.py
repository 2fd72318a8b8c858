"""The built-in evaluators, each named once, here; and the evaluators of a suite, by the names of their results.

`eval.final=("knn", "my_package.my_module:MyEvaluator")` runs one of ours and one of yours (see `runtime.registry`).
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jaxcl.errors import UserError
from jaxcl.evaluate.base import SPLITS, Evaluator, Metric
from jaxcl.evaluate.context import KINDS
from jaxcl.runtime.options import construct, suggestion
from jaxcl.runtime.registry import Registry

EVALUATORS = Registry(
    "evaluator",
    "jaxcl.evaluate.base:Evaluator",
    {
        "knn": "jaxcl.evaluate.knn:KNN",
        "linear": "jaxcl.evaluate.linear:Linear",
        "logistic": "jaxcl.evaluate.logistic:Logistic",
        "linear_sgd": "jaxcl.evaluate.linear_sgd:LinearSGD",
        "raw_pixels": "jaxcl.evaluate.baselines:RawPixels",
        "untrained": "jaxcl.evaluate.baselines:Untrained",
        "pretrained": "jaxcl.evaluate.baselines:Pretrained",
        "majority": "jaxcl.evaluate.baselines:Majority",
        "classifier": "jaxcl.evaluate.classifier:Classifier",
        "explanation": "jaxcl.evaluate.explanation:Explanation",
        "fgsm": "jaxcl.evaluate.attacked:ClassifierFGSM",
        "pgd": "jaxcl.evaluate.attacked:ClassifierPGD",
        "linear_fgsm": "jaxcl.evaluate.attacked:ProbeFGSM",
        "linear_pgd": "jaxcl.evaluate.attacked:ProbePGD",
        "adversary": "jaxcl.evaluate.adversary:AdversaryMoves",
        "calibration": "jaxcl.evaluate.calibration:Calibration",
        "transfer": "jaxcl.evaluate.transfer:Transfer",
        "transfer_augmented": "jaxcl.evaluate.transfer:TransferAugmented",
        "worst_group": "jaxcl.evaluate.worst_group:WorstGroup",
        "collapse": "jaxcl.evaluate.collapse:Collapse",
        "drift": "jaxcl.evaluate.drift:Drift",
        "neighbours": "jaxcl.evaluate.neighbours:Neighbours",
        "clusters": "jaxcl.evaluate.clusters:Clusters",
        "ood": "jaxcl.evaluate.ood:OutOfDomain",
        "shape_bias": "jaxcl.evaluate.shape_bias:ShapeBias",
        "invariance": "jaxcl.evaluate.invariance:Invariance",
        "color": "jaxcl.evaluate.color:Color",
        "tint": "jaxcl.evaluate.color:Tint",
        "dense": "jaxcl.evaluate.dense:Dense",
    },
)


def make_evaluator(kind: str, where: str = "eval.final") -> Evaluator:
    """One evaluator by its kind; arguments and errors as in `make_suite`."""
    evaluator = construct(f"{where}: {kind}", EVALUATORS.resolve(kind, where), {})
    for attribute, known in (("needs_labels", SPLITS), ("feature_kinds", KINDS)):
        for value in getattr(evaluator, attribute):
            if value not in known:
                raise UserError(f"{where}: {kind}.{attribute} has {value!r}{suggestion(value, known)}")
    return evaluator


def make_suite(where: str, kinds: Iterable[str]) -> dict[str, Evaluator]:
    """The evaluators of a suite, by the names of their results, in order.

    Args:
      where: the config key or flag that holds the kinds, for messages.
      kinds: names of ours, or "package.module:Name".

    Raises:
      UserError: a kind that is unknown, cannot be imported or is no evaluator; two evaluators of one name; a split or
        a kind of features that an evaluator needs and that does not exist.
    """
    suite: dict[str, Evaluator] = {}
    for kind in dict.fromkeys(kinds):
        evaluator = make_evaluator(kind, where)
        name = _result_name(kind, evaluator)
        if name in suite or (name != kind and name in EVALUATORS):
            raise UserError(f"{where} has {kind!r}, whose results are {name!r} like another's; give it another `name`")
        suite[name] = evaluator
    return suite


def result_name(kind: str) -> str:
    """The key of an evaluator's results: its name in the registry, its attribute `name`, or what follows the colon."""
    return kind if kind in EVALUATORS else _result_name(kind, make_evaluator(kind))


def _result_name(kind: str, evaluator: Evaluator) -> str:
    return kind if kind in EVALUATORS else evaluator.name or kind.rpartition(":")[2].rpartition(".")[2]


# ---- what results mean


def declared_metrics(kinds: Iterable[str] = ()) -> dict[str, Metric]:
    """The main results of all built-in evaluators and of these, {"linear.accuracy": Metric, "fgsm.*.accuracy": ...}.

    kinds: further evaluators, such as the eval.final of a config, which may name evaluators of your own.
    """
    found: dict[str, Metric] = {}
    for kind in dict.fromkeys((*EVALUATORS, *kinds)):
        evaluator = make_evaluator(kind)
        found |= {f"{_result_name(kind, evaluator)}.{key}": metric for key, metric in evaluator.metrics.items()}
    return found


def find_metric(path: str, kinds: Iterable[str] = ()) -> Metric:
    """The declaration of one result by its place in results.json, such as "linear.accuracy" or "fgsm.4.accuracy".

    Raises:
      UserError: no evaluator declares it.
    """
    declared = declared_metrics(kinds)
    for pattern, metric in declared.items():
        if (matched := _match(pattern, path)) is not None:
            return _named(metric, matched)
    raise UserError(f"no evaluator declares a result {path!r}{suggestion(path, declared)}")


def main_results(results: Mapping[str, Any], kinds: Iterable[str] = ()) -> dict[str, tuple[float, Metric]]:
    """The declared results that are there, {"linear.accuracy": (0.61, Metric)}, in the order of the registry.

    Args:
      results: the contents of results.json; values that are no finite number are left out.
      kinds: as in `declared_metrics`.
    """
    flat = dict(_flat(results))
    found: dict[str, tuple[float, Metric]] = {}
    for pattern, metric in declared_metrics(kinds).items():
        for path, value in flat.items():
            if path not in found and (matched := _match(pattern, path)) is not None:
                found[path] = (value, _named(metric, matched))
    return found


def _match(pattern: str, path: str) -> list[str] | None:
    """The parts of a path that the stars of a pattern stand for; None where the two do not match."""
    wanted, given = pattern.split("."), path.split(".")
    if len(wanted) != len(given) or any(w not in ("*", g) for w, g in zip(wanted, given, strict=True)):
        return None
    return [g for w, g in zip(wanted, given, strict=True) if w == "*"]


def _named(metric: Metric, matched: list[str]) -> Metric:
    if not matched:
        return metric
    return dataclasses.replace(metric, title=metric.title.format(*matched), meaning=metric.meaning.format(*matched))


def _flat(results: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in results.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            yield f"{prefix}{key}", float(value)
