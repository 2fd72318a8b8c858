"""The figure of the table: the speed of jaxcl relative to each peer, for every task."""

import pathlib
import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks._measure import figures
from benchmarks._table import ahead, reference, rows_of, tasks_of, times_as_fast

ROW, SPACE = 0.185, 1.0  # height of a line in inches; empty lines above a section


def draw(parts: Mapping[str, Any], path: pathlib.Path) -> None:
    """Draws a dot at the median ratio to each peer and a line over the range of the rounds; log scale; .png or .svg."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    from jaxcl.report import style

    lines, y = [], 0.0  # (y, kind, text, ratios)
    for section in parts.values():
        tasks = tasks_of(rows_of(section)).items()
        compared = [
            (t, e, peers) for t, e in tasks if (peers := [r for r in e if not r.ours and ahead(r, e) is not None])
        ]
        if not compared:
            continue
        lines.append((y, "section", section["title"], ()))
        y += 1
        for task, entries, peers in compared:
            lines.append((y, "task", task, ()))
            for row in peers:
                y += 1
                lines.append((y, "peer", row.contestant, tuple(times_as_fast(reference(entries), row))))
            y += 1
        y += SPACE
    with style.style():
        figure = style.new_figure(max(2.0, ROW * y + 0.6))
        axes = figure.subplots()
        shown = [r for *_, ratios in lines for r in ratios]
        left, right = min([0.5, *shown]) / 1.6, max([2.0, *shown]) * 1.6
        axes.set(xscale="log", xlim=(left, right), ylim=(y - SPACE + 0.5, -1))
        for at, kind, text, ratios in lines:
            bold, color = (
                ("bold", style.INK) if kind == "section" else ("normal", style.MUTED if kind == "task" else style.INK)
            )
            indent = {"section": 1.0, "task": 0.98, "peer": 0.96}[kind]
            axes.annotate(
                text,
                (indent - 1.0, at),
                (-265 + 12 * (kind == "task") + 24 * (kind == "peer"), 0),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                va="center",
                color=color,
                fontweight=bold,
                fontsize=8.5,
                annotation_clip=False,
            )
            if not ratios:
                continue
            middle = statistics.median(ratios)
            color = style.GOOD if middle >= 1 else style.BAD
            axes.plot([min(ratios), max(ratios)], [at, at], color=color, linewidth=1.2)
            axes.plot(middle, at, "o", color=color, markersize=4.5)
            axes.annotate(
                figures(middle),
                (max(ratios) if middle >= 1 else min(ratios), at),  # on the side away from 1
                (5 if middle >= 1 else -5, 0),
                textcoords="offset points",
                ha="left" if middle >= 1 else "right",
                va="center",
                color=color,
                fontsize=8,
            )
        axes.axvline(1, color=style.INK, linewidth=0.9)
        axes.set_yticks([])
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.10g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title("Speed of jaxcl over the speed of its peer; right of 1, jaxcl is faster", loc="right")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})
