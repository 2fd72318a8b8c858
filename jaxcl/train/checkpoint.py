"""Checkpoints of a TrainState with Orbax, and the signals that ask a run to stop.

A checkpoint holds the whole state. Its step is also the position in the data, so a run continues exactly from it.
`manifest.json` beside it names the run and has a hash of every file, which is checked when the checkpoint is read.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from jaxcl.errors import Preempted, UserError
from jaxcl.method.state import TrainState
from jaxcl.runtime import distributed, signals, storage
from jaxcl.train.step_names import ReadableSteps

logger = logging.getLogger("jaxcl")
Tree = Any
AGAIN = "run the same command again to continue"
MANIFEST = "manifest.json"
_KEY = "key_data"


def _plain(state: TrainState) -> dict[str, Tree]:
    """The state with the bits of its typed key: a checkpoint holds plain arrays only."""
    tree = {f: getattr(state, f) for f in ("step", "params", "batch_stats", "opt_state", "memory")}
    return tree | {_KEY: jax.random.key_data(state.key)}


class Checkpoints:
    """Saves checkpoints asynchronously and keeps the newest; a half-written one is never the latest.

    Args:
      directory: where they are, one folder per step; local or remote.
      keep: number of checkpoints to keep.
      read_only: the directory may belong to a run in progress: change nothing in it.
      about: entries for the manifests, which name the run.

    Raises:
      UserError: (any method that writes) the disk is full or refuses; the message names the last good checkpoint.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep: int = 2,
        read_only: bool = False,
        about: Mapping[str, Any] | None = None,
    ):
        self.directory = storage.folder(directory)
        if self.directory.exists() and not self.directory.is_dir():
            raise UserError(
                f"{self.directory} is no folder; move it away, and put the checkpoints back if there are some"
            )
        self._read_only, self._about = read_only, dict(about or {})
        training, self._names = ocp.training, ReadableSteps()
        self._checkpointer = training.Checkpointer(
            storage.plain_link(self.directory),
            # The loop decides when to save. Orbax's defaults are to save when idle and to keep everything.
            save_decision_policy=training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=not read_only,  # left behind by a save that was killed
            step_name_format=self._names,
        )
        self._finishing: threading.Thread | None = None
        self._read_one = False
        self._error: BaseException | None = None

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return max(self.steps, default=None)

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps of the complete checkpoints, ascending."""
        return tuple(sorted({c.step for c in self._checkpointer.checkpoints} | self._names.unreadable.keys()))

    def save(self, step: int, state: TrainState) -> None:
        """Copy the state to the host and write it in the background. Saving a step twice does nothing."""
        if self.latest == step:
            return
        # Orbax deletes old checkpoints when it saves: none may vanish while its manifest is made.
        self._finish()
        storage.plain_link(self.directory)  # again: folders for temporary files are swept
        tree = _plain(state)
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
        try:
            response = self._checkpointer.save_async(step, tree)
        except Exception as error:
            raise self._refused(error) from error
        if response is None:  # Orbax saves no step before its newest
            raise UserError(
                f"{self.directory}/{self.latest} stands in the way: it is no checkpoint of this run, which is at step "
                f"{step}; move it away, then run the same command again to continue"
            )
        self._finishing = threading.Thread(target=self._seal, args=(step, response, wanted), name="jaxcl-manifest")
        self._finishing.start()

    def _seal(self, step: int, response: Any, wanted: Tree) -> None:
        """Wait until all files of a save are written and can be read, then write the manifest with their hashes."""
        try:
            response.result()
            if jax.process_index() == 0:
                self._read_back(step, wanted)
                _write_manifest(self.directory / str(step), {"step": step} | self._about)
        except BaseException as error:  # noqa: BLE001 - raised in the loop, by its next save
            self._error = error

    def _read_back(self, step: int, wanted: Tree) -> None:
        """Raise UserError if what was just saved cannot be read: without its manifest it does not count.

        Names and shapes are read each time; of the first save of a process that is alone, all values too.
        """
        try:
            fault = "" if _shapes(self._checkpointer.metadata(step).metadata) == _shapes(wanted) else "its names differ"
            if not fault and not self._read_one and jax.process_count() == 1:
                self._checkpointer.load(step, jax.tree.map(lambda x: np.empty(x.shape, x.dtype), wanted))
            self._read_one = True
        except Exception as error:  # noqa: BLE001 - tensorstore, json and zarr raise any error
            fault = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        if fault:
            raise UserError(
                f"the checkpoint of step {step} in {self.directory} was written, but cannot be read back ({fault}); "
                f"{last_good(self.directory, self.steps)}; use another --workdir, on another disk"
            )

    def _finish(self) -> None:
        if self._finishing is not None:
            self._finishing.join()
            self._finishing = None
        error, self._error = self._error, None
        if error is not None:
            raise self._refused(error) from error

    def _refused(self, error: BaseException) -> BaseException:
        reason = storage.refusal(error)
        if not reason:
            return error
        return UserError(
            f"cannot save a checkpoint in {self.directory}: {reason}; {last_good(self.directory, self.steps)}; "
            "make room, then run the same command again to continue"
        )

    def restore(self, abstract: TrainState, step: int | None = None, *, at_most: int | None = None) -> TrainState:
        """Read a state, onto any number of devices.

        Args:
          abstract: arrays or ShapeDtypeStructs with the shapes and shardings of the state.
          step: of the checkpoint; None: the newest that is undamaged. Damaged ones are set aside, with a warning.
          at_most: consider no newer ones.

        Raises:
          UserError: the checkpoint is of another model, the one of `step` is damaged, or all are.
        """
        storage.plain_link(self.directory)
        damaged: dict[int, str] = {}
        steps = [s for s in reversed(self.steps) if at_most is None or s <= at_most]
        for candidate in steps if step is None else [step]:
            where = self.directory / str(candidate)
            odd = self._names.unreadable.get(candidate, "")
            fault = distributed.agreed(lambda where=where, odd=odd: odd or _fault(where))
            if not fault:
                try:
                    state = self._load(candidate, abstract)
                except UserError:
                    raise
                except Exception as error:  # noqa: BLE001 - a broken file raises errors of tensorstore, json or zarr
                    fault = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
                else:
                    self._set_aside(damaged)
                    return state
            damaged[candidate] = fault
            if step is None:
                logger.warning("checkpoint %s is damaged: %s; trying the one before", where, fault)
        raise UserError(
            f"no checkpoint in {self.directory} can be read: "
            + "; ".join(f"step {s}: {fault}" for s, fault in damaged.items())
            + "; restore a copy, or use another --workdir to start again"
        )

    def _load(self, step: int, abstract: TrainState) -> TrainState:
        wanted = jax.eval_shape(_plain, abstract)
        shardings = _plain_shardings(abstract)
        wanted = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), wanted, shardings)
        # Compared before loading: a load that fails half way leaves threads that print errors at exit.
        stored = self._checkpointer.metadata(step).metadata
        if stored is None:
            raise ValueError("its metadata cannot be read")
        there, here = _shapes(stored), _shapes(wanted)
        if odd := sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name)):
            raise UserError(
                f"checkpoint {self.directory}/{step} does not fit this model: {odd[0]} is "
                f"{there.get(odd[0], 'absent')} there and {here.get(odd[0], 'absent')} here; use another --workdir"
            )
        tree = self._checkpointer.load(step, wanted)
        return TrainState(key=jax.random.wrap_key_data(tree.pop(_KEY), impl="threefry2x32"), **tree)

    def _set_aside(self, damaged: Mapping[int, str]) -> None:
        """Rename damaged checkpoints: their steps can be saved again, and the files can still be examined."""
        if not damaged or self._read_only:
            return
        if jax.process_index() == 0:
            for step in damaged:
                storage.move_folder(self.directory / str(step), self.directory / f"damaged-{step}")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("jaxcl damaged checkpoints set aside")
        self._checkpointer.reload()

    def wait(self) -> None:
        """Wait until everything that was saved is on disk."""
        self._finish()
        self._checkpointer.wait()

    def close(self) -> None:
        """Finish the last save and free Orbax's threads."""
        try:
            self._finish()
        finally:
            try:
                self._checkpointer.close()
            except Exception as error:  # Orbax raises the error of the last save again
                raise self._refused(error) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def last_good(directory: epath.Path, steps: Sequence[int]) -> str:
    """The checkpoint that a run can continue from, as part of a message."""
    whole = [s for s in sorted(steps) if (directory / str(s) / MANIFEST).exists()]
    return f"the last good checkpoint is step {whole[-1]}" if whole else "no checkpoint was saved yet"


