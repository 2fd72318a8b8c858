"""What all faults use: a tiny run, its folders at two moments, processes, and what may be said of their end."""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.survival import kills
from benchmarks.survival.kills import ROOT

STEPS = 24  # a checkpoint every 4; the folder "half" was stopped after 12
PATIENCE = 240.0  # seconds that a process may take
MAY_GO = ("lock.json", "environment.json")  # files that a command may remove, or write anew when it starts
_BOTH = "-dac_override,-dac_read_search"
OBEY = ("setpriv", f"--inh-caps={_BOTH}", f"--bounding-set={_BOTH}")  # root without its way past permissions
COMMANDS = ("evaluate", "embed", "export")  # that read a run folder


class Ended(NamedTuple):
    """How a command ended. code: 128 + N after signal N; None: it did not end in time."""

    code: int | None
    out: str
    error: str
    seconds: float = 0.0


class Lab:
    """Folders and processes of one session.

    Args:
      out: a folder for everything.
      seed: of what is drawn.
    """

    kills, devices, steps = 0, (1, 2, 4), 48  # of the fault "kills"

    def __init__(self, out: pathlib.Path, seed: int = 0):
        self.out, self.seed, self.rng = out, seed, random.Random(seed)
        self._workers: dict[bool, subprocess.Popen] = {}
        self._count = 0
        os.environ.update({k: v for k, v in environment().items() if k.startswith(("JAX", "XLA"))})
        # Processes inherit that a signal is ignored, as in the background of a script, but not how it is handled.
        for number in (signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_IGN:
                signal.signal(number, lambda *_: None)

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers.values():
            worker.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.wait(timeout=20)
            worker.kill()
        self._workers = {}

    # ---- folders

    def place(self, name: str = "trial") -> pathlib.Path:
        """A new path; its parent exists."""
        self._count += 1
        path = self.out / "trials" / f"{name}-{self._count}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @functools.cached_property
    def done(self) -> pathlib.Path:
        """An undisturbed run."""
        folder = self.out / "done"
        if not (folder / "results.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            ended = self.run(training(folder))
            assert ended.code == 0, ended.error
        return folder

    @functools.cached_property
    def half(self) -> pathlib.Path:
        """A run that was asked to end after 12 updates or a little later."""
        folder = self.out / "half"
        if not (folder / "checkpoints").exists():
            at = {"event": "os.mkdir", "name": "checkpoints/12", "do": "TERM"}
            ended = self.run(training(folder), at=at)
            assert ended.code == 75, (ended.code, ended.error)
        return folder

    @functools.cached_property
    def other(self) -> pathlib.Path:
        """A run of another config."""
        folder = self.out / "other"
        if not (folder / "results.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            odd = ("seed=1", "data.limit=48", "optimizer.lr=0.001", "model.head_features=24", "name='other'")
            ended = self.run(training(folder, *(f"--config.{o}" for o in odd)))
            assert ended.code == 0, ended.error
        return folder

    def copy(self, of: pathlib.Path, to: pathlib.Path | None = None) -> pathlib.Path:
        """A copy of a folder to damage."""
        return pathlib.Path(shutil.copytree(of, to or self.place(of.name), symlinks=True))

    # ---- processes

    def start(self, arguments: Sequence[str], **options: Any) -> subprocess.Popen:
        """Start `jaxcl ARGUMENTS`.

        Args:
          at: what happens at which moment (`hooked`); None: nothing.
          environ: more variables.
          cwd: the folder to start in.
        """
        program, at = "jaxcl", options.get("at")
        there = environment() | {"JAXCL_HUGE_PAGES": "off"} | dict(options.get("environ") or {})
        if at is not None:
            program, there["SURVIVAL_AT"] = "benchmarks.survival.hooked", json.dumps(at)
        return subprocess.Popen(
            [sys.executable, "-m", program, *map(str, arguments)],
            cwd=options.get("cwd", ROOT),
            env=there,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )

    def run(self, arguments: Sequence[str], **options: Any) -> Ended:
        """Run `jaxcl ARGUMENTS` to its end, as `start`."""
        return wait(self.start(arguments, **options))

    def quick(self, arguments: Sequence[str], *, denied: bool = False) -> Ended:
        """Run `jaxcl ARGUMENTS` in a process that is already there; as `run`, but only for commands that end.

        Args:
          denied: in a process that obeys permissions, also where this one is root's.
        """
        worker = self._workers.get(denied)
        if worker is None or worker.poll() is not None:
            obey = list(OBEY) if denied and os.geteuid() == 0 else []
            worker = self._workers[denied] = subprocess.Popen(
                [*obey, sys.executable, "-m", "benchmarks.survival.worker"],
                cwd=ROOT,
                env=environment() | {"JAXCL_HUGE_PAGES": "off"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        begun, files = time.monotonic(), {k: str(self.out / f"worker.{k}") for k in ("out", "error")}
        worker.stdin.write(json.dumps({"arguments": list(map(str, arguments))} | files) + "\n")
        worker.stdin.flush()
        if select.select([worker.stdout], [], [], PATIENCE)[0]:
            answer = worker.stdout.readline().strip()
            code = int(answer) if answer else worker.wait()
        else:
            worker.kill()
            worker.wait()
            code = None
        texts = (pathlib.Path(files[k]).read_text(errors="replace") for k in ("out", "error"))
        return Ended(code, *texts, time.monotonic() - begun)

    # ---- what must be so

    def same_end(self, folder: pathlib.Path, *, only_state: bool = False) -> str:
        """How a run that was continued to its end differs from the undisturbed one; "" if it does not."""
        try:
            if only_state:
                kills.compare_states(folder, self.done, exact=True)
            else:
                kills.compare(folder, self.done, exact=True)
            ours, wanted = (results_of(f) for f in (folder, self.done))
        except kills.Unequal as error:
            return str(error).replace(str(self.out), "...")
        except Exception as error:  # noqa: BLE001 - it cannot even be read
            return f"it cannot be read: {type(error).__name__}: {error}"
        return "" if ours == wanted else "its results.json differs"

    def answer(self, command: str, folder: pathlib.Path, *more: str, denied: bool = False) -> tuple[Ended, str]:
        """Run a command that reads a run folder; -> (its end, a hash of what it gave)."""
        out = self.place("out")
        arguments = [command, f"--workdir={folder}", *more]
        if command == "evaluate":
            ended = self.quick([*arguments, "--suite=knn"], denied=denied)
            return ended, ended.out.strip()
        path = out.with_suffix({"embed": ".npz", "export": ".safetensors"}[command])
        ended = self.quick(
            [*arguments, f"--out={path}", *(["--split=test"] if command == "embed" else [])], denied=denied
        )
        return ended, _content(path) if path.exists() else ""

    @functools.cache  # noqa: B019 - a lab lives as long as the program
    def right(self, command: str, of: pathlib.Path, step: int) -> str:
        """What a command gives for an undamaged folder."""
        ended, content = self.answer(command, of, f"--step={step}")
        assert ended.code == 0 and content, ended.error
        return content

    def nothing_lost(self, folder: pathlib.Path, of: pathlib.Path) -> str:
        """After a run that ended early: a checkpoint can be evaluated, and the same command goes on to the same end."""
        if steps_of(folder):
            ended, _ = self.answer("evaluate", folder)
            if ended.code:
                return f"evaluate ended with {ended.code}: {last_line(ended)}"
        ended = self.quick(training(folder))
        if ended.code:
            return f"continuing it ended with {ended.code}: {last_line(ended)}"
        return self.same_end(folder)


def environment() -> dict[str, str]:
    """That of the kills, without hints of another run."""
    return {k: v for k, v in kills.environment().items() if k not in ("JAXCL_GUARDED", "SURVIVAL_AT")}


def training(workdir: pathlib.Path, *more: str) -> list[str]:
    """The command of the tiny run."""
    own = [f"--workdir={workdir}", "--config.devices=1", f"--config.duration={STEPS}"]
    return ["train", *kills.SMALL, *own, *more]


def wait(process: subprocess.Popen, timeout: float = PATIENCE) -> Ended:
    """The end of a process; it is killed when the time is over."""
    begun = time.monotonic()
    try:
        out, error = process.communicate(timeout=timeout)
        code = process.returncode if process.returncode >= 0 else 128 - process.returncode
    except subprocess.TimeoutExpired:
        process.kill()
        out, error = process.communicate()
        code = None
    return Ended(code, out, error, time.monotonic() - begun)


def told(ended: Ended, *codes: int) -> str:
    """What is wrong with an end that should be one plain line and one of some exit codes; "": nothing."""
    if ended.code is None:
        return "it did not end"
    if ended.code not in codes:
        return f"exit code {ended.code}: {last_line(ended)}"
    if "Traceback" in ended.error:
        return f"a traceback: {last_line(ended)}"
    lines = [line for line in ended.error.splitlines() if line.startswith("jaxcl: ")]
    if len(lines) != (ended.code != 0):
        return f"{len(lines)} lines"
    if lines and last_line(ended) != lines[0]:
        return f"its line is not the last: {last_line(ended)}"
    return ""


def last_line(ended: Ended) -> str:
    return (ended.error.strip().splitlines() or [""])[-1][:300]


def contents(folder: pathlib.Path) -> dict[str, str]:
    """{hash: a path} of all files below a folder, except those that may go."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in MAY_GO:
            found[_content(path)] = str(path.relative_to(folder))
    return found


def gone(before: Mapping[str, str], folder: pathlib.Path) -> str:
    """The file whose content is nowhere in the folder any more; "" if there is none."""
    now = contents(folder)
    return next((path for digest, path in before.items() if digest not in now), "")


def _content(path: pathlib.Path) -> str:
    if path.suffix == ".npz":  # the archive has times in it
        import numpy as np

        with np.load(path) as file:
            return hashlib.blake2b(file["features"].tobytes()).hexdigest()
    data = path.read_bytes()
    if path.suffix == ".safetensors":  # without its description, which names paths
        data = data[8 + int.from_bytes(data[:8], "little") :]
    return hashlib.blake2b(data).hexdigest()


def results_of(folder: pathlib.Path) -> dict[str, Any]:
    """results.json without what depends on the clock and on the command line."""
    found = json.loads((folder / "results.json").read_text())
    return {k: v for k, v in found.items() if k not in ("seconds", "command", "versions")}


def steps_of(folder: pathlib.Path) -> list[int]:
    """The complete checkpoints, ascending."""
    there = folder / "checkpoints"
    return sorted(int(p.name) for p in there.iterdir() if p.name.isdigit()) if there.is_dir() else []


@contextlib.contextmanager
def ends_with_us(*processes: subprocess.Popen) -> Iterator[None]:
    """No process outlives the block."""
    try:
        yield
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
