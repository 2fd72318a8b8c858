"""Histograms of similarities during training: to positives, to negatives of the same image, to other images."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.figure
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.ticker import MaxNLocator

from jaxcl.report.style import INK, LINES, message, new_figure, styled

PREFIX = "similarity_histogram/"


def rows(metrics: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The lines of `read_metrics` with histograms of similarities."""
    return [row for row in metrics if any(name.startswith(PREFIX) for name in row)]


@styled
def similarities(metrics: Sequence[Mapping[str, Any]]) -> matplotlib.figure.Figure:
    """Draw the distribution of cosines over the steps for each kind of pair, and of all kinds at the end of training.

    Args:
      metrics: lines with "step" and "similarity_histogram/KIND": the shares [bins] of the cosines in equal bins of
        [-1, 1].
    """
    kinds = dict.fromkeys(n for row in metrics for n in row if n.startswith(PREFIX))
    kinds = sorted(kinds, key=lambda name: "positive" not in name)
    if not kinds:
        return message("No similarities were recorded.")
    columns = 2
    lines = math.ceil((len(kinds) + 1) / columns)
    figure = new_figure(2.9 * lines + 0.2)
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.1)
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    low, high = _range([row[n] for row in metrics for n in kinds if n in row])
    for ax, name, color in zip(axes, kinds, LINES, strict=False):
        steps = np.array([row["step"] for row in metrics if name in row], float)
        shares = np.array([row[name] for row in metrics if name in row], float)
        edges = np.linspace(-1, 1, shares.shape[1] + 1)
        middles = (edges[:-1] + edges[1:]) / 2
        # A column reaches from the previous line to its own: a line is the mean since the previous one.
        starts = np.concatenate([[max(0.0, 2 * steps[0] - steps[min(1, len(steps) - 1)])], steps])
        shade = LinearSegmentedColormap.from_list(name, ["white", color])
        norm = PowerNorm(0.6, vmin=0, vmax=max(float(np.nanmax(shares, initial=0)), 1e-9))
        ax.pcolormesh(starts, edges, shares.T, cmap=shade, norm=norm, rasterized=True)
        ax.plot((starts[:-1] + steps) / 2, shares @ middles, color=INK, linewidth=1.1)
        ax.set(ylim=(low, high), ylabel="cosine", xlabel="step")
        ax.set_title(name.removeprefix(PREFIX))
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    last = axes[len(kinds)]
    for name, color in zip(kinds, LINES, strict=False):
        shares = np.array(next(row[name] for row in reversed(metrics) if name in row), float)
        last.stairs(shares, np.linspace(-1, 1, len(shares) + 1), color=color, fill=True, alpha=0.35)
        last.stairs(shares, np.linspace(-1, 1, len(shares) + 1), color=color, label=name.removeprefix(PREFIX))
    last.set(xlim=(low, high), xlabel="cosine", ylabel="share")
    last.set_title("at the end")
    last.legend(frameon=False, fontsize=8)
    for ax in axes[len(kinds) + 1 :]:
        ax.set_axis_off()
    return figure


def _range(histograms: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The range of the bins with more than a thousandth of a histogram, slightly enlarged."""
    low, high = 1.0, -1.0
    for shares in histograms:
        shares = np.asarray(shares, float)
        edges = np.linspace(-1, 1, len(shares) + 1)
        filled = np.flatnonzero(shares > 1e-3)
        if len(filled):
            low, high = min(low, edges[filled[0]]), max(high, edges[filled[-1] + 1])
    return (max(-1.0, low - 0.05), min(1.0, high + 0.05)) if low < high else (-1.0, 1.0)
