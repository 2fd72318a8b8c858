"""Train configs over seeds and a grid of values, and write one table.

    jaxcl sweep --config=FILE[:PRESET] --seeds=0,1,2 --out=DIR
    jaxcl sweep --config=configs/simclr.py --config=configs/clae.py:clean_pair --seeds=0,1,2 \\
        --set="eval.final=('knn','linear')" --grid=optimizer.lr=1e-3,3e-3 --out=runs/clae-table

Each run is a separate process, `python -m jaxcl.main`, with the run folder DIR/<setting>/seed-N and its output in
seed-N.log beside the folder. All configs are read before the first run starts. All settings run with one seed before
the next seed, so that an interrupted sweep has a complete table for the first seeds. The same command resumes: runs
that have finished or diverged are not repeated. DIR/table.md and DIR/table.json are rewritten after every run.

Exit codes: 0 done, even if runs diverged; 1 runs failed; 2 a mistake to correct; 75 stopped on request: run the same
command again.
"""

import collections
import contextlib
import dataclasses
import logging
import os
import pathlib
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from jaxcl.commands.sweep import table as sweep_table
from jaxcl.commands.sweep.runs import Run, plan
from jaxcl.commands.sweep.table import Entry, Row
from jaxcl.errors import Preempted, UserError
from jaxcl.report.progress import duration
from jaxcl.runtime import storage
from jaxcl.runtime.cores import usable_cores
from jaxcl.runtime.flags import Flags
from jaxcl.train import config_diff, run_folder

logger = logging.getLogger("jaxcl")

FLAGS = Flags(__doc__)
FLAGS.texts("config", "FILE[:PRESET]; once for each config.")
FLAGS.texts("grid", "KEY=VALUE,VALUE,...: a config key and its values; several flags: all combinations.")
FLAGS.texts("set", "KEY=VALUE for every run, as --config.KEY=VALUE of jaxcl train; may be given several times.")
FLAGS.text("seeds", "0", "Values of config.seed, separated by commas.")
FLAGS.text(
    "measures", "", "Paths into results.json, separated by commas; default: accuracy of knn, linear, classifier."
)
FLAGS.number("jobs", 1, "Runs at a time, which share the cores; use 1 on an accelerator, since a run takes all of it.")
FLAGS.path("out", "runs/sweep", "The folder of the sweep.")

PROGRAM = (sys.executable, "-m", "jaxcl.main")  # trains one config
_POLL_SECONDS = 0.1
_SAVE_SECONDS = 120.0  # for a run to save, after an error in this process
_RESULTS_BESIDE_EVALUATORS = ("best", "seconds", "steps")


def main(argv: list[str]) -> int:
    """Run the sweep; -> exit code. Raises: UserError before anything starts, or from a run; Preempted."""
    given = FLAGS.parse(argv)
    out = pathlib.Path(given.out)
    runs = plan(given.config, grids=given.grid, sets=given.set, seeds=_seeds(given.seeds), out=out)
    measures = _measures(given.measures, runs)
    if given.jobs < 1:
        raise UserError(f"--jobs is {given.jobs}; expected 1 or more")
    sweep = Sweep(runs, out, measures, command=shlex.join(["python", "-m", "jaxcl", "sweep", *argv[1:]]))
    try:
        sweep.run(given.jobs)
    finally:
        if any(e.state != "waiting" for e in sweep.entries.values()):
            print(sweep.write_table(), end="", flush=True)
    return 1 if any(e.state == "failed" for e in sweep.entries.values()) else 0


def _seeds(text: str) -> list[int]:
    words = [w.strip() for w in text.split(",")]
    if not all(re.fullmatch("[0-9]+", w) for w in words):
        raise UserError(f"--seeds is {text!r}; expected whole numbers from 0, separated by commas")
    return [int(w) for w in words]


def _measures(text: str, runs: Sequence[Run]) -> list[str]:
    """The measures, checked now: a measure that no run has would show as dashes only after hours."""
    measures = [w.strip() for w in text.split(",") if w.strip()]
    from jaxcl.evaluate.registry import result_name  # late: it imports JAX

    evaluators = {result_name(kind) for r in runs for kind in r.config["eval"]["final"]}
    for measure in measures:
        head = measure.partition(".")[0]
        if head not in evaluators.union(_RESULTS_BESIDE_EVALUATORS):
            raise UserError(
                f"--measures names {measure!r}, but no config's eval.final has {head!r}; "
                f"add it by --set=\"eval.final=('knn','{head}')\"; there now: {', '.join(sorted(evaluators)) or 'none'}"
            )
    return measures


@dataclasses.dataclass
class _Job:
    run: Run
    process: subprocess.Popen
    slot: int
    began: float
    log_start: int  # bytes that earlier processes wrote to the log


