"""The table of `python -m benchmarks.run`: its rows and ratios, the file of a release, and the comparison with it.

A section of the table is a module, named in `run.SECTIONS`, with

    TITLE: str                                        # of the section, one line
    NOTE: str                                         # the method, and differences between contestants; may be ""
    def rows(settings: Settings) -> list[Row]: ...    # measures when called; may take minutes

Rows of one `task` are compared; its first row with `ours` is the reference. Ratios are taken round by round, so round r
of all rows of a task must come from the same sweep over the contestants. A contestant that is not installed, or cannot
do the task, is not an error but a row with `left_out` and no values. Most modules measure with `benchmarks._paired`.
"""

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from benchmarks._measure import ROOT, figures
from benchmarks._report import markdown

RELEASES = ROOT / "benchmarks" / "releases"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of a measurement."""

    rounds: int = 5
    seconds: float = 0.5  # least duration of a measurement; short calls are repeated
    quick: bool = False  # toy sizes, to check that it works within seconds
    note: Callable[[str], None] = lambda text: None  # progress, in words


@dataclasses.dataclass(frozen=True)
class Row:
    """One contestant at one task."""

    task: str  # such as "32 px, batch 512"; rows of one task are compared
    contestant: str
    unit: str  # of the values; more is better if it ends in "/s", else less is better
    values: tuple[float, ...] = ()  # one per round
    ours: bool = False
    differs: str = ""  # differences from the reference, in a few words
    left_out: str = ""  # the reason if there are no values
    needs: tuple[float, ...] = ()  # of our row: least (FLOPs, bytes) per unit of work, see `_floor`
    peaks: tuple[tuple[float, float], ...] = ()  # of our row: (FLOPs, bytes) per second of the machine, one per round

    def speeds(self) -> tuple[float, ...]:
        """Values for which more is better."""
        return self.values if self.unit.endswith("/s") else tuple(1 / v for v in self.values)


# ---- ratios


def tasks_of(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """{task: its rows}, in the order of the first of each."""
    out: dict[str, list[Row]] = {}
    for row in rows:
        out.setdefault(row.task, []).append(row)
    return out


def reference(rows: Iterable[Row]) -> Row | None:
    """The row with which the others of its task are compared; None if it was not measured."""
    return next((row for row in rows if row.ours and row.values), None)


def times_as_fast(of: Row, than: Row) -> list[float]:
    """Speed of one over speed of the other, round by round."""
    return [a / b for a, b in zip(of.speeds(), than.speeds(), strict=True)]


def ahead(row: Row, rows: Iterable[Row]) -> float | None:
    """Speed of the reference over the speed of this row, median over rounds; above 1, jaxcl is faster."""
    ours = reference(rows)
    if ours is None or not row.values or row is ours:
        return None
    return statistics.median(times_as_fast(ours, row))


# ---- floors


def floors(row: Row) -> tuple[float, ...]:
    """The values of the row if the task ran at the rates of the machine, one per round; () if needs are not counted."""
    scale = {"ms": 1e3, "s": 1.0}.get(row.unit)
    seconds = [max(n / p for n, p in zip(row.needs, peaks, strict=True)) for peaks in row.peaks]
    return tuple(s * scale if scale else 1 / s for s in seconds)


def over_floor(row: Row, rows: Iterable[Row]) -> float | None:
    """Time of a row over the floor of its task, median over rounds."""
    ours = reference(rows)
    if ours is None or not row.values or not (at := floors(ours)):
        return None
    at = at if ours.unit.endswith("/s") else tuple(1 / v for v in at)
    return statistics.median(f / s for f, s in zip(at, row.speeds(), strict=True))


# ---- in words


def value(row: Row) -> str:
    """The median with its unit, or the reason why there is none."""
    return row.left_out or f"{figures(statistics.median(row.values))} {row.unit}"


def text(parts: Mapping[str, Any], then: Mapping[str, Any] | None, same_machine: bool) -> str:
    """The tables of all sections. parts: {name: section}, from `section_of`; then: the sections of the last release."""
    out = []
    for name, section in parts.items():
        rows = rows_of(section)
        old = {(row.task, row.contestant): row for row in rows_of((then or {}).get(name, {}))}
        counted = [row for row in rows if row.needs]
        head = ["task", "contestant", "median", "jaxcl is times as fast", "rounds"]
        head += ["times its floor"] * bool(counted) + ["to the last"] * bool(then)
        lines = []
        for task, entries in tasks_of(rows).items():
            for i, row in enumerate(entries):
                ratio = ahead(row, entries)
                ratios = times_as_fast(reference(entries), row) if ratio else []
                spread = f"{figures(min(ratios))} to {figures(max(ratios))}" if ratios else ""
                cells = ["" if i else task, _named(row), value(row), figures(ratio) if ratio else "", spread]
                if counted:
                    times = over_floor(row, entries)
                    cells.append("" if times is None else figures(times))
                if then:
                    change = to_last(row, entries, old, same_machine)
                    cells.append("" if change is None else figures(change))
                lines.append(cells)
        out += [
            f"### {section['title']}",
            _when(section),
            *([section["note"]] if section["note"] else []),
            markdown(head, lines),
        ]
        out += [_floors_table(counted)] if counted else []
    return "\n\n".join(out)


_ONE = {"images/s": "an image", "images x steps/s": "a step of an image", "queries/s": "a query"}


def _floors_table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        flops, moved = row.needs
        peaks = [statistics.median(p) for p in zip(*row.peaks, strict=True)]
        bound = "products" if flops / peaks[0] > moved / peaks[1] else "memory"
        each = _ONE.get(row.unit, "a call")
        lines.append(
            [
                row.task,
                f"{scaled(flops)}FLOP, {scaled(moved)}B for {each}",
                f"{scaled(peaks[0])}FLOP/s, {scaled(peaks[1])}B/s",
                bound,
                f"{figures(statistics.median(floors(row)))} {row.unit}",
            ]
        )
    return markdown(["task", "needs at least", "rates of the machine", "bound by", "floor"], lines)


def scaled(x: float) -> str:
    """12300000.0 -> "12.3 M"."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= factor:
            return f"{figures(x / factor)} {prefix}"
    return f"{x:.0f} "


