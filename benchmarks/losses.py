"""Value and gradient of the contrastive losses, compared with optax, pytorch-metric-learning and plain matmuls.

    python -m benchmarks.losses [--sizes=256..65536] [--rounds=5] [--out=docs/figures/losses.svg] [--write_docs]

First the memory of each contestant is measured, in its own process; then the times. A round runs every contestant once,
in turn, so a machine that slows down slows all of them. Ratios are taken round by round, and their median is reported.
Before timing, implementations of one loss must agree to 1e-4 in value and gradient. A contestant that would exceed the
memory budget, or took too long at a smaller size, is not run, and the table says so. Tables go to stdout.
"""

import argparse
import json
import math
import os
import pathlib
import sys
import tempfile
import time

import jax

from benchmarks import _measure, _paired, _report, _task
from benchmarks._contestants import (
    CONTESTANTS,
    Contestant,
    distance,
    jax_loss,
    make_data,
    nt_xent,
    numbers,
    rate_matmul,
    release,
)
from benchmarks._table import Row, Settings

TITLE = "Losses"
NOTE = (
    "Value and gradient for N rows (two views of N/2 images) of 128 features, temperature 0.1, float32; "
    "implementations of one loss agree to 1e-4. More sizes, and memory: [losses.md](losses.md)."
)
TOLERANCE = 1e-4
MEMORY_BUDGET = "8GiB"
PACKAGES = ("jaxcl", "jax", "optax", "numpy", "torch", "pytorch-metric-learning")
PEERS = ("optax", "pml")
# A measurement lasts at least this long: short calls are repeated.
SHORTEST = 0.02
# For calls longer than this, the first one, which is cold, counts like any other.
COLD = 2.0


def parse_sizes(text: str) -> list[int]:
    """'256,1024': these sizes. '256..65536': the powers of two in this range. Errors: ValueError."""
    if ".." in text:
        first, last = (int(x) for x in text.split(".."))
        sizes = [2**i for i in range(1, 40) if first <= 2**i <= last]
    else:
        sizes = sorted({int(x) for x in text.split(",")})
    if not sizes or any(n < 4 or n % 2 for n in sizes):
        raise ValueError(f"sizes {text!r}: expected even numbers of rows, at least 4, such as 256,1024 or 256..65536")
    return sizes


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.losses", description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=parse_sizes, default="256..65536", help="rows (images x 2 views)")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=30, help="most seconds of a contestant at one size")
    parser.add_argument("--slowest", type=float, default=60, help="above these seconds per call, no larger size is run")
    parser.add_argument("--memory_budget", type=_measure.parse_bytes, default=MEMORY_BUDGET)
    parser.add_argument("--peers", default=",".join(PEERS), help=f"some of {','.join(PEERS)}; none: no peer")
    parser.add_argument("--only", help=f"some of {', '.join(c.key for c in CONTESTANTS)}")
    parser.add_argument("--out", type=pathlib.Path, help="figure, .svg or .png")
    parser.add_argument("--write_docs", action="store_true", help="put tables and figure into docs/losses.md")
    parser.add_argument("--save", type=pathlib.Path, help="JSON of all measurements; those in it are not repeated")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)  # for the process that measures memory
    options = parser.parse_args(argv)
    peers = [] if options.peers == "none" else options.peers.split(",")
    if unknown := set(peers) - set(PEERS):
        parser.error(f"--peers: {', '.join(unknown)}, expected some of {', '.join(PEERS)}, or none")
    if unknown := set((options.only or CONTESTANTS[0].key).split(",")) - {c.key for c in CONTESTANTS}:
        parser.error(f"--only: {', '.join(unknown)}, expected some of {', '.join(c.key for c in CONTESTANTS)}")
    options.peers = peers
    if options.write_docs and options.out is None:
        options.out = _measure.ROOT / "docs" / "figures" / "losses.svg"
    return options


# ---- memory


def measure_memory(contestant: Contestant, options: argparse.Namespace) -> None:
    """Runs in its own process and prints a line of JSON for each size that fits, smallest first."""
    # A first run of the smallest size loads libraries and starts threads; it is not counted.
    contestant.prepare(make_data(min(64, options.sizes[0]), options.dim), options.memory_budget).run()
    for rows in options.sizes:
        ready = contestant.prepare(make_data(rows, options.dim), options.memory_budget)
        if ready.run is None:
            return
        begun = time.perf_counter()
        resident = _measure.peak_increase(ready.run)
        print(json.dumps({"rows": rows, "resident": resident}), flush=True)
        if time.perf_counter() - begun > options.slowest:
            return
        del ready
        release()


