"""The signals that ask a process to end."""

import os
import signal
import subprocess
import sys

import pytest
from processes import ROOT

from jaxcl.runtime import distributed, signals

pytestmark = [pytest.mark.skipif(os.name != "posix", reason="signals"), pytest.mark.usefixtures("usual_signals")]


def test_signals_of_one_request_count_once(monkeypatch):
    """Cases B.10: shells and `timeout` send a signal twice; a second Ctrl-C of a person comes later."""
    clock = iter([0.0, 0.05, 0.3])
    monkeypatch.setattr(signals.time, "monotonic", lambda: next(clock))
    requests = signals.Requests()
    assert [requests.repeated(signal.SIGINT) for _ in range(3)] == [False, False, True]
    clock = iter([0.0, 1.0, 5.0])
    requests = signals.Requests()
    assert [requests.repeated(signal.SIGHUP) for _ in range(3)] == [False, False, True]


def test_a_signal_that_the_caller_ignores_stays_ignored():
    """Cases B.10: `nohup` means that the run outlives its terminal."""
    assert set(signals.asking()) == {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert set(signals.asking()) == {signal.SIGTERM, signal.SIGINT}
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_a_process_of_somebody_else_is_not_ended():
    """Cases B.10: in a notebook a second Ctrl-C is the usual exception."""
    with pytest.raises(KeyboardInterrupt):
        signals.end_at_once()


TELLS = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from jaxcl.runtime import signals
heard = []
signal.signal(signal.SIGHUP, lambda *_: (heard.append(1), signals.drop_closed_terminal()))
print("begun", flush=True)
while not heard:
    time.sleep(0.05)
print("a line for nobody", flush=True)
signals.say("nor this one")
open(sys.argv[1], "w").write("goes on")
"""


def test_a_terminal_that_closes(tmp_path):
    """Cases B.10: the process can still write its lines and go on."""
    import fcntl
    import termios

    ours, theirs = os.openpty()

    def own_terminal():
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    command = [sys.executable, "-c", TELLS, str(tmp_path / "said")]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=own_terminal)
    os.close(theirs)
    assert os.read(ours, 5) == b"begun"
    os.close(ours)
    assert process.wait(30) == 0 and (tmp_path / "said").read_text() == "goes on"


def test_a_reader_that_is_gone():
    """Cases B.10: Ctrl-C in `... | tee` ends tee first; the last line is lost, the exit code is not."""
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom jaxcl.runtime import entry\n"
    program += "from jaxcl.errors import Preempted\ndef main(argv):\n    raise Preempted('stopped')\nentry.leave(main)"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", program], stdout=writer, stderr=writer, timeout=60)
    os.close(writer)
    assert done.returncode == 75


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_parent_passes_requests_on(number, monkeypatch, capfdbinary):
    """Cases B.10: the child of --distributed gets SIGTERM for each of them; a second request kills it."""
    handlers = {s: signal.getsignal(s) for s in signals.asking()}
    child = "import os, signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\ntime.sleep(0.2)\n"
    child += f"os.kill(os.getppid(), signal.{number})\ntime.sleep(30)"
    deaf = "import os, signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nfor _ in range(2):\n"
    deaf += f"    time.sleep(0.3)\n    os.kill(os.getppid(), signal.{number})\ntime.sleep(30)"
    monkeypatch.setitem(signals.ECHO_SECONDS, "SIGHUP", 0.1)
    monkeypatch.setattr(sys, "argv", ["main", "--distributed=h:80,2,1"])
    try:
        for program in (child, deaf):
            monkeypatch.setattr(sys, "orig_argv", ["python", "-c", program])
            assert distributed.guard() == 75
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    assert len(capfdbinary.readouterr().err.splitlines()) == 1


STUCK = f"""
import concurrent.futures, sys, threading
sys.path.insert(0, {str(ROOT)!r})
from jaxcl.runtime import entry
entry.EXIT_SECONDS = 0.5
entry.huge_pages.ask = lambda **_: None
def main(argv):
    concurrent.futures.ThreadPoolExecutor(1).submit(threading.Event().wait)
    raise KeyboardInterrupt
entry.leave(main)
"""


def test_ctrl_c_ends_a_command_whose_threads_wait_for_ever():
    """Cases C.3: any command that reads a disk which does not answer."""
    done = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130 and done.stderr.splitlines() == ["jaxcl: stopped by Ctrl-C"]
