"""`jaxcl.main --profile=N`: a trace of N updates of the training loop, and the time of each scope of the update.

The trace is JAX's own, on any platform. The compiled program maps the operations in the trace to the scopes of the
update (`jaxcl.method.scopes`). Nothing is compiled or run only for the profile, so it measures the real run.
"""

import collections
import contextlib
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
from etils import epath

from jaxcl.errors import UserError
from jaxcl.method.scopes import Scopes, scopes_of
from jaxcl.runtime import storage

logger = logging.getLogger("jaxcl")
WARM = 3  # first updates of a process, which are not traced: they compile and touch memory for the first time
FILE = "step_time.json"
NUMBERS = ("seconds", "data", "rest")  # keys of it
_WAIT = "jaxcl: wait for data"
_NAMES_IN_KEY = "jax_compilation_cache_include_metadata_in_key"
OTHER, UNNAMED = "other programs", "in no scope"
_SEARCHED = 100_000  # updates searched for a stretch without evaluations and checkpoints


def check(count: int, total: int) -> None:
    """UserError if a run of `total` updates is too short to trace `count` of them."""
    if count > total - WARM:
        raise UserError(
            f"--profile is {count}, but the run has {total} updates, of which the first {WARM} are not traced; "
            f"expected {'at most ' + str(total - WARM) if total > WARM else 'a longer run'}"
        )


def window(first: int, total: int, count: int, kind: Callable[[int], Any], pauses: Callable[[int], bool]) -> int | None:
    """Choose the updates to trace: `count` in a row that run one program, without a pause between them.

    Args:
      first: updates done when this process starts.
      total: updates of the run.
      count: updates to trace.
      kind: maps an update to the program that it runs; the first update of a program compiles it.
      pauses: whether something else, such as an evaluation or a checkpoint, follows after this number of updates.

    Returns:
      The first update to trace (from 0), or None if fewer than `count` are left. If there is no such stretch, the
      pauses count as time in which nothing ran.
    """
    begin = first + WARM
    if begin + count > total:
        return None
    run = 0  # updates in a row that run one program without a pause
    for step in range(begin, min(total, begin + _SEARCHED)):
        alike = kind(step) == kind(step - 1) == kind(step - 2)
        run = (0 if run and pauses(step) else run) + 1 if alike else 0
        if run == count:
            return step + 1 - count
    return begin


