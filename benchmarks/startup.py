"""Seconds from the command to the first finished update: with an empty cache of compiled programs, and a full one.

    python -m benchmarks.startup [--config=configs/excon.py] [--rounds=3] [--config.KEY=VALUE ...]

Each round runs two fresh processes of `jaxcl.main` with a new cache: the first finds it empty (cold), the second full
(warm). Both end with their first update. The table gives medians of the total and of its pieces.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks._measure import ROOT, machine
from benchmarks._table import Row, Settings

TITLE = "Start-up"
NOTE = (
    "Seconds from the command `python -m jaxcl.main --config=configs/excon.py` to its first finished update: with an "
    "empty cache of compiled programs, and with a full one. There is no peer. `python -m benchmarks.startup` shows the "
    "pieces of this time."
)
_CHILD, _BEGUN = "--of-a-round", "JAXCL_STARTUP_BEGUN"
PARTS = (
    "interpreter, flags, imports",
    "data",
    "state: trace, compile or read, draw",
    "update: trace",
    "update: lower",
    "update: compile or read",
    "the rest: loader, folder, running the update",
)


# ---- one process: jaxcl.main with clocks


def child(argv: list[str]) -> None:
    """Runs the command up to its first update; the last line that it prints is JSON."""
    from jaxcl import main

    begun = float(os.environ[_BEGUN])
    seconds, events, counts = dict.fromkeys(PARTS, 0.0), {}, {}
    sys.argv = ["jaxcl.main", *argv]
    run_main = main.main

    def clocks() -> None:
        from jax import monitoring

        from jaxcl.train import job
        from jaxcl.train import loop as train
        from jaxcl.train.log import TrainLog

        def heard(name: str, duration: float, **about) -> None:
            if "update" in str(about.get("fun_name")):
                events[name.rpartition("/")[2]] = events.get(name.rpartition("/")[2], 0.0) + duration

        def counted(name: str, **_) -> None:
            counts[name.rpartition("/")[2]] = counts.get(name.rpartition("/")[2], 0) + 1

        monitoring.register_event_duration_secs_listener(heard)
        monitoring.register_event_listener(counted)
        for place, name, part in (
            (job, "source_of", PARTS[1]),
            (job, "state_shardings", PARTS[2]),
            (job.Job, "initial_state", PARTS[2]),
        ):
            setattr(place, name, _timed(getattr(place, name), seconds, part))
        run, read = train.run, TrainLog._read

        def run_clocked(*args, **kwargs):
            seconds[PARTS[0]] = time.time() - begun
            return run(*args, **kwargs)

        def read_and_end(log, step, metrics):
            read(log, step, metrics)
            total = time.time() - begun
            for part, name in zip(PARTS[3:6], ("jaxpr_trace", "jaxpr_to_mlir_module", "backend_compile"), strict=True):
                seconds[part] = events.get(f"{name}_duration", 0.0)
            seconds[PARTS[6]] = total - sum(seconds.values())
            busy = sum(os.times()[:2])
            print(json.dumps({"total": total, "busy": busy, "parts": seconds, "counts": counts}), flush=True)
            os._exit(0)

        train.run, TrainLog._read = run_clocked, read_and_end

    # The clocks need modules that main imports late, so they are set when main turns the cache on.
    from jaxcl.runtime import compile_cache

    turn_on = compile_cache.turn_on

    def turn_on_and_clock(*args):
        folder = turn_on(*args)
        clocks()
        return folder

    compile_cache.turn_on = turn_on_and_clock
    raise SystemExit(run_main(sys.argv))


def _timed(function, seconds: dict[str, float], part: str):
    def timed(*args, **kwargs):
        begin = time.time()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[part] += time.time() - begin

    return timed


# ---- the rounds


def one(arguments: list[str], folder: str, name: str) -> dict:
    """Runs a fresh process with its caches in `folder`."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))}
    command = [sys.executable, "-m", "benchmarks.startup", _CHILD, *arguments, f"--workdir={folder}/{name}"]
    environ |= {"XDG_CACHE_HOME": folder, _BEGUN: repr(time.time())}
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def rows(settings: Settings) -> list[Row]:
    """For benchmarks.run: one row for a cold start and one for a warm start."""
    arguments, found = [f"--config={ROOT / 'configs' / 'excon.py'}"], {"cold": [], "warm": []}
    for r in range(settings.rounds):
        settings.note(f"start-up: round {r + 1} of {settings.rounds}")
        with tempfile.TemporaryDirectory() as folder:
            for name, rounds in found.items():
                rounds.append(one(arguments, folder, name)["total"])
    settings.note("start-up: rounds end")
    return [Row(f"ExCon on garments, {name}", "jaxcl", "s", tuple(times), ours=True) for name, times in found.items()]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", default="configs/excon.py")
    parser.add_argument("--rounds", type=int, default=3)
    given, overrides = parser.parse_known_args(argv)
    path, colon, preset = given.config.partition(":")
    arguments = [f"--config={pathlib.Path(path).resolve()}{colon}{preset}", *overrides]
    found: dict[str, list[dict]] = {"cold": [], "warm": []}
    for _ in range(given.rounds):
        with tempfile.TemporaryDirectory() as folder:
            for name, rounds in found.items():
                rounds.append(one(arguments, folder, name))
    print(", ".join(v if k == "processor" else f"{k} {v}" for k, v in machine(("jax", "jaxlib")).items()))
    print(f"load average {os.getloadavg()[0]:.1f}; {given.config}, medians of {given.rounds}")
    print(f"{'seconds':48}{'cold':>8}{'warm':>8}")
    for part in PARTS:
        print(f"{part:48}" + "".join(f"{_median(r, part):8.2f}" for r in found.values()))
    totals = [[r["total"] for r in rounds] for rounds in found.values()]
    print(f"{'command to first finished update':48}" + "".join(f"{statistics.median(t):8.2f}" for t in totals))
    print(f"{'  of all rounds':48}" + "  ".join(f"{min(t):.2f} to {max(t):.2f}" for t in totals))
    last = [rounds[-1]["counts"] for rounds in found.values()]
    asked, read = ([c.get(k, 0) for c in last] for k in ("compile_requests_use_cache", "cache_hits"))
    busy = [statistics.median(r["busy"] for r in rounds) for rounds in found.values()]
    print(f"{'seconds of processor time, all cores':48}" + "".join(f"{b:8.2f}" for b in busy))
    cells = [f"{r} of {a}" for a, r in zip(asked, read, strict=True)]
    print(f"{'programs, read from the cache':48}" + "".join(f"{cell:>8}" for cell in cells))


def _median(rounds: list[dict], part: str) -> float:
    return statistics.median(r["parts"][part] for r in rounds)


if __name__ == "__main__":
    if sys.argv[1:2] == [_CHILD]:
        child(sys.argv[2:])
    else:
        main(sys.argv[1:])
