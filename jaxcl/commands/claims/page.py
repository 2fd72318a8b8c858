"""The page of `jaxcl claims`: the claims, the verdicts, and every number with a link to its run folder."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.figure
import numpy as np

from jaxcl.commands.claims import table as claims_table
from jaxcl.commands.claims.methods import AUTHORS, MEASURES, SETTINGS
from jaxcl.report import figures
from jaxcl.report.page import escape, write_page
from jaxcl.report.style import BLUE, INK, MUTED, VERMILLION, message, new_figure, short, styled

COLORS = {claims_table.SEEN: BLUE, claims_table.OPPOSITE: VERMILLION}
_CSS = """
.seen{color:var(--accent);font-weight:700}.opposite{color:#d55e00;font-weight:700}
.claims td,.claims th{padding:6px 12px 6px 0}.claims a{color:inherit}.claims .value{font-size:.94rem;font-weight:400}
td.value{color:var(--ink)}
"""


def write_claims(folder: pathlib.Path, content: Mapping[str, Any]) -> pathlib.Path:
    """Write `folder/index.html` and its figure; -> the page. content: that of claims.json."""
    picture = folder / "claims.png"
    figure = intervals(content["claims"])
    figures.save(figure, picture)
    width, height = (round(inches * 100) for inches in figure.get_size_inches())
    body = [
        f"<header><h1>The papers' claims</h1><p class=lead>{escape(claims_table.counts(content))}</p></header>",
        f"<section><h2>The rule</h2><p>{escape(content['rule'])}</p><p>{escape(claims_table.about(content))}</p>",
        f"<pre>{escape(content['command'])}</pre></section>",
        "<section><h2>Claim by claim</h2><p>The difference is method minus baseline, the mean over seeds and half of "
        "its 90% interval, in percentage points; the arrow says what is claimed.</p>",
        _claims(content["claims"]),
        f'<figure><img src="{picture.name}" width="{width}" height="{height}" alt="Intervals of all claims"></figure>',
        "</section>",
        _not_seen(content),
        _all_measures(content),
        _differences(content),
        _runs(content["methods"]),
    ]
    return write_page(folder / "index.html", "The papers' claims", "\n".join(body), style=_CSS)


@styled
def intervals(claims: Sequence[Mapping[str, Any]]) -> matplotlib.figure.Figure:
    """The difference of each claim with its interval, drawn so that the claimed side is on the right.

    Args:
      claims: from `table.table`; claims that were not measured are left out.
    """
    claims = [c for c in claims if c["low"] is not None and np.isfinite(c["low"])]
    if not claims:
        return message("No claim has two pairs of runs yet.")
    figure = new_figure(0.8 + 0.27 * len(claims))
    ax = figure.add_subplot()
    for y, claim in enumerate(reversed(claims)):
        mean, *ends = (100 * claim["direction"] * claim[k] for k in ("mean", "low", "high"))
        color = COLORS.get(claim["verdict"], MUTED)
        ax.plot(sorted(ends), (y, y), color=color)
        ax.plot(mean, y, "o", color=color, markersize=5)
    ax.axvline(0, color=INK, linewidth=0.8)
    names = [f"{claims_table.title(c['method'])}: {MEASURES[c['measure']].title}" for c in reversed(claims)]
    ax.set_yticks(range(len(claims)), [short(n, 52) for n in names])
    ax.set_ylim(-0.7, len(claims) - 0.3)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("percentage points in the claimed direction, 90% interval over seeds")
    return figure


def _claims(claims: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for c in claims:
        compared = f"{claims_table.title(c['method'])} against {claims_table.title(c['baseline'])}"
        measure = f"{MEASURES[c['measure']].title} {'↑' if c['direction'] > 0 else '↓'}"
        place = claims_table.place(c["method"], c["measure"])[0]
        rows.append(
            [
                f"<th scope=row>{escape(c['text'])}</th>",
                f"<td>{escape(compared)}</td>",
                f"<td>{escape(measure)}</td>",
                f"<td class=value>{_link(c['method'], place, claims_table.cell(c['measure'], c, signed=True))}</td>",
                f'<td class="{c["verdict"].replace(" ", "-")}">{escape(c["verdict"])}</td>',
                f"<td class=better>{escape(c['paper'])}, {escape(c['section'])}</td>",
            ]
        )
    return _table(["claim", "runs", "measure", "difference", "verdict", "source"], rows)


def _not_seen(content: Mapping[str, Any]) -> str:
    """For every claim that was not seen: what was tried, and how the authors' setting differs."""
    parts = []
    for c in content["claims"]:
        if c["verdict"] in (claims_table.SEEN, claims_table.NOT_MEASURED):
            continue
        size = f"{len(c['values'])} pairs of runs"
        tried = (
            f"Tried: {size} on {content['source']}, {content['budget']} each with the small network and the shipped "
            f"settings of both; the difference in {MEASURES[c['measure']].title} was "
            f"{claims_table.cell(c['measure'], c, signed=True)} points."
        )
        words = " ".join([tried, AUTHORS[c["paper"]], *([c["note"]] if c["note"] else [])])
        parts.append(f"<h3>{escape(c['text'])}: {escape(c['verdict'])}</h3><p>{escape(words)}</p>")
    return f"<section><h2>What was not seen</h2>{''.join(parts)}</section>" if parts else ""


def _all_measures(content: Mapping[str, Any]) -> str:
    words = "Mean over seeds and half of its 90% interval, fractions in percent. Each number links to its run folders."
    return _section("All measures", words, content, "measures", content["methods"], signed=False)


def _differences(content: Mapping[str, Any]) -> str:
    rows = [row for row in content["methods"] if any(f["mean"] is not None for f in row["differences"].values())]
    words = "Method minus baseline, paired by seed, with half of the 90% interval. Only some of them are claims."
    return _section("Differences to the baseline", words, content, "differences", rows, signed=True) if rows else ""


def _section(
    title: str, words: str, content: Mapping[str, Any], kind: str, of: Sequence[Mapping[str, Any]], signed: bool
) -> str:
    measures, rows = claims_table.shown_measures(content), []
    for row in of:
        name = row["title"] + (f" against {claims_table.title(row['baseline'])}" if signed else "")
        cells = [f"<th scope=row>{escape(name)}</th>"]
        for k in measures:
            text, place = claims_table.cell(k, row[kind][k], signed), claims_table.place(row["method"], k)[0]
            cells.append(f"<td class=value>{_link(row['method'], place, text)}</td>")
        rows.append(cells)
    head = ["method", *(MEASURES[k].title for k in measures)]
    return f"<section><h2>{escape(title)}</h2><p>{escape(words)}</p>{_table(head, rows)}</section>"


def _runs(methods: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for row in methods:
        for setting in dict.fromkeys(r["setting"] for r in row["runs"]):
            runs = [r for r in row["runs"] if r["setting"] == setting]
            links = ", ".join(
                f'<a href="{escape(r["run"])}/">seed {r["seed"]}</a>'
                + ("" if r["state"] == "finished" else f" ({escape(r['state'])})")
                for r in runs
            )
            rows.append(
                [
                    f'<th scope=row id="{_anchor(row["method"], setting)}">{escape(row["title"])}</th>',
                    f"<td>{escape(row['config'])}</td><td>{escape(SETTINGS[setting].title)}</td><td>{links}</td>",
                ]
            )
    words = "Each folder holds config.json, environment.json, metrics.jsonl and results.json."
    table = _table(["method", "config", "data", "run folders"], rows)
    return f"<section><h2>The runs</h2><p>{words}</p>{table}</section>"


def _anchor(method: str, setting: str) -> str:
    return f"{method}-{setting}"


def _link(method: str, setting: str, text: str) -> str:
    absent = text == claims_table.sweep_table.ABSENT
    return escape(text) if absent else f'<a href="#{_anchor(method, setting)}">{escape(text)}</a>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    names = "".join(f"<th>{escape(h)}</th>" for h in head)
    body = "".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    return f"<div class=wide><table class=claims><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>"
