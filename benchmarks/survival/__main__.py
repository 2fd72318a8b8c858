"""The table of faults; see the package."""

import argparse
import datetime
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from benchmarks._measure import ROOT, machine
from benchmarks.survival import disks, files, hosts, kills, signals, stalls, starts  # noqa: F401 - they register
from benchmarks.survival.lab import Lab
from benchmarks.survival.registry import LOST, WELL, Fault, chosen
from jaxcl.runtime import storage


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
        "seconds": round(time.monotonic() - begun, 1),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
    }


def commit() -> str:
    """The commit of this copy, and whether it was changed."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: one line a fault, their sum, and what was not answered well."""
    lines = ["| fault | tried | answered well | lost |", "|---|---|---|---|"]
    lines += [f"| {f['about']} | {f['tried']} | {f['well']} | {f['lost']} |" for f in found.values()]
    sums = [sum(f[k] for f in found.values()) for k in ("tried", "well", "lost")]
    lines += [f"| **all** | {sums[0]} | {sums[1]} | {sums[2]} |"]
    odd = [o for f in found.values() for o in f["odd"]]
    return "\n".join([*lines, *(f"\n* {o['what']} ({o['outcome']}): {o['said']}" for o in odd)])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.survival", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="names or kinds of faults, separated by commas; default: all")
    parser.add_argument("--rounds", type=int, default=2, help="of faults at random moments")
    parser.add_argument("--kills", type=int, default=0, help="default: three a round")
    parser.add_argument("--devices", default="1,2,4", help="fake CPU devices of the kills, at most 8")
    parser.add_argument("--steps", type=int, default=96, help="updates of the run that is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn moments; the progress of processes varies")
    parser.add_argument("--out", default="", help="a folder that keeps run folders and logs")
    parser.add_argument("--json", default="", help="file of the results; faults that it has are not tried again")
    parser.add_argument("--table", action="store_true", help="only print the table of --json")
    given = parser.parse_args()
    path = pathlib.Path(given.json) if given.json else None
    found = json.loads(path.read_text()) if path and path.exists() else {}
    if given.table:
        print(table(found))
        return 0
    faults = chosen(given.only)
    with tempfile.TemporaryDirectory() as temporary:
        lab = Lab(pathlib.Path(given.out or temporary).resolve(), given.seed)
        lab.kills, lab.steps = given.kills, given.steps
        lab.devices = tuple(int(n) for n in given.devices.split(","))
        lab.out.mkdir(parents=True, exist_ok=True)
        try:
            for fault in faults:
                if fault.name in found:
                    continue
                print(f"{fault.name}: {fault.about}", flush=True)
                entry = record(lab, fault, given.rounds)
                found[fault.name] = entry
                print(f"  tried {entry['tried']}, well {entry['well']}, lost {entry['lost']}", flush=True)
                if path:
                    storage.write_whole(path, json.dumps(found, indent=1) + "\n")
        finally:
            lab.close()
    these = {f.name: found[f.name] for f in faults}
    print("\n" + ", ".join(machine(("jax", "jaxlib", "orbax-checkpoint")).values()) + "\n\n" + table(these))
    return int(any(f["well"] < f["tried"] for f in these.values()))


if __name__ == "__main__":
    os.nice(10)
    sys.exit(main())
