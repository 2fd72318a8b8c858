"""Kills: a run that is killed many times must equal an undisturbed run.

    python -m benchmarks.survival --kinds=kills --kills=50 --devices=1,2,4

It runs processes of the real command on a tiny network, with fake CPU devices. They get TERM or KILL, drawn at random,
while they start, between two steps, or during a save; then the same command continues the run. There is one leg for
each number of devices, and a last leg in which every restart draws one of the numbers. Every run that reaches its end
is compared with an undisturbed run: the examples of each update, the loss curve, and the whole final state. With one
number of devices they must be equal to the bit. With several, sums are taken in another order, and the tolerances below
apply.
"""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.survival.registry import LOST, WELL, Trial, fault

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Of the loss, relative at every step; of the state, relative to the largest entry of a tensor. The optimiser has a
# larger one, because its average of gradients depends on every ReLU that a last bit switches.
TOLERANCE = {"loss": 1e-5, "params": 1e-4, "batch_stats": 1e-4, "opt_state": 1e-2, "memory": 1e-2}
APART = (
    4.0  # times the distance of undisturbed runs on two numbers of devices, where that is more: it depends on the CPU
)
CLOCK = ("time", "images_per_second", "data_wait")
SMALL = [
    "--config=configs/supcon.py",
    "--config.data.limit=64",
    "--config.batch_size=16",
    "--config.model.stage_sizes=(1,)",
    "--config.model.stage_widths=(8,)",
    "--config.model.strides=(1,)",
    *(f"--config.views.{v}.{p}=0.0" for v in ("view1", "view2") for p in ("jitter_p", "grayscale")),
    "--config.optimizer.kind=sgd",
    # Low, because training amplifies the last bits of sums: at 0.02, undisturbed runs on 1 and on 2 devices differ so
    # much after 96 steps that a mistake would stay hidden; at this rate, on 1 and on 4 devices by up to 4e-5 after 60.
    "--config.optimizer.lr=0.0005",
    "--config.eval.final=('classifier',)",
    "--config.eval.every=0",
    "--config.report=False",
    "--config.log_every=1",
    "--config.log_examples",
    "--config.checkpoint.every=4",
]
MOMENTS = ("start", "step", "step", "save", "save")


class Unequal(AssertionError):
    """A killed run differs from the undisturbed run."""


@dataclasses.dataclass
class Leg:
    """One run folder, with a number of kills. A run that ends before the last kill is compared and started again."""

    name: str
    devices: Sequence[int]  # each start draws one of them
    kills: int
    folder: pathlib.Path
    steps: int
    rng: random.Random
    moments: Sequence[str] = MOMENTS
    ready: float = 5.0  # seconds from the start of a process to its first step
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    finished: int = 0

    def run(self) -> Iterator[pathlib.Path]:
        """Yields the folder of every run that reached its end."""
        left, under_way = self.kills, False
        while left or under_way:
            moment = self.rng.choice(self.moments) if left else ""
            killed = self._once(moment)
            left, under_way = left - killed, killed
            if not killed:
                self.finished += 1
                yield self.folder
                shutil.rmtree(self.folder)

    def _once(self, moment: str) -> bool:
        """Runs one process, which is killed at the moment or reaches its end -> whether it was killed."""
        number = self.rng.choice([signal.SIGTERM, signal.SIGKILL])
        process, log = start(self.folder, self.rng.choice(self.devices), self.steps)
        try:
            if moment:
                self._wait(moment, process)
                process.send_signal(number)
            code = process.wait(timeout=600)
        finally:
            process.kill()
        if code == 0:  # it ended before the kill
            return False
        # Nothing catches a TERM before Python has started and imported its modules.
        expected = (75, -signal.SIGTERM) if number == signal.SIGTERM else (-signal.SIGKILL,)
        if not moment or code not in expected:
            raise Unequal(f"{self.name}: exit code {code} after {moment or 'no kill'}\n{log.read_text()[-3000:]}")
        said = f"{signal.Signals(number).name[3:]} at {moment}"
        self.counts[said] = self.counts.get(said, 0) + 1
        return True

    def _wait(self, moment: str, process: subprocess.Popen) -> None:
        if moment == "start":
            return _sleep(self.rng.uniform(0, self.ready), process)
        # Ignores what earlier processes left: incomplete checkpoints, and lines after the last checkpoint.
        before, remains = last_step(self.folder), _half_saved(self.folder)
        target = min(self.steps - 1, _newest(self.folder) + self.rng.randint(1, 8))
        while process.poll() is None:
            if moment == "save" and _half_saved(self.folder) - remains:
                return _sleep(self.rng.uniform(0, 0.03), process)
            now = last_step(self.folder)
            if moment == "step" and now != before and now >= target:
                return _sleep(self.rng.uniform(0, 0.03), process)
            time.sleep(0.002)


