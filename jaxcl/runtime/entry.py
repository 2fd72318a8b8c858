"""How a command begins and ends as a process: restart, parent process, log, exit code."""

import logging
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from absl import logging as absl_logging

from jaxcl.errors import Diverged, LostHost, Preempted, UserError
from jaxcl.runtime import distributed, huge_pages, messages, signals, storage, together

EXIT_SECONDS = 10.0  # for threads to end after Ctrl-C; one may wait for a file system for ever
CODES = {UserError: 2, Diverged: 3, Preempted: 75, LostHost: 75}


def leave(main: Callable[[list[str]], int], *, script: bool = False) -> NoReturn:
    """Run `main(sys.argv)` and end this process with its exit code; an expected error becomes one line on stderr.

    The process first restarts itself with large memory pages where that helps, and with --distributed it runs the
    command in a child process (`distributed.guard`).

    Args:
      main: returns the exit code.
      script: whether this process was started by the console script `jaxcl`. A process that was started by
        `python -m jaxcl` is recognised without it.
    """
    huge_pages.ask(script=script)
    if distributed.wants_guard(sys.argv):
        sys.exit(distributed.guard())
    distributed.end_with_guard()
    _quiet_libraries()
    signals.own_process = True
    try:
        code = main(sys.argv)
    except KeyboardInterrupt:
        signals.say("stopped by Ctrl-C")
        code = 130
        if together.several():
            os._exit(code)
        threading.Thread(target=_end, args=(code,), name="jaxcl-end", daemon=True).start()
    except tuple(CODES) as error:
        signals.say(str(error))
        code = code_of(error)
        if isinstance(error, LostHost) or together.several() or getattr(error, "at_once", False):
            sys.stderr.flush()
            os._exit(code)  # a normal exit would wait for the lost process, or for threads
    except Exception as error:
        if isinstance(error, OSError) and (reason := storage.refusal(error)):
            signals.say(f"cannot write {_place(error)}: {reason}; make room, then run the same command again")
            code = 2
        elif not together.several():
            raise
        else:
            traceback.print_exc()
            code = 1
        if together.several():
            sys.stderr.flush()
            os._exit(code)
    finally:
        signals.own_process = False
    sys.exit(code)


def _place(error: OSError) -> str:
    return str(error.filename or error.filename2 or "a file")


def _end(code: int) -> None:
    """End this process, if it has not ended by itself."""
    time.sleep(EXIT_SECONDS)
    os._exit(code)


def code_of(error: BaseException) -> int:
    """The exit code of a process that ends with an error."""
    return next((code for kind, code in CODES.items() if isinstance(error, kind)), 1)


def error_of(message: str, code: int) -> Exception:
    """An error that ends this process with the code of another one."""
    return next((kind for kind, c in CODES.items() if c == code), RuntimeError)(message)


def _quiet_libraries() -> None:
    """Show progress of jaxcl, but only warnings of libraries."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("jaxcl").setLevel(logging.INFO)
    absl_logging.set_verbosity(absl_logging.WARNING)
    # Pillow warns of damaged metadata and large images; jaxcl names a file that cannot be used itself.
    warnings.filterwarnings("ignore", module=r"PIL\b")
    # Orbax prints pages about a save that failed; jaxcl prints one line.
    logging.getLogger("absl").addFilter(lambda record: messages.ORBAX_MODULES not in record.pathname)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _except_late_answers


def _except_late_answers(unraisable: Any) -> None:
    """`sys.unraisablehook` without what TensorStore's threads print when a save failed: nobody awaits their answers."""
    last = unraisable.exc_traceback
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or last.tb_frame.f_globals.get("__name__") != "asyncio.base_events":
        sys.__unraisablehook__(unraisable)
