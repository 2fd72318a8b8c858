"""How a command ends as a process."""

import errno
import subprocess
import sys

import pytest
from processes import ROOT, one_line

LEAVE = f"""
import errno, sys
sys.path.insert(0, {str(ROOT)!r})
from jaxcl.runtime import entry
def main(argv):
    with open(argv[1], "w") as file:
        file.write("x" * 100_000)
    return 0
entry.leave(main)
"""

LATE = f"""
import asyncio, sys, threading
sys.path.insert(0, {str(ROOT)!r})
from jaxcl.runtime import entry
class Late:
    def __init__(self, error):
        self.error = error
    def __del__(self):
        self.error()
def answer():
    loop = asyncio.new_event_loop()
    loop.close()
    loop.call_soon_threadsafe(print)
def wrong():
    raise ValueError("seen")
def main(argv):
    for error in (answer, wrong):
        Late(error)
    return 0
entry.leave(main)
"""


def python(program, *arguments):
    done = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True)
    return done.returncode, done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/full")
def test_a_full_disk_is_one_line_of_any_command():
    """Cases C.7: where a command does not expect it, too."""
    code, error = python(LEAVE, "/dev/full")
    assert code == 2
    assert "no space left" in one_line(error)


def test_the_file_is_named(tmp_path, monkeypatch):
    from jaxcl.runtime import storage

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(OSError) as error:
        storage.write_whole(tmp_path / "out.json", "{}")
    assert error.value.filename == str(tmp_path / "out.json")
    assert not list(tmp_path.iterdir())


def test_late_answers_of_a_save_are_not_printed():
    """Cases C.7: a save that failed closes the loop that threads of TensorStore answer to."""
    code, error = python(LATE)
    assert code == 0
    assert "Event loop" not in error and "ValueError: seen" in error
