"""The command: one line for every mistake, and exit codes."""

import pathlib
import subprocess
import sys

import pytest
import tiny
from absl import flags
from absl.testing import flagsaver
from test_train import ROOT, subprocess_run

from jaxcl import main
from jaxcl.errors import Diverged, Preempted, UserError
from jaxcl.train import loop as train


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    return tiny.colours(tmp_path_factory.mktemp("data") / "colours.npz")


def cli(arguments, monkeypatch, capsys):
    """`python -m jaxcl.main` in this process -> (exit code, what it wrote to stderr)."""
    monkeypatch.setattr(sys, "argv", ["main.py", *map(str, arguments)])
    saved = flagsaver.save_flag_values()
    try:
        with pytest.raises(SystemExit) as exit_:
            main.cli()
    finally:
        flagsaver.restore_flag_values(saved)
        flags.FLAGS.unparse_flags()
    return exit_.value.code, capsys.readouterr().err


SUPCON, EXCON = (f"--config={ROOT}/configs/{name}.py" for name in ("supcon", "excon"))
SMALL = f"{SUPCON}:fashion_mnist", "--config.data.source=npz:{npz}", "--config.batch_size=16"


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "no --config; for example --config=configs/excon.py"),
        ([SUPCON, "--worrkdir=x"], "Unknown command line flag 'worrkdir'"),
        ([SUPCON, "x"], "unexpected argument 'x'"),
        ([SUPCON, "--profile=0"], "flag --profile=0: 0 is not a positive integer"),
        ([*SMALL, "--config.duration=20 steps", "--profile=18"], "--profile is 18, but the run has 20 updates"),
        ([SUPCON, "--config.batchsize=3"], "batchsize"),
        ([SUPCON, "--config.views.view1.crop_aera=(0.1,1.0)"], "crop_aera"),
        ([SUPCON, "--config.batch_size=many"], "many"),
        ([SUPCON, "--config.wandb.project=x"], "unknown config key: wandb.project; wandb is '', which has no keys"),
        ([SUPCON, "--config.optimizer.lr.x=1"], "unknown config key: optimizer.lr.x; optimizer.lr is 0.006, which has"),
        ([SUPCON, "--config.eval=3"], "eval"),
        ([f"{SUPCON}:cifr10"], "unknown preset 'cifr10'; did you mean 'cifar10'?"),
        ([f"{SUPCON}:cifar10,cifar100"], "names both 'cifar10' and 'cifar100'; choose one"),
        (["--config=configs/nothing.py"], "no config file at configs/nothing.py; for example"),
        (["--config=configs/nothing.py:cifar10", "--config.seed=1"], "no config file at configs/nothing.py"),
        (["--config", "nothing.py"], "no config file at nothing.py"),
        ([f"{SUPCON}:fashion_mnist", "--config.data.source=npz:nothing.npz"], "no file at nothing.npz"),
        ([SUPCON, "--config.data.source=garmets"], "unknown data source 'garmets'"),
        ([*SMALL, "--config.batch_size=30", "--config.devices=8"], "batch_size 30 does not divide over 8 devices"),
        ([*SMALL, "--config.devices=9"], "devices is 9, but there are 8"),
        ([*SMALL, "--config.duration=4 weeks"], "duration is '4 weeks'; expected a duration"),
        ([*SMALL, "--config.optimizer.lr=-1.0"], "optimizer.lr is -1.0"),
        ([*SMALL, "--config.eval.tap=stage9"], "tap 'stage9' is not in this encoder"),
        ([*SMALL, "--config.eval.quick=('knnn',)"], "eval names 'knnn'; expected one of knn, linear"),
        ([*SMALL, "--config.log_every=often"], "log_every is 'often'; expected a duration"),
    ],
)
def test_mistakes_on_the_command_line(arguments, words, npz, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments = [a.format(npz=npz) for a in arguments]
    code, text = cli([*arguments, "--workdir=run"] if arguments else arguments, monkeypatch, capsys)
    assert code == 2
    assert words in text and text.startswith("jaxcl: ") and len(text.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()  # nothing is left behind


@pytest.mark.parametrize("module", ["main", "sweep", "evaluate"])
def test_help(module):
    done = subprocess.run([sys.executable, "-m", f"jaxcl.{module}", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert f"python -m jaxcl.{module} " in done.stdout
    assert ("--workdir: " in done.stdout) == (module != "sweep") and ("--seeds: " in done.stdout) == (module == "sweep")
    assert "--verbosity" not in done.stdout  # absl's own


START = "from jaxcl import config as base\ndef get_config(preset=''):\n    c = base.default()\n    "


@pytest.mark.parametrize(
    "body, words",
    [
        ("def get_config(:\n", "SyntaxError"),
        ("def get_config(preset=''):\n    return 1 / 0\n", "ZeroDivisionError: division by zero (mine.py, line 2)"),
        (START + "return base.term('supconn')\n", "no term is called 'supconn'; did you mean 'supcon'?"),
        (START + "c.sed = 1\n    return c\n", "unknown config key sed; did you mean 'seed'?"),
        (START + "c.eval.evry = 1\n    return c\n", "unknown config key eval.evry; did you mean 'every'?"),
    ],
)
def test_mistakes_in_a_config_file(body, words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(body)
    code, text = cli(["--config=mine.py", "--workdir=run"], monkeypatch, capsys)
    assert code == 2 and len(text.strip().splitlines()) == 1
    assert words in text


def test_exit_codes(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for error, code in ((Diverged("loss is nan at step 3"), 3), (Preempted("stopped"), 75), (UserError("wrong"), 2)):

        def fail(config, workdir, profile, error=error):
            raise error

        monkeypatch.setattr(train, "run", fail)
        assert cli([SUPCON], monkeypatch, capsys) == (code, f"jaxcl: {error}\n")
    seen = []
    monkeypatch.setattr(train, "run", lambda config, workdir, profile: seen.append((config.seed, workdir, profile)))
    assert cli([f"{SUPCON}:cifar10", "--config.seed=3"], monkeypatch, capsys) == (0, "")
    assert cli([EXCON, "--workdir=here", "--profile=4"], monkeypatch, capsys) == (0, "")
    assert seen == [(3, pathlib.Path("runs/supcon-cifar10"), 0), (0, "here", 4)]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([SUPCON, "--config.modl.depth=18"], "modl"),
        (
            [SUPCON, "--config.batch_size=20000", "--config.devices=1"],
            "batch_size 20000 is larger than the training set",
        ),
    ],
)
def test_mistakes_of_the_real_command(arguments, words, tmp_path):
    done = subprocess_run(arguments, tmp_path)
    assert done.returncode == 2
    assert words in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == "" and not (tmp_path / "runs").exists()
