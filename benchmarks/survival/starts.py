"""Several starts of one command at one moment, after a run was killed, stopped or never was."""

import json
import pathlib
import time
from collections.abc import Iterator

from benchmarks.survival.lab import Lab, ends_with_us, told, training, wait
from benchmarks.survival.registry import BADLY, LOST, WELL, Trial, fault


def race(lab: Lab, what: str, work: pathlib.Path, count: int = 2) -> Trial:
    """Start so many processes, which claim a folder at one moment: one trains, the others say that it is in use."""
    go, ready = lab.place("go"), []
    for _ in range(count):
        at = {"event": "open", "name": r"/lock\.json\..*tmp$", "do": f"wait {go}"}
        ready.append(lab.start(training(work), at=at))
    with ends_with_us(*ready):
        time.sleep(14)  # all of them are at the door
        go.write_text("")
        ends = [wait(process) for process in ready]
    winners = [e for e in ends if e.code == 0 and "is finished" not in e.error]
    wrong = next((w for e in ends if (w := told(e, 0, 2))), "")
    if len(winners) != 1:
        wrong = f"{len(winners)} of {count} trained: exit codes {[e.code for e in ends]}; {wrong}"
    lost = lab.same_end(work) if winners else ""
    return Trial(what, LOST if lost else BADLY if wrong else WELL, lost or wrong)


@fault("starts", "two or three starts of one command at one moment: new, after TERM, after KILL, beside a broken lock")
def tries(lab: Lab, rounds: int) -> Iterator[Trial]:
    for _ in range(rounds):
        yield race(lab, "two starts of a new run", lab.place("new"))
        yield race(lab, "three starts of a stopped run", lab.copy(lab.half), 3)
        dead = lab.copy(lab.half)
        at = {"event": "os.mkdir", "name": "checkpoints/16", "do": "KILL"}
        lab.run(training(dead), at=at)
        yield race(lab, "two starts of a killed run", dead)
        broken = lab.copy(lab.half)
        (broken / "lock.json").write_text(json.dumps({"host": "h"})[:7])
        yield race(lab, "two starts beside a lock that was cut", broken)
