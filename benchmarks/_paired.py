"""Contestants measured in turn, each in its own process, which sleeps while the others run.

A module with such contestants has a function

    def prepare(contestant: str, **task) -> Ready

It is called in a fresh process, with arguments from JSON. All processes of a task start, prepare and warm up. Then
every round asks each of them once, in turn, to repeat its work for some time. So contestants share no threads, caches
or memory, a machine that slows down slows all of them, and times do not include imports and compilation. A process is
bound to a number of cores: XLA and OpenCV read that number, BLAS and torch get it as an option. If a call is short,
torch is also measured with one thread, and the faster time counts.
"""

import atexit
import contextlib
import functools
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import _floor
from benchmarks._measure import ROOT, installed, seconds_per_call
from benchmarks._measure import cores as _cores
from benchmarks._table import Row, Settings
from benchmarks._task import Contestant, NotApplicable, Ready
from jaxcl.runtime import huge_pages

TORCH_SHORT = 3.0  # seconds; torch is measured with one thread, too, if a call is shorter


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
    """Measures one row per contestant.

    Args:
      module: the module with `prepare`.
      arguments: of `prepare`, as JSON.
      unit: ends in "/s" for work per second; "ms" or "s" for time per call.
      cores: number of cores that each process may use.
      tolerance: the largest relative difference between the answers of two contestants.

    Raises:
      SystemExit: answers that differ, or a contestant of ours that fails.
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
            answer = _answer(worker)  # sent when it is prepared
            if "left_out" in answer and not c.ours:
                left_out[c.key] = answer["left_out"]
            elif "left_out" in answer:
                raise SystemExit(f"{task}: {c.name}: {answer['left_out']}")
            else:
                workers[c.key] = worker, answer
        _check_answers(task, {key: prepared["answer"] for key, (_, prepared) in workers.items()}, tolerance)
        values, peaks = {key: [] for key in workers}, []
        needs = {c.key: workers[c.key][1]["needs"] for c in contestants if c.ours and workers[c.key][1]["needs"]}
        keys = list(workers)
        for r in range(settings.rounds):
            settings.note(f"{task}: round {r + 1} of {settings.rounds}")
            if needs:
                peaks.append(tuple(_peak(kind, cores, settings.seconds) for kind in (_floor.PRODUCTS, _floor.MEMORY)))
            for key in keys[r % len(keys) :] + keys[: r % len(keys)]:  # another one is first in each round
                time.sleep(0.05)  # lets the threads of the one before go to sleep
                answer = _ask(workers[key][0], f"{settings.seconds}")
                if "left_out" in answer:
                    raise SystemExit(f"{task}: {key}, in round {r + 1}: {answer['left_out']}")
                scale = {"ms": 1e3, "s": 1.0}.get(unit)
                values[key].append(answer["seconds"] * scale if scale else answer["work"] / answer["seconds"])
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
    """A process that measures the machine. It sleeps between measurements and lives until the program ends."""
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    worker = stack.enter_context(_started("benchmarks._floor", kind, {}, cores))
    _answer(worker)
    return worker


def _peak(kind: str, cores: int, seconds: float) -> float:
    answer = _ask(_peak_worker(kind, cores), f"{min(seconds, 0.3)}")
    return answer["work"] / answer["seconds"]


def _check_answers(task: str, answers: Mapping[str, Any], tolerance: float) -> None:
    """Errors: SystemExit unless all contestants compute the same numbers."""
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
            "JAX_PLATFORMS": "cpu",  # like the peers, unless the user sets another
            **os.environ,
            **huge_pages.environ(),  # for all contestants; jaxcl's commands set it for themselves
            **threads,
            "NO_ALBUMENTATIONS_UPDATE": "1",  # else it asks its registry for a newer version
        },
    )
    try:
        yield worker
    finally:
        worker.stdin.close()  # the process ends when it reads the end of its input
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
    """The process of one contestant. It answers every line of its input with a measurement."""
    if hasattr(os, "sched_setaffinity"):
        # The last cores, because the first ones handle interrupts.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-int(cores) :])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print; only answers go to stdout

    def send(**answer: Any) -> None:
        out.write(json.dumps(answer) + "\n")
        out.flush()

    try:
        ready = importlib.import_module(module).prepare(key, **json.loads(arguments))
        ready.run()
        answer = None if ready.answer is None else np.asarray(ready.answer, np.float64).ravel().tolist()
        send(answer=answer, needs=ready.needs, work=ready.work)
    except NotApplicable as reason:
        return send(left_out=str(reason))
    except Exception as error:  # any error of a library is reported in its row
        return send(left_out=f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0][:120]}")
    calls: dict[int, int] = {}
    for line in sys.stdin:
        send(seconds=min(_seconds(ready, float(line), calls, threads) for threads in _threads(ready)), work=ready.work)


def _threads(ready: Ready) -> Iterator[int]:
    """Numbers of threads to try. Short calls of torch also get one, because its threads may wait for each other."""
    yield (every := _cores())
    if "torch" in sys.modules and every > 1 and seconds_per_call(ready.run, 1) < TORCH_SHORT:
        yield 1


def _seconds(ready: Ready, shortest: float, calls: dict[int, int], threads: int) -> float:
    """Seconds per call, over enough calls to last `shortest`. `calls` keeps their number for the next round."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(threads)
    while True:
        count = calls.get(threads, 1)
        seconds = seconds_per_call(ready.run, count)
        if seconds * count >= 0.8 * shortest:
            return seconds
        calls[threads] = max(count + 1, int(shortest / seconds) + 1)


def torch_threads() -> Any:
    """Imports torch with one thread, until it is measured: on a busy machine, two may block each other."""
    import torch

    torch.set_num_threads(1)
    return torch


if __name__ == "__main__":
    work(*sys.argv[1:])
    os._exit(0)  # libraries take seconds to clean up, and the next task would wait for that