class Sweep:
    """The runs, their states and their table."""

    def __init__(self, runs: Sequence[Run], out: pathlib.Path, measures: Sequence[str], command: str):
        self.runs, self.out, self.measures, self.command = runs, out, measures, command
        self.entries: dict[Run, Entry] = {r: self._recorded(r) for r in runs}
        self._failures: list[str] = []
        self._mistakes: list[str] = []
        self._seconds: list[float] = []
        self._asked: list[int] = []  # signals that asked the sweep to stop
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make --out {out}: {error.strerror}; choose a folder you may write to") from None

    def run(self, jobs: int) -> None:
        """Start the waiting runs, `jobs` at a time, and wait for them. Raises: UserError, Preempted."""
        waiting = collections.deque(r for r in self.runs if self.entries[r].state == "waiting")
        logger.info("%d runs in %s, %d of them already done", len(self.runs), self.out, len(self.runs) - len(waiting))
        running: list[_Job] = []
        handled = 0
        with self._signals():
            try:
                while running or (waiting and not self._halted):
                    while waiting and len(running) < jobs and not self._halted:
                        slot = min(set(range(jobs)) - {j.slot for j in running})
                        running.append(self._start(waiting.popleft(), slot, jobs))
                    if len(self._asked) > handled:
                        handled = len(self._asked)
                        self._stop(running)
                    time.sleep(_POLL_SECONDS)
                    for job in [j for j in running if j.process.poll() is not None]:
                        running.remove(job)
                        self._ended(job, len(waiting), running, jobs)
            finally:
                for job in running:  # only after an error in this process, such as a full disk
                    job.process.terminate()
                for job in running:
                    try:  # it saves first; one that waits for a disk never does
                        job.process.wait(_SAVE_SECONDS)
                    except subprocess.TimeoutExpired:
                        job.process.kill()
        for line in self._failures:
            print(f"jaxcl: {line}", file=sys.stderr)
        if self._mistakes:
            raise UserError(self._mistakes[0])
        if self._asked:
            done = sum(e.state in ("finished", "diverged") for e in self.entries.values())
            raise Preempted(f"stopped on request, {done} of {len(self.runs)} runs done; the same command resumes")

    # ---- before and after a process

    def _recorded(self, run: Run) -> Entry:
        """What an earlier sweep left. Raises: UserError if the folder holds a run of another config."""
        path = run.workdir / "config.json"
        old = storage.read_json(path, "eval") if path.exists() else run.config
        if changed := config_diff.differences(old, run.config):
            more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            raise UserError(
                f"{run.workdir} holds a run of another config, {changed[0]}{more}; "
                "use another --out, or the same options to resume"
            )
        if (run.workdir / "results.json").exists():
            if old["eval"] != run.config["eval"]:
                a, b = config_diff.flatten(old["eval"], "eval"), config_diff.flatten(run.config["eval"], "eval")
                key = next(k for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k))
                logger.warning(
                    "%s was evaluated with %s = %s, not %s; its results are kept. Remove %s to evaluate it again",
                    run.title, key, a.get(key), b.get(key), run.workdir / "results.json",
                )  # fmt: skip
            return self._finished(run)
        if (mark := _mark(run)).exists():
            record = storage.read_json(mark, "config", "why", advice="remove it to repeat the run")
            if record["config"] == config_diff.fingerprint(run.config):
                logger.info("%s diverged before (%s); remove %s to repeat it", run.title, record["why"], mark)
                return self._entry(run, "diverged")
        return self._entry(run, "waiting")

    def _entry(self, run: Run, state: str, results: dict[str, Any] | None = None) -> Entry:
        return Entry(run.seed, str(run.workdir.relative_to(self.out)), state, results)

    def _finished(self, run: Run) -> Entry:
        path, advice = run.workdir / "results.json", "remove it to evaluate the run again"
        return self._entry(run, "finished", storage.read_json(path, advice=advice))

    def _start(self, run: Run, slot: int, jobs: int) -> _Job:
        run.workdir.parent.mkdir(parents=True, exist_ok=True)
        # A new session: Ctrl-C in a terminal reaches only the sweep, which then asks its runs to save.
        with run.log.open("ab") as log, _affinity(slot, jobs):
            start = log.tell()
            process = subprocess.Popen(
                [*PROGRAM, *run.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return _Job(run, process, slot, time.monotonic(), start)

    def _ended(self, job: _Job, waiting: int, running: Sequence[_Job], jobs: int) -> None:
        run, code, seconds = job.run, job.process.returncode, time.monotonic() - job.began
        why = _last_words(job)
        if code == 0 and (run.workdir / "results.json").exists():
            self.entries[run] = self._finished(run)
            self._seconds.append(seconds)
            what = self._summary(self.entries[run])
        elif code == 3:
            self.entries[run] = self._entry(run, "diverged")
            run_folder.write_json(_mark(run), {"why": why, "config": config_diff.fingerprint(run.config)})
            what = f"diverged: {why}"
        elif code == 2:
            self._mistakes.append(f"{why} ({run.title}, see {run.log})")
            what = f"{why}; no more runs are started"
        elif code == 75 or (self._asked and code in (-signal.SIGTERM, -signal.SIGKILL)):
            self._asked = self._asked or [signal.SIGTERM]  # a scheduler that stops one run means the whole sweep
            what = "stopped"
        else:
            self.entries[run] = self._entry(run, "failed")
            how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
            what = f"failed ({how}): {why or 'no message'}"
            self._failures.append(f"{run.title} {what}; see {run.log}")
        ended = sum(e.state != "waiting" for e in self.entries.values())
        left = self._left(waiting, running, jobs)
        logger.info("[%d/%d] %s: %s (%s)%s", ended, len(self.runs), run.title, what, duration(seconds), left)
        self.write_table()

    def _summary(self, entry: Entry) -> str:
        shown = self.measures or sweep_table.DEFAULT
        values = [(m, sweep_table.value(entry.results, m)) for m in shown]
        words = [f"{sweep_table.short(m)} {sweep_table.number(m, v)}" for m, v in values if v is not None]
        return ", ".join(words[:4]) or "finished"

    def _left(self, waiting: int, running: Sequence[_Job], jobs: int) -> str:
        if not self._seconds or self._halted or not (waiting or running):
            return ""
        usual, now = statistics.fmean(self._seconds), time.monotonic()
        seconds = waiting * usual + sum(max(0.0, usual - (now - j.began)) for j in running)
        return f"; about {duration(seconds / min(jobs, waiting + len(running)))} left"

    # ---- ending early

    @property
    def _halted(self) -> bool:
        return bool(self._asked or self._mistakes)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        wanted = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]
        wanted = [s for s in wanted if signal.getsignal(s) != signal.SIG_IGN]  # nohup
        previous = {s: signal.signal(s, lambda signum, frame: self._asked.append(signum)) for s in wanted}
        try:
            yield
        finally:
            for s, handler in previous.items():
                signal.signal(s, handler)

    def _stop(self, running: Sequence[_Job]) -> None:
        impatient = self._asked.count(signal.SIGINT) > 1
        for job in running:
            job.process.kill() if impatient else job.process.terminate()
        if running and not impatient:
            logger.info("stopping: waiting for %d runs to save (Ctrl-C again: do not wait)", len(running))

    # ---- the table

    def write_table(self) -> str:
        """Write table.md and table.json; -> the table in Markdown."""
        rows = []
        for setting in dict.fromkeys(r.setting for r in self.runs):
            grid = {setting.labels[k]: v for k, v in setting.grid.items()}
            rows.append(Row(setting.name, grid, [self.entries[r] for r in self.runs if r.setting is setting]))
        content = sweep_table.table(rows, self.measures)
        about = self.origin()
        run_folder.write_json(self.out / "table.json", about | content)
        storage.write_whole(self.out / "table.md", sweep_table.page(about | content))
        return sweep_table.markdown(content)

    def origin(self) -> dict[str, Any]:
        """The origin of the numbers: "command", "commits", "machine" and "seeds"."""
        environments = self._environments()
        return {
            "command": self.command,
            "commits": list(dict.fromkeys(e["commit"] for e in environments if e.get("commit"))),
            "machine": _machine(environments),
            "seeds": list(dict.fromkeys(r.seed for r in self.runs)),
        }

    def _environments(self) -> list[dict[str, Any]]:
        """The recorded environments of the finished runs. Asking JAX here would take the accelerator from the runs."""
        paths = [r.workdir / "environment.json" for r, e in self.entries.items() if e.state == "finished"]
        return [storage.read_json(p) for p in paths if p.exists()]


def _mark(run: Run) -> pathlib.Path:
    """The file that records that a run diverged. The run has no results.json, and repeating it would not help."""
    return run.workdir.with_name(f"{run.workdir.name}.diverged.json")


def _last_words(job: _Job) -> str:
    """The last line that the process wrote; preferably its message, without "jaxcl: "."""
    with job.run.log.open("rb") as log:
        log.seek(job.log_start)
        lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    plain = [line for line in lines if line.startswith("jaxcl: ")]
    return (plain or lines or [""])[-1].removeprefix("jaxcl: ")


@contextlib.contextmanager
def _affinity(slot: int, jobs: int) -> Iterator[None]:
    """Give processes that start inside their share of the cores. They inherit it before XLA counts the cores."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if jobs == 1 or not cores:
        yield
        return
    os.sched_setaffinity(0, cores[slot::jobs] or [cores[slot % len(cores)]])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def _machine(environments: Sequence[dict[str, Any]]) -> str:
    """ "AMD EPYC 7B13, 2 cores, cpu:cpu, jax 0.10.2"."""
    processor, info = platform.processor() or platform.machine(), pathlib.Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE)):
        processor = found[1]
    devices = collections.Counter(d for e in environments[:1] for d in e.get("devices", ()))
    versions = dict.fromkeys(f"jax {e['packages']['jax']}" for e in environments if "jax" in e.get("packages", {}))
    kinds = [f"{count} x {kind}" if count > 1 else kind for kind, count in devices.items()]
    return ", ".join([processor, f"{usable_cores()} cores", *kinds, *versions])
