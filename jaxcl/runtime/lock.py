"""The lock of a run folder: `lock.json` names the process that writes there.

A killed process leaves the file behind, so the lock holds only while its owner lives. On the same machine the process
table tells. For a process elsewhere, only its signs of life can be seen: the owner touches the file every 10 s, and an
owner that does not touch it for 60 s counts as dead. Clocks are never compared. Of processes that start at one moment,
exactly one gets the lock. In an object store, two that start in the same second may both get it.
"""

import contextlib
import json
import logging
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

from jaxcl.errors import UserError
from jaxcl.runtime import storage

logger = logging.getLogger("jaxcl")
NAME = "lock.json"
TOUCH_SECONDS, STILL_SECONDS = 10.0, 60.0
ALONE_SECONDS = 5.0  # to wait for a process that takes a lock over; it needs milliseconds
WRITE_SECONDS = 1.0  # until a lock that cannot be read is complete, where a file system writes it in two steps
_held: set[str] = set()  # tokens of the locks of this process


class RunLock:
    """Hold the folder until `close`. Raises: UserError if another living process holds it."""

    def __init__(self, workdir: str | os.PathLike, *, still: float = STILL_SECONDS, touch: float = TOUCH_SECONDS):
        self._path = epath.Path(workdir) / NAME
        self._still, self._touch_every = still, touch
        self._mine = {**_identity(), "token": uuid.uuid4().hex, "touched": 0}
        self._stop, self._lost = threading.Event(), ""
        _held.add(self._mine["token"])  # first: threads of this process may start at one moment, too
        try:
            self._take()
        except BaseException:
            _held.discard(self._mine["token"])
            raise
        self._thread = threading.Thread(target=self._keep, name="jaxcl-lock", daemon=True)
        self._thread.start()

    def _take(self) -> None:
        while not _create(self._path, self._mine):
            found = _read(self._path)
            if found is None:
                continue  # its owner has just ended
            if not self._dead(found):
                raise UserError(
                    f"{self._path.parent} is in use by process {found.get('pid')} on {found.get('host')}; wait for it, "
                    "end it, or use another --workdir"
                )
            with _alone(self._path.parent) as alone:
                if _read(self._path) != found:
                    continue  # somebody else took over, or it was only half written
                if self._path.is_dir():
                    raise UserError(f"{self._path} is a folder, and no lock; move it away, then run the command again")
                storage.write_whole(self._path, json.dumps(self._mine))
            if not alone:  # then the later file stays, and the other process sees it
                time.sleep(0.2)
            now = _read(self._path) or {}
            if now.get("token") == self._mine["token"]:
                return

    def _dead(self, found: dict[str, Any]) -> bool:
        if not found:
            time.sleep(min(WRITE_SECONDS, self._still))
            return True
        if found.get("token") in _held:
            return False
        if all(found.get(k) == self._mine[k] for k in ("host", "boot")):
            return found.get("pid") == os.getpid() or _started(found.get("pid")) != found.get("started")
        logger.info(
            "%s: process %s on %s held the lock last; waiting up to %d s for a sign of life",
            self._path.parent,
            found.get("pid"),
            found.get("host"),
            self._still,
        )
        before, until = _sign(self._path), time.monotonic() + self._still
        while time.monotonic() < until:
            time.sleep(min(1.0, self._still / 20))
            now = _sign(self._path)
            if now is None:
                return True  # the owner has just ended
            if now != before:
                return False
        return True

    def _keep(self) -> None:
        while not self._stop.wait(self._touch_every):
            try:
                now = _read(self._path)
                if now and now.get("token") != self._mine["token"]:
                    self._lost = f"process {now.get('pid')} on {now.get('host')}"
                    return
                if storage.is_remote(self._path) or not now:
                    self._mine["touched"] += 1
                    storage.write_whole(self._path, json.dumps(self._mine))
                else:
                    os.utime(self._path)  # works on a full disk
            except Exception:  # noqa: BLE001 - a store may be unreachable for a while; the next touch tries again
                continue

    def check(self, *, look: bool = False) -> None:
        """Raise UserError if this process was suspended for so long that another one took the folder over.

        Args:
          look: also look whether the folder is still there: what writes next would make half of a new one.
        """
        if look and not storage.is_remote(self._path) and not self._path.parent.exists():
            raise UserError(
                f"{self._path.parent} was renamed or removed during the run; put it back, then run the same command "
                "again to continue"
            )
        if self._lost:
            raise UserError(f"{self._path.parent} was taken over by {self._lost} while this process was suspended")

    def close(self) -> None:
        """Release the folder; may be called twice."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join(timeout=5)
        _held.discard(self._mine["token"])
        try:
            if (_read(self._path) or {}).get("token") == self._mine["token"]:
                self._path.unlink(missing_ok=True)
        except OSError:
            pass  # the lock expires by itself

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _identity() -> dict[str, Any]:
    """The identity of this process. boot: of machine and container, within which process numbers are unique."""
    boot = [_first(lambda: pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip())]
    boot.append(_first(lambda: os.readlink("/proc/self/ns/pid")))
    return {"host": socket.gethostname(), "boot": " ".join(boot), "pid": os.getpid(), "started": _started(os.getpid())}


def _first(ask: Callable[[], str]) -> str:
    try:
        return ask()
    except OSError:  # no /proc, as on macOS
        return ""


def _started(pid: Any) -> str:
    """The start time of a living process, in kernel ticks; "" if there is none. It detects reused process numbers."""
    if not isinstance(pid, int):
        return ""
    if pathlib.Path("/proc/self/stat").exists():
        fields = _first(lambda: pathlib.Path(f"/proc/{pid}/stat").read_text()).rpartition(")")[2].split()
        return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else ""  # a zombie does not write
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "alive"


def _create(path: epath.Path, content: dict[str, Any]) -> bool:
    """Create the file, whole, even of a full disk: it is there with its content or not at all.

    Returns:
      False if it exists already.
    """
    if storage.is_remote(path):
        if path.exists():
            return False
        storage.write_whole(path, json.dumps(content))
        return True
    temporary = storage.beside(path)
    try:
        temporary.write_text(json.dumps(content), encoding="utf-8")
        try:
            os.link(temporary, path)
            return True
        except FileExistsError:
            return False
        except OSError:
            pass  # a file system without links
    finally:
        temporary.unlink(missing_ok=True)
    try:
        with open(path, "x", encoding="utf-8") as file:
            try:
                file.write(json.dumps(content))
                file.flush()
            except BaseException:
                path.unlink(missing_ok=True)
                raise
    except FileExistsError:
        return False
    return True


@contextlib.contextmanager
def _alone(folder: epath.Path) -> Iterator[bool]:
    """Exclude others from a block that replaces the lock; yields whether the file system can do that."""
    try:
        file = None if fcntl is None or storage.is_remote(folder) else os.open(folder, os.O_RDONLY)
    except OSError:
        file = None
    if file is None:
        yield False
        return
    try:
        yield _locked(file)
    finally:
        os.close(file)


def _locked(file: int) -> bool:
    """Wait for the others, but not for ever: one of them may be suspended. Whether the lock is ours."""
    until = time.monotonic() + ALONE_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(0.02)
        except OSError:  # NFS and Lustre, depending on how they are mounted
            return False


def _read(path: epath.Path) -> dict[str, Any] | None:
    """The content; None if there is no file, {} if it is not a lock: half written, or another program's."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {} if os.path.islink(path) else None  # a link to nothing stays; a lock of somebody else goes by itself
    except (OSError, ValueError, RecursionError):
        return {}
    whole = isinstance(content, dict) and all(isinstance(content.get(k), str) for k in ("host", "token"))
    return content if whole else {}


def _sign(path: epath.Path) -> Any:
    """A value that changes with each sign of life of the owner; None if the file is gone."""
    try:
        return path.read_text(), None if storage.is_remote(path) else os.stat(path).st_mtime_ns
    except OSError:
        return None
