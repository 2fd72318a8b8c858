"""Metrics during training: one JSON object per line in `metrics.jsonl`, and the same metrics for TensorBoard.

On a local disk a line is complete as soon as it is written. Nothing can be appended to a file in an object store: there
the files are kept in a temporary folder and uploaded whole, every half minute, before a checkpoint and at the end. A
kill then loses only lines after the last checkpoint, whose steps are repeated anyway.
"""

import json
import logging
import math
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath

from jaxcl.errors import UserError
from jaxcl.runtime import storage

logger = logging.getLogger("jaxcl")
FILE_NAME = "metrics.jsonl"
UPLOAD_SECONDS = 30.0
# JSON has no literals for these. As strings they are valid JSON, and pandas still reads the column as numbers.
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class JsonLines:
    """A file of JSON lines to append to.

    Args:
      path: local or in an object store.
      first_step: lines of later steps are dropped first, since a resumed run writes them again, and so is a last line
        that a kill cut short. 0 empties the file.
    """

    def __init__(self, path: str | os.PathLike, *, first_step: int = 0):
        self._path = storage.folder(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        _keep_until(self._path, first_step)
        self._mirror = _Mirror(self._path.parent) if storage.is_remote(self._path) else None
        local = self._mirror.fetch(self._path.name) if self._mirror else pathlib.Path(self._path)
        self._file = open(local, "a", encoding="utf-8")

    @property
    def closed(self) -> bool:
        return self._file.closed

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one object, which has a "step"."""
        self._file.write(json.dumps(as_json(line), allow_nan=False) + "\n")
        self._file.flush()
        if self._mirror:
            self._mirror.upload(UPLOAD_SECONDS)

    def flush(self) -> None:
        """Upload what was written, if the file is remote."""
        if self._mirror:
            self._mirror.upload()

    def close(self) -> None:
        """Flush and close. May be called twice."""
        if not self._file.closed:
            self._file.close()
            self.flush()


class _Mirror:
    """A temporary local folder whose files are uploaded whole to a folder of an object store."""

    def __init__(self, remote: epath.Path):
        self._remote, self._sizes, self._last = remote, {}, time.monotonic()
        self._folder = tempfile.TemporaryDirectory(prefix="jaxcl-")
        self.path = pathlib.Path(self._folder.name)

    def fetch(self, name: str) -> pathlib.Path:
        """The local copy of a remote file; empty if there is none."""
        remote, local = self._remote / name, self.path / name
        local.write_bytes(remote.read_bytes() if remote.exists() else b"")
        self._sizes[local] = local.stat().st_size
        return local

    def upload(self, seconds: float = 0.0) -> None:
        """Upload the files that have grown, unless that was done within the last `seconds`."""
        if time.monotonic() - self._last < seconds:
            return
        for local in sorted(self.path.iterdir()):
            if (size := local.stat().st_size) != self._sizes.get(local):
                storage.write_whole(self._remote / local.name, local.read_bytes())
                self._sizes[local] = size
        self._last = time.monotonic()


class _Board:
    """A TensorBoard event file, written synchronously.

    tensorboardX.SummaryWriter writes in a thread, which dies silently when the disk is full; its caller then waits
    for ever on a full queue.
    """

    def __init__(self, folder: epath.Path, first_step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._event, self._mirror = Event, None
        if storage.is_remote(folder):
            self._mirror = _Mirror(folder)
        else:
            folder.mkdir(parents=True, exist_ok=True)
        local = self._mirror.path if self._mirror else folder
        # TensorBoard expects names in the order of time; the suffix keeps two files of one second apart.
        self._writer = EventsWriter(os.path.join(local, "events"), f".{os.getpid()}.{time.time_ns() % 10**9:09d}")
        if first_step:  # makes TensorBoard drop the repeated steps of earlier event files
            log = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(wall_time=time.time(), step=first_step + 1, session_log=log))
        self.flush()

    def add(self, step: int, scalars: Mapping[str, float], now: float) -> None:
        from tensorboardX.summary import scalar

        for name, value in scalars.items():
            # TensorBoard does not plot other values, and tensorboardX prints a warning for each.
            if math.isfinite(value):
                self._writer.write_event(self._event(wall_time=now, step=step, summary=scalar(name, value)))
        self._writer.flush()
        if self._mirror:
            self._mirror.upload(UPLOAD_SECONDS)

    def flush(self) -> None:
        self._writer.flush()
        if self._mirror:
            self._mirror.upload()

    def close(self) -> None:
        self._writer.close()
        if self._mirror:
            self._mirror.upload()


class MetricsWriter:
    """Appends metrics to `workdir/metrics.jsonl` and to `workdir/tensorboard`.

    Only one process may write to a workdir; a run of several processes uses process 0.

    Args:
      workdir: the run folder, created if missing; local or in an object store.
      tensorboard: also write TensorBoard event files.
      first_step: the step of the checkpoint that the run continues from. Lines of later steps are dropped, so no step
        appears twice, and so is a last line that a kill cut short. 0 starts afresh.
      also: a function that receives the finite scalars of every step too.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        tensorboard: bool = True,
        first_step: int = 0,
        also: Callable[[int, Mapping[str, float]], None] | None = None,
    ):
        self._also = also
        workdir = storage.folder(workdir)
        self._lines = JsonLines(workdir / FILE_NAME, first_step=first_step)
        self._board = _Board(workdir / "tensorboard", first_step) if tensorboard else None

    def write(self, step: int, metrics: Mapping[str, Any], **extra: Any) -> None:
        """Write one line.

        Args:
          step: the update that the metrics belong to.
          metrics: name -> scalar (Python, NumPy or device scalar). TensorBoard groups names by the part before "/".
          **extra: other content for the line only, such as a histogram or a note.

        Raises:
          ValueError: a name is "step" or "time" or is given twice, or a value is not a scalar.
        """
        if self._lines.closed:
            raise ValueError("this MetricsWriter is closed")
        scalars = {name: _scalar(name, value) for name, value in metrics.items()}
        taken = ({"step", "time"} & (scalars.keys() | extra.keys())) | (scalars.keys() & extra.keys())
        if taken:
            raise ValueError(f"metric names already in use on this line: {sorted(taken)}")
        now = time.time()
        self._lines.write({"step": int(step), "time": round(now, 3), **scalars, **extra})
        if self._board is not None:
            self._board.add(int(step), scalars, now)
        if self._also is not None:
            self._also(int(step), {name: value for name, value in scalars.items() if math.isfinite(value)})

    def flush(self) -> None:
        """Complete both records; before a checkpoint, which must not be ahead of them."""
        self._lines.flush()
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Flush and close both records. May be called twice."""
        board, self._board = self._board, None
        try:
            self._lines.close()
        finally:
            if board is not None:
                board.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """Read the lines of `workdir/metrics.jsonl`, "nan" and "inf" as floats; [] if there is no such file."""
    path = epath.Path(workdir) / FILE_NAME
    if not path.exists():
        return []
    rows = []
    for row in _rows(path.read_bytes()):
        rows.append({k: _NON_FINITE.get(v, v) if isinstance(v, str) else v for k, v in row.items()})
    return rows


def _rows(text: bytes) -> list[dict[str, Any]]:
    """The lines that are records."""
    return [row for row in map(_row, text.splitlines()) if row]


def _row(line: bytes) -> dict[str, Any] | None:
    """The record of one line; None if it is none."""
    row = _value(line)
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _value(line: bytes) -> Any:
    """What a line holds; None if it is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _keep_until(path: epath.Path, first_step: int) -> None:
    """Rewrite `path` atomically with only the steps 1..first_step. What are no records is kept in a file beside it."""
    if not path.exists():
        return
    try:
        before = path.read_bytes()
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise UserError(f"{path} cannot be read: {why}; move it away, then run the same command again") from None
    *lines, last = before.split(b"\n")
    # A kill in the middle of a write leaves a line without an end; a loss of power may leave zeros.
    torn = any(map(_row, [*lines, last])) or (last[:1] in (b"", b"{", b"\0") and _value(last) is None)
    if not torn or any(line.strip() and not _row(line) for line in lines):
        aside = path.with_name(f"damaged-{path.name}")
        storage.write_whole(aside, before)
        logger.warning("%s has lines that are no records; it is kept as %s, and the records go on", path, aside.name)
    # A run that starts afresh writes its step 0 again too.
    rows = [row for row in _rows(before) if first_step > 0 and row["step"] <= first_step]
    after = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if after == before:
        return
    storage.write_whole(path, after)


def _scalar(name: str, value: Any) -> float:
    array = np.asarray(value)
    if array.size != 1:
        raise ValueError(f"metric {name!r} has shape {array.shape}; expected one number")
    array = array.reshape(())
    # The shortest digits that read back as the same float32: 0.1, not 0.10000000149011612.
    return float(str(array[()])) if array.dtype == np.float32 else float(array)


def as_json(value: Any) -> Any:
    """The value in types that JSON can hold; numbers that are not finite as "nan", "inf" and "-inf"."""
    if isinstance(value, Mapping):
        return {str(k): as_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if hasattr(value, "tolist"):  # NumPy and device arrays and scalars
        return as_json(value.tolist())
    return str(value)
