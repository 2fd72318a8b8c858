"""Fault injection: what may happen to a run, tried on processes of the real commands, in one table.

    python -m benchmarks.survival [--kinds=NAME,...] [--rounds=1] [--seconds=3600] [--seed=0] [--out=FOLDER]

A fault is answered well if the exit code is right, one plain line says what is wrong, and nothing is lost: the last
good checkpoint can still be evaluated, and the same command continues the run to the same bits. The faults are in
modules by kind: `kills`, `files`, `disks`, `stalls`, `hosts`, `starts` and `signals`; `registry` lists them, `lab` has
the tiny run that they meet. OUT/faults.json has the results after each fault, and the same command goes on with the
others.
"""

from benchmarks.survival.kills import Unequal, compare, survive

__all__ = ["Unequal", "compare", "survive"]