class Profile:
    """The loop's handle on its trace. Does nothing if `begin` is None."""

    def __init__(self, workdir: epath.Path, count: int, begin: int | None):
        process = f"process{jax.process_index()}" if jax.process_count() > 1 else ""
        self._folder = workdir / "profile" / process
        self._begin, self._end = (-1, -1) if begin is None else (begin, begin + count)
        self._since = 0.0
        self._tracing: str | None = None  # the folder that the trace is written to
        self._names_in_key = getattr(jax.config, _NAMES_IN_KEY)
        if begin is not None:
            # Otherwise the compilation cache may return this program with the scope names of another config.
            jax.config.update(_NAMES_IN_KEY, True)

    @classmethod
    def of_run(
        cls,
        workdir: epath.Path,
        count: int,
        *,
        first: int,
        total: int,
        kind: Callable[[int], Any],
        pauses: Callable[[int], bool],
    ) -> "Profile":
        """Trace `count` updates (0: none) in the `window` of a run; logs a line if too few are left."""
        begin = window(first, total, count, kind, pauses) if count else None
        if count and begin is None:
            left = max(0, total - first - WARM)
            logger.info("no profile: --profile asks for %d updates, but only %d are left to trace", count, left)
        return cls(workdir, count, begin)

    def before(self, step: int, state: Any) -> None:
        """Call before every update, before waiting for its batch."""
        if step != self._begin:
            return
        jax.block_until_ready(state)
        # The profiler writes to local disks only.
        remote = storage.is_remote(self._folder)
        folder = tempfile.mkdtemp() if remote else os.fspath(storage.plain_link(self._folder))
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # tracing every Python call would slow the loop down
        try:
            jax.profiler.start_trace(folder, profiler_options=options)
        except RuntimeError as error:  # another trace is running
            logger.warning("no profile: %s", str(error).splitlines()[0])
            return
        self._tracing, self._since = folder, time.perf_counter()

    def waiting(self) -> contextlib.AbstractContextManager:
        """Annotate the wait for a batch."""
        return jax.profiler.TraceAnnotation(_WAIT) if self._tracing else contextlib.nullcontext()

    def update(self, step: int) -> contextlib.AbstractContextManager:
        """Annotate an update."""
        if not self._tracing:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("update", step_num=step)

    def after(self, step: int, update: Any, state: Any, batch: Any) -> None:
        """Call after every update was dispatched. `update`: the jitted function, called with such a state and batch."""
        if not self._tracing or step + 1 != self._end:
            return
        jax.block_until_ready(state)
        seconds = (time.perf_counter() - self._since) / (self._end - self._begin)
        folder = self.close()
        where = f"updates {self._begin + 1} to {self._end}"
        found = _newest(folder)
        if found is None:
            logger.warning("the profiler wrote no trace of %s", where)
            return
        measured = {"updates": [self._begin + 1, self._end], "device": jax.devices()[0].device_kind}
        try:
            program = update.lower(state, batch).compile()  # from the cache: it ran already
            measured |= step_time(found, scopes_of(program.as_text()), self._end - self._begin, seconds)
        except Exception as error:  # noqa: BLE001 - traces differ between platforms; none may end the run
            logger.warning(
                "the time of each scope cannot be read from the profile: %s: %s", type(error).__name__, error
            )
            measured = None
        self._keep(folder, measured)
        logger.info(
            "profile of %s: %s; open it with `xprof --logdir=%s` (pip install xprof), or its .trace.json.gz at "
            "ui.perfetto.dev",
            *(where, self._folder, self._folder),
        )

    def close(self) -> str:
        """End the trace, if one is running; -> the folder it was written to."""
        jax.config.update(_NAMES_IN_KEY, self._names_in_key)
        folder, self._tracing = self._tracing, None
        if folder:
            jax.profiler.stop_trace()
        return folder or ""

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _keep(self, folder: str, measured: dict[str, Any] | None) -> None:
        """Move the trace to the run folder, if that is remote, and write the measurements beside it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if storage.is_remote(self._folder):
            for path in storage.files(epath.Path(folder)):
                target = self._folder / path.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
            epath.Path(folder).rmtree()
        if measured:
            storage.write_whole(self._folder / FILE, json.dumps(measured, indent=2) + "\n")


def read_step_time(workdir: str | os.PathLike) -> dict[str, Any] | None:
    """Read the measurements of a run's newest trace (`step_time`, of its first process); None if there are none."""
    for process in ("", "process0"):
        path = epath.Path(workdir) / "profile" / process / FILE
        if path.exists():
            advice = "remove it, then run the same command again"
            found = storage.read_json(path, "updates", "device", "parts", *NUMBERS, advice=advice)
            parts, updates = found["parts"], found["updates"]
            whole = isinstance(parts, dict) and isinstance(updates, list) and len(updates) == 2
            if not whole or not all(
                isinstance(x, (int, float)) for x in (*parts.values(), *(found[k] for k in NUMBERS))
            ):
                raise UserError(f"{os.fspath(path)} is not one of jaxcl; {advice}")
            return found
    return None


def _newest(folder: str) -> str | None:
    found = storage.matching(folder, "plugins/profile/*/*.xplane.pb")
    return os.fspath(found[-1]) if found else None


# ---- from a trace to the time of each scope


class _Op(NamedTuple):
    """One run of an operation; around: it only contains others, such as a loop."""

    start: float
    end: float
    scope: str
    around: bool


