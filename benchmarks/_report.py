"""Tables in markdown and the figure of benchmarks/losses.py, for the terminal and for docs/losses.md."""

import os
import pathlib
import statistics
from collections.abc import Iterable

from benchmarks._contestants import flops_of_three_matmuls
from benchmarks._measure import duration, figures, size

BEGIN, END = "<!-- benchmark table -->", "<!-- end of benchmark table -->"


# ---- numbers


def seconds_of(entries: dict, key: str) -> dict[str, float]:
    """{round: seconds} of a contestant, or of the contestant with the same program."""
    entry = entries.get(key)
    if entry is None:
        return {}
    return entries[entry["same_as"]]["seconds"] if entry["same_as"] else entry["seconds"]


def ratio(entries: dict, key: str, reference: dict[str, float]) -> float | None:
    """Median over rounds of the time of this contestant over that of the reference in the same round."""
    pairs = [(s, reference[r]) for r, s in seconds_of(entries, key).items() if r in reference]
    return statistics.median(a / b for a, b in pairs) if pairs else None


def resident_of(state: dict, rows: str, key: str) -> int | None:
    key = state["sizes"][rows]["entries"][key]["same_as"] or key
    return state["memory"].get(key, {"resident": {}})["resident"].get(rows)


def floor_of(measured: dict, rows: str, dim: int) -> dict[str, float]:
    """{round: seconds of three matmuls at the rate of the large matmul in that round}."""
    flops = flops_of_three_matmuls(int(rows), dim)
    return {str(r): flops / rate for r, rate in enumerate(measured["rate"])}


# ---- tables


