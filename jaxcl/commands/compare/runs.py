"""Runs side by side: what each encoder keeps of the fine classes, and a table of results."""

import collections
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxcl.commands.sweep import table as sweep_table
from jaxcl.errors import UserError
from jaxcl.evaluate.base import NotApplicable
from jaxcl.evaluate.transfer import Transfer
from jaxcl.report.names import KNN, LINEAR, TRANSFER
from jaxcl.runtime import storage
from jaxcl.train.runs import Joined, load_run

MEASURES = (TRANSFER, LINEAR, KNN)


def folders(text: str) -> list[pathlib.Path]:
    """ "A+B" -> two folders, unless a folder has that name."""
    pieces = [text] if pathlib.Path(text).is_dir() else text.split("+")
    return [pathlib.Path(storage.expanded(piece)) for piece in pieces]


def default_names(groups: Sequence[Sequence[pathlib.Path]]) -> list[str]:
    """The names of the configs, with the folders where two names are equal."""
    names = [" + ".join(str(config_of(f).get("name") or f.name) for f in group) for group in groups]
    taken = collections.Counter(names)
    paths = ["+".join(map(str, group)) for group in groups]
    return [n if taken[n] == 1 else f"{n} ({p})" for n, p in zip(names, paths, strict=True)]


def config_of(folder: pathlib.Path) -> dict[str, Any]:
    """The config of a run, as its folder holds it. Raises: UserError if it is no run folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a run folder: it has no config.json; give the --workdir of a run")
    return storage.read_json(path)


def evaluate(group: Sequence[pathlib.Path], source: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """-> (the panel "transfer" of one run, or of several joined, and its results).

    The results are those of results.json, except "transfer", which is measured here. Joined runs, runs that are not
    finished and runs on another source have no other results.

    Raises:
      UserError: no run there, runs that cannot be joined, or data with one level of labels.
    """
    runs = [load_run(folder, source=source) for folder in group]
    try:
        found, panels = Transfer()(Joined(runs) if len(runs) > 1 else runs[0].context())
    except NotApplicable as reason:
        raise UserError(f"{group[0]}: {reason}; a comparison needs fine classes inside coarse ones") from None
    path = group[0] / "results.json"
    results = storage.read_json(path) if len(group) == 1 and path.is_file() and not source else {}
    note = f"fine classes {sweep_table.number('accuracy', found['accuracy'])}%"
    return panels["transfer"] | {"note": note}, results | {"transfer": found}


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Results by run as a Markdown table, with a column for each of MEASURES that a run has; fractions in percent."""
    values = {name: [sweep_table.value(r, m) for m in MEASURES] for name, r in results.items()}
    columns = [i for i in range(len(MEASURES)) if any(v[i] is not None for v in values.values())]

    def shown(i: int, value: float | None) -> str:
        return sweep_table.ABSENT if value is None else sweep_table.number(MEASURES[i], value)

    rows = [["run", *(MEASURES[i] for i in columns)]]
    rows += [[name.replace("|", "\\|"), *(shown(i, v[i]) for i in columns)] for name, v in values.items()]
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]

    def line(texts: Sequence[str]) -> str:
        cells = [t.rjust(w) if i else t.ljust(w) for i, (t, w) in enumerate(zip(texts, widths, strict=True))]
        return f"| {' | '.join(cells)} |\n"

    rule = ["-" * (w - 1) + ":" if i else "-" * w for i, w in enumerate(widths)]
    return "".join([line(rows[0]), line(rule), *map(line, rows[1:])])
