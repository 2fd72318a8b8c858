"""The lock of a run folder: who holds it, and whose lock no longer counts."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from jaxcl.errors import UserError
from jaxcl.runtime import lock, storage
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


RACE = """
import sys, time
from jaxcl.errors import UserError
from jaxcl.runtime import lock, storage
lock.time.time()
print("ready", flush=True)
sys.stdin.readline()
try:
    held = lock.RunLock(sys.argv[1])
    print("held", flush=True)
    sys.stdin.readline()
except UserError:
    print("refused", flush=True)
"""


def test_starts_at_one_moment(tmp_path):
    """Cases C.6: of three that find a dead process's lock, or none, at one moment, exactly one gets the folder."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for i in range(6):
        folder = tmp_path / str(i)
        folder.mkdir()
        if i % 2:
            written(folder, started="1")
        racers = [subprocess.Popen([sys.executable, "-c", RACE, str(folder)], **pipes) for _ in range(3)]
        try:
            assert [r.stdout.readline() for r in racers] == ["ready\n"] * 3
            for r in racers:
                r.stdin.write("go\n")
                r.stdin.flush()
            assert sorted(r.stdout.readline() for r in racers) == ["held\n", "refused\n", "refused\n"]
        finally:
            for r in racers:
                r.kill()
                r.communicate()
        assert [p.name for p in folder.iterdir()] == [lock.NAME]


def test_threads_that_take_over_at_one_moment(tmp_path, monkeypatch):
    """Cases C.6: also where the file system cannot exclude others, never nobody."""
    for alone in (True, False):
        if not alone:
            monkeypatch.setattr(lock, "fcntl", None)
        written(tmp_path, started="1")
        start, held = threading.Barrier(8), []

        def take(start=start, held=held):
            start.wait()
            try:
                held.append(RunLock(tmp_path))
            except UserError:
                pass

        threads = [threading.Thread(target=take) for _ in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert len(held) == 1
        held[0].check()
        held[0].close()


def test_writers_of_one_file(tmp_path):
    """Cases C.6: any number of writers at one moment; the file is always one writer's, whole."""
    path, errors = tmp_path / "file", []

    def write(letter):
        try:
            for _ in range(30):
                storage.write_whole(path, letter * 10000)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abcd"]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    text = path.read_text()
    assert not errors and len(text) == 10000 and len(set(text)) == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"\x80\xff\x00", b"[]", b'{"pid": 3, "ho', b'{"token": [1]}', b"[" * 100000])
def test_a_file_that_is_no_lock(tmp_path, content, monkeypatch):
    """Cases C.7, C.9: what a full disk left, or another program. It is taken over after a moment, not after 60 s."""
    (tmp_path / lock.NAME).write_bytes(content)
    monkeypatch.setattr(lock, "WRITE_SECONDS", 0.01)
    with RunLock(tmp_path) as first:
        with pytest.raises(UserError):
            RunLock(tmp_path)
        first.check()


def test_a_full_disk_leaves_no_lock(tmp_path, monkeypatch):
    """Cases C.7: a lock that cannot be written is not there."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("link", "fsync"):
        with monkeypatch.context() as patched:
            patched.setattr("pathlib.Path.write_text", full)
            patched.setattr(lock.os, name, full)
            with pytest.raises(OSError):
                RunLock(tmp_path)
        assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_links(tmp_path, monkeypatch):
    """Cases C.6."""

    def none(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(lock.os, "link", none)
    with RunLock(tmp_path):
        with pytest.raises(UserError):
            RunLock(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(lock.fcntl is None, reason="flock")
def test_a_process_that_is_suspended_while_it_takes_over(tmp_path, monkeypatch):
    """Cases C.3, C.6: the others wait for it a while, not for ever."""
    monkeypatch.setattr(lock, "ALONE_SECONDS", 0.3)
    written(tmp_path, started="1")
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        lock.fcntl.flock(folder, lock.fcntl.LOCK_EX)
        with RunLock(tmp_path) as held:
            held.check()
            with pytest.raises(UserError):
                RunLock(tmp_path)
    finally:
        os.close(folder)


def test_a_link_to_nothing_is_no_lock(tmp_path):
    """Cases C.9: it can neither be read nor made; the run takes its place, and does not try for ever."""
    (tmp_path / lock.NAME).symlink_to(tmp_path / "nothing")
    with RunLock(tmp_path, still=0.1):
        assert not (tmp_path / lock.NAME).is_symlink()
        with pytest.raises(UserError):
            RunLock(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_in_its_place_is_refused(tmp_path):
    (tmp_path / lock.NAME).mkdir()
    with pytest.raises(UserError, match=lock.NAME):
        RunLock(tmp_path, still=0.1)
    assert (tmp_path / lock.NAME).is_dir()
