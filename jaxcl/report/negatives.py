"""Figures of non-semantic negatives: how accuracy in and out of domain depends on their weight."""

import math
from collections.abc import Mapping, Sequence

import matplotlib.figure
import numpy as np
from matplotlib.ticker import MaxNLocator, PercentFormatter

from jaxcl.report.figures import MARKS
from jaxcl.report.style import INK, LINES, MUTED, message, new_figure, short, styled

Points = Mapping[float | None, Sequence[float]]  # alpha, None without negatives -> the values of its seeds


@styled
def alpha_curves(panels: Mapping[str, Mapping[str, Points]]) -> matplotlib.figure.Figure:
    """Draw metrics against the weight alpha of the negatives: one panel per metric, one line per setting.

    Args:
      panels: title -> name of the line -> alpha -> values in [0,1] of its seeds. Drawn are their mean and sample
        standard deviation. A line with the only alpha None is a setting without negatives; it is dashed.
    """
    panels = {t: {n: p for n, p in lines.items() if any(len(v) for v in p.values())} for t, lines in panels.items()}
    panels = {title: lines for title, lines in panels.items() if lines}
    if not panels:
        return message("No run of the sweep has an accuracy.")
    alphas = sorted({a for lines in panels.values() for p in lines.values() for a in p if a is not None})
    without = any(None in p for lines in panels.values() for p in lines.values())
    ticks = ([None] if without else []) + alphas
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(2.7 * rows + 0.35 + 0.2 * math.ceil(len(names) / 2), width=3.0 * max(columns, 2))
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    drawn = {}
    for k, (title, lines) in enumerate(panels.items()):
        ax = figure.add_subplot(rows, columns, k + 1)
        for name, points in lines.items():
            i = names.index(name)
            known = [t for t in ticks if len(points.get(t, ()))]
            x = np.array([ticks.index(t) for t in known], float) + 0.06 * (i - (len(names) - 1) / 2)
            mean = np.array([np.mean(points[t]) for t in known])
            spread = np.array([np.std(points[t], ddof=1) if len(points[t]) > 1 else 0.0 for t in known])
            bare = known == [None]
            color = MUTED if bare else LINES[i % len(LINES)]
            drawn[name] = ax.errorbar(
                x, mean, spread if spread.any() else None, color=color, marker=MARKS[i % len(MARKS)], markersize=5,
                capsize=3, linewidth=1.4, elinewidth=1.2, linestyle="-",
            )  # fmt: skip
            if bare:
                ax.axhline(mean[0], color=color, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        ax.set_title(title)
        ax.set_xticks(range(len(ticks)), ["none" if t is None else f"{t:g}" for t in ticks], color=INK)
        ax.set_xlim(-0.4, len(ticks) - 0.6)
        ax.margins(y=0.15)
        ax.yaxis.set_major_locator(MaxNLocator(5))
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        if k // columns == rows - 1 or k + columns >= len(panels):
            ax.set_xlabel("α of the negatives")
    figure.legend(
        list(drawn.values()), [short(name, 46) for name in drawn], loc="outside lower center", ncols=2, frameon=False
    )
    return figure