def _hashes(folder: epath.Path) -> dict[str, list]:
    """{name: [bytes, BLAKE2b]} of all files of a checkpoint except its manifest."""

    def read(path: epath.Path) -> list:
        digest, size = hashlib.blake2b(digest_size=16), 0
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
                size += len(chunk)
        return [size, digest.hexdigest()]

    paths = {os.fspath(p.relative_to(folder)): p for p in storage.files(folder)}
    paths = {name: paths[name] for name in sorted(paths) if not name.startswith(MANIFEST)}
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return dict(zip(paths, pool.map(read, paths.values()), strict=True))


def _write_manifest(folder: epath.Path, about: Mapping[str, Any]) -> None:
    storage.write_whole(folder / MANIFEST, json.dumps({**about, "files": _hashes(folder)}, indent=1) + "\n")


def _fault(folder: epath.Path) -> str:
    """How the files differ from the saved ones; "" if they do not, or if there is no manifest, after a kill."""
    path = folder / MANIFEST
    if not path.exists():
        return ""
    try:
        manifest = storage.read_json(path, "files")
        if str(manifest.get("step", folder.name)) != folder.name:
            return f"it is step {manifest['step']} under another name"
        wanted = manifest["files"]
        found = _hashes(folder)
    except (OSError, UserError) as error:
        return str(error)
    pairs = wanted.values() if isinstance(wanted, dict) else [None]
    if not all(isinstance(pair, list) and list(map(type, pair)) == [int, str] for pair in pairs):
        return f"{MANIFEST} is not one of jaxcl"
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in wanted:
            return f"{name} was added after it was saved"
        if wanted[name] != found[name]:
            sizes = wanted[name][0], found[name][0]
            return f"{name} has {sizes[1]} of {sizes[0]} bytes" if sizes[0] != sizes[1] else f"{name} has changed"
    return ""


