"""Figures of fine classes inside coarse ones, for encoders that were trained on the coarse labels."""

import dataclasses
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.figure
import numpy as np
from matplotlib.ticker import FixedLocator

from jaxcl.report.figures import MARKS, class_colors, to_plane
from jaxcl.report.spread_theory import alpha_threshold, family, optimal_t
from jaxcl.report.style import INK, LINES, MUTED, VERMILLION, WIDTH, message, new_figure, short, styled

MAX_COARSE = 12
_MAX_NAMES = 8  # in a legend
_BEHIND = "#e1e5ea"  # points of the other coarse classes
_UNKNOWN = "#9aa5b1"  # points of the class whose fine label is unknown


@dataclasses.dataclass(frozen=True)
class _Run:
    """The t-SNE picture of a run, or the reason why there is none."""

    points: np.ndarray  # [m,2]
    fine: list[str | None]  # [m] names
    coarse: list[str | None]
    why: str = ""


@styled
def fine_embedding(panels: Mapping[str, Mapping[str, Any]], *, seed: int = 0) -> matplotlib.figure.Figure:
    """Draw a t-SNE picture of the embeddings by coarse class, then of each coarse class by its fine classes.

    There is one t-SNE per run; the picture of a coarse class is an enlarged part of it, with points of other classes in
    grey. The pictures of one run are side by side; several runs have one column each, with the same class in a row.

    Args:
      panels: name of the run -> {"features": [n,D], "labels": [n] fine classes, "coarse": [n], "class_names",
        "coarse_names": by id, "note": (optional) a line under the name of the run}; ids -1 are unknown. At most 1,500
        points are drawn. Classes of two runs are the same if they have the same name.
      seed: of the choice of points and of t-SNE.
    """
    runs = {name: _placed(panel, seed) for name, panel in panels.items()}
    fine_of: dict[str, list[str]] = {}
    for panel in panels.values():
        for coarse, names in _fine_classes(panel).items():
            known = fine_of.setdefault(coarse, [])
            known += [n for n in names if n not in known]
    if not fine_of:
        return message("No image has a coarse and a fine label.")
    if len(runs) == 1 and (why := next(iter(runs.values())).why):
        return message(why)
    shown, said = _chosen(fine_of)
    rows = [("All coarse classes", list(fine_of), None), *((c, fine_of[c], c) for c in shown)]
    figure = _one_run(runs, rows) if len(runs) == 1 else _columns(runs, rows, panels)
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - 0.1 / figure.get_figheight()))  # room for titles
    if said:
        figure.supxlabel(said, x=0.01, ha="left", color=MUTED, fontsize=8.5)
    return figure


