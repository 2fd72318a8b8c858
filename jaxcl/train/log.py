"""Everything a run records while it trains: metrics.jsonl, TensorBoard, W&B, examples.jsonl and the progress line."""

import contextlib
import math
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxcl.data import Loader
from jaxcl.errors import Diverged
from jaxcl.method.recipe import Recipe
from jaxcl.report import JsonLines, MetricsWriter, Progress
from jaxcl.report.wandb import WandbRun


class TrainLog:
    """Averages the metrics of the updates and writes one line every `interval` steps.

    The metrics of an update are read after the next update was dispatched, so the device never waits for the host.
    Only process 0 writes metrics; every process writes its own examples.

    Args:
      interval: steps between two lines.
      first_step: step of the state that the run starts from; records of later steps are dropped, they come again.
      examples: also write the example ids of every update, to examples.jsonl (examples-I.jsonl in process I > 0).
      wandb: also receives every line.
    """

    def __init__(
        self,
        recipe: Recipe,
        workdir: epath.Path,
        *,
        interval: int,
        first_step: int = 0,
        examples: bool = False,
        wandb: WandbRun | None = None,
    ):
        self._recipe, self._interval = recipe, interval
        self._pending: tuple[int, dict[str, jax.Array]] | None = None  # step and metrics of the newest update
        self._sums: dict[str, list[Any]] = {}
        self.newest: dict[str, Any] = {}  # metrics of the last update that were read
        self._step = first_step
        self._writer = self._examples = None
        with contextlib.ExitStack() as stack:  # closes from the last to the first, even if one of them fails
            if jax.process_index() == 0:
                also = wandb.write if wandb else None
                self._writer = stack.enter_context(MetricsWriter(workdir, first_step=first_step, also=also))
                stream = None
            else:
                stream = stack.enter_context(open(os.devnull, "w"))
            if examples:
                suffix = f"-{jax.process_index()}" if jax.process_index() else ""
                self._examples = JsonLines(workdir / f"examples{suffix}.jsonl", first_step=first_step)
                stack.callback(self._examples.close)
            progress = Progress(recipe.total_steps, initial=first_step, unit_images=recipe.batch_size, stream=stream)
            self._progress = stack.enter_context(progress)
            stack.callback(self._write_means)
            self._resources = stack.pop_all()

    def start_clock(self, loader: Loader) -> None:
        """Start measuring speed: before the first update, and again after an evaluation, which does not count."""
        self._loader, self._since, self._waited = loader, time.monotonic(), loader.seconds_waited
        self._first: int | None = None

    def add(self, step: int, metrics: dict[str, jax.Array], batch: dict[str, jax.Array]) -> None:
        """Take the metrics and the batch of update `step` (from 1) and read the metrics of the one before.

        Raises:
          Diverged: a metric of the update before is not finite.
        """
        self.sync()
        self._pending = (step, metrics)
        if self._examples:
            self._examples.write({"step": step, "index": _local_rows(batch["index"])})

    def sync(self) -> None:
        """Wait for the newest update and read its metrics. Raises: Diverged."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._read(*pending)

    def _read(self, step: int, metrics: dict[str, jax.Array]) -> None:
        metrics = jax.device_get(metrics)
        values = {k: float(v) for k, v in metrics.items() if not np.ndim(v)}
        # NaN where the batch has no pair to measure, for example no two images of one class.
        values = {k: v for k, v in values.items() if not (k.startswith("collapse/") and math.isnan(v))}
        # The loss first, then the others: a gradient or the probe may diverge while the loss is still finite.
        for k in sorted(values, key=lambda k: k != "loss"):
            if not math.isfinite(values[k]):
                raise Diverged(f"{k} is {values[k]} at step {step}", step=step, metrics=metrics)
        self.newest = metrics
        for k, v in (values | {k: v for k, v in metrics.items() if np.ndim(v)}).items():
            self._sums.setdefault(k, []).append(v)
        self._step = step
        if self._first is None:
            self._first = step - 1
        if step % self._interval == 0 or step == self._recipe.total_steps:
            self._write_means()

    def _write_means(self) -> None:
        """Write the means of the metrics since the last line, if there are any."""
        if not self._sums:
            return
        now, waited = time.monotonic(), self._loader.seconds_waited
        seconds, steps = now - self._since, 0 if self._first is None else self._step - self._first
        metrics = {k: sum(v) / len(v) for k, v in self._sums.items()}
        metrics["lr"] = float(self._recipe.schedule(jnp.asarray(self._recipe.encoder_step(self._step - 1))))
        if steps:  # none since the clock was started
            metrics["images_per_second"] = steps * self._recipe.batch_size / seconds
            metrics["data_wait"] = (waited - self._waited) / seconds
        self._sums, self._since, self._waited, self._first = {}, now, waited, self._step
        loss = metrics.get("loss", metrics.get("probe/loss"))  # a phase that trains only the probe has no other loss
        self._progress.update(self._step, loss=loss, data_wait=metrics.get("data_wait", 0.0))
        self.write(self._step, metrics)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Write one line. Arrays (histograms) are rounded to the digits that a figure shows."""
        if self._writer:
            rows = {k: np.round(np.asarray(v, np.float64), 5).tolist() for k, v in metrics.items() if np.ndim(v)}
            self._writer.write(step, {k: v for k, v in metrics.items() if k not in rows}, **rows)

    def paused(self) -> contextlib.AbstractContextManager:
        """Exclude the time spent inside from the speed on the progress line."""
        return self._progress.paused()

    def flush(self) -> None:
        """Complete the files: before a checkpoint, which must not be ahead of its records."""
        for record in filter(None, (self._writer, self._examples)):
            record.flush()

    def close(self) -> None:
        self._resources.close()

    def __enter__(self) -> "TrainLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _local_rows(index: jax.Array) -> list[int]:
    """The values of a sharded vector that are on this process, each once, in order."""
    shards = sorted(index.addressable_shards, key=lambda s: s.index[0].start or 0)
    return [i for shard in shards if shard.replica_id == 0 for i in np.asarray(shard.data).tolist()]
