"""`jaxcl.main --profile=N`: a trace of N updates of the real loop, and where their time went.

The trace is JAX's own, of whatever platform; each operation in it is known to the compiled program by name, and the
program tells which part of the update it came from (`jaxcl.method.scopes`). So nothing is compiled or run that would not be
without, and what is measured is what runs.
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
WARM = 3  # updates of a process before its trace: compiling and first touches of memory are over
FILE = "step_time.json"
_WAIT = "jaxcl: wait for data"
_NAMES_MATTER = "jax_compilation_cache_include_metadata_in_key"
OTHER, UNNAMED = "other programs", "of no one part"
_FAR = 100_000  # updates within which a stretch without evaluations is looked for


def check(count: int, total: int) -> None:
    """UserError where a run is too short for the trace that is asked for."""
    if count > total - WARM:
        raise UserError(
            f"--profile is {count}, but the run has {total} updates, of which the first {WARM} are not traced; "
            f"expected {'at most ' + str(total - WARM) if total > WARM else 'a longer run'}"
        )


def window(first: int, total: int, count: int, kind: Callable[[int], Any], pauses: Callable[[int], bool]) -> int | None:
    """The update (from 0) at which to begin; None where too few are left after `first`.

    Args:
      kind: of an update; those of another are other programs, and the first of them compiles.
      pauses: whether something else, such as an evaluation or a checkpoint, follows on so many updates.
    """
    begin = first + WARM
    if begin + count > total:
        return None
    run = 0  # updates in a row that are alike and undisturbed
    for step in range(begin, min(total, begin + _FAR)):
        alike = kind(step) == kind(step - 1) == kind(step - 2)
        run = (0 if run and pauses(step) else run) + 1 if alike else 0
        if run == count:
            return step + 1 - count
    return begin  # there is none so long; what else happens then shows as the rest


class Profile:
    """The loop's handle on its trace; does nothing where no updates are to be traced."""

    def __init__(self, workdir: epath.Path, count: int, begin: int | None):
        own = f"process{jax.process_index()}" if jax.process_count() > 1 else ""
        self._folder = workdir / "profile" / own
        self._begin, self._end = (-1, -1) if begin is None else (begin, begin + count)
        self._since = 0.0
        self._tracing: str | None = None  # the folder it is written to
        self._names_mattered = getattr(jax.config, _NAMES_MATTER)
        if begin is not None:
            # Otherwise the cache may give the same program as another config or version named its parts.
            jax.config.update(_NAMES_MATTER, True)

    def before(self, step: int, state: Any) -> None:
        """Of every update, in front of the wait for its batch."""
        if step != self._begin:
            return
        jax.block_until_ready(state)
        # The profiler writes to local disks only.
        remote = storage.is_remote(self._folder)
        folder = tempfile.mkdtemp() if remote else os.fspath(self._folder)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every call of Python would slow the loop, and hide the rest
        try:
            jax.profiler.start_trace(folder, profiler_options=options)
        except RuntimeError as error:  # somebody else's trace is on
            logger.warning("no profile: %s", str(error).splitlines()[0])
            return
        self._tracing, self._since = folder, time.perf_counter()

    def waiting(self) -> contextlib.AbstractContextManager:
        return jax.profiler.TraceAnnotation(_WAIT) if self._tracing else contextlib.nullcontext()

    def update(self, step: int) -> contextlib.AbstractContextManager:
        if not self._tracing:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("update", step_num=step)

    def after(self, step: int, update: Any, state: Any, batch: Any) -> None:
        """Of every update, when it is on its way; update: what was called with such a state and batch, under jit."""
        if not self._tracing or step + 1 != self._end:
            return
        jax.block_until_ready(state)
        seconds = (time.perf_counter() - self._since) / (self._end - self._begin)
        folder = self.close()
        where = f"updates {self._begin + 1} to {self._end}"
        found = _newest(folder)
        if found is None:
            logger.warning("the profiler wrote nothing of %s", where)
            return
        figures = {"updates": [self._begin + 1, self._end], "device": jax.devices()[0].device_kind}
        try:
            program = update.lower(state, batch).compile()  # the one that ran: nothing is compiled
            figures |= step_time(found, scopes_of(program.as_text()), self._end - self._begin, seconds)
        except Exception as error:  # noqa: BLE001 - every platform writes its own kind of trace, and a run goes on
            logger.warning(
                "the times of its parts could not be read from the profile: %s: %s", type(error).__name__, error
            )
            figures = None
        self._keep(folder, figures)
        logger.info(
            "profile of %s: %s; open it with `xprof --logdir=%s` (pip install xprof), or its .trace.json.gz at "
            "ui.perfetto.dev",
            *(where, self._folder, self._folder),
        )

    def close(self) -> str:
        """End the trace, if one is on; -> where it was written."""
        jax.config.update(_NAMES_MATTER, self._names_mattered)
        folder, self._tracing = self._tracing, None
        if folder:
            jax.profiler.stop_trace()
        return folder or ""

    def _keep(self, folder: str, figures: dict[str, Any] | None) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        if storage.is_remote(self._folder):
            for path in storage.files(epath.Path(folder)):
                target = self._folder / path.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
            epath.Path(folder).rmtree()
        if figures:
            storage.write_whole(self._folder / FILE, json.dumps(figures, indent=2) + "\n")


