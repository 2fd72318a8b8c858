"""Checkpoints of a TrainState with Orbax, and the notice that the machine wants this process to end.

A checkpoint holds the whole state; its step is the position in the data, so nothing else is needed to go on exactly.
"""

import os
import pathlib
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from jaxcl.errors import UserError
from jaxcl.train_state import TrainState

Tree = Any
_KEY = "key_data"


def _plain(state: TrainState) -> dict[str, Tree]:
    """The state with the typed key as its bits: a checkpoint holds plain arrays only."""
    tree = {f: getattr(state, f) for f in ("step", "params", "batch_stats", "opt_state", "memory")}
    return tree | {_KEY: jax.random.key_data(state.key)}


class Checkpoints:
    """Asynchronous saves under `directory`, the newest `keep` of them kept; a half-written one is never the latest."""

    def __init__(self, directory: str | os.PathLike, *, keep: int = 2, read_only: bool = False):
        """read_only: to look at the checkpoints of a run that may be going on."""
        self.directory = pathlib.Path(directory).resolve()
        training = ocp.training
        self._checkpointer = training.Checkpointer(
            self.directory,
            # The loop decides when; Orbax's own defaults are "whenever idle" and "keep everything".
            save_decision_policy=training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=not read_only,  # what a killed save left behind
        )

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps of the complete checkpoints, ascending."""
        return tuple(sorted(c.step for c in self._checkpointer.checkpoints))

    def save(self, step: int, state: TrainState) -> None:
        """Copy the state off the devices, write it in the background. Saving a step twice does nothing."""
        if self.latest != step:
            self._checkpointer.save_async(step, _plain(state))

    def restore(self, abstract: TrainState, step: int | None = None) -> TrainState:
        """The state at `step` (None: the newest), placed as `abstract` (arrays or ShapeDtypeStructs) is sharded.

        Errors: UserError when the checkpoint is of another model.
        """
        wanted = jax.eval_shape(_plain, abstract)
        shardings = _plain_shardings(abstract)
        wanted = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), wanted, shardings)
        step = self.latest if step is None else step
        # Compared before loading: a load that fails half way leaves its threads complaining at exit.
        there, here = _shapes(self._checkpointer.metadata(step).metadata), _shapes(wanted)
        if odd := sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name)):
            raise UserError(
                f"checkpoint {self.directory}/{step} does not fit this model: {odd[0]} is "
                f"{there.get(odd[0], 'absent')} there and {here.get(odd[0], 'absent')} here; use another --workdir"
            )
        tree = self._checkpointer.load(step, wanted)
        return TrainState(key=jax.random.wrap_key_data(tree.pop(_KEY), impl="threefry2x32"), **tree)

    def wait(self) -> None:
        """Until what was saved is on disk."""
        self._checkpointer.wait()

    def close(self) -> None:
        self._checkpointer.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _plain_shardings(abstract: TrainState) -> Tree:
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    tree = {f: getattr(shardings, f) for f in ("step", "params", "batch_stats", "opt_state", "memory")}
    return tree | {_KEY: shardings.key}


def _shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
    """{"params.encoder.stem_conv.kernel": (4, 4, 3, 64), ...}; the same for a state and for what is stored of it."""

    def name(entry: Any) -> str:
        return str(next(getattr(entry, a) for a in ("key", "name", "idx") if hasattr(entry, a)))

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(map(name, path)): tuple(leaf.shape) for path, leaf in leaves}


class Preemption:
    """Whether this run has been asked to end: SIGTERM, on any host of a multi-process run."""

    def __init__(self):
        self._asked = False
        self._distributed = jax.process_count() > 1
        self._previous = None
        # With several processes JAX's coordination service catches the signal and makes all hosts agree on one step.
        # Python lets only the main thread catch signals; a run in another thread (a notebook's) goes without.
        if not self._distributed and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._notice)

    def _notice(self, signum: int, frame: Any) -> None:
        self._asked = True

    def reached(self, step: int) -> bool:
        """Ask once after every step, on every process."""
        if self._distributed:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def close(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None
