"""Figures of the transformations that each stage of a network is invariant to."""

from collections.abc import Mapping
from typing import Any

import matplotlib.figure
import numpy as np
from matplotlib.colors import LinearSegmentedColormap

from jaxcl.report.style import BLUE, FAINT, INK, MUTED, WIDTH, message, new_figure, short, styled

_BLUES = LinearSegmentedColormap.from_list("page", ["#ffffff", "#cfe3f1", "#6fb0d8", BLUE, "#00395c"])
_TITLES = {"centred": "Beyond what all images share", "cosine": "Features as they are"}


@styled
def invariance(panel: Mapping[str, Any]) -> matplotlib.figure.Figure:
    """Draw heat maps of the mean cosine: one row per stage (the last on top), one column per transformation.

    Args:
      panel: "stages" [K] and "transformations" [A], names; "centred" and "cosine" [K,A], either may be missing. If the
        last column compares with another image instead of a transformed one, it is set apart.
    """
    kinds = [k for k in _TITLES if k in panel and np.size(panel[k])]
    if not kinds:
        return message("No stage was measured.")
    stages, names = [str(s) for s in panel["stages"]], [str(n) for n in panel["transformations"]]
    figure = new_figure((0.5 * len(stages) + 1.05) * len(kinds), width=min(WIDTH, 1.6 + 0.95 * len(names)))
    figure.get_layout_engine().set(h_pad=0.1)
    for i, kind in enumerate(kinds):
        ax = figure.add_subplot(len(kinds), 1, i + 1)
        table = np.asarray(panel[kind], float)
        # The scale starts at the lowest value of the copies, in tenths: the values of a network are close together.
        copies = table[:, :-1] if names[-1].startswith("another") and len(names) > 1 else table
        low = float(np.clip(np.floor(10 * np.nanmin(copies, initial=0.9)) / 10, 0, 0.9))
        _heat_map(ax, table, stages, names, low)
        ax.set_title(_TITLES[kind])
        ax.set_title(f"white {low:.1f} or less, dark 1.0", loc="right", fontsize=8.5, weight="normal", color=MUTED)
    return figure


@styled
def invariances(tables: Mapping[str, Mapping[str, Any]]) -> matplotlib.figure.Figure:
    """Draw the centred heat maps of several encoders side by side, on one scale.

    Args:
      tables: name -> "stages" [K], "transformations" [A] and "centred" [K,A], the mean over seeds. Encoders with other
        stages or transformations than the first one are left out.
    """
    if not tables:
        return message("No run of the sweep has results of the evaluator invariance.")
    first = next(iter(tables.values()))
    alike = {n: t for n, t in tables.items() if all(t[k] == first[k] for k in ("stages", "transformations"))}
    stages, names = [str(s) for s in first["stages"]], [str(n) for n in first["transformations"]]
    apart = names[-1].startswith("another") and len(names) > 1
    copies = np.concatenate(
        [np.asarray(t["centred"], float)[:, : -1 if apart else None].ravel() for t in alike.values()]
    )
    low = float(np.clip(np.floor(10 * np.nanmin(copies, initial=0.9)) / 10, 0, 0.9))
    columns = 2 if len(alike) > 1 else 1
    rows = -(-len(alike) // columns)
    figure = new_figure((0.42 * len(stages) + 1.0) * rows, width=(1.1 + 0.72 * len(names)) * columns)
    figure.get_layout_engine().set(h_pad=0.1, w_pad=0.12)
    for i, (name, table) in enumerate(alike.items()):
        ax = figure.add_subplot(rows, columns, i + 1)
        _heat_map(ax, np.asarray(table["centred"], float), stages, names, low)
        ax.set_title(short(name, 44))
        if i == 0:
            ax.set_title(f"white {low:.1f}, dark 1.0", loc="right", fontsize=8.5, weight="normal", color=MUTED)
    return figure


def _heat_map(ax, table: np.ndarray, stages: list[str], names: list[str], low: float) -> None:
    apart = names[-1].startswith("another")
    x = np.arange(len(names)) + np.where(apart & (np.arange(len(names)) == len(names) - 1), 0.25, 0.0)
    for k, row in enumerate(table):
        for a, value in enumerate(row):
            share = float(np.clip((value - low) / (1 - low), 0, 1)) if np.isfinite(value) else 0.0
            ax.add_patch(_cell(x[a], k, _BLUES(share) if np.isfinite(value) else "#eceff2"))
            text = f"{value:.2f}".replace("-0.00", "0.00") if np.isfinite(value) else "–"
            color = "white" if share > 0.55 else INK
            ax.text(x[a], k, text, ha="center", va="center", color=color, fontsize=10, weight="bold")
    ax.set_xlim(-0.5, x[-1] + 0.5)
    ax.set_ylim(-0.5, len(stages) - 0.5)  # the input is at the bottom, as networks are drawn
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.set_xticks(x, [short(n, 14) for n in names], color=INK)
    ax.set_yticks(range(len(stages)), [short(s.replace("stage", "stage "), 12) for s in stages], color=INK)
    if apart:
        ax.get_xticklabels()[-1].set_color(MUTED)


def _cell(x: float, y: float, color):
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=color, edgecolor=FAINT, linewidth=0.8)