def _named(row: Row) -> str:
    name = f"**{row.contestant}**" if row.ours else row.contestant
    return f"{name}: {row.differs}" if row.differs else name


def _when(section: Mapping[str, Any]) -> str:
    low, high = section["load"]
    load = f"load average {low:.1f} to {high:.1f}"
    return f"{section['rounds']} rounds on {section['date']}, {load}, commit {section['commit']}."


# ---- releases


def section_of(rows: Iterable[Row], **about: Any) -> dict[str, Any]:
    """A section in the form that is stored."""
    return about | {"rows": [dataclasses.asdict(row) for row in rows]}


def rows_of(section: Mapping[str, Any]) -> list[Row]:
    return [Row(**{k: _tuple(v) for k, v in row.items()}) for row in section.get("rows", ())]


def _tuple(x: Any) -> Any:
    return tuple(map(_tuple, x)) if isinstance(x, list) else x


def last_release(folder: pathlib.Path = RELEASES) -> pathlib.Path | None:
    """The file of the highest version."""
    files = [(_version(path.stem), path) for path in folder.glob("*.json")]
    return max(files)[1] if files else None


def _version(name: str) -> tuple[int, ...]:
    return tuple(int(number) if number.isdigit() else -1 for number in name.split("."))


def store(path: pathlib.Path, machine: Mapping[str, str], parts: Mapping[str, Any]) -> None:
    """Writes sections into the file of a release, which keeps its others. Errors: SystemExit on another machine."""
    kept = json.loads(path.read_text()) if path.exists() else {"machine": dict(machine), "parts": {}}
    words = machine.keys() | kept["machine"].keys()
    if other := sorted(key for key in words if machine.get(key) != kept["machine"].get(key)):
        raise SystemExit(
            f"{path.name} was measured on another machine or with other packages ({', '.join(other)}); "
            "remove it to start again here"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    release = {"version": path.stem, "machine": dict(machine), "parts": {**kept["parts"], **parts}}
    path.write_text(json.dumps(release, indent=1) + "\n")


def to_last(row: Row, entries: list[Row], old: Mapping[tuple[str, str], Row], same_machine: bool) -> float | None:
    """The change since the last release; above 1 is better.

    On the same machine: speed now over speed then. On another machine, for the row of a peer: how many times as fast as
    the peer jaxcl is now, over the same number then; None for our rows.
    """
    before = old.get((row.task, row.contestant))
    if before is None or not before.values or not row.values:
        return None
    if same_machine:
        return statistics.median(row.speeds()) / statistics.median(before.speeds())
    then, now = ahead(before, [r for (task, _), r in old.items() if task == row.task]), ahead(row, entries)
    return now / then if now and then else None
