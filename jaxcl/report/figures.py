"""The figures of the report: functions of NumPy arrays and plain dicts that return a matplotlib Figure."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.figure
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.ticker import MaxNLocator, PercentFormatter

from jaxcl.report.curves import curves
from jaxcl.report.pictures import adversary_grid, saliency_grid, view_grid
from jaxcl.report.style import (
    BLUE,
    CLASSES,
    INK,
    LINES,
    MUTED,
    ORANGE,
    SKY,
    VERMILLION,
    message,
    new_figure,
    save,
    short,
    styled,
)

__all__ = [
    "adversary_grid",
    "calibration_error",
    "confusion",
    "curves",
    "embedding",
    "out_of_domain",
    "reliability",
    "robustness",
    "saliency_grid",
    "save",
    "view_grid",
]

_BLUES = LinearSegmentedColormap.from_list("page", ["#ffffff", "#cfe3f1", "#6fb0d8", BLUE, "#00395c"])
_TSNE_POINTS = 1500
MARKS = "osD^vP"  # markers of lines, which then differ not only in colour


@styled
def embedding(
    features: np.ndarray, labels: np.ndarray, class_names: Sequence[str] | None = None, *, seed: int = 0
) -> matplotlib.figure.Figure:
    """Draw a t-SNE picture of the embeddings, coloured by class, with each name at the median of its class.

    Args:
      features: [n,D] embeddings; scaled to unit length and reduced to 50 principal components before t-SNE. At most
        1,500 points are drawn, chosen at random.
      labels: [n] class ids, -1 = unlabelled (grey).
      class_names: names by id.
      seed: of the choice of points and of t-SNE.
    """
    labels = np.asarray(labels)
    try:
        rows, points = to_plane(features, seed)
    except ValueError as reason:
        return message(str(reason))
    labels = labels[rows]

    figure = new_figure(6.2, width=8.0)
    ax = figure.add_subplot()
    ax.set_axis_off()
    classes = [int(c) for c in np.unique(labels) if c >= 0]
    color_of = class_colors(len(classes))
    ax.scatter(*points[labels < 0].T, s=9, color="#b6bec7", linewidths=0)
    order = np.random.default_rng(seed).permutation(len(points))  # in random order, so no class covers the others
    rank = {c: i for i, c in enumerate(classes)}
    order = order[labels[order] >= 0]
    ax.scatter(*points[order].T, s=13, c=[color_of[rank[int(labels[i])]] for i in order], alpha=0.75, linewidths=0)
    if len(classes) <= 30:
        from matplotlib import patheffects

        halo = [patheffects.withStroke(linewidth=3.5, foreground="white")]
        middles = np.array([np.median(points[labels == c], axis=0) for c in classes]).reshape(-1, 2)
        for c, (x, y) in zip(classes, _apart(middles, np.ptp(points, axis=0)), strict=True):
            name = class_names[c] if class_names is not None and c < len(class_names) else f"class {c}"
            color, size = _darker(color_of[rank[c]]), 10 if len(classes) <= 12 else 8
            ax.text(x, y, short(name), ha="center", va="center", weight="bold", color=color, fontsize=size,
                    path_effects=halo)  # fmt: skip
    else:
        ax.set_title(f"{len(classes)} classes, too many to name", color=MUTED, weight="normal")
    ax.set_aspect("equal", adjustable="datalim")
    return figure


def to_plane(features: np.ndarray, seed: int = 0, *, limit: int | None = _TSNE_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Place features in the plane by t-SNE.

    Args:
      features: [n,...]; scaled to unit length and reduced to 50 principal components before t-SNE.
      limit: of more features than these, so many are chosen at random.

    Returns:
      (rows of the features [m], their positions [m,2]).

    Raises:
      ValueError: too few finite features, or all are equal; the message says which.
    """
    features = np.asarray(features, np.float32)
    features = features.reshape(len(features), -1)
    rows = np.flatnonzero(np.isfinite(features).all(1))
    if limit is not None and len(rows) > limit:
        rows = rows[np.random.default_rng(seed).permutation(len(rows))[:limit]]
    if len(rows) < 10:
        raise ValueError(f"Only {len(rows)} finite embeddings: too few for a picture.")
    features = features[rows]
    features = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    if features.std(0).max() < 1e-5:
        raise ValueError("All embeddings are the same point: the encoder has collapsed.")
    return rows, tsne(features, seed)


