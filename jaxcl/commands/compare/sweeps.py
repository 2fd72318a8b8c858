"""The curves of a sweep, read from its table.json and the results of its runs."""

import logging
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxcl.commands.compare.runs import config_of
from jaxcl.commands.sweep import table as sweep_table
from jaxcl.errors import UserError
from jaxcl.report import names
from jaxcl.report.transfer import Setting
from jaxcl.runtime import storage

logger = logging.getLogger("jaxcl")

# The first of these that a run has: if it can, that of the embeddings that the loss sees.
COSINES = (names.WITHIN_CLASS_COSINE_Z, names.WITHIN_CLASS_COSINE_H)
# Panels of a sweep over alpha: title -> measures; the first that a run has is drawn.
DOMAINS = {
    "In domain": (names.OOD, names.LINEAR, names.KNN),
    "Shifted test": (names.OOD_SHIFTED, names.SHIFTED_CLASSIFIER),
    "Corrupted test": (names.OOD_CORRUPTION,),
    "Texture only": (names.OOD_TEXTURE,),
    "Shape bias": (names.SHAPE_BIAS, names.SHAPE_BIAS_STIMULI),
}


class NothingToDraw(UserError):
    """The sweep has no values for one kind of curve."""


class Curves(NamedTuple):
    """What a sweep has to draw; None for what it does not have."""

    collapse: tuple[dict[str, dict[float, list[float]]], dict[str, Setting | None]] | None
    alphas: dict[str, dict[str, dict[float | None, list[float]]]] | None
    invariance: dict[str, dict[str, Any]] | None


def read(folder: str | os.PathLike) -> Curves:
    """Everything that a sweep has to draw. Raises: UserError if there is nothing."""
    found, reasons = [], []
    for reader in (read_collapse, read_alphas, read_invariance):
        try:
            found.append(reader(folder))
        except NothingToDraw as reason:
            found.append(None)
            reasons.append(str(reason))
    if len(reasons) == len(found):
        raise UserError("; ".join(reasons))
    return Curves(*found)


def read_collapse(folder: str | os.PathLike) -> tuple[dict[str, dict[float, list[float]]], dict[str, Setting | None]]:
    """The arguments of `report.transfer.collapse_curve`: one line for each setting of the keys other than alpha.

    Raises:
      UserError: no sweep there.
      NothingToDraw: no run has both a spread term and a within-class cosine.
    """
    folder = pathlib.Path(folder)
    points: dict[str, dict[float, list[float]]] = {}
    settings: dict[str, Setting | None] = {}
    for row in _rows(folder):
        name = _line(row, ("a_lc", "a_spread"))
        for run_folder, cosine in _values(folder, row, COSINES).items():
            config = config_of(run_folder)
            if (weights := _weights(config)) is None:
                logger.info("%s is left out: it does not have exactly one term that attracts or spreads", run_folder)
                continue
            alpha, term = weights
            points.setdefault(name, {}).setdefault(round(alpha, 9), []).append(cosine)
            settings[name] = _setting(run_folder, config, term)
    if not points:
        raise NothingToDraw(
            f"no run in {folder} has both a spread term and collapse.z_within_class_cosine in its results; sweep "
            "configs/l_spread.py with \"eval.final=('collapse',)\""
        )
    return points, settings


def read_alphas(folder: str | os.PathLike) -> dict[str, dict[str, dict[float | None, list[float]]]]:
    """The argument of `report.negatives.alpha_curves`: one line for each setting of the keys other than alpha.

    Raises:
      UserError: no sweep there.
      NothingToDraw: fewer than two values of alpha (none counts as one), or no accuracy.
    """
    folder = pathlib.Path(folder)
    panels: dict[str, dict[str, dict[float | None, list[float]]]] = {}
    seen, alphas = set(), set()
    for row in _rows(folder):
        name = _line(row, ("alpha",))
        for title, measures in DOMAINS.items():
            for run_folder, value in _values(folder, row, measures).items():
                config = config_of(run_folder)
                alpha = _alpha(config)
                # Without negatives alpha has no effect: a grid over alpha repeats the same run.
                if alpha is None and (once := (title, name, config["seed"])) in seen:
                    continue
                elif alpha is None:
                    seen.add(once)
                alphas.add(alpha)
                panels.setdefault(title, {}).setdefault(name, {}).setdefault(alpha, []).append(value)
    if len(alphas) < 2:
        raise NothingToDraw(
            f"no two runs in {folder} have an accuracy and different values of alpha (or one of them no negatives); "
            "sweep a config with negatives over the alpha of its term, with \"eval.final=('linear','ood')\""
        )
    return panels