def markdown(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    head = list(head)
    rows = [head, ["---"] + ["---:"] * (len(head) - 1), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def text(state: dict, names: dict[str, str]) -> str:
    """All measurements as markdown."""
    settings, sizes = state["settings"], state["sizes"]
    losses = [key for key in names if key != "matmuls"]
    words = ", ".join(f"{v}" if k == "processor" else f"{k} {v}" for k, v in settings["machine"].items())
    apart = [f"{a:.0e}" for m in sizes.values() for a in [max(m["agreement"].values(), default=0.0)] if a]
    rates = [r for m in sizes.values() for r in m["rate"]]

    def time_cell(rows, key):
        entries = sizes[rows]["entries"]
        seconds = seconds_of(entries, key)
        if not seconds:
            return entries[key]["skipped"]
        over = None if key in ("plain", "matmuls") else ratio(entries, key, seconds_of(entries, "plain"))
        return duration(statistics.median(seconds.values())) + ("" if over is None else f" ({figures(over)})")

    def memory_cell(rows, key):
        entry = sizes[rows]["entries"][key]
        if not seconds_of(sizes[rows]["entries"], key):
            return entry["skipped"]
        resident, xla = resident_of(state, rows, key), None if key.startswith("pml") else entry["need"]
        return " / ".join("-" if x is None else size(x) for x in (resident, xla))

    parts = [
        f"Machine: {words}. Load average at the start and the end: "
        + ", ".join(f"{x:.1f}" for x in state["load"])
        + f". D = {settings['dim']}, temperature 0.1, float32, value and gradient. A matmul of 2,048 x 2,048 x 2,048 "
        f"ran at {figures(min(rates) / 1e9)} to {figures(max(rates) / 1e9)} GFLOP/s.",
        "Implementations of one loss agreed at every size, in value and gradient, to a relative difference of at most "
        + (max(apart, key=float) if apart else "0")
        + ".",
        "**Time**, median of the rounds; in brackets the median ratio to the plain dense SupCon of the same round:",
        markdown(["rows", *names.values()], [[f"{int(n):,}", *(time_cell(n, key) for key in names)] for n in sizes]),
        "**Memory**: the largest rise of the resident memory of the process (including the gradient; one run, in its "
        "own process) / XLA's temporaries, known before running (without the gradient; torch has no such number). "
        "These are different measures; compare libraries by the first:",
        markdown(["rows", *names.values()], [[f"{int(n):,}", *(memory_cell(n, key) for key in names)] for n in sizes]),
        "<details><summary>Rounds, and ratios to matrix multiplication</summary>",
        "Three matmuls are z z', s z and s' z, those of the dense form: timed in the same round if N x N fits, and "
        "computed from the rate of the large matmul in that round.",
        markdown(
            ["rows", "loss", "time", "rounds", "/ plain", "/ three matmuls", "/ computed"],
            [long_line(state, n, key, names) for n in sizes for key in losses],
        ),
        "</details>",
    ]
    return "\n\n".join(parts)


def long_line(state: dict, rows: str, key: str, names: dict[str, str]) -> list[str]:
    measured = state["sizes"][rows]
    entries = measured["entries"]
    seconds = seconds_of(entries, key)
    start = [
        f"{int(rows):,}",
        names[key] + (f" (the program of {names[entries[key]['same_as']]})" if entries[key]["same_as"] else ""),
    ]
    if not seconds:
        return [*start, entries[key]["skipped"], *[""] * 4]
    references = (
        seconds_of(entries, "plain"),
        seconds_of(entries, "matmuls"),
        floor_of(measured, rows, state["settings"]["dim"]),
    )
    ratios = [ratio(entries, key, reference) for reference in references]
    return [
        *start,
        duration(statistics.median(seconds.values())),
        str(len(seconds)),
        *("" if r is None else figures(r) for r in ratios),
    ]


def write_docs(state: dict, names: dict[str, str], path: pathlib.Path, figure: pathlib.Path | None = None) -> None:
    """Writes the figure and the tables between the two markers of the page. Errors: SystemExit without markers."""
    page = path.read_text()
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise SystemExit(f"{path}: expected one {BEGIN} and one {END} after it")
    before, rest = page.split(BEGIN)
    body = text(state, names)
    if figure is not None:
        link = pathlib.Path(os.path.relpath(figure, path.parent)).as_posix()
        body = f"![Time and memory of each loss against the number of rows]({link})\n\n{body}"
    path.write_text(f"{before}{BEGIN}\n\n{body}\n\n{END}{rest.split(END)[1]}")


# ---- figure


def draw(state: dict, names: dict[str, str], path: pathlib.Path) -> None:
    """Draws time and memory against the number of rows, log-log, with a name at the end of each line; .svg or .png."""
    import matplotlib
    from matplotlib.ticker import FuncFormatter, NullLocator

    from jaxcl.report import style

    looks = {
        "matmuls": (style.MUTED, ":"),
        "plain": (style.INK, "-"),
        "supcon_tiled": (style.BLUE, "-"),
        "pml_supcon": (style.VERMILLION, "-"),
        "nt_xent_tiled": (style.GREEN, "--"),
        "optax_ntxent": (style.ORANGE, "--"),
        "pml_ntxent": (style.PURPLE, "--"),
    }
    sizes = state["sizes"]
    shown = [key for key in looks if key in names]

    def time(rows, key):
        seconds = seconds_of(sizes[rows]["entries"], key)
        return statistics.median(seconds.values()) * 1e3 if seconds else None

    def memory(rows, key):
        resident = resident_of(state, rows, key)
        return resident / 2**20 if resident else None

    with style.style():
        matplotlib.rcParams.update({"svg.hashsalt": "jaxcl", "axes.grid.axis": "both"})
        figure = style.new_figure(5.0)
        panels = figure.subplots(1, 2)
        titles = ("Time of value and gradient, ms", "Rise of resident memory at the peak, MiB")
        for axes, title, number in zip(panels, titles, (time, memory), strict=True):
            axes.set(xscale="log", yscale="log", title=title, xlabel="rows (images x 2 views)")
            ends = []
            for key in shown:
                points = [(int(n), y) for n in sizes if (y := number(n, key))]
                if not points:
                    continue
                color, line = looks[key]
                wide = 2.6 if key == "supcon_tiled" else 1.6
                axes.plot(*zip(*points, strict=True), line, color=color, linewidth=wide, marker="o", markersize=2.5)
                ends.append((*points[-1], names[key], color))
            ticks = [int(n) for n in sizes]
            # Space on the right for the names of lines that reach the largest size.
            axes.set_xlim(ticks[0] / 1.15, ticks[-1] * max(4.0, (ticks[-1] / ticks[0]) ** 0.45))
            shown_ticks = ticks[:: max(1, -(-len(ticks) // 5))]
            axes.set_xticks(shown_ticks, [f"{n:,}" for n in shown_ticks])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.10g}"))
            axes.margins(y=0.1)
            if number is memory:
                budget = state["settings"]["memory_budget"]
                axes.axhline(budget / 2**20, color=style.MUTED, linewidth=0.8)
                axes.annotate(
                    f"above {size(budget).replace('.00', '')}: not run",
                    (1, budget / 2**20),
                    (0, 3),
                    xycoords=("axes fraction", "data"),
                    textcoords="offset points",
                    ha="right",
                    color=style.MUTED,
                    fontsize=8,
                )
            if ends:
                name_ends(figure, axes, ends)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(path, metadata=metadata)


def name_ends(figure, axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Writes the name of each line beside its last point, or above it if other lines continue; names do not overlap."""
    placed = []
    last = max(x for x, *_ in ends)
    figure.draw_without_rendering()
    for x, y, name, color in sorted(ends):
        left = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))[0] < 0.25
        where, side = ((6, 0), "left") if x == last else ((-6, 9), "left") if left else ((4, 9), "right")
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.5}
        label = axes.annotate(
            name, (x, y), where, textcoords="offset points", va="center", ha=side, color=color, fontsize=8, bbox=box
        )
        for _ in range(60):
            extent = label.get_window_extent()
            if not any(extent.overlaps(other) for other in placed):
                break
            label.xyann = (where[0], label.xyann[1] + 2)
        placed.append(label.get_window_extent())
