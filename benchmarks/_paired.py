"""Contestants measured in turn, each in a process of its own that is asleep while the others run.

A module whose contestants are measured so has

    def prepare(contestant: str, **task) -> Ready

called in a fresh process, whose arguments are JSON. All processes of a task are started, prepare and warm up; then
every round asks each of them once, in turn, to repeat its work for some time. So nobody's threads, caches or memory are
the others', a machine that slows down slows all of them, and imports and compilation are not in the times. The process
may use so many cores and no more: XLA and OpenCV take their number from that, BLAS and torch are told it, and torch is
measured with one thread too where a call is short; its faster time counts.
"""

import atexit
import contextlib
import dataclasses
import functools
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import _floor
from benchmarks._floor import Needs
from benchmarks._measure import ROOT, installed, seconds_per_call
from benchmarks._measure import cores as _cores
from benchmarks._table import Row, Settings
from jaxcl.runtime import huge_pages

TORCH_SHORT = 3.0  # seconds


@dataclasses.dataclass(frozen=True)
class Contestant:
    """`key` is what `prepare` is called with."""

    key: str
    name: str
    ours: bool = False
    package: str = ""  # that it needs beside jaxcl's own
    differs: str = ""


@dataclasses.dataclass(frozen=True)
class Ready:
    """What a contestant's process repeats."""

    run: Callable[[], object]  # one call; returns when all is computed
    work: float = 1  # units of work in a call: the row's value is work a second, or, for a unit of time, time a call
    answer: Any = None  # numbers that must be the same for all contestants of the task; None: nothing to compare
    needs: Needs | None = None  # of a call of the task, given by our own contestant; None: not counted


class NotApplicable(Exception):
    """Raised by `prepare`: why this contestant cannot do this task."""


def rows(
    module: str,
    task: str,
    contestants: Sequence[Contestant],
    settings: Settings,
    *,
    arguments: Mapping[str, Any],
    unit: str,
    cores: int,
    tolerance: float = 1e-4,
) -> list[Row]:
    """A row a contestant.

    Args:
      module: where `prepare` is.
      arguments: of `prepare`, JSON.
      unit: ending in "/s": work a second; "ms" or "s": time a call.
      cores: that each process may use.
      tolerance: relative difference of answers to the first one's, above which the program ends.
    """
    settings.note(f"{task}: processes start")
    with contextlib.ExitStack() as stack:
        left_out, started, workers = {}, {}, {}
        for c in contestants:
            if c.package and not installed(c.package):
                left_out[c.key] = f"{c.package} is not installed"
                continue
            started[c.key] = stack.enter_context(_started(module, c.key, arguments, cores))
        for c in contestants:
            if c.key not in started:
                continue
            worker = started[c.key]
            said = _answer(worker)  # when it is prepared
            if "left_out" in said and not c.ours:
                left_out[c.key] = said["left_out"]
            elif "left_out" in said:
                raise SystemExit(f"{task}: {c.name}: {said['left_out']}")
            else:
                workers[c.key] = worker, said
        _check_answers(task, {key: said["answer"] for key, (_, said) in workers.items()}, tolerance)
        values, peaks = {key: [] for key in workers}, []
        needs = {c.key: workers[c.key][1]["needs"] for c in contestants if c.ours and workers[c.key][1]["needs"]}
        keys = list(workers)
        for r in range(settings.rounds):
            settings.note(f"{task}: round {r + 1} of {settings.rounds}")
            if needs:
                peaks.append(tuple(_peak(kind, cores, settings.seconds) for kind in (_floor.PRODUCTS, _floor.MEMORY)))
            for key in keys[r % len(keys) :] + keys[: r % len(keys)]:  # nobody is always the first
                time.sleep(0.05)  # threads of the one before go to sleep
                said = _ask(workers[key][0], f"{settings.seconds}")
                if "left_out" in said:
                    raise SystemExit(f"{task}: {key}, in round {r + 1}: {said['left_out']}")
                scale = {"ms": 1e3, "s": 1.0}.get(unit)
                values[key].append(said["seconds"] * scale if scale else said["work"] / said["seconds"])
        settings.note(f"{task}: rounds end")
    return [
        Row(
            task,
            c.name,
            unit,
            tuple(values.get(c.key, ())),
            c.ours,
            c.differs,
            left_out.get(c.key, ""),
            tuple(n / (workers[c.key][1]["work"] if unit.endswith("/s") else 1) for n in needs.get(c.key, ())),
            tuple(peaks) if c.key in needs else (),
        )
        for c in contestants
    ]


