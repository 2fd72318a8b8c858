"""The command that trains: one line for every mistake, exit codes, help."""

import errno
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import types

import pytest
import tiny
from processes import ROOT, cli, one_line, subprocess_run

from jaxcl import __main__ as commands
from jaxcl import main
from jaxcl.errors import Diverged, Preempted, UserError
from jaxcl.runtime import entry, huge_pages
from jaxcl.train import loop as train
from jaxcl.train import replay, runs


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    return tiny.colours(tmp_path_factory.mktemp("data") / "colours.npz")


SUPCON, EXCON = (f"--config={ROOT}/configs/{name}.py" for name in ("supcon", "excon"))
SMALL = f"{SUPCON}:fashion_mnist", "--config.data.source=npz:{npz}", "--config.batch_size=16"


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], ["--config", "configs/excon.py"]),
        ([SUPCON, "--worrkdir=x"], ["--worrkdir", "workdir"]),
        ([SUPCON, "x"], ["'x'"]),
        ([SUPCON, "--profile=0"], ["--profile=0"]),
        ([*SMALL, "--config.duration=20 steps", "--profile=18"], ["--profile is 18", "20 updates"]),
        ([SUPCON, "--config.views.view1.crop_aera=(0.1,1.0)"], ["views.view1.crop_aera", "views.view1.crop_area"]),
        (["--config=configs/nothing.py"], ["configs/nothing.py"]),
        ([f"{SUPCON}:fashion_mnist", "--config.data.source=npz:nothing.npz"], ["nothing.npz"]),
        ([SUPCON, "--config.data.source=garmets"], ["garmets", "garments"]),
        ([*SMALL, "--config.batch_size=30", "--config.devices=8"], ["batch_size", "30", "8 devices"]),
        ([*SMALL, "--config.devices=9"], ["devices", "9", "8"]),
        ([*SMALL, "--config.duration=4 weeks"], ["duration", "4 weeks"]),
        ([*SMALL, "--config.optimizer.lr=-1.0"], ["optimizer.lr", "-1.0"]),
        ([*SMALL, "--config.eval.final=('explanation',)", "--config.eval.tap=stage9"], ["tap", "stage9"]),
        ([*SMALL, "--config.eval.quick=('knnn',)"], ["knnn", "knn"]),
        ([*SMALL, "--config.log_every=often"], ["log_every", "often"]),
    ],
)
def test_mistakes_on_the_command_line(arguments, words, npz, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments = [a.format(npz=npz) for a in arguments]
    code, out, err = cli(["train", *arguments, *(["--workdir=run"] if arguments else [])], monkeypatch, capsys)
    assert (code, out) == (2, "")
    assert all(word in one_line(err) for word in words), err
    assert not (tmp_path / "run").exists()  # nothing is left behind


START = "from jaxcl import config as base\ndef get_config(preset=''):\n    c = base.default()\n    "


@pytest.mark.parametrize(
    "body, words",
    [
        (START + "return base.term('supconn')\n", ["supconn", "supcon"]),
        (START + "c.sed = 1\n    return c\n", ["sed", "seed"]),
        (START + "c.eval.evry = 1\n    return c\n", ["eval.evry", "every"]),
    ],
)
def test_mistakes_in_a_config_file(body, words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(body)
    code, _, err = cli(["train", "--config=mine.py", "--workdir=run"], monkeypatch, capsys)
    assert code == 2 and all(word in one_line(err) for word in words)


def test_exit_codes(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for error, code in ((Diverged("loss is nan at step 3"), 3), (Preempted("stopped"), 75), (UserError("wrong"), 2)):

        def fail(config, workdir, profile, error=error):
            raise error

        monkeypatch.setattr(train, "run", fail)
        assert cli(["train", SUPCON], monkeypatch, capsys) == (code, "", f"jaxcl: {error}\n")
    seen = []
    monkeypatch.setattr(train, "run", lambda config, workdir, profile: seen.append((config.seed, workdir, profile)))
    assert cli(["train", f"{SUPCON}:cifar10", "--config.seed=3"], monkeypatch, capsys) == (0, "", "")
    assert cli(["train", EXCON, "--workdir=here", "--profile=4"], monkeypatch, capsys) == (0, "", "")
    assert seen == [(3, pathlib.Path("runs/supcon-cifar10"), 0), (0, "here", 4)]
    assert sys.argv[1:] == [EXCON, "--workdir=here", "--profile=4"]  # what the run folder records
    monkeypatch.setattr(replay, "run", lambda config, workdir, step: seen.append((config.seed, workdir, step)))
    assert cli(["train", EXCON, "--workdir=here", "--replay=7"], monkeypatch, capsys) == (0, "", "")
    assert seen[2:] == [(0, "here", 7)]


def test_a_full_disk_in_any_command(monkeypatch, capsys):
    """Cases C.7: one line and code 2, not a traceback; another error of the system is not hidden."""

    def full(argv):
        raise OSError(errno.ENOSPC, "No space left on device", "/out/table.md")

    def other(argv):
        raise OSError(errno.EIO, "Input/output error", "/out/table.md")

    monkeypatch.setattr(sys, "argv", ["jaxcl"])
    with pytest.raises(SystemExit) as end:
        entry.leave(full)
    assert end.value.code == 2 and "/out/table.md: no space left" in one_line(capsys.readouterr().err)
    with pytest.raises(OSError, match="Input/output"):
        entry.leave(other)


def test_results_that_cannot_be_written(monkeypatch, capsys, tmp_path):
    """Cases C.7: after an evaluation; what was measured is on the terminal."""
    for name, found in (("load_run", None), ("evaluate_runs", {}), ("summary", {"results": {"knn": 0.5}})):
        monkeypatch.setattr(runs, name, lambda *_, found=found, **__: found)
    out = tmp_path / "nothing" / "x.json"
    code, said, err = cli(["evaluate", "--workdir=x", f"--out={out}"], monkeypatch, capsys)
    assert code == 2 and str(out) in one_line(err) and json.loads(said) == {"knn": 0.5}


@pytest.mark.parametrize("program", [("-m", "jaxcl.main"), ("-m", "jaxcl", "train")])
def test_mistakes_of_the_real_command(program, tmp_path):
    done = subprocess_run([SUPCON, "--config.modl.depth=18"], tmp_path, program)
    assert done.returncode == 2 and "modl.depth" in one_line(done.stderr)
    assert done.stdout == "" and not (tmp_path / "runs").exists()


def test_a_mistake_that_the_data_show(tmp_path):
    done = subprocess_run([SUPCON, "--config.batch_size=20000", "--config.devices=1"], tmp_path)
    assert done.returncode == 2 and "batch_size" in one_line(done.stderr)


# ---- all commands


def test_the_list_of_commands(monkeypatch, capsys):
    for arguments in ([], ["--help"], ["-h"], ["help"]):
        code, out, err = cli(arguments, monkeypatch, capsys)
        assert (code, err) == (0, "")
        lines = out.splitlines()
        for name in commands.COMMANDS:
            assert sum(line.startswith(f"  {name} ") for line in lines) == 1
    for name in ("plan", "prepare", "claims"):
        assert importlib.util.find_spec(commands.COMMANDS[name].module)
    for arguments, word in ((["trian"], "'train'"), (["nothing"], "evaluate"), ([SUPCON], "jaxcl train")):
        code, out, err = cli(arguments, monkeypatch, capsys)
        assert (code, out) == (2, "") and word in one_line(err)


def test_help_of_every_command(monkeypatch, capsys):
    """Its own text with an example, its own flags and no others; and nothing starts."""
    flags_of = {}
    for name, command in commands.COMMANDS.items():
        code, out, err = cli([name, "--help"], monkeypatch, capsys)
        assert (code, err) == (0, ""), name
        assert f"    jaxcl {name} " in out and out.startswith(sys.modules[command.module].__doc__.splitlines()[0])
        flags_of[name] = {line.split(":")[0] for line in out.splitlines() if line.startswith("  --")}
    assert "  --workdir" in flags_of["train"] and "  --seeds" in flags_of["sweep"] - flags_of["train"]
    assert flags_of["prepare"] == {"  --data_dir"}
    assert not any("  --verbosity" in own for own in flags_of.values())  # absl's own
    evaluators = cli(["evaluate", "--help"], monkeypatch, capsys)[1]
    assert "knn" in evaluators.split("Evaluators:")[1] and "linear" in evaluators.split("Evaluators:")[1]
    text = cli(["train", "--help"], monkeypatch, capsys)[1]
    assert "--config.KEY" in text and "Presets" in text


def test_prepare_names_what_is_missing(monkeypatch, capsys):
    code, _, err = cli(["prepare"], monkeypatch, capsys)
    assert code == 2 and "jaxcl prepare cifar10" in one_line(err)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, err = cli(["prepare", "cifar10", "--data_dir=x"], monkeypatch, capsys)
    assert code == 2 and "tensorflow" in one_line(err) and "jaxcl[prepare]" in err


# ---- the console script


def test_the_script_finds_modules_of_the_current_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["/somewhere/bin"])
    seen = []
    monkeypatch.setattr(entry, "leave", lambda main, script=False: seen.append((main, script)))
    commands.script()
    assert sys.path == [str(tmp_path), "/somewhere/bin"] and seen == [(commands.main, True)]
    monkeypatch.setattr(sys, "path", ["/somewhere/bin"])
    monkeypatch.setattr(commands.sys, "flags", types.SimpleNamespace(safe_path=True))
    commands.script()
    assert sys.path == ["/somewhere/bin"]


SCRIPT = "import sys\nfrom jaxcl.__main__ import script\nsys.exit(script())\n"


def test_the_script_as_a_process(tmp_path):
    """It restarts itself with large pages as `python -m jaxcl` does, and reads its config from where it is started."""
    (tmp_path / "jaxcl").write_text(SCRIPT)
    (tmp_path / "my_pkg.py").write_text(
        "import os\nfrom jaxcl.errors import UserError\nraise UserError(str(os.environ.get('GLIBC_TUNABLES')))\n"
    )
    (tmp_path / "c.py").write_text("def get_config():\n    import my_pkg\n")
    environ = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", "JAXCL_HUGE_PAGES")}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "jaxcl"), "train", "--config=c.py"],
        cwd=tmp_path, env=environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    expected = "glibc.malloc.hugetlb=1" if huge_pages.wanted() else "None"
    assert done.returncode == 2 and one_line(done.stderr) == f"jaxcl: {expected}"


def test_jaxcl_main_is_the_train_command():
    assert commands.COMMANDS["train"].module == main.__name__
