"""The lock of a run folder: who holds it, and whose lock no longer counts."""

import json
import os
import signal
import subprocess
import sys

import pytest

from jaxcl.errors import UserError
from jaxcl.runtime import lock
from jaxcl.runtime.lock import RunLock

HOLD = """
import sys, time
from jaxcl.runtime.lock import RunLock
held = RunLock(sys.argv[1])
print("held", flush=True)
time.sleep(99)
"""


@pytest.fixture
def other(tmp_path):
    """A process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def written(folder, **changes):
    """A lock as another process left it."""
    content = {**lock._identity(), "token": "other", "touched": 0} | changes
    (folder / lock.NAME).write_text(json.dumps(content))


def test_one_at_a_time_in_this_process(tmp_path):
    first = RunLock(tmp_path)
    with pytest.raises(UserError, match=f"is in use by process {os.getpid()} on "):
        RunLock(tmp_path)
    first.check()
    first.close()
    first.close()
    assert not (tmp_path / lock.NAME).exists()
    RunLock(tmp_path).close()


def test_another_process_and_its_death(tmp_path, other):
    with pytest.raises(UserError) as error:
        RunLock(tmp_path)
    text = str(error.value)
    assert text.startswith(f"{tmp_path} is in use by process {other.pid} on ") and "\n" not in text
    assert text.endswith("wait for it, end it, or use another --workdir")
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / lock.NAME).exists()
    RunLock(tmp_path).close()  # at once: the process table tells


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="no /proc")
def test_a_number_that_came_round(tmp_path):
    """A container that is started again has the same name, and often the same process number."""
    written(tmp_path, started="1")
    RunLock(tmp_path).close()
    written(tmp_path, pid=1, started="1")
    RunLock(tmp_path).close()


def test_another_machine_that_is_dead(tmp_path, caplog):
    written(tmp_path, host="elsewhere", boot="other", pid=12)
    with caplog.at_level("INFO", logger="jaxcl"):
        RunLock(tmp_path, still=0.2).close()
    assert "process 12 on elsewhere" in caplog.text


def test_another_machine_that_lives(tmp_path, monkeypatch):
    written(tmp_path, host="elsewhere", boot="other", pid=12)
    times = iter(range(100))
    monkeypatch.setattr(lock.time, "sleep", lambda s: os.utime(tmp_path / lock.NAME, (next(times), 1)))
    with pytest.raises(UserError, match="is in use by process 12 on elsewhere"):
        RunLock(tmp_path, still=5)


def test_a_lock_that_was_half_written(tmp_path):
    (tmp_path / lock.NAME).write_text('{"pid": 3, "ho')
    RunLock(tmp_path, still=0.1).close()


def test_taken_over_while_standing_still(tmp_path):
    first = RunLock(tmp_path, touch=0.02)
    written(tmp_path, pid=77, host="elsewhere")
    first._thread.join(timeout=10)
    with pytest.raises(UserError, match="process 77 on elsewhere"):
        first.check()
    first.close()
    assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == 77  # not ours to remove


def test_it_is_touched(tmp_path):
    os_time = (1, 1)
    first = RunLock(tmp_path, touch=0.02)
    os.utime(tmp_path / lock.NAME, os_time)
    for _ in range(200):
        if os.stat(tmp_path / lock.NAME).st_mtime > 1:
            break
        lock.time.sleep(0.02)
    else:
        pytest.fail("nobody touched it")
    first.close()
