"""Runs side by side: what each encoder kept of the fine classes, and over a sweep how far classes spread, or what
negatives do.

    python -m jaxcl compare --workdir=RUN --workdir=RUN1+RUN2 --name=L_spread --name=Thanos --out=DIR
    python -m jaxcl compare --sweep=SWEEP --out=DIR

RUN1+RUN2 are runs joined to one encoder, their features side by side. Of runs DIR gets fine_embedding.png, with the
accuracy of a linear probe on the fine classes, measured here, and table.md, which adds what their results.json says. Of
a sweep over a_lc or a_spread of a term (`python -m jaxcl sweep --grid=terms.contrast.a_spread=...`, "collapse" in
eval.final) it gets collapse_curve.png: the within-class cosine against its prediction by theory. Of one over the alpha
of non-semantic negatives, or of configs with and without them ("linear" or "ood" in eval.final), it gets
alpha_curves.png: accuracy in and out of domain. Of one with "invariance" in eval.final it gets invariance.png: what
each stage of each setting is invariant to, the mean of its seeds.
"""

import collections
import json
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from jaxcl.commands.sweep import table as sweep_table
from jaxcl.errors import UserError
from jaxcl.runtime import flags as command_line

logger = logging.getLogger("jaxcl")

_FLAGS = flags.FlagValues()
_own = dict(flag_values=_FLAGS)
_WORKDIR = flags.DEFINE_multi_string("workdir", [], "A run folder, or several with + between them: joined.", **_own)
_NAME = flags.DEFINE_multi_string("name", [], "Of each --workdir, in order; default: the name of its config.", **_own)
_SOURCE = flags.DEFINE_string("source", "", "A data source as in a config; default: each run's own.", **_own)
_SWEEP = flags.DEFINE_string(
    "sweep", "", "The --out of a jaxcl.commands.sweep.main over a_lc, a_spread or alpha.", **_own
)
_OUT = flags.DEFINE_string("out", "", "A folder for the figures and the table.", **_own)

MEASURES = ("transfer.accuracy", "linear.accuracy", "knn.accuracy")
# Of the embeddings that the loss sees, if there is a choice.
COSINES = tuple(f"collapse.{p}within_class_cosine" for p in ("z_", "", "h_"))
# Of a sweep over alpha: title -> the measures, of which the first that a run has is drawn.
DOMAINS = {
    "In domain": ("ood.accuracy", "linear.accuracy", "knn.accuracy"),
    "Shifted test": ("ood.shifted.accuracy", "calibration.test_shifted.accuracy"),
    "Corrupted test": ("ood.corruption.accuracy",),
    "Texture only": ("ood.texture.accuracy",),
    "Shape bias": ("shape_bias.shape_bias", "shape_bias.stimuli.shape_bias"),
}


def run(argv: list[str]) -> int:
    """Compare; -> exit code."""
    _FLAGS.unparse_flags()
    command_line.parse(argv, _FLAGS)
    groups, names, out = [_folders(w) for w in _WORKDIR.value], _NAME.value, pathlib.Path(_OUT.value)
    if not groups and not _SWEEP.value:
        raise UserError("nothing to compare; give the folders of runs by --workdir, or of a sweep by --sweep")
    if not _OUT.value:
        raise UserError("no --out; give a folder for the figures")
    if names and len(names) != len(groups):
        raise UserError(f"{len(names)} --name for {len(groups)} --workdir; give one for each, or none")
    if twice := [n for n, count in collections.Counter(names).items() if count > 1]:
        raise UserError(f"--name={twice[0]} is given twice; names tell the runs apart")
    lines, alphas, stages = _sweep(_SWEEP.value) if _SWEEP.value else (None, None, None)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make --out {out}: {error.strerror}; choose a folder you may write to") from None
    from jaxcl.report import figures, invariance, negatives, transfer  # after the flags are known to be right

    if lines is not None:
        _told(figures.save(transfer.collapse_curve(*lines), out / "collapse_curve.png"))
    if alphas is not None:
        _told(figures.save(negatives.alpha_curves(alphas), out / "alpha_curves.png"))
    if stages is not None:
        _told(figures.save(invariance.invariances(stages), out / "invariance.png"))
    if groups:
        panels, results = {}, {}
        for default, group in zip(_default_names(groups), groups, strict=True):
            name = names[len(panels)] if names else default
            panels[name], results[name] = evaluate(group, _SOURCE.value)
        _told(figures.save(transfer.fine_embedding(panels), out / "fine_embedding.png"))
        words = table(results)
        _write(out / "table.md", words)
        print(words, end="")
    return 0


# ---- runs


