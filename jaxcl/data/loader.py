"""Batches for training (`Loader`: shuffled, endless, resumable) and for evaluation (`batches`: one pass)."""

import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import grain
import jax
import numpy as np

from jaxcl.data.shuffle import Shuffled
from jaxcl.data.source import Source
from jaxcl.errors import UserError

Batch = dict[str, np.ndarray | jax.Array]
ENDLESS = 2**62  # steps; grain counts in 64 bits, and a run begins at any of them


class Loader(Iterator[Batch]):
    """An endless iterator of training batches. Its position is the step.

    A background thread makes the next batches and puts them on the devices. Batch `k` depends only on the
    source, `batch_size`, `seed` and `k`: a loader with `start_step=k` continues exactly where one from step 0
    would be. The global batch is the same, row by row, for any number of processes, so computations that depend on a
    row's place in it, such as groups of a batch norm, do not depend on that number either.

    Args:
      source: the training images.
      batch_size: global, over all processes; the last partial batch of an epoch is dropped.
      seed: of the shuffle, modulo 2^64.
      start_step: the step of the first batch.
      process_index, process_count: the loader gives this process's batch_size / process_count rows of each batch.
      sharding: of the batch axis; batches are then global `jax.Array`s, otherwise NumPy arrays of the local
        rows.
      prefetch: number of batches made in advance, at least 1.
      order: a function from a step to the rows of its global batch [batch_size], instead of the shuffled pass. Threads
        may call it at the same time. An example is `per_class.PerClass`.

    Attributes:
      steps_per_epoch: len(source) // batch_size.
      step: of the next batch.
      seconds_waited: total time that `next` has blocked; near zero when the input keeps up with the training.

    Raises:
      UserError: the batch is larger than the set or cannot be shared equally.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        sharding: jax.sharding.Sharding | None = None,
        prefetch: int = 2,
        order: Callable[[int], np.ndarray] | None = None,
    ):
        name = f"{source.name} ({source.split})"
        if batch_size < 1 or prefetch < 1 or start_step < 0:
            raise UserError(
                f"batch_size={batch_size} and prefetch={prefetch} must be at least 1,"
                f" start_step={start_step} at least 0"
            )
        if batch_size > len(source):
            raise UserError(
                f"batch_size={batch_size} is larger than {name} with {len(source)} images; use at most {len(source)}"
            )
        if batch_size % process_count:
            raise UserError(
                f"batch_size={batch_size} cannot be shared equally by {process_count} processes;"
                f" use a multiple of {process_count}"
            )
        if not 0 <= process_index < process_count:
            raise UserError(f"process_index={process_index} must be from 0 to {process_count - 1}")
        self.steps_per_epoch = len(source) // batch_size
        self.step = start_step
        self.seconds_waited = 0.0
        self._error: BaseException | None = None
        self._ready: queue.Queue = queue.Queue(maxsize=prefetch)
        self._stop = threading.Event()

        # Global batch k is the same for any number of processes: each has a contiguous slice of its rows.
        share = batch_size // process_count
        mine = slice(process_index * share, (process_index + 1) * share)
        shuffled = Shuffled(len(source), batch_size=batch_size, seed=seed)
        steps = grain.MapDataset.range(start_step, start_step + ENDLESS)
        rows = steps.map(lambda step: shuffled(step, mine) if order is None else order(step)[mine])
        local_batches = iter(_local_batches(source, rows))
        # The thread holds no reference to the loader, so dropping the loader without close() also ends the
        # thread. finalize also runs at interpreter exit, before JAX shuts down while the thread still uses it.
        self._thread = threading.Thread(
            target=_produce,
            args=(local_batches, _placer(sharding), self._ready, self._stop),
            name="jaxcl-loader",
            daemon=True,
        )
        self._finalizer = weakref.finalize(self, _shut_down, self._thread, self._ready, self._stop)
        self._thread.start()

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        if self._error is not None:
            raise self._error
        if self._stop.is_set():
            raise StopIteration
        begin = time.perf_counter()
        item = self._ready.get()
        self.seconds_waited += time.perf_counter() - begin
        if isinstance(item, BaseException):
            self._error = item
            raise item
        self.step += 1
        return item

    def close(self) -> None:
        """Ends the thread and drops the batches made in advance. A closed loader gives no more batches."""
        self._finalizer()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def _local_batches(source: Source, rows: grain.MapDataset[np.ndarray]) -> grain.IterDataset[Batch]:
    """Batches of `source` by their rows."""
    if source.in_memory:  # one fancy index per batch; more threads would only wait for the interpreter lock
        options = grain.ReadOptions(num_threads=0)
    else:  # a batch is decoded in threads; the next one starts while its slowest images are still decoded
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)
    return rows.map(source.batch).to_iter_dataset(options)


def _placer(sharding: jax.sharding.Sharding | None) -> Callable[[Batch], Batch]:
    if sharding is None:
        return lambda batch: batch

    if sharding.is_fully_addressable:  # one process: one call for all arrays is cheaper
        return lambda batch: jax.device_put(batch, sharding)
    return lambda batch: {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def _produce(made: Iterator[Batch], place: Callable, ready: queue.Queue, stop: threading.Event) -> None:
    try:
        with jax.transfer_guard("allow"):  # these copies are intended; the guard is for accidental ones
            while not stop.is_set():
                _put(place(next(made)), ready, stop)
    except BaseException as error:  # noqa: BLE001 - the consumer raises any error
        _put(error, ready, stop)


def _put(item, ready: queue.Queue, stop: threading.Event) -> None:
    """Waits for room in the queue until `stop` is set."""
    while not stop.is_set():
        try:
            return ready.put(item, timeout=0.05)
        except queue.Full:
            continue


def _shut_down(thread: threading.Thread, ready: queue.Queue, stop: threading.Event) -> None:
    stop.set()
    thread.join(timeout=10)
    while not ready.empty():
        ready.get_nowait()


def batches(source: Source, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """One pass over the source in order, in batches of one constant shape.

    Yields {"image", "label", "index", "where"}. `where` bool [B] is False in the padded rows of the last batch
    (image 0, label -1, index -1), so one compiled function fits every batch.
    """
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1")
    for begin in range(0, len(source), batch_size):
        rows = np.arange(begin, min(begin + batch_size, len(source)))
        batch = source.batch(rows)
        pad = batch_size - len(rows)
        fill = {"image": 0, "label": -1, "index": -1}
        padded = {
            k: np.concatenate([v, np.full((pad, *v.shape[1:]), fill[k], v.dtype)]) if pad else v
            for k, v in batch.items()
        }
        yield padded | {"where": np.arange(batch_size) < len(rows)}