def start(workdir: pathlib.Path, devices: int, steps: int) -> tuple[subprocess.Popen, pathlib.Path]:
    """Starts the command of a user -> (process, its log)."""
    workdir.parent.mkdir(parents=True, exist_ok=True)
    log = workdir.with_name(workdir.name + ".log")
    own = [f"--workdir={workdir}", f"--config.devices={devices}", f"--config.duration={steps}"]
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "jaxcl.main", *SMALL, *own], cwd=ROOT, env=environment(), stdout=out, stderr=out
        )
    return process, log


def environment() -> dict[str, str]:
    """Fake CPU devices, and a compilation cache, so that a restart does not compile."""
    there = dict(os.environ)
    flags = there.get("XLA_FLAGS", "")
    if "device_count" not in flags:
        flags = f"--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 {flags}"
    there.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
    there.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    return there | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}


def undisturbed(folder: pathlib.Path, devices: int, steps: int) -> float:
    """An undisturbed run, which also fills the compilation cache -> seconds to its first step."""
    begun, ready = time.monotonic(), 0.0
    process, log = start(folder, devices, steps)
    while process.poll() is None:
        if not ready and last_step(folder):
            ready = time.monotonic() - begun
        time.sleep(0.01)
    if process.returncode:
        raise Unequal(f"the undisturbed run ended with code {process.returncode}\n{log.read_text()[-3000:]}")
    return ready


def compare(
    killed: pathlib.Path, alone: pathlib.Path, exact: bool, tolerance: Mapping[str, float] = TOLERANCE
) -> dict[str, float]:
    """The largest deviations. Errors: Unequal."""
    a, b = (rows(f / "examples.jsonl") for f in (killed, alone))
    if a != b:
        raise Unequal(f"{killed}: its examples differ from those of {alone}")
    a, b = (rows(f / "metrics.jsonl") for f in (killed, alone))
    if [r["step"] for r in a] != [r["step"] for r in b]:
        raise Unequal(f"{killed}: the steps of its metrics differ from those of {alone}")
    loss = max(abs(x["loss"] - y["loss"]) / abs(y["loss"]) for x, y in zip(a, b, strict=True))
    if (exact and a != b) or loss > tolerance["loss"]:
        raise Unequal(f"{killed}: losses differ by {loss:.2g} from {alone}")
    return {"loss": loss} | compare_states(killed, alone, exact, tolerance)


def compare_states(
    killed: pathlib.Path, alone: pathlib.Path, exact: bool, tolerance: Mapping[str, float] = TOLERANCE
) -> dict[str, float]:
    """The largest deviations of the final states. Errors: Unequal."""
    import numpy as np

    far, wanted = {}, final_state(alone)
    for field, leaves in final_state(killed).items():
        for x, y in zip(leaves, wanted[field], strict=True):
            if (exact or field not in tolerance) and not np.array_equal(x, y):
                raise Unequal(f"{killed}: the final {field} differs from that of {alone}")
            if field in tolerance:
                x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
                apart = np.abs(x - y).max(initial=0) / max(np.abs(y).max(initial=0), 1e-6)
                far[field] = max(far.get(field, 0.0), apart)
        if far.get(field, 0) > tolerance.get(field, 0):
            raise Unequal(f"{killed}: the final {field} differs by {far[field]:.2g} from {alone}")
    return far