def _folders(text: str) -> list[pathlib.Path]:
    """ "A+B" -> both; a folder whose own name has a plus is itself."""
    return [pathlib.Path(p) for p in ([text] if pathlib.Path(text).is_dir() else text.split("+"))]


def _default_names(groups: Sequence[Sequence[pathlib.Path]]) -> list[str]:
    """The configs' names; where two are the same, those with their folders."""
    names = [" + ".join(str(_config(f).get("name") or f.name) for f in group) for group in groups]
    taken = collections.Counter(names)
    folders = ["+".join(map(str, group)) for group in groups]
    return [n if taken[n] == 1 else f"{n} ({f})" for n, f in zip(names, folders, strict=True)]


def _config(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a run folder: it has no config.json; give the --workdir of a run")
    return json.loads(path.read_text())


def evaluate(group: Sequence[pathlib.Path], source: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """The panel "transfer" of one run, or of several joined, and its results.

    The results are those of results.json (none of joined runs, and of one that is not finished), but for "transfer",
    which is measured here.

    Raises:
      UserError: no run there, runs that cannot be joined, or data of one level of labels.
    """
    from jaxcl.evaluate.base import NotApplicable
    from jaxcl.evaluate.transfer import Transfer
    from jaxcl.train.runs import Joined, load_run

    runs = [load_run(folder, source=source) for folder in group]
    try:
        found, panels = Transfer()(Joined(runs) if len(runs) > 1 else runs[0].frozen())
    except NotApplicable as reason:
        raise UserError(f"{group[0]}: {reason}; a comparison needs fine classes inside coarse ones") from None
    path = group[0] / "results.json"
    results = json.loads(path.read_text()) if len(group) == 1 and path.is_file() and not source else {}
    note = f"fine classes {sweep_table.number('accuracy', found['accuracy'])}%"
    return panels["transfer"] | {"note": note}, results | {"transfer": found}


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Results by run as a Markdown table, a column for each of MEASURES that a run has; fractions in percent."""
    values = {name: [sweep_table.value(r, m) for m in MEASURES] for name, r in results.items()}
    columns = [i for i in range(len(MEASURES)) if any(v[i] is not None for v in values.values())]
    shown = lambda i, v: sweep_table.ABSENT if v is None else sweep_table.number(MEASURES[i], v)  # noqa: E731
    rows = [["run", *(MEASURES[i] for i in columns)]]
    rows += [[name.replace("|", "\\|"), *(shown(i, v[i]) for i in columns)] for name, v in values.items()]
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]

    def line(texts: Sequence[str]) -> str:
        cells = [t.rjust(w) if i else t.ljust(w) for i, (t, w) in enumerate(zip(texts, widths, strict=True))]
        return f"| {' | '.join(cells)} |\n"

    rule = ["-" * (w - 1) + ":" if i else "-" * w for i, w in enumerate(widths)]
    return "".join([line(rows[0]), line(rule), *map(line, rows[1:])])


# ---- a sweep


def _sweep(folder: str) -> tuple[Any, ...]:
    """What `read_sweep`, `read_alphas` and `read_invariance` find, None for what is not there. UserError if all is."""
    found, reasons = [], []
    for read in (read_sweep, read_alphas, read_invariance):
        try:
            found.append(read(folder))
        except NothingToDraw as reason:
            found.append(None)
            reasons.append(str(reason))
    if len(reasons) == len(found):
        raise UserError("; ".join(reasons))
    return tuple(found)


class NothingToDraw(UserError):
    """A sweep of something else."""


def read_sweep(folder: str | os.PathLike) -> tuple[dict[str, dict[float, list[float]]], dict[str, Any]]:
    """What `report.transfer.collapse_curve` draws of a sweep; a line for each setting of what is not alpha.

    Raises:
      UserError: no sweep there, or no run of it has both a term of spread and a within-class cosine.
    """
    from jaxcl.report.transfer import Setting

    folder = pathlib.Path(folder)
    points: dict[str, dict[float, list[float]]] = {}
    settings: dict[str, Setting | None] = {}
    for row in _rows(folder):
        name = _line(row, ("a_lc", "a_spread"))
        for run_folder, cosine in _values(folder, row, COSINES).items():
            config = _config(run_folder)
            if (weights := _weights(config)) is None:
                logger.info("%s has no single term that attracts or spreads, so it is left out", run_folder)
                continue
            alpha, term = weights
            points.setdefault(name, {}).setdefault(round(alpha, 9), []).append(cosine)
            settings[name] = _setting(run_folder, config, term, Setting)
    if not points:
        raise NothingToDraw(
            f"no run in {folder} has both a term of spread and collapse.z_within_class_cosine in its results; sweep "
            "configs/l_spread.py with \"eval.final=('collapse',)\""
        )
    return points, settings


def read_alphas(folder: str | os.PathLike) -> dict[str, dict[str, dict[float | None, list[float]]]]:
    """What `report.negatives.alpha_curves` draws of a sweep; a line for each setting of what is not alpha.

    Raises:
      UserError: no sweep there, or no run of it has negatives, or all have them with one alpha, or none an accuracy.
    """
    folder = pathlib.Path(folder)
    panels: dict[str, dict[str, dict[float | None, list[float]]]] = {}
    seen, alphas = set(), set()
    for row in _rows(folder):
        name = _line(row, ("alpha",))
        for title, measures in DOMAINS.items():
            for run_folder, value in _values(folder, row, measures).items():
                config = _config(run_folder)
                alpha = _alpha(config)
                # Without negatives alpha does nothing: such runs under a grid of alpha are one run several times.
                if alpha is None and (once := (title, name, config["seed"])) in seen:
                    continue
                elif alpha is None:
                    seen.add(once)
                alphas.add(alpha)
                panels.setdefault(title, {}).setdefault(name, {}).setdefault(alpha, []).append(value)
    if len(alphas) < 2:
        raise NothingToDraw(
            f"no two runs in {folder} have negatives of different alpha (or one of them none) and an accuracy in their "
            "results; sweep a config with negatives over the alpha of its term, with \"eval.final=('linear','ood')\""
        )
    return panels


def read_invariance(folder: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """What `report.invariance.invariances` draws of a sweep, by setting.

    Raises:
      UserError: no sweep there, or no run of it has measured its stages.
    """
    folder = pathlib.Path(folder)
    tables: dict[str, list[dict[str, dict[str, float]]]] = {}
    for row in _rows(folder):
        for run_folder in dict.fromkeys(folder / v["run"] for m in row["measures"].values() for v in m["values"]):
            path = run_folder / "results.json"
            results = json.loads(path.read_text()) if path.is_file() else {}
            if found := results.get("invariance", {}).get("centred"):
                tables.setdefault(_line(row, ()), []).append(found)
    if not tables:
        raise NothingToDraw(f"no run in {folder} has measured its stages, which \"eval.final=('invariance',)\" does")
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
    return json.loads(path.read_text())["rows"]


def _line(row: Mapping[str, Any], swept: tuple[str, ...]) -> str:
    """The row's config and what of its grid is not swept along a line."""
    return " ".join([row["config"], *(f"{k}={v}" for k, v in row["grid"].items() if k.split(".")[-1] not in swept)])


def _values(folder: pathlib.Path, row: Mapping[str, Any], measures: Sequence[str]) -> dict[pathlib.Path, float]:
    """The first of some measures by run folder: from the table, else, if it has others, from the runs' results."""
    for measure in measures:
        if values := row["measures"].get(measure, {}).get("values"):
            return {folder / v["run"]: v["value"] for v in values}
    found = {}
    for run_folder in dict.fromkeys(folder / v["run"] for m in row["measures"].values() for v in m["values"]):
        path = run_folder / "results.json"
        results = json.loads(path.read_text()) if path.is_file() else {}
        if (value := next((v for m in measures if (v := sweep_table.value(results, m)) is not None), None)) is not None:
            found[run_folder] = value
    return found


def _alpha(config: Mapping[str, Any]) -> float | None:
    """Weight of the negatives in the first term that has some, None where there are none."""
    terms = config["terms"].values()
    return next((float(t["alpha"]) for t in terms if t.get("negatives") and t["weight"] and "alpha" in t), None)


def _weights(config: Mapping[str, Any]) -> tuple[float, dict[str, Any]] | None:
    """(alpha, the term) of the one term that attracts or spreads by class."""
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


def _setting(folder: pathlib.Path, config: Mapping[str, Any], term: Mapping[str, Any], make: type) -> Any:
    """What theory needs to know; None where it does not speak of this loss."""
    path = folder / "data.json"
    classes = json.loads(path.read_text())["num_classes"] if path.is_file() else 0
    usual = term["norm"] == "unit" and not term.get("clip_positive") and not term.get("positives_in_denominator")
    if classes < 2 or config["batch_size"] <= classes or not usual:
        return None
    return make(classes, config["batch_size"] / classes, term["temperature"])


# ---- files


def _write(path: pathlib.Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    _told(path)


def _told(path: pathlib.Path) -> None:
    logger.info("%s", path)


def cli() -> None:
    """Exit codes as those of jaxcl.main."""
    command_line.leave(run)


if __name__ == "__main__":
    cli()
