"""The metrics of a run over its steps, as small multiples."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.figure
import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator

from jaxcl.report.style import LINES, VERMILLION, message, new_figure, short, styled

_NOT_CURVES = {"step", "time", "epoch", "examples", "seconds"}
_MAX_LINES = 6


@styled
def curves(metrics: Sequence[Mapping[str, Any]]) -> matplotlib.figure.Figure:
    """Draw the metrics of a run as small multiples: single measurements light, their running mean strong.

    Args:
      metrics: the dicts of `read_metrics`. Known metrics get panels in a fixed order (loss, learning rate, accuracy,
        saliency, collapse, speed, data wait), the others one panel for each prefix before "/".
    """
    panels = grouped(read_series(metrics))
    if not panels:
        return message("No metrics were recorded.")
    columns = 1 if len(panels) == 1 else 2
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(2.35 * rows + 0.2)
    figure.get_layout_engine().set(w_pad=0.05, h_pad=0.1)
    axes = figure.subplots(rows, columns, squeeze=False)
    last = max(steps[-1] for _, lines, _ in panels for steps, _ in lines.values())
    for ax, (title, lines, kind) in zip(axes.flat, panels, strict=False):
        _draw_lines(ax, lines, kind, last)
        ax.set_title(title)
    for ax in list(axes.flat)[len(panels) :]:
        ax.set_axis_off()
    for c in range(columns):
        bottom = max(r for r in range(rows) if r * columns + c < len(panels))
        axes[bottom, c].set_xlabel("step")
    return figure


def read_series(metrics: Sequence[Mapping[str, Any]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name -> (steps [n], values [n]) in the order of the steps, of all metrics that are numbers, finite or not."""
    found: dict[str, dict[int, float]] = {}
    for row in metrics:
        for name, value in row.items():
            if name in _NOT_CURVES or isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            found.setdefault(name, {})[row["step"]] = float(value)
    ordered = {name: sorted(points.items()) for name, points in found.items()}
    return {name: tuple(np.array(points, float).T) for name, points in ordered.items()}


def grouped(series: dict) -> list[tuple[str, dict, str]]:
    """[(title, {label: (steps, values)}, kind)]; kind "number" | "percent" | "schedule"."""
    rest = dict(series)

    def take(*names: str, prefix: str | None = None, suffix: str = "") -> dict:
        chosen = [n for n in names if n in rest]
        if prefix is not None:
            chosen += [n for n in rest if n.startswith(prefix) and n.endswith(suffix) and n not in chosen]
        return {n: rest.pop(n) for n in chosen}

    def label(lines: dict) -> dict:
        names = {n: n.split("/", 1)[-1] for n in lines}
        unique = len(set(names.values())) == len(names)
        return {(names[n] if unique else n).replace("_", " "): line for n, line in lines.items()}

    def renamed(names: Sequence[str], labels: Sequence[str]) -> dict:
        return {label: rest.pop(n) for n, label in zip(names, labels, strict=True) if n in rest}

    panels = []
    losses = take("loss", prefix="loss/")
    if "loss" in losses and len(losses) == 2:
        (_, total), (_, part) = losses.items()
        if np.array_equal(total, part, equal_nan=True):  # one term of weight 1 equals the total
            losses = {"loss": total}
    if "loss" in losses and len(losses) > 1:
        losses = {"total": losses.pop("loss"), **losses}
    panels.append(("Loss", label(losses), "number"))
    panels.append(("Learning rate", label(take("lr", "learning_rate", prefix="lr/")), "schedule"))
    accuracy = take("probe/accuracy", "accuracy", prefix="eval/", suffix="accuracy")
    accuracy = {("online probe" if n == "probe/accuracy" else n): v for n, v in accuracy.items()}
    short_names = {n: n.removeprefix("eval/").removesuffix("_accuracy").removesuffix("/accuracy") for n in accuracy}
    panels.append(("Accuracy", {short_names[n].replace("_", " "): v for n, v in accuracy.items()}, "percent"))
    panels.append(("Masks", label(take("saliency/accepted", "saliency/kept_area")), "percent"))
    backgrounds = take("saliency/backgrounds")
    fraction = all(np.nanmax(v, initial=0) <= 1 for _, v in backgrounds.values())
    panels.append(("Backgrounds in the batch", label(backgrounds), "percent" if fraction else "number"))
    collapse = "collapse/within_class_cosine", "collapse/between_class_cosine", "collapse/class_spread"
    names = ("within", "between", "class spread")
    panels.append(("Cosines within and between classes", renamed(collapse, names), "number"))
    others = ("collapse/effective_rank", "collapse/alignment", "collapse/uniformity")
    lines = renamed(others, ("log eff. rank", "alignment", "uniformity"))
    if "log eff. rank" in lines:  # on the rank's own scale the other two lines are flat; 0: all points are one
        steps, ranks = lines["log eff. rank"]
        lines["log eff. rank"] = steps, np.log(np.maximum(ranks, 1))
    panels.append(("All embeddings: spread and alignment", lines, "number"))
    panels.append(("Images a second", take("images_per_second"), "number"))
    panels.append(("Time waiting for data", take("data_wait"), "percent"))
    for prefix in dict.fromkeys(n.split("/")[0] for n in rest):
        lines = {n: v for n, v in rest.items() if n.split("/")[0] == prefix}
        panels.append((prefix.replace("_", " ").capitalize(), label(lines), "number"))
    return [(title, dict(list(lines.items())[:_MAX_LINES]), kind) for title, lines, kind in panels if lines]


