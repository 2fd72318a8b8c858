"""Metrics as they come: one JSON object a line in `metrics.jsonl`, and the same numbers for TensorBoard."""

import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

FILE_NAME = "metrics.jsonl"
# JSON has no word for these. As strings they stay valid JSON, stay apart from each other, and pandas reads
# the column as numbers again.
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class MetricsWriter:
    """Appends metrics to `workdir/metrics.jsonl` (flushed line by line) and to `workdir/tensorboard`.

    Only one process may write a workdir; in a run of several processes the caller makes it process 0.

    Args:
      workdir: the run folder, created if missing.
      tensorboard: also write TensorBoard event files.
      first_step: the step the run continues from (that of its checkpoint). What an earlier, interrupted run
        wrote for later steps will be written again, so it is dropped here and no step appears twice; a last
        line cut short by a kill is dropped too. 0 starts the record afresh.
      also: given every step's scalars too, those that are finite.
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
        workdir = pathlib.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / FILE_NAME
        _keep_until(path, first_step)
        self._file = open(path, "a", encoding="utf-8")
        self._board = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            # purge_step makes TensorBoard forget the replayed steps of the earlier event files.
            self._board = SummaryWriter(
                logdir=str(workdir / "tensorboard"), purge_step=first_step + 1 if first_step else 0
            )

    def write(self, step: int, metrics: Mapping[str, Any], **extra: Any) -> None:
        """Writes one line.

        Args:
          step: the update the numbers belong to.
          metrics: name -> scalar (Python, NumPy or device scalar). "/" in a name groups it in TensorBoard.
          **extra: anything else JSON can hold, for the line only (an epoch, a note).

        Raises:
          ValueError: a name is "step" or "time", is given twice, or its value is not a scalar.
        """
        if self._file.closed:
            raise ValueError("this MetricsWriter is closed")
        scalars = {name: _scalar(name, value) for name, value in metrics.items()}
        taken = ({"step", "time"} & (scalars.keys() | extra.keys())) | (scalars.keys() & extra.keys())
        if taken:
            raise ValueError(f"metric names already in use on this line: {sorted(taken)}")
        now = time.time()
        line = {"step": int(step), "time": round(now, 3), **scalars, **extra}
        self._file.write(json.dumps(_plain(line), allow_nan=False) + "\n")
        self._file.flush()
        # tensorboardX prints a warning for each of the others and plots nothing; the JSON line keeps them.
        finite = {name: value for name, value in scalars.items() if math.isfinite(value)}
        if self._board is not None:
            for name, value in finite.items():
                self._board.add_scalar(name, value, int(step), walltime=now)
        if self._also is not None:
            self._also(int(step), finite)

    def close(self) -> None:
        """Flushes and closes both records; may be called twice."""
        self._file.close()
        if self._board is not None:
            self._board.close()
            self._board = None

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads `workdir/metrics.jsonl` in the order written, "nan" and "inf" as floats; [] if there is none."""
    path = pathlib.Path(workdir) / FILE_NAME
    if not path.exists():
        return []
    rows = []
    for row in _rows(path.read_bytes()):
        rows.append({k: _NON_FINITE.get(v, v) if isinstance(v, str) else v for k, v in row.items()})
    return rows


def _rows(text: bytes) -> list[dict[str, Any]]:
    """The lines that are whole; a kill in the middle of a write leaves at most one that is not."""
    rows = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _keep_until(path: pathlib.Path, first_step: int) -> None:
    """Rewrites `path` with the steps 1..first_step of a run that is continued, in one atomic replacement."""
    if not path.exists():
        return
    before = path.read_bytes()
    # A run that starts over writes its step 0 again as well.
    rows = [row for row in _rows(before) if first_step > 0 and row["step"] <= first_step]
    after = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if after == before:
        return
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as f:
        f.write(after)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def _scalar(name: str, value: Any) -> float:
    array = np.asarray(value)
    if array.size != 1:
        raise ValueError(f"metric {name!r} has shape {array.shape}; a metric is one number")
    array = array.reshape(())
    # The shortest digits that give the same float32 back: 0.1, not 0.10000000149011612.
    return float(str(array[()])) if array.dtype == np.float32 else float(array)


def _plain(value: Any) -> Any:
    """The same value in what JSON can hold."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if hasattr(value, "tolist"):  # NumPy and device arrays and scalars
        return _plain(value.tolist())
    return str(value)