def read_step_time(workdir: str | os.PathLike) -> dict[str, Any] | None:
    """What `step_time` found in a run's newest trace (of its first process); None without."""
    for own in ("", "process0"):
        path = epath.Path(workdir) / "profile" / own / FILE
        if path.exists():
            return json.loads(path.read_text())
    return None


def _newest(folder: str) -> str | None:
    found = sorted(epath.Path(folder).glob("plugins/profile/*/*.xplane.pb"))
    return os.fspath(found[-1]) if found else None


# ---- from a trace to the time of each part


class _Op(NamedTuple):
    start: float
    end: float
    scope: str
    around: bool


def step_time(trace: str, parts: Scopes, updates: int, seconds: float) -> dict[str, Any]:
    """Seconds an update of each part of it, from a trace of so many updates.

    Args:
      trace: an .xplane.pb file.
      parts: of the program that ran.
      updates: how many were traced.
      seconds: that one took, by the host's clock.

    Returns:
      {"seconds": as given, "parts": {scope: seconds, most first}, "data": seconds in which the device had nothing to do
      and the loop waited for a batch, "rest": what is left of `seconds`: nothing ran, or nothing that the trace knows}.
      A moment in which several operations run is shared between them; of several devices the mean.
    """
    devices, waits = _read(trace, parts)
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


def _read(trace: str, parts: Scopes) -> tuple[list[list[_Op]], list[tuple[float, float]]]:
    """Operations of each device, and the times in which the loop waited for a batch; in nanoseconds."""
    devices: dict[Any, list[_Op]] = collections.defaultdict(list)
    waits, begun, ended = [], [], {}
    for plane in jax.profiler.ProfileData.from_file(trace).planes:
        accelerator = plane.name.startswith("/device:")
        for line in plane.lines:
            if accelerator and not (line.name.startswith("Stream") or line.name == "XLA Ops"):
                continue  # the same again, summed up
            for event in line.events:
                start, end = event.start_ns, event.start_ns + event.duration_ns
                if event.name == _WAIT:
                    waits.append((start, end))
                elif accelerator:
                    found = dict(event.stats)
                    name = found.get("hlo_op") or re.match(r"%?([\w.-]*)", event.name)[1]
                    devices[plane.name].append(_op(start, end, name, found, parts))
                elif event.name.startswith("end: "):
                    ended[dict(event.stats).get("_c")] = end
                elif event.duration_ns or "::" not in event.name:
                    found = dict(event.stats)
                    if "hlo_op" in found:
                        begun.append((start, end, found))
    # On a CPU an operation may go on in other threads after its own event; a second one then tells of its end.
    for start, end, found in begun:
        end = max(end, ended.get(found.get("_p"), end))
        devices[found.get("device_ordinal", 0)].append(_op(start, end, found["hlo_op"], found, parts))
    return list(devices.values()), waits


def _op(start: float, end: float, name: str, found: dict[str, Any], parts: Scopes) -> _Op:
    if found.get("hlo_module", parts.module) != parts.module:
        return _Op(start, end, OTHER, False)
    return _Op(start, end, parts.of.get(name) or UNNAMED, name in parts.around)


def _shares(ops: Iterable[_Op]) -> tuple[collections.Counter, list[tuple[float, float]]]:
    """-> (time of each part, the stretches in which nothing ran)."""
    edges = sorted(
        [(op.start, 1, op) for op in ops if op.end > op.start] + [(op.end, 0, op) for op in ops if op.end > op.start],
        key=lambda e: e[:2],
    )
    shares, idle = collections.Counter(), []
    active, around = collections.Counter(), collections.Counter()
    before = edges[0][0] if edges else 0.0
    for at, begins, op in edges:
        if at > before:
            # What only holds others counts where none of them runs.
            running = +active or +around
            for name, count in running.items():
                shares[name] += (at - before) * count / running.total()
            if not running:
                idle.append((before, at))
        (around if op.around else active)[op.part] += 1 if begins else -1
        before = at
    return shares, idle


def _overlap(a: list[tuple[float, float]], b: list[tuple[float, float]]) -> float:
    """Length of what two lists of stretches, each without overlaps, have in common."""
    a, b, i, j, total = sorted(a), sorted(b), 0, 0, 0.0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total
