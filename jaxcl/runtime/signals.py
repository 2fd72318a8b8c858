"""The signals that ask a process to end, and a terminal that goes away with them."""

import contextlib
import os
import signal
import sys
import time
from typing import NoReturn

try:
    import termios
except ImportError:  # not a Unix
    termios = None

# A shell that closes and `timeout` send their signal twice, to the process and to its group: that is one request.
ECHO_SECONDS = {"SIGHUP": 2.0}
ECHO = 0.1

own_process = False  # whether this process is a command of jaxcl, which may be ended at once


def asking() -> list[signal.Signals]:
    """SIGTERM, Ctrl-C and SIGHUP, as far as the system has them; without those that the caller ignores (nohup)."""
    known = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
    return [s for s in known if s == signal.SIGTERM or signal.getsignal(s) != signal.SIG_IGN]


class Requests:
    """Counts the requests to end: several signals of one request count once."""

    def __init__(self):
        self._since: float | None = None

    def repeated(self, signum: int) -> bool:
        """Note a signal. Whether it is a further request."""
        now = time.monotonic()
        if self._since is None:
            self._since = now
            return False
        return now - self._since > ECHO_SECONDS.get(signal.Signals(signum).name, ECHO)


def end_at_once() -> NoReturn:
    """Leave without waiting for anything: exit code 75. In a process of somebody else: KeyboardInterrupt."""
    if not own_process:
        raise KeyboardInterrupt
    say("ended at once, as asked again; what was saved before is whole: run the same command again to continue")
    os._exit(75)


def say(text: str) -> None:
    """One line on stderr, also where nobody can read it any more."""
    try:
        print(f"jaxcl: {text}", file=sys.stderr, flush=True)
    except (OSError, ValueError):
        drop(2)


def drop(*descriptors: int) -> None:
    """From now on nothing is written there: the reader of a pipe, or the terminal, is gone."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in descriptors:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)


def drop_closed_terminal() -> None:
    """After SIGHUP: stdin, stdout and stderr of a terminal that closed lead nowhere, and writing does not fail."""
    if termios is None:
        return
    for descriptor in range(3):
        try:
            termios.tcgetattr(descriptor)
        except termios.error as error:
            if error.args[0] == 5:  # EIO: it was a terminal; a file or a pipe gives ENOTTY
                drop(descriptor)
