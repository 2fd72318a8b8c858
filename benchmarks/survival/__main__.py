"""The table of faults; see the package."""

import argparse
import datetime
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks._measure import machine
from benchmarks._report import BEGIN, END, markdown
from benchmarks.survival import disks, files, hosts, kills, signals, stalls, starts  # noqa: F401 - they register
from benchmarks.survival.kills import ROOT
from benchmarks.survival.lab import Lab
from benchmarks.survival.registry import KINDS, LOST, WELL, Fault, chosen
from jaxcl.runtime import storage
from jaxcl.train import run_folder

PAGE = ROOT / "docs" / "survival.md"
PACKAGES = ("jaxcl", "jax", "jaxlib", "orbax-checkpoint", "flax", "optax", "numpy")
Found = dict[str, dict[str, Any]]  # entries by name of the fault


def record(lab: Lab, fault: Fault, rounds: int) -> dict[str, Any]:
    """Try one fault; -> its entry in the JSON file."""
    begun, tried, odd = time.monotonic(), [], []
    for trial in fault.tries(lab, rounds):
        tried.append(trial.outcome)
        if trial.outcome != WELL:
            odd.append(trial._asdict())
            print(f"  {trial.what}: {trial.outcome}: {trial.said}", flush=True)
    return {
        "about": fault.about,
        "tried": len(tried),
        "well": tried.count(WELL),
        "lost": tried.count(LOST),
        "odd": odd,
        "rounds": rounds,
        "seed": lab.seed,
        "seconds": round(time.monotonic() - begun, 1),
        "date": datetime.date.today().isoformat(),
        "machine": machine(PACKAGES),
        "commit": run_folder.environment({})["commit"],
    }


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: the sums of each kind, one line a fault, and what was not answered well."""
    head = ("tried", "answered well", "lost")

    def cells(entries: Iterable[Mapping[str, Any]]) -> list[str]:
        entries = list(entries)
        return [f"{sum(e[k] for e in entries)}" for k in ("tried", "well", "lost")]

    kinds = {kind: [e for n, e in found.items() if n.partition(":")[0] == kind] for kind in KINDS}
    sums = [[KINDS[kind], *cells(entries)] for kind, entries in kinds.items() if entries]
    each = [[e["about"], *cells([e])] for e in found.values()]
    odd = [o for e in found.values() for o in e["odd"]]
    said = {
        ", ".join(f"{k} {v}" if k not in ("processor", "memory") else v for k, v in e["machine"].items())
        for e in found.values()
    }
    dates, commits = (sorted({e[k] for e in found.values()}) for k in ("date", "commit"))
    return "\n\n".join(
        [
            f"{' to '.join(sorted({dates[0], dates[-1]}))}, commits {', '.join(commits)}; {'; '.join(sorted(said))}.",
            markdown(("kind", *head), [*sums, ["**all**", *cells(found.values())]]),
            markdown(("fault", *head), each),
            "\n".join(f"* {o['what']} ({o['outcome']}): {o['said']}" for o in odd) or "Nothing was answered badly.",
        ]
    )


def write_page(text: str) -> None:
    """Put the table into docs/survival.md."""
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    storage.write_whole(PAGE, f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}")


def _read(paths: str) -> Found:
    """The entries of some files, separated by commas; of two with the same name, the later one."""
    found: Found = {}
    for path in filter(None, paths.split(",")):
        if os.path.exists(path):
            found |= json.loads(pathlib.Path(path).read_text())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.survival", description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", default="", help="kinds or names of faults, separated by commas; default: all")
    parser.add_argument("--rounds", type=int, default=1, help="of faults at random moments")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after them, no further fault is tried")
    parser.add_argument("--kills", type=int, default=0, help="default: twelve a round")
    parser.add_argument("--devices", default="1,2,4", help="fake CPU devices of the kills, at most 8")
    parser.add_argument("--steps", type=int, default=48, help="updates of the run that is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn moments; the progress of processes varies")
    parser.add_argument("--out", default="", help="a folder that keeps faults.json, run folders and logs")
    parser.add_argument(
        "--json", default="", help="the results, instead of OUT/faults.json; what it has is not repeated"
    )
    parser.add_argument("--markdown", action="store_true", help="only print the table of --json: one file, or A,B,...")
    parser.add_argument("--write_docs", action="store_true", help="put the table into docs/survival.md, too")
    given = parser.parse_args()
    kept = given.json or (os.path.join(given.out, "faults.json") if given.out else "")
    found, begun = _read(kept), time.monotonic()
    faults = chosen(given.kinds)
    if not given.markdown:
        with tempfile.TemporaryDirectory() as temporary:
            lab = Lab(pathlib.Path(given.out or temporary).resolve(), given.seed)
            lab.kills, lab.steps = given.kills, given.steps
            lab.devices = tuple(int(n) for n in given.devices.split(","))
            lab.out.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(lab.out / "trials", ignore_errors=True)  # of an earlier call
            try:
                for fault in faults:
                    if fault.name in found or time.monotonic() - begun > given.seconds:
                        continue
                    print(f"{fault.name}: {fault.about}", flush=True)
                    entry = found[fault.name] = record(lab, fault, given.rounds)
                    print(f"  tried {entry['tried']}, well {entry['well']}, lost {entry['lost']}", flush=True)
                    if kept:
                        storage.write_whole(kept, json.dumps(found, indent=1) + "\n")
            finally:
                lab.close()
    these = {f.name: found[f.name] for f in faults if f.name in found}
    if left := [f.name for f in faults if f.name not in found]:
        print(f"not tried: {', '.join(left)}")
    if not these:
        return 0
    print("\n" + table(these))
    if given.write_docs:
        write_page(table(these))
    return int(any(f["well"] < f["tried"] for f in these.values()))


if __name__ == "__main__":
    os.nice(10)
    sys.exit(main())
