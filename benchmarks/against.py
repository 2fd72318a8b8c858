"""Losses and attacks of this copy of jaxcl against those of another copy, such as an older commit, in one run.

    git worktree add --detach /tmp/before COMMIT
    python -m benchmarks.against /tmp/before [--starts=5] [--rounds=9] [--only=REGEX] [--out=FILE.json] [--write_docs]

Three processes, each on one core: this copy, the other one, and the other one once more, which tells how much two
equal programs differ here. Where a process lays its arrays may cost some tasks half as much again, so all of them are
started anew several times. A round asks each of them in turn for a burst of each task, so what else the machine does
meets all of them. A burst counts the CPU time of its process, which the work of others hardly changes. Ratios are taken
round by round; the table has their median with quartiles, and the ratio of the shortest bursts.
"""

import argparse
import datetime
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
from typing import Any

from benchmarks._measure import ROOT, machine
from benchmarks._report import markdown
from jaxcl.runtime import storage

TASKS = ROOT / "benchmarks" / "_against_tasks.py"
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- table of two copies -->", "<!-- end of table of two copies -->"
# {task: {"this", "other", "again": CPU seconds of a call, by round}}
Times = dict[str, dict[str, list[float]]]
START = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"


class Copy:
    """A process that runs the tasks of one copy."""

    def __init__(self, tree: pathlib.Path, core: int):
        self._process = subprocess.Popen(
            [sys.executable, "-c", START, str(TASKS), str(core)],
            cwd=tree,
            env=os.environ | {"PYTHONPATH": str(tree), "JAX_PLATFORMS": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, task: str, seconds: float) -> Any:
        """The CPU seconds of a call in a burst of some seconds; for "tasks", their names."""
        self._process.stdin.write(json.dumps([task, seconds]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"a process ended, exit code {self._process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def measure(other: pathlib.Path, starts: int, rounds: int, seconds: float, only: str) -> Times:
    """The rounds of all starts, one after the other."""
    found: Times = {}
    for _ in range(starts):
        for task, times in _measured(other, rounds, seconds, only).items():
            known = found.setdefault(task, {name: [] for name in times})
            for name, values in times.items():
                known[name] += values
    return found


def _measured(other: pathlib.Path, rounds: int, seconds: float, only: str) -> Times:
    core = max(os.sched_getaffinity(0))
    copies = {"this": Copy(ROOT, core), "other": Copy(other, core), "again": Copy(other, core)}
    names = [t for t in copies["this"].ask("tasks", 0) if re.search(only, t)]
    found = {task: {name: [] for name in copies} for task in names}
    for task in names:
        for copy in copies.values():
            copy.ask(task, seconds)  # compiles, and finds how many calls a burst has
    for r in range(rounds):
        order = list(copies)
        for task in names:
            for name in order[r % 3 :] + order[: r % 3]:
                found[task][name].append(copies[name].ask(task, seconds))
    for copy in copies.values():
        copy.close()
    return found


def ratios(found: dict[str, list[float]], name: str) -> dict[str, float]:
    """One copy over the other one: median and quartiles of the rounds' ratios, and the ratio of the minima."""
    each = [a / b for a, b in zip(found[name], found["other"], strict=True)]
    low, median, high = statistics.quantiles(each, n=4)
    return {"median": median, "low": low, "high": high, "least": min(found[name]) / min(found["other"])}


def table(state: dict[str, Any]) -> str:
    """Markdown: what was compared, and one line for each task."""
    lines = []
    for task, times in state["times"].items():
        new, control = (ratios(times, name) for name in ("this", "again"))
        cells = [f"{r['median']:.3f} ({r['low']:.3f} to {r['high']:.3f})" for r in (new, control)]
        lines.append([task, f"{min(times['other']) * 1e6:,.0f} us", cells[0], f"{new['least']:.3f}", cells[1]])
    about = ", ".join(v if k in ("processor", "memory") else f"{k} {v}" for k, v in state["machine"].items())
    first, last = state["load"]
    head = f"{state['date']}, commit {state['this']} against {state['other']}; "
    head += f"{state['starts']} starts of {state['rounds']} rounds; {about}; load average {first:.1f} to {last:.1f}."
    columns = ("task", "before, least", "after / before", "of the least", "before / before")
    return f"{head}\n\n{markdown(columns, lines)}"


def commit(tree: pathlib.Path) -> str:
    git = ["git", "-C", str(tree), "describe", "--always", "--dirty", "--abbrev=7"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.against", description=__doc__.splitlines()[0])
    parser.add_argument("other", type=pathlib.Path, help="folder of the other copy, a clone or a worktree")
    parser.add_argument("--starts", type=int, default=5, help="of all processes")
    parser.add_argument("--rounds", type=int, default=9, help="of each start")
    parser.add_argument("--seconds", type=float, default=0.05, help="of a burst")
    parser.add_argument("--only", default="", help="a regular expression for the tasks")
    parser.add_argument("--out", type=pathlib.Path, help="JSON of all bursts")
    parser.add_argument("--write_docs", action="store_true", help="put the table into docs/benchmarks.md")
    given = parser.parse_args()
    load = os.getloadavg()[0]
    state = {
        "date": datetime.date.today().isoformat(),
        "this": commit(ROOT),
        "other": commit(given.other),
        "starts": given.starts,
        "rounds": given.rounds,
        "machine": machine(("jax", "jaxlib")),
    }
    state["times"] = measure(given.other.resolve(), given.starts, given.rounds, given.seconds, given.only)
    state["load"] = [load, os.getloadavg()[0]]
    if given.out:
        storage.write_whole(given.out, json.dumps(state) + "\n")
    print(table(state))
    if given.write_docs:
        page = PAGE.read_text()
        before, rest = page.split(BEGIN)
        storage.write_whole(PAGE, f"{before}{BEGIN}\n\n{table(state)}\n\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