def memory_of(contestant: Contestant, options: argparse.Namespace, cache: str) -> dict:
    """{"resident": {rows: bytes}, "failed": "" or why}, from a fresh process."""
    lines, failed = _measure.fresh_process(
        "benchmarks.losses",
        f"--memory_of={contestant.key}",
        "--sizes=" + ",".join(map(str, options.sizes)),
        f"--dim={options.dim}",
        f"--slowest={options.slowest}",
        f"--memory_budget={options.memory_budget}",
        environment={
            **_measure.LIVE,
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        },
    )
    measured = [json.loads(line) for line in lines if line.startswith("{")]
    return {"resident": {str(m["rows"]): m["resident"] for m in measured}, "failed": failed}


# ---- time


def measure_times(rows: int, contestants: list[Contestant], options: argparse.Namespace, skip: dict[str, str]) -> dict:
    """All contestants at one size: {"entries": {key: ...}, "rate": FLOP/s per round, "agreement": {group: ...}}."""
    data = make_data(rows, options.dim)
    entries, runs, identities = {}, {}, {}
    for c in contestants:
        entries[c.key] = entry = {"seconds": {}, "need": None, "skipped": skip.get(c.key, ""), "same_as": None}
        if entry["skipped"]:
            continue
        ready = c.prepare(data, options.memory_budget)
        entry["need"] = ready.need
        if ready.run is None:
            entry["skipped"] = f"would need {_measure.size(ready.need)}"
        elif ready.identity is not None and ready.identity in identities:
            entry["same_as"] = identities[ready.identity]
        else:
            identities[ready.identity] = c.key
            runs[c.key] = ready.run

    rate = rate_matmul()
    rates = [rate()]
    groups = {c.key: c.group for c in contestants}
    results, calls, spent = {}, {}, {}
    for key, run in runs.items():
        begun = time.perf_counter()
        result = run()
        cold = time.perf_counter() - begun
        if groups[key] != "floor":
            results[key] = numbers(result)
        del result
        calls[key], seconds = 1, cold
        if cold <= COLD:
            calls[key] = max(1, math.ceil(SHORTEST / _measure.seconds_per_call(run, 1)))
            seconds = _measure.seconds_per_call(run, calls[key])
        entries[key]["seconds"]["0"] = seconds
        spent[key] = cold
    agreement = check_agreement(rows, results, groups)

    keys = list(runs)
    for r in range(1, options.rounds):
        if all(spent[key] > options.seconds for key in keys):
            break
        rates.append(rate())
        for key in keys[r % len(keys) :] + keys[: r % len(keys)]:
            last = entries[key]["seconds"][max(entries[key]["seconds"], key=int)]
            if spent[key] + last > options.seconds:
                continue
            time.sleep(0.01)  # lets the threads of the one before go to sleep
            seconds = _measure.seconds_per_call(runs[key], calls[key])
            entries[key]["seconds"][str(r)] = seconds
            spent[key] += seconds * calls[key]
    return {"entries": entries, "rate": rates, "agreement": agreement}


def check_agreement(rows: int, results: dict, groups: dict[str, str]) -> dict[str, float]:
    """{group: largest relative difference}. Errors: SystemExit if contestants of a group do not agree."""
    worst = {}
    for key, result in results.items():
        first = next(k for k in results if groups[k] == groups[key])
        apart = distance(result, results[first])
        if not apart <= TOLERANCE:
            sys.exit(f"N={rows}: {key} and {first} differ by {apart:.1e} in value or gradient, expected {TOLERANCE}")
        if key != first:
            worst[groups[key]] = max(worst.get(groups[key], 0.0), apart)
    return worst


def too_slow(sizes: dict, options: argparse.Namespace) -> dict[str, str]:
    """Contestants that took too long at a smaller size: {key: reason}."""
    return {
        key: f"over {options.slowest:.0f} s at {int(rows):,} rows"
        for rows, measured in sizes.items()
        for key, entry in measured["entries"].items()
        if max(entry["seconds"].values(), default=0) > options.slowest
    }


# ---- for benchmarks.run


