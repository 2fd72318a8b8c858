"""The numbers of `jaxcl claims`: means with intervals, differences paired by seed, and verdicts. S seeds."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from jaxcl.commands.claims.methods import CLAIMS, COST, MEASURES, METHODS, SETTINGS, Claim, Measure
from jaxcl.commands.sweep import table as sweep_table

CONFIDENCE = 0.9
RULE = (
    "A claim is a difference, method minus baseline, in one measure. It is taken seed by seed, and the two-sided 90 % "
    'interval of its mean by Student\'s t decides: "seen" if the interval lies wholly on the claimed side of 0, '
    '"opposite" if wholly on the other side, "not seen" if it contains 0. With fewer than two pairs: "not measured". '
    "Nothing else enters, and nothing is chosen by looking: every run is a shipped config, its last state, one budget. "
    "Of claims that are not true about one in twenty will be seen by chance."
)
SEEN, NOT_SEEN, OPPOSITE, NOT_MEASURED = "seen", "not seen", "opposite", "not measured"


@dataclasses.dataclass(frozen=True)
class Result:
    """One run of a method in a data setting."""

    method: str
    setting: str
    seed: int
    run: str  # its folder, below the command's own
    state: str  # finished, diverged, failed or waiting
    results: Mapping[str, Any] | None = None  # of a finished run, with `COST`


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """Mean [S] and the two ends of its two-sided confidence interval by Student's t.

    Args:
      values: at least one; the interval of a single value is the whole line.
      confidence: between 0 and 1.
    """
    from scipy.stats import t

    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return mean, -math.inf, math.inf
    half = float(t.ppf((1 + confidence) / 2, count - 1)) * statistics.stdev(values) / math.sqrt(count)
    return mean, mean - half, mean + half


def verdict(differences: Sequence[float], direction: int) -> str:
    """The verdict of `RULE` on differences paired by seed. direction: 1 claims that they are above 0, -1 below."""
    if len(differences) < 2:
        return NOT_MEASURED
    _, low, high = interval([direction * d for d in differences])
    return SEEN if low > 0 else OPPOSITE if high < 0 else NOT_SEEN


def place(method: str, measure: str) -> tuple[str, str]:
    """The (setting, path into results.json) of a measure of a method."""
    wanted = MEASURES[measure]
    unlabelled = not METHODS[method].labels and wanted.unlabelled[0]
    return wanted.unlabelled if unlabelled else (wanted.setting, wanted.path)


def table(results: Sequence[Result], methods: Sequence[str], source: str) -> dict[str, Any]:
    """The content of claims.json.

    Args:
      results: every run in whatever state.
      methods: the rows, in order.
      source: of SOURCES; claims on measures that it does not have are left out.

    Returns:
      {"rule", "confidence", "methods": [{"method", "title", "config", "baseline", "measures": {measure: numbers},
      "differences": {measure: numbers}, "runs": [...]}], "claims": [{fields of the claim, "verdict", numbers}]}.
      Numbers are {"mean", "low", "high", "values": [{"seed", "value", "run", "path"}]}; differences also have
      "baseline_run" and "baseline_value". low and high are None for a single value, and mean too if there is none.
    """
    values = {(m, k): _values(results, m, k) for m in methods for k in MEASURES}
    rows = []
    for name in methods:
        method = METHODS[name]
        compared = method.baseline in methods
        rows.append(
            {
                "method": name,
                "title": method.title,
                "config": method.argument(source),
                "baseline": method.baseline,
                "labels": method.labels,
                "measures": {k: _numbers(values[name, k]) for k in MEASURES},
                "differences": {
                    k: _numbers(_pairs(values[name, k], values[method.baseline, k])) for k in MEASURES if compared
                },
                "runs": [
                    {"setting": r.setting, "seed": r.seed, "run": r.run, "state": r.state}
                    for r in results
                    if r.method == name
                ],
            }
        )
    claims = [
        _claim(c, values)
        for c in CLAIMS
        if c.method in methods and c.baseline in methods and asked(MEASURES[c.measure], source)
    ]
    return {"rule": RULE, "confidence": CONFIDENCE, "source": source, "methods": rows, "claims": claims}


def asked(measure: Measure, source: str) -> bool:
    """Whether runs on this source have the measure."""
    return source in SETTINGS[measure.setting].sources


def _values(results: Sequence[Result], method: str, measure: str) -> list[dict[str, Any]]:
    setting, path = place(method, measure)
    return [
        {"seed": r.seed, "value": v, "run": r.run, "path": path}
        for r in results
        if (r.method, r.setting) == (method, setting) and (v := sweep_table.value(r.results, path)) is not None
    ]


def _pairs(values: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    of_seed = {v["seed"]: v for v in baseline}
    return [
        v
        | {
            "value": v["value"] - of_seed[v["seed"]]["value"],
            "method_value": v["value"],
            "baseline_value": of_seed[v["seed"]]["value"],
            "baseline_run": of_seed[v["seed"]]["run"],
        }
        for v in values
        if v["seed"] in of_seed
    ]


def _numbers(values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    mean, low, high = interval([v["value"] for v in values]) if values else (None, None, None)
    if len(values) < 2:
        low = high = None
    return {"mean": mean, "low": low, "high": high, "values": list(values)}


def _claim(claim: Claim, values: Mapping[tuple[str, str], list[dict[str, Any]]]) -> dict[str, Any]:
    pairs = _pairs(values[claim.method, claim.measure], values[claim.baseline, claim.measure])
    said = verdict([p["value"] for p in pairs], claim.direction)
    return dataclasses.asdict(claim) | {"verdict": said} | _numbers(pairs)


# ---- as text


def number(measure: str, value: float, signed: bool = False) -> str:
    """A value of this measure as the table shows it, fractions in percent."""
    shown = 100 * value if MEASURES[measure].percent else value
    return f"{shown:{'+' if signed else ''}.{1 if MEASURES[measure].percent else 3}f}"


def cell(measure: str, found: Mapping[str, Any], signed: bool = False) -> str:
    """ "61.2 ± 0.5": the mean and half of its interval; a single value has no interval."""
    if found["mean"] is None:
        return sweep_table.ABSENT
    text = number(measure, found["mean"], signed)
    return text if found["low"] is None else f"{text} ± {number(measure, found['high'] - found['mean'])}"


def shown_measures(content: Mapping[str, Any]) -> list[str]:
    """The measures that at least one method has."""
    return [k for k in MEASURES if any(row["measures"][k]["mean"] is not None for row in content["methods"])]


def counts(content: Mapping[str, Any]) -> str:
    """ "3 of 29 claims seen, 25 not seen, 1 opposite"."""
    said = [c["verdict"] for c in content["claims"]]
    words = [f"{said.count(v)} {v}" for v in (SEEN, NOT_SEEN, OPPOSITE, NOT_MEASURED) if v in said]
    return f"{len(said)} claims: {', '.join(words) or 'none'}"


def title(name: str) -> str:
    return METHODS[name].title


def markdown(content: Mapping[str, Any]) -> str:
    """The content of claims.md. content: that of claims.json."""
    measures = shown_measures(content)
    claims = [
        [
            c["text"],
            f"{title(c['method'])} against {title(c['baseline'])}",
            f"{MEASURES[c['measure']].title} {'↑' if c['direction'] > 0 else '↓'}",
            cell(c["measure"], c, signed=True),
            f"**{c['verdict']}**",
            f"{c['paper']}, {c['section']}",
        ]
        for c in content["claims"]
    ]
    rows = [[row["title"], *(cell(k, row["measures"][k]) for k in measures)] for row in content["methods"]]
    parts = [
        "# Claims",
        f"    {content['command']}",
        about(content),
        f"{counts(content)}. {content['rule']}",
        _grid(["claim", "runs", "measure", "difference", "verdict", "source"], claims),
        "## All measures",
        "Mean over seeds and half of its 90 % interval; fractions in percent.",
        _grid(["method", *(MEASURES[k].title for k in measures)], rows),
    ]
    return "\n\n".join(parts) + "\n"


def about(content: Mapping[str, Any]) -> str:
    """How the runs were made, in one or two sentences."""
    done = sum(r["state"] == "finished" for row in content["methods"] for r in row["runs"])
    every = sum(len(row["runs"]) for row in content["methods"])
    commits = f" Commit: {', '.join(content['commits'])}." if content["commits"] else ""
    smoke = "A SMOKE RUN of a tiny encoder and a few updates: nothing here is a result. " if content["smoke"] else ""
    return (
        f"{smoke}{done} of {every} runs finished: {content['source']}, {content['budget']}, seeds "
        f"{', '.join(map(str, content['seeds']))}. Machine: {content['machine']}.{commits}"
    )


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [[text.replace("|", "\\|") for text in line] for line in (head, ["---"] * len(head), *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cost(batch_size: int, metrics: Sequence[Mapping[str, Any]]) -> float | None:
    """Seconds per update, from the lines of metrics.jsonl; None for fewer than two lines.

    The first line includes compilation and is dropped; the median is robust to other slow lines.
    """
    rates = [line["images_per_second"] for line in metrics if line.get("images_per_second")]
    return batch_size / statistics.median(rates[1:]) if len(rates) > 1 else None


def with_cost(results: Mapping[str, Any], batch_size: int, metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """results.json with the seconds per update under `COST`."""
    seconds = cost(batch_size, metrics)
    return dict(results) if seconds is None else {**results, COST: seconds}