@functools.cache
def _peak_worker(kind: str, cores: int) -> subprocess.Popen:
    """One that measures the machine; it sleeps between, to the end of the program."""
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    worker = stack.enter_context(_started("benchmarks._floor", kind, {}, cores))
    _answer(worker)
    return worker


def _peak(kind: str, cores: int, seconds: float) -> float:
    said = _ask(_peak_worker(kind, cores), f"{min(seconds, 0.3)}")
    return said["work"] / said["seconds"]


def _check_answers(task: str, answers: Mapping[str, Any], tolerance: float) -> None:
    """Ends the program if contestants that claim to compute the same do not."""
    given = {key: np.asarray(answer) for key, answer in answers.items() if answer is not None}
    first = next(iter(given), "")
    for key, answer in given.items():
        apart = np.linalg.norm(answer - given[first]) / np.linalg.norm(given[first])
        if not apart <= tolerance:
            raise SystemExit(f"{task}: {key} and {first} differ by {apart:.1e}, expected at most {tolerance:g}")


# ---- processes


@contextlib.contextmanager
def _started(module: str, key: str, arguments: Mapping[str, Any], cores: int) -> Iterator[subprocess.Popen]:
    threads = {f"{library}_NUM_THREADS": str(cores) for library in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")}
    worker = subprocess.Popen(
        [sys.executable, "-m", "benchmarks._paired", module, key, json.dumps(dict(arguments)), str(cores)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env={
            "JAX_PLATFORMS": "cpu",  # as the peers'; unless the user says otherwise
            **os.environ,
            **huge_pages.environ(),  # for all of them, as jaxcl's commands ask for themselves
            **threads,
            "NO_ALBUMENTATIONS_UPDATE": "1",  # it would ask its registry for a newer version
        },
    )
    try:
        yield worker
    finally:
        worker.stdin.close()  # it leaves when it reads the end
        try:
            worker.wait(10)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def _ask(worker: subprocess.Popen, line: str) -> dict[str, Any]:
    with contextlib.suppress(BrokenPipeError):
        worker.stdin.write(line + "\n")
        worker.stdin.flush()
    return _answer(worker)


def _answer(worker: subprocess.Popen) -> dict[str, Any]:
    answer = worker.stdout.readline()
    return json.loads(answer) if answer else {"left_out": f"its process ended, exit code {worker.wait()}"}


def work(module: str, key: str, arguments: str, cores: str) -> None:
    """The process of one contestant: a line in, a measurement out."""
    if hasattr(os, "sched_setaffinity"):
        # The last ones: the first cores have the interrupts.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-int(cores) :])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def say(**what: Any) -> None:
        out.write(json.dumps(what) + "\n")
        out.flush()

    try:
        ready = importlib.import_module(module).prepare(key, **json.loads(arguments))
        ready.run()
        answer = None if ready.answer is None else np.asarray(ready.answer, np.float64).ravel().tolist()
        say(answer=answer, needs=ready.needs, work=ready.work)
    except NotApplicable as reason:
        return say(left_out=str(reason))
    except Exception as error:  # whatever a library does: the row says so
        return say(left_out=f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0][:120]}")
    calls: dict[int, int] = {}
    for line in sys.stdin:
        say(seconds=min(_seconds(ready, float(line), calls, threads) for threads in _threads(ready)), work=ready.work)


def _threads(ready: Ready) -> Iterator[int]:
    """torch: all cores, and where a call is short one thread too, since its threads may only wait for each other."""
    yield (every := _cores())
    if "torch" in sys.modules and every > 1 and seconds_per_call(ready.run, 1) < TORCH_SHORT:
        yield 1


def _seconds(ready: Ready, shortest: float, calls: dict[int, int], threads: int) -> float:
    """Seconds a call, over so many in a row that it lasts; how many these are is kept for the next round."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(threads)
    while True:
        count = calls.get(threads, 1)
        seconds = seconds_per_call(ready.run, count)
        if seconds * count >= 0.8 * shortest:
            return seconds
        calls[threads] = max(count + 1, int(shortest / seconds) + 1)


def torch_threads() -> Any:
    """torch. With one thread until it is measured: on a busy machine two would wait for each other for minutes."""
    import torch

    torch.set_num_threads(1)
    return torch


if __name__ == "__main__":
    from benchmarks import _paired

    _paired.work(
        *sys.argv[1:]
    )  # not this module's own, whose NotApplicable is another class than the one that is raised
    os._exit(0)  # what libraries do on leaving takes seconds, and the next task waits for it
