"""The table of `python -m benchmarks.run`: its rows, their ratios, the file of a release, the comparison with one.

A part of the table is a module with

    TITLE: str                                        # what is measured, one line
    NOTE: str                                         # how, and what contestants do otherwise; "" for nothing to say
    def rows(settings: Settings) -> list[Row]: ...    # measured when called; may take minutes

named in `run.PARTS`. Rows of one `task` are compared with each other: its first row with `ours` is the reference.
Round r of every row of a task must have been measured in the same sweep over the contestants, because ratios are taken
round by round. A contestant that is not there, or cannot do the task, is a row with `left_out` and no values, never an
error. `benchmarks._paired` measures contestants in processes of their own; a module that needs it differently may do
without.
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
    """What a part is asked for."""

    rounds: int = 5
    seconds: float = 0.5  # a measurement lasts at least so long: short calls are repeated
    quick: bool = False  # toy sizes, to see that it works: seconds in all
    note: Callable[[str], None] = lambda text: None  # progress, in words


@dataclasses.dataclass(frozen=True)
class Row:
    """One contestant at one task."""

    task: str  # "32 px, batch 512": what is done, the same for all that are compared
    contestant: str
    unit: str  # of the values; more is better where it ends in "/s", less where it does not
    values: tuple[float, ...] = ()  # one a round
    ours: bool = False
    differs: str = ""  # what it does otherwise than the reference, in a few words
    left_out: str = ""  # why there are no values
    needs: tuple[float, ...] = ()  # of our row: (FLOPs, bytes) of a unit of the task's work at least, see `_floor`
    peaks: tuple[tuple[float, float], ...] = ()  # of our row: the machine's (FLOPs, bytes) a second, one a round

    def speeds(self) -> tuple[float, ...]:
        """More is better."""
        return self.values if self.unit.endswith("/s") else tuple(1 / v for v in self.values)


# ---- ratios


def tasks_of(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """{task: its rows}, in the order of the first of each."""
    out: dict[str, list[Row]] = {}
    for row in rows:
        out.setdefault(row.task, []).append(row)
    return out


def reference(rows: Iterable[Row]) -> Row | None:
    """The row that the others of its task are compared with; None if it was not measured."""
    return next((row for row in rows if row.ours and row.values), None)


def times_as_fast(of: Row, than: Row) -> list[float]:
    """Speed of one over speed of the other, round by round."""
    return [a / b for a, b in zip(of.speeds(), than.speeds(), strict=True)]


def ahead(row: Row, rows: Iterable[Row]) -> float | None:
    """How many times as fast as this row the reference of its task is: median over rounds; above 1, we are ahead."""
    ours = reference(rows)
    if ours is None or not row.values or row is ours:
        return None
    return statistics.median(times_as_fast(ours, row))


# ---- floors


def floors(row: Row) -> tuple[float, ...]:
    """The row's values if the task took what it needs at the machine's rates, one a round; () if it is not counted."""
    scale = {"ms": 1e3, "s": 1.0}.get(row.unit)
    seconds = [max(n / p for n, p in zip(row.needs, peaks, strict=True)) for peaks in row.peaks]
    return tuple(s * scale if scale else 1 / s for s in seconds)


def over_floor(row: Row, rows: Iterable[Row]) -> float | None:
    """How many times as long as its task's floor a row takes: median over rounds."""
    ours = reference(rows)
    if ours is None or not row.values or not (at := floors(ours)):
        return None
    at = at if ours.unit.endswith("/s") else tuple(1 / v for v in at)
    return statistics.median(f / s for f, s in zip(at, row.speeds(), strict=True))


# ---- in words


def value(row: Row) -> str:
    """The median, with its unit; or why there is none."""
    return row.left_out or f"{figures(statistics.median(row.values))} {row.unit}"


def text(parts: Mapping[str, Any], then: Mapping[str, Any] | None, same_machine: bool) -> str:
    """The tables of all parts. parts: {name: part}, as `part_of` makes them; then: the same of the release before."""
    out = []
    for name, part in parts.items():
        rows = rows_of(part)
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
        out += [f"### {part['title']}", _when(part), *([part["note"]] if part["note"] else []), markdown(head, lines)]
        out += [_floors_table(counted)] if counted else []
    return "\n\n".join(out)


_ONE = {"images/s": "an image", "images x steps/s": "an image's step", "queries/s": "a query"}


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
    return markdown(["task", "needs at least", "the machine gives", "bound by", "its floor"], lines)


def scaled(x: float) -> str:
    """12300000.0 -> "12.3 M"."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= factor:
            return f"{figures(x / factor)} {prefix}"
    return f"{x:.0f} "


def _named(row: Row) -> str:
    name = f"**{row.contestant}**" if row.ours else row.contestant
    return f"{name}: {row.differs}" if row.differs else name


def _when(part: Mapping[str, Any]) -> str:
    low, high = part["load"]
    return f"{part['rounds']} rounds on {part['date']}, load average {low:.1f} to {high:.1f}, commit {part['commit']}."


# ---- releases


def part_of(rows: Iterable[Row], **about: Any) -> dict[str, Any]:
    """A part as it is stored."""
    return about | {"rows": [dataclasses.asdict(row) for row in rows]}


def rows_of(part: Mapping[str, Any]) -> list[Row]:
    return [Row(**{k: _tuple(v) for k, v in row.items()}) for row in part.get("rows", ())]


def _tuple(x: Any) -> Any:
    return tuple(map(_tuple, x)) if isinstance(x, list) else x


def last_release(folder: pathlib.Path = RELEASES) -> pathlib.Path | None:
    """The file of the highest version."""
    files = [(_version(path.stem), path) for path in folder.glob("*.json")]
    return max(files)[1] if files else None


def _version(name: str) -> tuple[int, ...]:
    return tuple(int(number) if number.isdigit() else -1 for number in name.split("."))


def store(path: pathlib.Path, machine: Mapping[str, str], parts: Mapping[str, Any]) -> None:
    """Writes the parts into a release's file; what was stored for it on the same machine stays where nothing is new."""
    kept = json.loads(path.read_text()) if path.exists() else {"machine": dict(machine), "parts": {}}
    words = machine.keys() | kept["machine"].keys()
    if other := sorted(key for key in words if machine.get(key) != kept["machine"].get(key)):
        raise SystemExit(
            f"{path.name} was measured on another machine or with other packages ({', '.join(other)}); "
            "remove it to begin it again here"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    release = {"version": path.stem, "machine": dict(machine), "parts": {**kept["parts"], **parts}}
    path.write_text(json.dumps(release, indent=1) + "\n")


def to_last(row: Row, entries: list[Row], old: Mapping[tuple[str, str], Row], same_machine: bool) -> float | None:
    """How this row stands to the last release: above 1 is better now.

    On the same machine: its speed then and now. On another, a row of ours says nothing by itself; of a peer's row it is
    how far we are ahead of it now, over how far then.
    """
    before = old.get((row.task, row.contestant))
    if before is None or not before.values or not row.values:
        return None
    if same_machine:
        return statistics.median(row.speeds()) / statistics.median(before.speeds())
    then, now = ahead(before, [r for (task, _), r in old.items() if task == row.task]), ahead(row, entries)
    return now / then if now and then else None