def _plain_shardings(abstract: TrainState) -> Tree:
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    tree = {f: getattr(shardings, f) for f in ("step", "params", "batch_stats", "opt_state", "memory")}
    return tree | {_KEY: shardings.key}


def _shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
    """{"params.encoder.stem_conv.kernel": (4, 4, 3, 64), ...}, for a state and for the metadata of a stored one."""

    def name(entry: Any) -> str:
        return str(next(getattr(entry, a) for a in ("key", "name", "idx") if hasattr(entry, a)))

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(map(name, path)): tuple(leaf.shape) for path, leaf in leaves}


def stopped(where: str) -> Preempted:
    """The error of a run that ends on request. Its threads may wait for a file system that does not answer."""
    error = Preempted(f"stopped on request {where}; {AGAIN}")
    error.at_once = True
    return error


class Preemption:
    """Notices SIGTERM, Ctrl-C and SIGHUP (a terminal that closes), on any host of a multi-process run.

    In the loop one of them is only noted, and `reached` reports it between two steps. Before and after the loop
    (`at_once`) there is nothing to save: the signal handler raises Preempted in the main thread. A second request ends
    the process at once (`signals.end_at_once`).
    """

    def __init__(self, *, at_once: bool = False):
        self._asked, self._at_once = False, at_once
        self._requests = signals.Requests()
        # With several processes, JAX's coordination service catches the signal and makes all hosts agree on a step.
        # One process needs no agreement, and the service polls only once a second.
        self._distributed = jax.process_count() > 1
        self._previous: dict[int, Any] = {}
        if self._distributed:
            self._catch(signals.asking()[1:], self._pass_on)
        else:
            self._catch(signals.asking(), self._notice)

    def _catch(self, wanted: Sequence[int], handler: Callable[[int, Any], None]) -> None:
        # Python lets only the main thread catch signals; a run in another thread (a notebook) does not notice them.
        if threading.current_thread() is threading.main_thread():
            for signum in wanted:
                previous = signal.signal(signum, handler)
                self._previous.setdefault(signum, previous)

    def _pass_on(self, signum: int, frame: Any) -> None:
        """Tell JAX's service, which knows SIGTERM only."""
        signals.drop_closed_terminal()
        os.kill(os.getpid(), signal.SIGTERM)

    def _notice(self, signum: int, frame: Any) -> None:
        signals.drop_closed_terminal()
        asked, self._asked = self._asked, True
        if self._requests.repeated(signum):
            signals.end_at_once()
        if self._at_once and not asked:
            raise stopped("outside of a training step")

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, raise Preempted at once too: a wait for data in the loop may never end.

        The caller still has the state of the step before. With several processes a wait is not interrupted: the others
        are already in the next step.
        """
        if self._distributed:
            yield
            return
        before, self._at_once = self._at_once, True
        try:
            if self._asked:
                raise stopped("while it waited for data")
            yield
        finally:
            self._at_once = before

    def loop_begins(self) -> None:
        """From now on the loop calls `reached` after every step."""
        self._at_once = False

    def loop_ended(self) -> None:
        """From now on raise at once again, without the agreement of hosts."""
        self._at_once = True
        self._catch(signals.asking(), self._notice)

    def reached(self, step: int) -> bool:
        """Whether to stop after this step. Call it once after every step, on every process."""
        if self._distributed:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def close(self) -> None:
        """Restore the signal handlers."""
        for signum, previous in self._previous.items():
            signal.signal(signum, previous or signal.SIG_DFL)
        self._previous = {}