def rows(settings: Settings) -> list[Row]:
    """Milliseconds of each loss at a small and a large size; a loss is a task."""
    out = []
    for rows in (64,) if settings.quick else (512, 4096):
        for group, name in (("supcon", "SupCon"), ("nt_xent", "NT-Xent")):
            ours = _task.Contestant(f"{group}_auto", "jaxcl", ours=True)
            others = [
                _task.Contestant(c.key, c.name, package=c.package if c.peer else "")
                for c in CONTESTANTS
                if c.group == group and (c.peer or c.key == "plain")
            ]
            out += _paired.rows(
                "benchmarks.losses",
                f"{name}, {rows:,} rows",
                [ours, *others],
                settings,
                arguments={"rows": rows, "dim": 16 if settings.quick else 128},
                unit="ms",
                cores=_measure.cores(),
                tolerance=TOLERANCE,
            )
    return out


def prepare(contestant: str, *, rows: int, dim: int) -> _task.Ready:
    makers = {c.key: c.prepare for c in CONTESTANTS} | {"nt_xent_auto": jax_loss(nt_xent("auto"), "pairs_B")}
    ready = makers[contestant](make_data(rows, dim), _measure.parse_bytes(MEMORY_BUDGET))
    if ready.run is None:
        raise _task.NotApplicable(f"would need {_measure.size(ready.need)}")
    value, gradient = numbers(ready.run())
    some = gradient[:32].ravel() * rows  # gradients are proportional to 1/N
    # z z^T, and one matmul of an N x N matrix with z for the gradient; z is read, the gradient is written.
    needs = _task.Needs(2 * 2 * rows * rows * dim, 2 * 4 * rows * dim)
    return _task.Ready(ready.run, 1, [value, *some.tolist()], needs)


# ---- all of it


def load(path: pathlib.Path | None, settings: dict) -> dict:
    """The measurements of an earlier run with the same settings on the same machine, or an empty state."""
    fresh = {"settings": settings, "memory": {}, "sizes": {}}
    if path is None or not path.exists():
        return fresh
    saved = json.loads(path.read_text())
    if saved["settings"] != settings:
        sys.exit(f"{path} was measured with other settings or on another machine; choose another --save")
    return saved


def save(path: pathlib.Path | None, state: dict) -> None:
    if path is not None:
        path.write_text(json.dumps(state, indent=1))


def note(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    if options.memory_of:
        return measure_memory(next(c for c in CONTESTANTS if c.key == options.memory_of), options)
    contestants = [c for c in CONTESTANTS if not c.peer or c.peer in options.peers]
    if options.only:
        contestants = [c for c in contestants if c.key in options.only.split(",")]
    absent = sorted({c.package for c in contestants if c.peer and not _measure.installed(c.package)})
    contestants = [c for c in contestants if c.package not in absent]
    settings = {
        "machine": _measure.machine(PACKAGES) | {"backend": jax.default_backend()},
        "dim": options.dim,
        "rounds": options.rounds,
        "memory_budget": options.memory_budget,
        "contestants": [c.key for c in contestants],
    }
    for package in absent:
        note(f"{package} is not installed, so its rows are missing; pip install -e '.[bench]'")
    state = load(options.save, settings)
    state.setdefault("load", []).append(os.getloadavg()[0])

    # One cache for all processes, so that each program is compiled once.
    with tempfile.TemporaryDirectory() as folder:
        cache = jax.config.jax_compilation_cache_dir or folder
        jax.config.update("jax_compilation_cache_dir", cache)
        for c in contestants:
            if c.key in state["memory"] or c.key == "supcon_auto":  # it is the tiled or the dense program
                continue
            note(f"memory of {c.name}")
            state["memory"][c.key] = memory_of(c, options, cache)
            save(options.save, state)
        for rows in options.sizes:
            if str(rows) in state["sizes"]:
                continue
            note(f"times at {rows:,} rows")
            skip = too_slow(state["sizes"], options)
            for key, memory in state["memory"].items():
                reached = max(map(int, memory["resident"]), default=0)
                if memory["failed"] and rows > reached:
                    skip.setdefault(key, f"failed above {reached:,} rows: {memory['failed']}")
            state["sizes"][str(rows)] = measure_times(rows, contestants, options, skip)
            release()
            save(options.save, state)
    note("done")
    state["load"].append(os.getloadavg()[0])
    save(options.save, state)

    names = {c.key: c.name for c in contestants}
    print(_report.text(state, names))
    if options.out is not None:
        _report.draw(state, names, options.out)
    if options.write_docs:
        _report.write_docs(state, names, _measure.ROOT / "docs" / "losses.md", options.out)


if __name__ == "__main__":
    main()
