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
        head = ["task", "contestant", "median", "jaxcl is times as fast", "rounds", *(["to the last"] if then else [])]
        lines = []
        for task, entries in tasks_of(rows).items():
            for i, row in enumerate(entries):
                ratio = ahead(row, entries)
                ratios = times_as_fast(reference(entries), row) if ratio else []
                spread = f"{figures(min(ratios))} to {figures(max(ratios))}" if ratios else ""
                cells = ["" if i else task, _named(row), value(row), figures(ratio) if ratio else "", spread]
                if then:
                    change = to_last(row, entries, old, same_machine)
                    cells.append("" if change is None else figures(change))
                lines.append(cells)
        out += [f"### {part['title']}", _when(part), *([part["note"]] if part["note"] else []), markdown(head, lines)]
    return "\n\n".join(out)


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
    return [Row(**{**row, "values": tuple(row["values"])}) for row in part.get("rows", ())]


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
