"""A few cheap faults of `python -m benchmarks.survival`, and what its judgement finds."""

import json
import subprocess
import sys

import pytest

from benchmarks.survival import __main__ as suite
from benchmarks.survival import kills, registry
from benchmarks.survival.lab import Ended, contents, gone, told
from jaxcl.train.checkpoint import MANIFEST


def test_every_kind_is_there():
    names = {fault.name.partition(":")[0] for fault in registry.chosen("")}
    assert names == set(registry.KINDS)
    assert [f.name for f in registry.chosen("hosts:port,hosts")][0] == "hosts:port"
    with pytest.raises(SystemExit):
        registry.chosen("floods")


@pytest.mark.parametrize(
    "code, error, well",
    [
        (2, "step 1\njaxcl: no room\n", True),
        (0, "", True),
        (None, "", False),
        (1, "jaxcl: no room\n", False),
        (2, "", False),
        (2, "Traceback (most recent call last)\njaxcl: no room\n", False),
        (2, "jaxcl: no room\njaxcl: again\n", False),
        (2, "jaxcl: no room\nsomething else\n", False),
        (0, "jaxcl: no room\n", False),
    ],
)
def test_one_plain_line(code, error, well):
    assert (not told(Ended(code, "", error), 0, 2)) == well


def test_a_file_that_is_gone(tmp_path):
    for name in ("a", "b", "lock.json"):
        (tmp_path / name).write_text(name)
    before = contents(tmp_path)
    (tmp_path / "a").rename(tmp_path / "damaged-a")  # it is still there
    (tmp_path / "lock.json").unlink()
    assert not gone(before, tmp_path)
    (tmp_path / "b").write_text("other")
    assert gone(before, tmp_path) == "b"


def test_the_table(tmp_path, monkeypatch, capsys):
    """Results are kept after each fault, and the same command goes on with the others."""
    trials = [registry.Trial("x", registry.WELL), registry.Trial("y", registry.LOST, "it is gone")]
    tried = []

    def fault(name):
        return registry.Fault(name, f"about {name}", lambda lab, rounds: tried.append(name) or iter(trials))

    monkeypatch.setattr(registry, "FAULTS", {n: fault(n) for n in ("disk:a", "disk:b", "signal:c")})
    for more in (["--kinds=disk:a"], [], ["--markdown"]):
        monkeypatch.setattr(sys, "argv", ["survival", f"--out={tmp_path}", *more])
        assert suite.main() == 1
    assert tried == ["disk:a", "disk:b", "signal:c"]
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| **all**")]
    assert [int(x) for x in rows[-1][2:5]] == [6, 3, 3]
    assert {e["tried"] for e in json.loads((tmp_path / "faults.json").read_text()).values()} == {2}


@pytest.mark.slow
def test_a_signal_and_a_damaged_checkpoint(tmp_path):
    """Real processes: TERM during the third save; a cut manifest; the run goes on to the bits of an undisturbed one."""
    script = (
        "import pathlib, sys\n"
        "from benchmarks.survival import files, kills, lab\n"
        "lab.STEPS = 12\n"
        "its = lab.Lab(pathlib.Path(sys.argv[1]))\n"
        "its.run(lab.training(its.out / 'half'), at={'event': 'os.mkdir', 'name': 'checkpoints/8', 'do': 'TERM'})\n"
        "cut = lambda work: files.DAMAGES['cut in half'](work / 'checkpoints' / '8' / 'manifest.json')\n"
        "print(files.resume(its, 'cut', cut))\n"
        "its.close()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=kills.ROOT,
        env=kills.environment(),
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert "outcome='well'" in ended.stdout, ended.stdout
    assert (tmp_path / "half" / "checkpoints" / "8" / MANIFEST).exists()