def read_invariance(folder: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """The argument of `report.invariance.invariances`: the mean over seeds, by setting.

    Raises:
      UserError: no sweep there.
      NothingToDraw: no run has measured the invariance of its stages.
    """
    folder = pathlib.Path(folder)
    tables: dict[str, list[dict[str, dict[str, float]]]] = {}
    for row in _rows(folder):
        for run_folder in dict.fromkeys(folder / v["run"] for m in row["measures"].values() for v in m["values"]):
            path = run_folder / "results.json"
            results = storage.read_json(path) if path.is_file() else {}
            invariance = results.get("invariance")
            if isinstance(invariance, dict) and (found := invariance.get("centred")):
                tables.setdefault(_line(row, ()), []).append(found)
    if not tables:
        raise NothingToDraw(
            f"no run in {folder} has measured the invariance of its stages; use \"eval.final=('invariance',)\""
        )
    return {
        name: {
            "stages": list(seeds[0]),
            "transformations": list(next(iter(seeds[0].values()))),
            "centred": [
                [sum(t[s][a] for t in seeds) / len(seeds) for a in of_stage] for s, of_stage in seeds[0].items()
            ],
        }
        for name, seeds in tables.items()
    }


def _rows(folder: pathlib.Path) -> list[dict[str, Any]]:
    path = folder / "table.json"
    if not path.is_file():
        raise UserError(f"{folder} is not the folder of a sweep: it has no table.json; give the --out of jaxcl sweep")
    advice = "run jaxcl sweep again, which writes it"
    rows = storage.read_json(path, "rows", advice=advice)["rows"]
    kinds = {"config": str, "grid": dict, "measures": dict}
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and all(isinstance(row.get(key), kind) for key, kind in kinds.items()) for row in rows
    ):
        raise UserError(f"{path} is not one of jaxcl sweep; {advice}")
    return rows


def _line(row: Mapping[str, Any], swept: tuple[str, ...]) -> str:
    """The name of a line: the row's config, and the keys of its grid that do not vary along the line."""
    return " ".join([row["config"], *(f"{k}={v}" for k, v in row["grid"].items() if k.split(".")[-1] not in swept)])


def _values(folder: pathlib.Path, row: Mapping[str, Any], measures: Sequence[str]) -> dict[pathlib.Path, float]:
    """The first of these measures by run folder: from the table, or else from the results of the runs."""
    for measure in measures:
        if values := row["measures"].get(measure, {}).get("values"):
            return {folder / v["run"]: v["value"] for v in values}
    found = {}
    for run_folder in dict.fromkeys(folder / v["run"] for m in row["measures"].values() for v in m["values"]):
        path = run_folder / "results.json"
        results = storage.read_json(path) if path.is_file() else {}
        if (value := next((v for m in measures if (v := sweep_table.value(results, m)) is not None), None)) is not None:
            found[run_folder] = value
    return found


def _alpha(config: Mapping[str, Any]) -> float | None:
    """The weight of the negatives in the first term that has any; None if no term has."""
    terms = config["terms"].values()
    return next((float(t["alpha"]) for t in terms if t.get("negatives") and t["weight"] and "alpha" in t), None)


def _weights(config: Mapping[str, Any]) -> tuple[float, dict[str, Any]] | None:
    """(alpha, term) of the term that attracts or spreads by class; None unless there is exactly one."""
    kinds = ("spread", "attract", "class_conditional_infonce")
    terms = [t for t in config["terms"].values() if t["kind"] in kinds and t.get("labels", True) and t["weight"]]
    if len(terms) != 1:
        return None
    (term,) = terms
    attraction, spread = {
        "spread": lambda: (term["a_lc"], term["a_spread"]),
        "attract": lambda: (1.0, 0.0),
        "class_conditional_infonce": lambda: (0.0, 1.0),
    }[term["kind"]]()
    return attraction / (attraction + spread), term


def _setting(folder: pathlib.Path, config: Mapping[str, Any], term: Mapping[str, Any]) -> Setting | None:
    """What the theory needs; None where it does not cover the loss."""
    path = folder / "data.json"
    classes = storage.read_json(path, "num_classes")["num_classes"] if path.is_file() else 0
    usual = term["norm"] == "unit" and not term.get("clip_positive") and not term.get("positives_in_denominator")
    if classes < 2 or config["batch_size"] <= classes or not usual:
        return None
    return Setting(classes, config["batch_size"] / classes, term["temperature"])