def step_time(trace: str, scopes: Scopes, updates: int, seconds: float) -> dict[str, Any]:
    """Seconds per update that each scope takes.

    Args:
      trace: an .xplane.pb file.
      scopes: of the program that ran.
      updates: number of traced updates.
      seconds: duration of one update by the host's clock.

    Returns:
      {"seconds": as given, "parts": {scope: seconds, longest first}, "data": seconds in which the device was idle while
      the loop waited for a batch, "rest": the remaining seconds, in which nothing ran that the trace knows}.
      Operations that run at the same time share it equally; over several devices this is the mean.
    """
    devices, waits = _read(trace, scopes)
    shares, data = collections.Counter(), 0.0
    for ops in devices:
        own, idle = _shares(ops)
        shares.update({k: v / len(devices) for k, v in own.items()})
        data += _overlap(idle, waits) / len(devices)
    per_update = {k: v / updates / 1e9 for k, v in shares.most_common()}
    data = data / updates / 1e9
    return {
        "seconds": seconds,
        "parts": per_update,
        "data": data,
        "rest": seconds - data - sum(per_update.values()),
    }


def _read(trace: str, scopes: Scopes) -> tuple[list[list[_Op]], list[tuple[float, float]]]:
    """-> (operations of each device, intervals in which the loop waited for a batch), in nanoseconds."""
    devices: dict[Any, list[_Op]] = collections.defaultdict(list)
    waits, begun, ended = [], [], {}
    for plane in jax.profiler.ProfileData.from_file(trace).planes:
        accelerator = plane.name.startswith("/device:")
        for line in plane.lines:
            if accelerator and not (line.name.startswith("Stream") or line.name == "XLA Ops"):
                continue  # sums of the same operations
            for event in line.events:
                start, end = event.start_ns, event.start_ns + event.duration_ns
                if event.name == _WAIT:
                    waits.append((start, end))
                elif accelerator:
                    found = dict(event.stats)
                    name = found.get("hlo_op") or re.match(r"%?([\w.-]*)", event.name)[1]
                    devices[plane.name].append(_op(start, end, name, found, scopes))
                elif event.name.startswith("end: "):
                    ended[dict(event.stats).get("_c")] = end
                elif event.duration_ns or "::" not in event.name:
                    found = dict(event.stats)
                    if "hlo_op" in found:
                        begun.append((start, end, found))
    # On a CPU an operation may continue in other threads after its own event; a second event then marks its end.
    for start, end, found in begun:
        end = max(end, ended.get(found.get("_p"), end))
        devices[found.get("device_ordinal", 0)].append(_op(start, end, found["hlo_op"], found, scopes))
    return list(devices.values()), waits


def _op(start: float, end: float, name: str, found: dict[str, Any], scopes: Scopes) -> _Op:
    if found.get("hlo_module", scopes.module) != scopes.module:
        return _Op(start, end, OTHER, False)
    return _Op(start, end, scopes.of.get(name) or UNNAMED, name in scopes.around)


def _shares(ops: Iterable[_Op]) -> tuple[collections.Counter, list[tuple[float, float]]]:
    """-> (time of each scope, intervals in which nothing ran)."""
    edges = sorted(
        [(op.start, 1, op) for op in ops if op.end > op.start] + [(op.end, 0, op) for op in ops if op.end > op.start],
        key=lambda e: e[:2],
    )
    shares, idle = collections.Counter(), []
    active, around = collections.Counter(), collections.Counter()
    before = edges[0][0] if edges else 0.0
    for at, begins, op in edges:
        if at > before:
            # An operation that only contains others counts while none of them runs.
            running = +active or +around
            for name, count in running.items():
                shares[name] += (at - before) * count / running.total()
            if not running:
                idle.append((before, at))
        (around if op.around else active)[op.scope] += 1 if begins else -1
        before = at
    return shares, idle


def _overlap(a: list[tuple[float, float]], b: list[tuple[float, float]]) -> float:
    """Length of the intersection of two lists of intervals, each without overlaps."""
    a, b, i, j, total = sorted(a), sorted(b), 0, 0, 0.0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total
