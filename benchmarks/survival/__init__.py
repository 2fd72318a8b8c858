"""Fault injection: what may happen to a run, tried on processes of the real commands, in one table.

    python -m benchmarks.survival [--only=NAME,...] [--rounds=3] [--out=FOLDER] [--json=FILE]

A fault is answered well if the exit code is right, one plain line says what is wrong, and nothing is lost: the last
good checkpoint can still be evaluated, and the same command continues the run to the same bits. The faults are in
modules by kind: `kills`, `files`, `disks`, `stalls`, `hosts`, `starts` and `signals`; `registry` lists them, `lab` has
the tiny run that they meet. Results are kept in a JSON file after each fault, and a later call goes on with the others.
"""

from benchmarks.survival.kills import Unequal, compare, survive

__all__ = ["Unequal", "compare", "survive"]
