"""What the processes of one run tell each other: whether they do the same, and the mistake that ends one of them.

A process that ends alone leaves the others in a collective operation, which JAX ends after a while as if a host had
been lost: exit code 75, so that a scheduler tries for ever. So it tells the others first, and they end with its code.
"""

import contextlib
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from jaxcl.errors import UserError

_TOLD, _HEARD = "jaxcl/ended", "jaxcl/heard"  # keys of JAX's coordination service
POLL_SECONDS, GOODBYE_SECONDS = 1.0, 10.0
_ending = threading.Event()  # this process ends by itself


def several() -> bool:
    """Whether this process has joined a run of several. Unlike `jax.process_count`, this never starts a backend."""
    return _client() is not None and _state().num_processes > 1


def _state() -> Any:
    from jax._src import distributed  # JAX has no public access to its key-value store

    return distributed.global_state


def _client() -> Any:
    return _state().client if "jax" in sys.modules else None


def everyone(text: str) -> list[str]:
    """The text of every process, on every process. Call it on all of them."""
    import jax

    if jax.process_count() == 1:
        return [text]
    import numpy as np
    from jax.experimental import multihost_utils

    def gather(row: Any) -> Any:
        return np.asarray(multihost_utils.process_allgather(row)).reshape(jax.process_count(), -1)

    content = np.frombuffer(text.encode(), np.uint8)
    lengths = gather(np.array([len(content)], np.int32))[:, 0]
    rows = gather(np.pad(content, (0, int(lengths.max()) - len(content))))
    return [row[:n].astype(np.uint8).tobytes().decode() for row, n in zip(rows, lengths, strict=True)]


def same(facts: Mapping[str, Any], advice: str) -> None:
    """Compare what all processes of the run must have in common. Call it on all of them.

    Args:
      facts: by name; their values must have a short `repr`.
      advice: what to do if one differs.

    Raises:
      UserError: a value differs; on all processes, and it begins with the name.
    """
    here = {name: repr(value) for name, value in facts.items()}
    digests = everyone(hashlib.blake2b(json.dumps(here, sort_keys=True).encode(), digest_size=16).hexdigest())
    if len(set(digests)) == 1:
        return
    others = [json.loads(text) for text in everyone(json.dumps(here))]
    first = others[0]
    for i, other in enumerate(others):
        for name in sorted(first.keys() | other.keys()):
            if (a := first.get(name, "absent")) != (b := other.get(name, "absent")):
                raise UserError(f"{name} is {_short(a)} on process 0 and {_short(b)} on process {i}; {advice}")


def _short(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:97]}..."


def tell(message: str, code: int) -> None:
    """Tell the other processes that this one ends, and why. They end with the same exit code."""
    if not several() or _ending.is_set():
        return
    _ending.set()
    state = _state()
    with contextlib.suppress(Exception):  # another one was first, or cannot be reached any more
        state.client.key_value_set(_TOLD, json.dumps([state.process_id, code, message]))
    if state.process_id == 0:  # the others hear of it from the service in this process
        until = time.monotonic() + GOODBYE_SECONDS
        with contextlib.suppress(Exception):
            while time.monotonic() < until and len(state.client.key_value_dir_get(_HEARD)) < state.num_processes - 1:
                time.sleep(0.1)


def listen() -> None:
    """From now on end this process when another one tells that it ends."""
    if several():
        threading.Thread(target=_listen, name="jaxcl-listen", daemon=True).start()


def _listen() -> None:
    while not _ending.wait(POLL_SECONDS):
        if several() and (ended := heard()):
            if _ending.wait(POLL_SECONDS):  # this process has found the same mistake
                return
            message, code = ended
            sys.stderr.write(f"\njaxcl: {message}\n")
            sys.stderr.flush()
            os._exit(code)  # the main thread may wait for that process in a collective operation


def heard() -> tuple[str, int] | None:
    """What another process told when it ended, and its exit code; None if none did."""
    if not several():
        return None
    state = _state()
    try:
        index, code, message = json.loads(state.client.key_value_try_get(_TOLD))
        state.client.key_value_set(f"{_HEARD}/{state.process_id}", "", allow_overwrite=True)
    except Exception:  # noqa: BLE001 - nobody, or the service cannot be reached
        return None
    return None if index == state.process_id else (f"process {index} of this run has ended: {message}", code)
