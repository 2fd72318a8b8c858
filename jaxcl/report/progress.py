"""The progress of a run: a bar on a terminal, a plain line every ten seconds in a log file."""

import collections
import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

_WINDOW_SECONDS = 30.0
_LINE_SECONDS = 10.0


class Progress:
    """Shows the step, some metrics, images/s and the time left.

    images/s is the mean of the last half minute. It leaves out the time before the first update, which is mostly
    compilation, and the evaluations (`paused`).

    Args:
      total: steps of the whole run.
      initial: steps done before this process started (a resumed run).
      unit_images: images per step, over all devices and hosts.
      stream: where to write: a bar if it is a terminal, lines otherwise; None: stderr.
      clock: monotonic, in seconds.
    """

    def __init__(
        self,
        total: int,
        *,
        initial: int = 0,
        unit_images: int,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total, self.step, self.unit_images = total, initial, unit_images
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._marks: collections.deque[tuple[float, int]] = collections.deque()
        self._paused = 0.0  # seconds spent in `paused`
        self._last_line: float | None = None
        self._pending = ""
        self._bar = None
        if self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total,
                initial=initial,
                file=self._stream,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}{postfix}",
            )

    @property
    def images_per_second(self) -> float:
        """Images per second over the recent window; NaN before the second update."""
        if len(self._marks) < 2:
            return math.nan
        (t0, s0), (t1, s1) = self._marks[0], self._marks[-1]
        return (s1 - s0) * self.unit_images / (t1 - t0) if t1 > t0 else math.nan

    @property
    def seconds_left(self) -> float:
        """Seconds to the end at the recent speed; NaN while it is unknown."""
        speed = self.images_per_second
        return (self.total - self.step) * self.unit_images / speed if speed > 0 else math.nan

    def update(self, step: int, **metrics: Any) -> None:
        """Show that `step` steps are done, with some metrics (name -> number; `data_wait` is a fraction)."""
        now = self._clock() - self._paused
        done, self.step = step - self.step, step
        self._marks.append((now, step))
        # Keep one mark older than the window: with slow steps there are still two to measure between.
        while len(self._marks) > 2 and now - self._marks[1][0] >= _WINDOW_SECONDS:
            self._marks.popleft()
        text = self._text(metrics)
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done)
            return
        percent = 100 * step // self.total if self.total else 100
        self._pending = f"step {step}/{self.total} {percent}%" + (f" | {text}" if text else "")
        due = self._last_line is None or now - self._last_line >= _LINE_SECONDS
        if due or step >= self.total:
            self._last_line = now
            self._print_pending()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time spent inside (an evaluation) out of images/s and the time left."""
        start = self._clock()
        if self._bar is not None:
            self._bar.clear()
        try:
            yield
        finally:
            self._paused += self._clock() - start

    def close(self) -> None:
        """Show the last update if it was not shown yet. May be called twice."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        elif self._pending:
            self._print_pending()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _print_pending(self) -> None:
        with contextlib.suppress(OSError):  # the reader is gone, as after Ctrl-C in `... | tee`; the run goes on
            self._stream.write(self._pending + "\n")
            self._stream.flush()
        self._pending = ""

    def _text(self, metrics: dict[str, Any]) -> str:
        data_wait = metrics.pop("data_wait", None)
        parts = [f"{name.replace('_', ' ')} {_short(value)}" for name, value in metrics.items()]
        if math.isfinite(self.images_per_second):
            parts.append(f"{self.images_per_second:,.0f} images/s")
        if data_wait is not None:
            parts.append(f"data wait {100 * float(data_wait):.1f}%")
        if math.isfinite(self.seconds_left) and self.step < self.total:
            parts.append(f"{duration(self.seconds_left)} left")
        return " | ".join(parts)


def duration(seconds: float) -> str:
    """Seconds in words, in their two largest units: 110 -> "1 min 50 s"."""
    if not math.isfinite(seconds):
        return "unknown"
    if 0 < seconds < 9.95:
        return f"{seconds:.1f} s"
    s = max(0, round(seconds))
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60} s"
    minutes = round(s / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(s / 3600)
    return f"{hours // 24} d {hours % 24} h"


def _short(value: Any) -> str:
    if isinstance(value, str):
        return value
    value = float(value)
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