def _one_run(runs: Mapping[str, _Run], rows: Sequence) -> matplotlib.figure.Figure:
    run = next(iter(runs.values()))
    columns = len(rows) if len(rows) <= 4 else 3 if len(rows) <= 6 else 4
    legends = [_legend(names, 13 if columns == 4 else 18, _MAX_NAMES) for _, names, _ in rows]
    lines = [math.ceil(max(map(len, legends[i : i + columns])) / 2) for i in range(0, len(rows), columns)]
    side = WIDTH / columns
    figure = new_figure(len(lines) * (side + 0.35) + 0.19 * sum(lines) + 0.2)
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.12)
    grid = figure.add_gridspec(len(lines), columns, height_ratios=[side + 0.25 + 0.19 * n for n in lines])
    for k, ((title, names, coarse), legend) in enumerate(zip(rows, legends, strict=True)):
        ax = figure.add_subplot(grid[divmod(k, columns)])
        _scatter(ax, run, names, coarse)
        ax.set_title(short(title, 26))
        for i, (text, color) in enumerate(legend):
            _key(ax, (0.5 * (i % 2), 0), -13 - 13.5 * (i // 2), text, color)
        # Reserve the height of the tallest legend of the row.
        _key(ax, (0, 0), -13.5 * lines[k // columns], " ", None)
    return figure


def _columns(runs: Mapping[str, _Run], rows: Sequence, panels: Mapping[str, Any]) -> matplotlib.figure.Figure:
    words = 1.5
    side = min(2.4, max(1.55, (WIDTH - words) / len(runs)))
    most = max(6, int((side - 0.4) / 0.19))
    notes = {name: panels[name].get("note") for name in runs}
    figure = new_figure((side + 0.1) * len(rows) + 0.7, width=words + side * len(runs))
    figure.get_layout_engine().set(w_pad=0.04, h_pad=0.05, wspace=0.02, hspace=0.02)
    grid = figure.add_gridspec(len(rows), 1 + len(runs), width_ratios=[words, *[side] * len(runs)])
    for r, (title, names, coarse) in enumerate(rows):
        ax = figure.add_subplot(grid[r, 0])
        ax.set_axis_off()
        ax.text(0, 1, short(title, 18), weight="bold", fontsize=9.5, va="top", transform=ax.transAxes)
        for i, (text, color) in enumerate(_legend(names, 16, most)):
            _key(ax, (0, 1), -25 - 13.5 * i, text, color)
        for c, (name, run) in enumerate(runs.items()):
            ax = figure.add_subplot(grid[r, 1 + c])
            _scatter(ax, run, names, coarse)
            if r == 0:
                ax.set_title(short(name, round(10.5 * side)), loc="center", pad=19 if any(notes.values()) else None)
                ax.annotate(notes[name] or "", (0.5, 1), xycoords="axes fraction", xytext=(0, 6), ha="center",
                            textcoords="offset points", color=MUTED, fontsize=8.5)  # fmt: skip
    return figure


def _scatter(ax, run: _Run, names: Sequence[str], coarse: str | None) -> None:
    """Draw the points of a coarse class by fine class, enlarged, over all others; None: all points by coarse class."""
    ax.set(xticks=[], yticks=[], box_aspect=1)
    ax.spines[:].set_visible(True)
    ax.spines[:].set_color("#d5dae0")
    ax.grid(False)
    front = np.array([coarse is None or c == coarse for c in run.coarse], bool)
    if run.why or not front.any():
        why = textwrap.fill(run.why or "No image of this class.", 24)
        ax.text(0.5, 0.5, why, ha="center", va="center", color=MUTED, fontsize=8, transform=ax.transAxes)
        return
    color_of = dict(zip(names, class_colors(len(names)), strict=False))
    shown = run.coarse if coarse is None else run.fine
    ax.scatter(*run.points[~front].T, s=9, color=_BEHIND, linewidths=0)
    order = np.random.default_rng(0).permutation(np.flatnonzero(front))  # no class covers the others
    colors = [color_of.get(shown[i], _UNKNOWN) for i in order]
    ax.scatter(*run.points[order].T, s=6 if coarse is None else 11, c=colors, alpha=0.8, linewidths=0)
    # Ignore a few outliers when choosing the limits.
    edge = 0 if coarse is None else 1.5
    low, high = np.percentile(run.points[front], [edge, 100 - edge], axis=0)
    middle, half = (low + high) / 2, 0.54 * max((high - low).max(), 0.03 * np.ptp(run.points, axis=0).max())
    half *= 1 if coarse is None else 1.15
    ax.set(xlim=(middle[0] - half, middle[0] + half), ylim=(middle[1] - half, middle[1] + half))


def _key(ax, corner: tuple[float, float], down: float, text: str, color) -> None:
    """Draw a legend entry, a dot and a name, `down` points from a corner of the axes."""
    options = dict(xycoords="axes fraction", textcoords="offset points", va="center")
    if color is not None:
        ax.annotate("●", corner, xytext=(0, down), color=color, fontsize=9, **options)
    ax.annotate(text, corner, xytext=(10, down), color=MUTED if color is None else INK, fontsize=8.3, **options)


def _legend(names: Sequence[str], length: int, most: int) -> list[tuple[str, Any]]:
    """[(name, colour)]; if there are too many, the last entry is "and 7 more"."""
    entries = [(short(n, length), c) for n, c in zip(names, class_colors(len(names)), strict=False)]
    return entries if len(entries) <= most else [*entries[: most - 1], (f"and {len(entries) - most + 1} more", None)]


def _placed(panel: Mapping[str, Any], seed: int) -> _Run:
    try:
        rows, points = to_plane(panel["features"], seed)
    except ValueError as reason:
        return _Run(np.zeros((0, 2)), [], [], str(reason))
    fine, coarse = (np.asarray(panel[k])[rows] for k in ("labels", "coarse"))
    return _Run(points, _named(fine, panel["class_names"]), _named(coarse, panel["coarse_names"]))


def _named(ids: np.ndarray, names: Sequence[str] | None) -> list[str | None]:
    names = names if names is not None else ()
    return [None if i < 0 else str(names[i]) if i < len(names) else f"class {i}" for i in map(int, ids)]


def _fine_classes(panel: Mapping[str, Any]) -> dict[str, list[str]]:
    """Coarse class -> its fine classes, both in the order of their ids."""
    fine, coarse = np.asarray(panel["labels"]), np.asarray(panel["coarse"])
    pairs = np.unique(np.stack([coarse, fine], 1)[(coarse >= 0) & (fine >= 0)], axis=0)
    found: dict[str, list[str]] = {}
    names = (_named(pairs[:, 0], panel["coarse_names"]), _named(pairs[:, 1], panel["class_names"]))
    for c, f in zip(*names, strict=True):
        found.setdefault(c, []).append(f)
    return found


def _chosen(fine_of: Mapping[str, Sequence[str]]) -> tuple[list[str], str]:
    """-> (coarse classes that get a picture, a note about the others)."""
    several = [c for c, names in fine_of.items() if len(names) > 1]
    single = [c for c in fine_of if c not in several]
    shown = several[:MAX_COARSE] or list(fine_of)[:MAX_COARSE]
    said = []
    if len(several) > MAX_COARSE:
        said.append(f"The first {MAX_COARSE} of {len(several)} coarse classes.")
    if several and single:
        listed = ", ".join(short(c) for c in single[:4]) + (f" and {len(single) - 4} more" if len(single) > 4 else "")
        said.append(f"Without a picture, as they have only one fine class: {listed}.")
    return shown, " ".join(said)


@dataclasses.dataclass(frozen=True)
class Setting:
    """The quantities of a run that the theory of spread depends on; see `spread_theory`."""

    classes: float
    points: float  # per class in a batch
    temperature: float

    @property
    def threshold(self) -> float:
        return alpha_threshold(self.classes, self.points, self.temperature)


@styled
def collapse_curve(
    points: Mapping[str, Mapping[float, Sequence[float]]], settings: Mapping[str, Setting | None]
) -> matplotlib.figure.Figure:
    """Draw the within-class cosine against the weight of attraction: measured, predicted, and the predicted threshold.

    Args:
      points: name of the line -> alpha in [0,1] -> the cosines of its seeds, each in [-1,1]. Drawn are their mean and
        sample standard deviation.
      settings: of each line; None or absent: no prediction is drawn.
    """
    points = {name: {a: v for a, v in line.items() if len(v)} for name, line in points.items()}
    points = {name: line for name, line in points.items() if line}
    if not points:
        return message("No run of the sweep has a within-class cosine.")
    from matplotlib import patheffects

    figure = new_figure(4.6, width=7.6)
    ax = figure.add_subplot()
    fine = np.linspace(0, 1, 1001)
    same = len({settings.get(name) for name in points}) == 1
    drawn: dict[Setting, str] = {}
    lowest = 0.0
    for i, (name, line) in enumerate(points.items()):
        color, mark = LINES[i % len(LINES)], MARKS[i % len(MARKS)]
        setting = settings.get(name)
        if setting is not None and setting not in drawn:
            drawn[setting] = ink = VERMILLION if same else color
            s = (setting.classes, setting.points, setting.temperature)
            _, _, within = family(optimal_t(fine, *s), *s)
            lowest = min(lowest, within.min())
            label = "theory, free embeddings" + ("" if same else f", {name}")
            ax.plot(fine, within, color=ink, linewidth=1.6, label=label, zorder=1)
        alphas = sorted(line)
        means = np.array([np.mean(line[a]) for a in alphas])
        spreads = np.array([np.std(line[a], ddof=1) if len(line[a]) > 1 else 0.0 for a in alphas])
        ax.errorbar(
            alphas, means, spreads if spreads.any() else None, color=color, marker=mark, markersize=6, capsize=3,
            linewidth=0, elinewidth=1.5, label=_measured(name, line, len(points)), zorder=3,
        )  # fmt: skip
        lowest = min(lowest, float((means - spreads).min()))
    for k, (setting, color) in enumerate(drawn.items()):
        ax.axvline(setting.threshold, color=color, linewidth=1.2, linestyle=(0, (4, 3)), zorder=0)
        right = setting.threshold < 0.7
        said = f"α* = {setting.threshold:.2f}"
        if k == 0:
            said += "\ncollapse is optimal from here on" if right else "\ncollapse is optimal\nfrom here on"
        ax.annotate(
            said, (setting.threshold, 0.03 + 0.16 * k), xycoords=("data", "axes fraction"), color=color, fontsize=8.5,
            xytext=(6 if right else -6, 0), textcoords="offset points", ha="left" if right else "right",
            linespacing=1.35, path_effects=[patheffects.withStroke(linewidth=3, foreground="white")],
        )  # fmt: skip
    ax.text(0.005, 1.015, "1: each class is one point", color=MUTED, fontsize=8, transform=ax.get_yaxis_transform())
    ax.set(xlim=(-0.02, 1.02), ylim=(lowest - 0.08, 1.1))
    ax.yaxis.set_major_locator(FixedLocator([-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1]))
    ax.set_xlabel("α, the share of attraction: a_lc / (a_lc + a_spread)")
    ax.set_title("Cosine between two images of one class")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def _measured(name: str, line: Mapping[float, Sequence[float]], lines: int) -> str:
    seeds = sorted({len(v) for v in line.values()})
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    spread = f", mean ± sd of {count} seeds" if seeds[-1] > 1 else ", one seed"
    return (short(name, 30) if lines > 1 else f"measured ({short(name, 24)})" if name else "measured") + spread