def _draw_lines(ax, lines: dict, kind: str, last: float) -> None:
    ends = []
    for color, (name, (steps, values)) in zip(LINES, lines.items(), strict=False):
        finite = np.isfinite(values)
        if not finite.any():
            ax.text(0.02, 0.9, f"{name}: never finite", transform=ax.transAxes, color=VERMILLION)
            continue
        smooth = kind != "schedule" and len(values) >= 40
        shown = np.where(finite, values, np.nan)
        if smooth:
            ax.plot(steps, shown, color=color, alpha=0.25, linewidth=0.8)
            shown = running_mean(shown, max(3, len(values) // 25))
        sparse = len(values) < 25
        ax.plot(steps, shown, color=color, marker="o" if sparse else None, markersize=3.5)
        ends.append((float(shown[np.flatnonzero(np.isfinite(shown))[-1]]), name, color))
        if not finite.all():
            first_bad = steps[np.flatnonzero(~finite)[0]]
            ax.axvline(first_bad, color=VERMILLION, linewidth=1, linestyle=(0, (3, 2)))
            side = "right" if first_bad > 0.5 * last else "left"
            said = f" not finite from step {first_bad:,.0f} "
            top = ax.get_xaxis_transform()
            ax.text(first_bad, 1.0, said, color=VERMILLION, fontsize=8, va="top", ha=side, transform=top)
    ax.set_xlim(0, max(last, 1))
    low, high = ax.get_ylim()
    if kind == "percent":
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.3g}%"))
        low, high = max(low, 0.0), min(max(high, 0.005), 1.0 + 0.02 * (high > 0.9))
    elif low > 0 and (kind == "schedule" or low < 0.35 * high or set(lines) <= {"images_per_second"}):
        low = 0.0
    ax.set_ylim(low, high if high > low else low + 1)
    ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _thousands(x)))
    if kind != "percent":
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _number(y)))
    _label_ends(ax, ends, kind)


def _label_ends(ax, ends: list[tuple[float, str, str]], kind: str) -> None:
    """Names and last values at the right ends of the lines, pushed apart where they would overlap."""
    low, high = ax.get_ylim()
    apart = 0.115
    ends = sorted(ends)
    places = [(value - low) / (high - low) for value, _, _ in ends]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + apart)
    if places and places[-1] > 1.0:
        places[-1] = 1.0
        for i in range(len(places) - 2, -1, -1):
            places[i] = min(places[i], places[i + 1] - apart)
    for place, (value, name, color) in zip(places, ends, strict=True):
        said = f"{100 * value:.1f}%" if kind == "percent" else _number(value)
        ax.text(
            1.02, place, said if len(ends) == 1 else f"{short(name, 16)} {said}", color=color, weight="bold",
            fontsize=8.5, va="center", transform=ax.transAxes,
        )  # fmt: skip


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of the finite values in a centred window, cut off at the ends."""
    half = width // 2
    good = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(good, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(good)])
    i = np.arange(len(values))
    a, b = np.maximum(i - half, 0), np.minimum(i + half + 1, len(values))
    n = count[b] - count[a]
    return np.where(good, (total[b] - total[a]) / np.maximum(n, 1), np.nan)


def _number(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _thousands(value: float) -> str:
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k" if value >= 1e4 else f"{value:,.0f}"
