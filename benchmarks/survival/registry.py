"""The faults of the suite, by name, and what is counted of each."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

WELL, BADLY, LOST = "well", "badly", "lost"
KINDS = {
    "kills": "killed at random moments",
    "disk": "a full disk at one kind of write",
    "file": "files of a run folder that are damaged, foreign, in the way or not permitted",
    "stall": "reads that never return",
    "hosts": "hosts that differ, a mistake on one of them, a taken port",
    "starts": "several starts at one moment",
    "signal": "signals that ask a run to end",
}


class Trial(NamedTuple):
    """One fault, tried once.

    outcome: WELL: the right exit code, one plain line, nothing lost. BADLY: nothing is lost, but the code or the line
      is not right. LOST: something that was saved is gone, or a result is silently another one.
    said: why, unless it is WELL.
    """

    what: str
    outcome: str
    said: str = ""


class Fault(NamedTuple):
    """A kind of fault. `tries(lab, rounds)` yields trials; `about` is its line in the table."""

    name: str
    about: str
    tries: Callable[[Any, int], Iterator[Trial]]


FAULTS: dict[str, Fault] = {}


def fault(name: str, about: str) -> Callable[[Callable], Callable]:
    """Register the function below as the trials of a fault. Names are KIND or KIND:WHAT."""

    def register(tries: Callable) -> Callable:
        assert name not in FAULTS and name.partition(":")[0] in KINDS, name
        FAULTS[name] = Fault(name, about, tries)
        return tries

    return register


def chosen(words: str) -> list[Fault]:
    """The faults named by words, which are separated by commas: names, or kinds; all for "".

    Raises:
      SystemExit: a word that names none.
    """
    if not words:
        return list(FAULTS.values())
    found = []
    for word in words.split(","):
        those = [f for f in FAULTS.values() if word in (f.name, f.name.partition(":")[0])]
        if not those:
            raise SystemExit(f"--kinds={word}: expected some of {', '.join(FAULTS)}, or the part before :")
        found += [f for f in those if f not in found]
    return found