def tsne(features: np.ndarray, seed: int) -> np.ndarray:
    """t-SNE of [n,D] features -> positions [n,2]."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits  # scikit-learn depends on it

    n, d = features.shape
    perplexity = min(30.0, (n - 1) / 3)
    # 600 steps: later ones hardly change the picture.
    method = TSNE(2, perplexity=perplexity, init="pca", max_iter=600, random_state=seed)
    # One thread: on a busy machine, threads that wait for each other make this many times slower.
    with threadpool_limits(1):
        if min(n, d) > 50:
            features = PCA(50, svd_solver="randomized", random_state=seed).fit_transform(features)
        if d == 1:
            features = np.concatenate([features, np.zeros_like(features)], axis=1)
        return method.fit_transform(features.astype(np.float32))


def class_colors(count: int) -> list:
    """One colour for each of `count` classes."""
    if count <= len(CLASSES):
        return list(CLASSES)
    from matplotlib import colormaps

    return [colormaps["turbo"](0.05 + 0.9 * i / (count - 1)) for i in range(count)]


def _darker(color) -> tuple[float, ...]:
    from matplotlib.colors import to_rgb

    return tuple(0.72 * c for c in to_rgb(color))


def _apart(places: np.ndarray, extent: np.ndarray) -> np.ndarray:
    """Move labels up and down until they do not overlap."""
    places = places.astype(float).copy()
    wide, high = 0.13 * extent[0], 0.045 * extent[1]
    for _ in range(60):
        moved = False
        for i in range(len(places)):
            for j in range(i):
                dx, dy = np.abs(places[i] - places[j])
                if dx < wide and dy < high:
                    up = 1.0 if places[i, 1] >= places[j, 1] else -1.0
                    shift = (high - dy) / 2 + 1e-6 * extent[1]
                    places[i, 1] += up * shift
                    places[j, 1] -= up * shift
                    moved = True
        if not moved:
            break
    return places


@styled
def confusion(matrix: np.ndarray, class_names: Sequence[str] | None = None) -> matplotlib.figure.Figure:
    """Draw a row-normalised confusion matrix: up to 20 classes with numbers, more with the ten commonest mistakes.

    Args:
      matrix: [C,C] counts, rows = true class, columns = predicted class.
      class_names: [C].
    """
    counts = np.asarray(matrix, float)
    n = len(counts)
    names = [short(class_names[i] if class_names is not None else i, 16) for i in range(n)]
    total = counts.sum(1, keepdims=True)
    share = np.where(total > 0, counts / np.maximum(total, 1), np.nan)
    detailed = n <= 20
    height = min(8.0, 2.6 + 0.42 * n) if detailed else 5.4
    figure = new_figure(height, width=9.0 if not detailed else min(9.0, height + 0.15))
    grid = figure.add_gridspec(1, 2, width_ratios=[1.0, 0.62]) if not detailed else figure.add_gridspec(1, 1)
    ax = figure.add_subplot(grid[0, 0])
    ax.set_facecolor("#eceff2")  # a class without examples
    # With many classes each mistake is rare: a square-root scale keeps them visible.
    norm = PowerNorm(1.0 if detailed else 0.5, vmin=0, vmax=1)
    ax.imshow(share, cmap=_BLUES, norm=norm, interpolation="nearest")
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.set_xlabel("predicted")
    ax.set_ylabel("true")
    if detailed:
        ax.set_xticks(range(n), names, rotation=40, ha="right", rotation_mode="anchor", color=INK)
        ax.set_yticks(range(n), names, color=INK)
        for i, j in np.argwhere(np.nan_to_num(share) >= 0.01):
            ax.text(
                j, i, f"{100 * share[i, j]:.0f}", ha="center", va="center", fontsize=9 if n <= 12 else 7,
                color="white" if share[i, j] > 0.5 else INK, weight="bold" if i == j else "normal",
            )  # fmt: skip
        ax.set_title("% of each true class")
        return figure
    ax.set_title("Share of each true class, square-root scale")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    wrong = np.nan_to_num(share * (1 - np.eye(n)))
    side = figure.add_subplot(grid[0, 1])
    side.set_axis_off()
    side.set_title("Most often confused")
    pairs = [np.unravel_index(k, wrong.shape) for k in np.argsort(-wrong, axis=None, kind="stable")[:10]]
    for row, (i, j) in enumerate([p for p in pairs if wrong[p] > 0]):
        y = 0.95 - 0.095 * row
        side.text(0, y, f"{100 * wrong[i, j]:.0f}%", weight="bold", color=VERMILLION, transform=side.transAxes)
        side.text(0.17, y, f"{names[i]} → {names[j]}", transform=side.transAxes)
    return figure


def calibration_error(bins: Mapping[str, Any]) -> float:
    """Expected calibration error of binned predictions, a fraction: sum_b count_b/n |accuracy - confidence|.

    Args:
      bins: "count", "accuracy", "confidence", each [num_bins]; empty bins may hold anything.
    """
    count, accuracy, confidence = (np.asarray(bins[k], float) for k in ("count", "accuracy", "confidence"))
    gap = np.where(count > 0, np.abs(accuracy - confidence), 0.0)
    return float((count * gap).sum() / max(count.sum(), 1.0))


@styled
def reliability(splits: Mapping[str, Mapping[str, Any]]) -> matplotlib.figure.Figure:
    """Draw reliability diagrams side by side: how often the predictions of a given confidence are right.

    Args:
      splits: name -> {"count", "accuracy", "confidence"}, each [num_bins], equal-width bins over [0,1].
    """
    if not splits:
        return message("No calibration was measured.")
    columns = min(3, len(splits))
    rows = math.ceil(len(splits) / columns)
    figure = new_figure(4.0 * rows, width=9.0 if columns > 2 else 3.4 * columns)
    grid = figure.add_gridspec(2 * rows, columns, height_ratios=[1, 0.2] * rows)
    for k, (name, bins) in enumerate(splits.items()):
        r, c = divmod(k, columns)
        count = np.asarray(bins["count"], float)
        filled = count > 0
        accuracy = np.where(filled, np.asarray(bins["accuracy"], float), 0.0)
        confidence = np.where(filled, np.asarray(bins["confidence"], float), 0.0)
        edges = np.linspace(0, 1, len(count) + 1)
        middle, width = (edges[:-1] + edges[1:])[filled] / 2, 0.9 / len(count)
        ax = figure.add_subplot(grid[2 * r, c])
        ax.bar(middle, accuracy[filled], width, color=BLUE)
        low = np.minimum(accuracy, confidence)[filled]
        gap = np.abs(accuracy - confidence)[filled]
        ax.bar(middle, gap, width, low, color=VERMILLION, alpha=0.28, edgecolor=VERMILLION, linewidth=0.8)
        ax.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=(0, (4, 3)))
        ax.set(xlim=(0, 1), ylim=(0, 1), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1), xticklabels=[])
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        ax.set_title(f"{short(str(name).replace('_', ' '), 20)}\nECE {100 * calibration_error(bins):.1f}%")
        low_ax = figure.add_subplot(grid[2 * r + 1, c])
        share = count[filled] / max(count.sum(), 1.0)
        low_ax.bar(middle, share, width, color="#9aa5b1")
        low_ax.set(xlim=(0, 1), ylim=(0, max(0.01, 1.1 * share.max(initial=0))), xticks=(0, 0.5, 1), yticks=[])
        low_ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        low_ax.set_xlabel("confidence")
        if c == 0:
            ax.set_ylabel("accuracy")
            low_ax.set_ylabel("share")
        if k == 0:
            ax.text(0.05, 0.93, "dashed: perfect", fontsize=8, color=MUTED)
            ax.text(0.05, 0.86, "shaded: the gap", fontsize=8, color=VERMILLION)
    return figure


@styled
def robustness(lines: Mapping[str, Mapping[Any, Any]]) -> matplotlib.figure.Figure:
    """Draw the accuracy, and the calibration error where it is given, under attacks of growing strength.

    Args:
      lines: name of the line -> epsilon in 1/255 (number or text; 0: clean) -> accuracy or
        {"accuracy": ..., "ece": ...}.
    """
    series: dict[str, list[tuple[float, Any, Any]]] = {}
    for name, by_epsilon in lines.items():
        for epsilon, value in by_epsilon.items():
            metrics = value if isinstance(value, Mapping) else {"accuracy": value}
            series.setdefault(name, []).append((float(epsilon), metrics.get("accuracy"), metrics.get("ece")))
    panels = [("Accuracy under attack", 1, 0), ("Calibration error under attack", 2, 1)]
    panels = [p for p in panels if any(row[p[1]] is not None for rows in series.values() for row in rows)]
    if not panels:
        return message("No attack was run.")
    figure = new_figure(3.0 if len(series) == 1 else 3.5, width=4.5 * len(panels))
    figure.get_layout_engine().set(w_pad=0.12)
    strengths = sorted({row[0] for rows in series.values() for row in rows})
    for k, (title, column, shade) in enumerate(panels):
        ax = figure.add_subplot(1, len(panels), k + 1)
        top = 0.0
        for i, (name, rows) in enumerate(series.items()):
            points = np.array(sorted((row[0], row[column]) for row in rows if row[column] is not None), float)
            if not len(points):
                continue
            color = LINES[(i + shade) % len(LINES)] if len(series) == 1 else LINES[i % len(LINES)]
            ax.plot(*points.T, color=color, marker=MARKS[i % len(MARKS)], markersize=5, label=name)
            top = max(top, float(np.nanmax(points[:, 1])))
            if len(series) > 1:
                continue  # the numbers of several lines would overlap; the table has them
            falls = points[-1, 1] < points[0, 1]  # numbers go to the side that the line leaves free
            place = {"xytext": (4 if falls else -4, 5), "ha": "left" if falls else "right"}
            for x, y in points:
                ax.annotate(f"{100 * y:.1f}%", (x, y), textcoords="offset points", color=color, weight="bold",
                            fontsize=8.5, **place)  # fmt: skip
        ax.set_ylim(0, min(max(0.05, 1.25 * top), 1.12))
        ax.yaxis.set_major_locator(MaxNLocator(5))
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        ax.set_xticks(strengths, ["clean" if x == 0 else f"{x:g}" for x in strengths])
        ax.margins(x=0.14)
        ax.set_xlabel("attack strength, in 1/255 of the pixel range")
        ax.set_title(title)
    if len(series) > 1:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


@styled
def out_of_domain(rows: Mapping[str, Mapping[str, Any]]) -> matplotlib.figure.Figure:
    """Draw bars of accuracy in domain and out of it; hatched if lower is better.

    Args:
      rows: name -> {"value": in [0,1], "chance": (optional) drawn as a line across the bar, "lower": (optional) True if
        lower is better}, from top to bottom.
    """
    rows = {name: row for name, row in rows.items() if np.isfinite(row["value"])}
    if not rows:
        return message("Nothing was measured out of domain.")
    figure = new_figure(0.75 + 0.31 * len(rows), width=7.2)
    ax = figure.add_subplot()
    for y, row in enumerate(rows.values()):
        value, lower = float(row["value"]), row.get("lower", False)
        color = ORANGE if lower else BLUE if y == 0 else SKY
        ax.barh(y, value, 0.66, color=color, hatch="///" if lower else None, edgecolor="white", linewidth=0)
        end = max(value, row.get("chance") or 0)  # right of both
        ax.annotate(f"{100 * value:.1f}%", (end, y), xytext=(5, 0), textcoords="offset points", va="center",
                    weight="bold", fontsize=8.5)  # fmt: skip
        if row.get("chance") is not None:
            ax.plot([row["chance"]] * 2, [y - 0.4, y + 0.4], color=INK, linewidth=1.4)
    ax.set_yticks(range(len(rows)), [short(name, 34) for name in rows], color=INK)
    ax.set(xlim=(0, 1.12), ylim=(len(rows) - 0.4, -0.6), xticks=(0, 0.25, 0.5, 0.75, 1))
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.grid(axis="x")
    ax.grid(visible=False, axis="y")
    return figure