def rows(path: pathlib.Path) -> list[dict]:
    """The recorded lines, without values that depend on the clock."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def final_state(workdir: pathlib.Path) -> dict[str, list]:
    """Arrays by field of the state."""
    import jax
    import numpy as np

    from jaxcl.train.runs import load_run

    state = load_run(workdir).state
    state = state.replace(key=jax.random.key_data(state.key))
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    return {name: [np.asarray(x) for x in jax.tree.leaves(tree)] for name, tree in fields.items()}


def last_step(folder: pathlib.Path) -> int:
    try:
        lines = (folder / "metrics.jsonl").read_bytes().splitlines()
        return json.loads(lines[-1])["step"]
    except (OSError, ValueError, IndexError):
        return 0


def _newest(folder: pathlib.Path) -> int:
    """Step of the newest checkpoint."""
    return max((int(p.name) for p in _listed(folder / "checkpoints") if p.name.isdigit()), default=0)


def _half_saved(folder: pathlib.Path) -> set[tuple[str, int]]:
    """Incomplete checkpoints: being written now, or when a process was killed."""
    found = set()
    for path in _listed(folder / "checkpoints"):
        if not path.name.isdigit():
            try:
                found.add((path.name, path.stat().st_ino))
            except OSError:  # it is complete and was renamed
                continue
    return found


def _listed(folder: pathlib.Path) -> list[pathlib.Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _deviations(far: dict[str, float]) -> str:
    return ", ".join(f"{k} within {v:.1e}" for k, v in far.items())


def _sleep(seconds: float, process: subprocess.Popen) -> None:
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        pass


def survive(
    kills: int,
    devices: Sequence[int],
    out: pathlib.Path,
    *,
    seed: int = 0,
    steps: int = 48,
    mixed: bool = True,
    moments: Sequence[str] = MOMENTS,
    say=print,
) -> list[Leg]:
    """Kill and compare, leg by leg. Errors: Unequal."""
    ready = {n: undisturbed(out / f"alone-{n}", n, steps) for n in devices}
    plans = [(f"{n} device{'s' * (n > 1)}", [n]) for n in devices]
    if mixed and len(devices) > 1:
        plans.append((f"{', '.join(map(str, devices))} devices in turn", list(devices)))
    tolerance = dict(TOLERANCE)
    for n in devices[1:] if mixed else ():
        any_distance = dict.fromkeys(TOLERANCE, float("inf"))
        apart = compare(out / f"alone-{n}", out / f"alone-{devices[0]}", False, any_distance)
        tolerance = {k: max(v, APART * apart.get(k, 0)) for k, v in tolerance.items()}
        say(f"undisturbed, {n} devices and {devices[0]}: {_deviations(apart)}")
    legs = []
    for i, (name, numbers) in enumerate(plans):
        share = kills * (i + 1) // len(plans) - kills * i // len(plans)
        folder = out / f"killed-{'-'.join(map(str, numbers))}"
        rng = random.Random(f"{seed} {name}")
        leg = Leg(name, numbers, share, folder, steps, rng, moments, max(ready[n] for n in numbers))
        far: dict[str, float] = {}
        for done in leg.run():
            found = compare(done, out / f"alone-{numbers[0]}", len(numbers) == 1, tolerance)
            far = {k: max(far.get(k, 0.0), v) for k, v in found.items()}
        legs.append(leg)
        how = "equal to the bit" if len(numbers) == 1 else _deviations(far)
        what = ", ".join(f"{n} {k}" for k, n in sorted(leg.counts.items()))
        say(f"{name}: {sum(leg.counts.values())} kills ({what}), {leg.finished} runs to the end: same examples, {how}")
    return legs


@fault("kills", "TERM and KILL at random moments, also during saves, until the run has reached its end")
def tries(lab: Any, rounds: int) -> Iterator[Trial]:
    """One leg for each number of devices, and one with restarts on all of them."""
    folder = lab.place("kills")
    try:
        legs = survive(lab.kills or 12 * rounds, lab.devices, folder, seed=lab.seed, steps=lab.steps)
    except Unequal as error:
        yield Trial("killed", LOST, str(error))
        return
    for leg in legs:
        for what, count in leg.counts.items():
            yield from [Trial(f"{what}, {leg.name}", WELL)] * count
