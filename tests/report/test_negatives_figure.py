"""The curves over alpha: every value is drawn, at its place, in its panel; and the bars of one run."""

import numpy as np
import pytest

from jaxcl.report import figures
from jaxcl.report.negatives import alpha_curves


def drawn(ax):
    """[(x, y, height of the error bar)] of each line of points in a panel."""
    out = []
    for container in ax.containers:
        line, _, bars = container.lines
        heights = [np.ptp(s[:, 1]) / 2 for s in bars[0].get_segments()] if bars else [0.0] * len(line.get_xdata())
        out.append(list(zip(line.get_xdata(), line.get_ydata(), heights, strict=True)))
    return out


def test_points_means_and_spreads():
    lines = {"none": {None: [0.5, 0.7]}, "patch": {3.0: [0.4], 0.5: [0.3, 0.5]}}
    figure = alpha_curves({"In domain": lines, "Empty": {"patch": {1.0: []}}, "Shifted": {"patch": {0.5: [0.2]}}})
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["In domain", "Shifted"]
    first, second = figure.axes
    assert [t.get_text() for t in first.get_xticklabels()] == ["none", "0.5", "3"]
    (none,), patch = drawn(first)
    assert none == pytest.approx((-0.03, 0.6, np.std([0.5, 0.7], ddof=1)))
    assert patch[0] == pytest.approx((1.03, 0.4, np.std([0.3, 0.5], ddof=1)))  # in order of alpha
    assert patch[1] == pytest.approx((2.03, 0.4, 0))
    assert drawn(second)[0][0] == pytest.approx((1.03, 0.2, 0))  # at the place it has in the other panels
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["none", "patch"]


def test_nothing_to_draw():
    assert "No run" in alpha_curves({"In domain": {"a": {1.0: []}}}).texts[0].get_text()
    assert "Nothing" in figures.out_of_domain({"a": {"value": float("nan")}}).texts[0].get_text()


def test_bars_of_one_run():
    rows = {
        "In domain": {"value": 0.8},
        "nan": {"value": np.nan},
        "Texture": {"value": 0.2, "chance": 0.1, "lower": True},
    }
    (ax,) = figures.out_of_domain(rows).axes
    assert [bar.get_width() for bar in ax.patches] == [0.8, 0.2]
    assert [bar.get_hatch() for bar in ax.patches] == [None, "///"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["In domain", "Texture"]
    assert [list(line.get_xdata()) for line in ax.lines] == [[0.1, 0.1]] and ax.yaxis_inverted()
