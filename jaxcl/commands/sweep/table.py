"""The table of a sweep: a row for each setting, a column for each measure, with mean and spread over seeds.

A measure is a dotted path into results.json. A measure is a fraction, shown in percent with one decimal, if its last
word ends in one of FRACTIONS ("fgsm.4.accuracy", "explanation.average_drop"). Other numbers have four digits.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from jaxcl.report import names
from jaxcl.report.progress import duration
from jaxcl.report.verdict import flatten

FRACTIONS = ("accuracy", "ece", "drop", "increase", "iou", "hit", "inside", "changed", "bias", "share")
DEFAULT = (names.KNN, names.LINEAR, names.CLASSIFIER)
ABSENT = "–"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One run."""

    seed: int
    run: str  # its folder
    state: str  # finished, diverged, failed or waiting
    results: Mapping[str, Any] | None = None  # of a finished run


@dataclasses.dataclass(frozen=True)
class Row:
    """One setting."""

    config: str
    grid: Mapping[str, str]  # label -> value
    entries: Sequence[Entry]


def table(rows: Sequence[Row], measures: Sequence[str] = ()) -> dict[str, Any]:
    """The content of table.json.

    Args:
      rows: the settings, with a run for every seed in whatever state.
      measures: dotted paths; empty: the entries of DEFAULT that a run has.

    Returns:
      {"measures": [...], "rows": [{"config", "grid", "runs": their number when all are done, "finished", "diverged" and
      "failed": lists of seeds, "train_seconds": median over the finished runs (of a resumed run, since the last start),
      "measures": {measure: {"values": [{"seed", "run", "value"}], "mean", "sd"}}}]}. Values are as in results.json;
      "sd" is the sample standard deviation (n - 1), None for fewer than two values, "mean" None for none.
    """
    if not measures:
        measures = [m for m in DEFAULT if any(value(e.results, m) is not None for row in rows for e in row.entries)]
    return {"measures": list(measures), "rows": [_row(row, measures) for row in rows]}


def value(results: Mapping[str, Any] | None, measure: str) -> float | None:
    """The finite number at a dotted path, or None."""
    found = flatten(results or {}).get(measure)
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not math.isfinite(found):
        return None
    return found


def _row(row: Row, measures: Sequence[str]) -> dict[str, Any]:
    def seeds(state: str) -> list[int]:
        return [e.seed for e in row.entries if e.state == state]

    seconds = [s for e in row.entries if (s := value(e.results, "seconds.train")) is not None]
    return {
        "config": row.config,
        "grid": dict(row.grid),
        "runs": len(row.entries),
        **{state: seeds(state) for state in ("finished", "diverged", "failed")},
        "train_seconds": statistics.median(seconds) if seconds else None,
        "measures": {m: _statistics(row.entries, m) for m in measures},
    }


def _statistics(entries: Sequence[Entry], measure: str) -> dict[str, Any]:
    values = [
        {"seed": e.seed, "run": e.run, "value": v} for e in entries if (v := value(e.results, measure)) is not None
    ]
    numbers = [v["value"] for v in values]
    return {
        "values": values,
        "mean": statistics.fmean(numbers) if numbers else None,
        "sd": statistics.stdev(numbers) if len(numbers) > 1 else None,
    }


# ---- as text


def page(content: Mapping[str, Any]) -> str:
    """The content of table.md. content: that of `table`, with "command", "commits", "machine" and "seeds"."""
    finished, all_ = (sum(n) for n in zip(*((len(r["finished"]), r["runs"]) for r in content["rows"]), strict=True))
    parts = [
        "# Sweep",
        f"    {content['command']}",
        f"{finished} of {all_} runs finished. Mean ± sample standard deviation over seeds "
        f"{', '.join(map(str, content['seeds']))}, fractions in percent; n: seeds; "
        "time: median wall-clock time of training.",
        f"Machine: {content['machine']}."
        + (f" Commit: {', '.join(content['commits'])}." if content["commits"] else ""),
        markdown(content),
    ]
    return "\n\n".join(parts)


def markdown(content: Mapping[str, Any]) -> str:
    """The content of `table` as Markdown. Grid keys with the same value in all rows have no column."""
    rows, measures = content["rows"], content["measures"]
    varied = [k for k in (rows[0]["grid"] if rows else ()) if len({r["grid"][k] for r in rows}) > 1]
    head = ["config", *varied, *measures, "n", "time"]
    lines = [
        [
            row["config"],
            *(row["grid"][k] for k in varied),
            *(cell(row["measures"][m], m, len(row["finished"])) for m in measures),
            _count(row),
            ABSENT if row["train_seconds"] is None else duration(row["train_seconds"]),
        ]
        for row in rows
    ]
    words = [[text.replace("|", "\\|") for text in line] for line in [head, *lines]]
    widths = [max(3, *map(len, column)) for column in zip(*words, strict=True)]
    left = 1 + len(varied)

    def line(texts: Sequence[str]) -> str:
        cells = (t.ljust(w) if i < left else t.rjust(w) for i, (t, w) in enumerate(zip(texts, widths, strict=True)))
        return f"| {' | '.join(cells)} |"

    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(words[0]), line(rule), *map(line, words[1:])]) + "\n"


def cell(found: Mapping[str, Any], measure: str, finished: int) -> str:
    """ "61.2 ± 0.5"; a single value has no spread; "(2)" follows if only two of the finished runs have this measure."""
    if found["mean"] is None:
        return ABSENT
    text = number(measure, found["mean"])
    if found["sd"] is not None:
        text += f" ± {number(measure, found['sd'])}"
    count = len(found["values"])
    return text if count == finished else f"{text} ({count})"


def number(measure: str, value: float) -> str:
    """A value of this measure as the table shows it."""
    return f"{100 * value:.1f}" if measure.rpartition(".")[2].endswith(FRACTIONS) else f"{value:.4g}"


def short(measure: str) -> str:
    """ "linear.accuracy" -> "linear", "fgsm.4.accuracy" -> "fgsm.4"."""
    return measure.removesuffix(".accuracy")


def _count(row: Mapping[str, Any]) -> str:
    """ "3", or "1 of 3, 1 diverged"."""
    done, all_ = len(row["finished"]), row["runs"]
    words = [str(done) if done == all_ else f"{done} of {all_}"]
    words += [f"{len(row[state])} {state}" for state in ("diverged", "failed") if row[state]]
    return ", ".join(words)
