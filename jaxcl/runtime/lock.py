"""The lock of a run folder: `lock.json` names the process that writes there.

A killed process leaves the file behind, so the lock holds only while its owner lives. On the same machine the process
table tells. For a process elsewhere, only its signs of life can be seen: the owner touches the file every 10 s, and an
owner that does not touch it for 60 s counts as dead. Clocks are never compared. In an object store, two processes that
start in the same second may both get the lock.
"""

import json
import logging
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from etils import epath

from jaxcl.errors import UserError
from jaxcl.runtime import storage

logger = logging.getLogger("jaxcl")
NAME = "lock.json"
TOUCH_SECONDS, STILL_SECONDS = 10.0, 60.0
_held: set[str] = set()  # tokens of the locks of this process


class RunLock:
    """Hold the folder until `close`. Raises: UserError if another living process holds it."""

    def __init__(self, workdir: str | os.PathLike, *, still: float = STILL_SECONDS, touch: float = TOUCH_SECONDS):
        self._path = epath.Path(workdir) / NAME
        self._still, self._touch_every = still, touch
        self._mine = {**_identity(), "token": uuid.uuid4().hex, "touched": 0}
        self._stop, self._lost = threading.Event(), ""
        self._take()
        _held.add(self._mine["token"])
        self._thread = threading.Thread(target=self._keep, name="jaxcl-lock", daemon=True)
        self._thread.start()

    def _take(self) -> None:
        if _create(self._path, self._mine):
            return
        found = _read(self._path)
        if found is not None and not self._dead(found):
            raise UserError(
                f"{self._path.parent} is in use by process {found.get('pid')} on {found.get('host')}; wait for it, "
                "end it, or use another --workdir"
            )
        # If two processes take over at the same moment, the later file stays and the other process sees it.
        storage.write_whole(self._path, json.dumps(self._mine))
        time.sleep(0.2)
        now = _read(self._path) or {}
        if now.get("token") != self._mine["token"]:
            raise UserError(f"{self._path.parent} was taken by process {now.get('pid')} on {now.get('host')} just now")

    def _dead(self, found: dict[str, Any]) -> bool:
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
                if now is not None and now.get("token") != self._mine["token"]:
                    self._lost = f"process {now.get('pid')} on {now.get('host')}"
                    return
                if storage.is_remote(self._path) or now is None:
                    self._mine["touched"] += 1
                    storage.write_whole(self._path, json.dumps(self._mine))
                else:
                    os.utime(self._path)  # works on a full disk
            except Exception:  # noqa: BLE001 - a store may be unreachable for a while; the next touch tries again
                continue

    def check(self) -> None:
        """Raise UserError if this process was suspended for so long that another one took the folder over."""
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
    """Create the file; False if it exists already."""
    if storage.is_remote(path):
        if path.exists():
            return False
        storage.write_whole(path, json.dumps(content))
        return True
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(json.dumps(content))
    except FileExistsError:
        return False
    return True


def _read(path: epath.Path) -> dict[str, Any] | None:
    """The content; None if there is no file, {} if it is incomplete because its writer was killed."""
    try:
        text = path.read_text()
    except OSError:
        return None
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _sign(path: epath.Path) -> Any:
    """A value that changes with each sign of life of the owner; None if the file is gone."""
    try:
        return path.read_text(), None if storage.is_remote(path) else os.stat(path).st_mtime_ns
    except OSError:
        return None
