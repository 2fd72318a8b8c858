"""A sweep: which runs it is, its table, what it does about the ways a run ends, and two real runs."""

import json
import os
import pathlib
import re
import signal
import statistics
import sys

import numpy as np
import pytest
import tiny
from processes import ROOT, one_line, subprocess_run
from processes import cli as jaxcl

from jaxcl import config as configs
from jaxcl.commands import config_file
from jaxcl.commands.sweep import main as sweep
from jaxcl.commands.sweep import table as sweep_table
from jaxcl.commands.sweep.runs import folder_name, plan, split_values
from jaxcl.commands.sweep.table import Entry, Row
from jaxcl.errors import UserError

# ---- the command line


@pytest.mark.parametrize(
    "text, values",
    [
        ("0.1,0.2", ["0.1", "0.2"]),
        ("1e-3", ["1e-3"]),
        ("('knn',),('knn','linear')", ["('knn',)", "('knn','linear')"]),
        ("[(1,2),{3:4}],5", ["[(1,2),{3:4}]", "5"]),
        ("'4 epochs', '8 epochs, or so'", ["4 epochs", "8 epochs, or so"]),
        ("\"it's\",(',)',)", ["it's", "(',)',)"]),
    ],
)
def test_values_of_a_grid(text, values):
    assert split_values(text) == values


@pytest.mark.parametrize("text", ["", "1,,2", "1,", "(1,2", "1)", "(1]", "'1,2", "''"])
def test_values_that_are_none(text):
    with pytest.raises(ValueError):
        split_values(text)


def test_names_of_folders():
    assert folder_name("configs/simclr.py", {}) == "simclr"
    name = folder_name("configs/clae.py:plain,clean_pair", {"temperature": "0.1", "lr": "1e-3"})
    assert name == "clae-plain-clean_pair_temperature=0.1_lr=1e-3"
    values = ["('knn',)", "['knn']", "knn", "a/b", "a b", "../..", "é", "x" * 300, "x" * 301, "c:\\d", "a\nb", "-", "."]
    names = [folder_name("c.py", {"key": v}) for v in values]
    assert len({n.casefold() for n in names}) == len(values)
    for name in names:
        assert len(name) < 140 and set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789._=-") and name[0] == "c"
    assert folder_name("c.py", {"key": "knn"}, {"c_key=knn"}).startswith("c_key=knn-")  # a name that is taken


CONFIG = """
from jaxcl import config as base
def get_config(preset=""):
    (word,) = base.choose(preset, ("plain", "wide"))
    c = base.default()
    c.duration = "{epochs} epochs"
    c.batch_size = 512 if word == "wide" else 256
    if word == "wide":
        c.views.view1 = base.view("random")
    c.eval.final = ("knn", "classifier")
    return c
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text(CONFIG.format(epochs={"a": 10, "b": 5}[name]))
    return tmp_path


def test_the_runs_of_a_sweep(here):
    out = pathlib.Path("out")
    runs = plan(
        ["a.py", "a.py:wide"],
        grids=["optimizer.lr=1e-3,3e-3", "model.depth=18,34"],
        sets=["eval.final=('knn',)", "duration=4 epochs"],
        seeds=[0, 7],
        out=out,
    )
    assert len(runs) == 16 and len({r.workdir for r in runs}) == 16
    assert [r.seed for r in runs] == [0] * 8 + [7] * 8  # the whole table for one seed, then for the next
    assert runs[1].title == "a lr=1e-3 depth=34 seed 0"
    assert runs[13].workdir == out / "a-wide_lr=1e-3_depth=34" / "seed-7"
    assert runs[13].log == out / "a-wide_lr=1e-3_depth=34" / "seed-7.log"
    c = runs[13].config
    assert (c["seed"], c["batch_size"], c["optimizer"]["lr"], c["model"]["depth"]) == (7, 512, 1e-3, 34)
    assert c["eval"]["final"] == ["knn"] and c["duration"] == "4 epochs"
    # What the process gets is what was read here.
    argument, workdir, *overrides = runs[13].arguments
    assert workdir == "--workdir=out/a-wide_lr=1e-3_depth=34/seed-7"
    again = config_file.read_config(argument.removeprefix("--config="), overrides)
    assert configs.to_dict(again) == c


def test_labels_tell_keys_apart(here):
    grids = ["views.view1.grayscale=0.1,0.2", "data.garments.spurious=0.0,0.5", "checkpoint.every=10%", "eval.every=0"]
    (first, *_) = plan(["a.py:wide"], grids=grids, sets=[], seeds=[0], out=pathlib.Path("out"))
    assert first.setting.title == "a:wide grayscale=0.1 spurious=0.0 checkpoint.every=10% eval.every=0"


# ---- mistakes


def squeezed(text):
    return re.sub(" +", " ", text)


def cli(arguments, monkeypatch, capfd):
    """`jaxcl sweep` in this process -> (exit code, stdout, stderr)."""
    return jaxcl(["sweep", *arguments], monkeypatch, capfd)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], ["--config"]),
        (["--config=a.py", "--confg=b.py"], ["--confg", "'config'"]),
        (["--config=a.py", "b.py"], ["'b.py'"]),
        (["--config=a.py", "--config=c.py", "--config=b.py"], ["c.py"]),
        (["--config=a.py", "--config=b.py:wid"], ["b.py:wid", "'wide'"]),
        (["--config=a.py", "--set=optimizer.lrr=1"], ["a.py", "optimizer.lrr", "optimizer.lr?"]),
        (["--config=a.py:wide", "--config=b.py", "--grid=views.view1.grayscale=0.1,0.2"], ["b.py", "views.view1"]),
        (["--config=a.py", "--grid=optimizer.lr=1e-3,fast"], ["optimizer.lr", "fast"]),
        (["--config=a.py", "--grid=optimizer.lr"], ["--grid=optimizer.lr", "KEY=VALUE,VALUE,..."]),
        (["--config=a.py", "--set==3"], ["--set==3", "--set=KEY=VALUE"]),
        (["--config=a.py", "--grid=eval.final=('knn',"], ["--grid=eval.final", "')'"]),
        (["--config=a.py", "--grid=optimizer.lr=1,"], ["--grid=optimizer.lr", "empty"]),
        (["--config=a.py", "--grid=optimizer.lr=1,1"], ["--grid=optimizer.lr", "1 twice"]),
        (["--config=a.py", "--grid=optimizer.lr=1,2", "--grid=optimizer.lr=3"], ["--grid", "optimizer.lr twice"]),
        (["--config=a.py", "--grid=optimizer.lr=1,2", "--set=optimizer.lr=3"], ["optimizer.lr", "--grid and --set"]),
        (["--config=a.py", "--grid=seed=1,2"], ["--grid", "--seeds"]),
        (["--config=a.py", "--config=a.py"], ["--config=a.py", "twice"]),
        (["--config=a.py", "--config=./a.py:plain"], ["'a.py'", "'./a.py:plain'"]),
        (["--config=a.py", "--grid=optimizer.lr=0.1,1e-1"], ["'a lr=0.1'", "'a lr=1e-1'"]),
        (["--config=a.py", "--seeds=0,x"], ["--seeds", "'0,x'"]),
        (["--config=a.py", "--seeds=1,1"], ["--seeds", "1 twice"]),
        (["--config=a.py", "--jobs=0"], ["--jobs", "0"]),
        (["--config=a.py", "--measures=knn.accuracy,linear.accuracy"], ["--measures", "'linear'", "eval.final"]),
    ],
)
def test_mistakes(arguments, words, here, monkeypatch, capfd):
    monkeypatch.setattr(sweep, "PROGRAM", ("/nothing",))  # a run that starts is an error of another kind
    arguments = ["--out=out", *arguments] if "--out" not in str(arguments) else arguments
    code, out, err = cli(arguments, monkeypatch, capfd)
    assert code == 2 and out == ""
    assert all(word in one_line(err) for word in words), err
    assert not (here / "out").exists()


def test_a_mistake_of_the_real_command(here):
    """In the last config: nothing has been run."""
    arguments = ["--config=a.py", "--config=b.py:wide", "--set=views.view1.crop_aera=(0.1,1.0)", "--jobs=2"]
    done = subprocess_run(arguments, here, ("-m", "jaxcl", "sweep"))
    assert done.returncode == 2 and done.stdout == "" and not (here / "runs").exists()
    assert "a.py" in one_line(done.stderr) and "views.view1" in done.stderr


# ---- the table


def entry(seed, accuracy=None, state="finished", **results):
    results = {"linear": {"accuracy": accuracy}, "seconds": {"train": 60.0 + seed}, **results}
    return Entry(seed, f"folder/seed-{seed}", state, results if state == "finished" else None)


def test_the_numbers_of_a_table():
    three = [entry(0, 0.5), entry(1, 0.6), entry(2, 0.61, fgsm={"0.5": {"ece": 0.1}})]
    one = [entry(0, 0.25), entry(1, state="diverged"), entry(2, state="waiting")]
    rows = [Row("a", {"lr": "1e-3", "depth": "18"}, three), Row("b|c", {"lr": "3e-3", "depth": "18"}, one)]
    measures = ["linear.accuracy", "fgsm.0.5.ece", "seconds.train", "steps"]
    content = sweep_table.table(rows, measures)
    first, second = content["rows"]
    assert first["finished"] == [0, 1, 2] and second["finished"] == [0] and second["diverged"] == [1]
    assert first["train_seconds"] == 61 and second["train_seconds"] == 60
    accuracy = first["measures"]["linear.accuracy"]
    assert accuracy["values"][1] == {"seed": 1, "run": "folder/seed-1", "value": 0.6}
    np.testing.assert_allclose(accuracy["mean"], 0.57)
    np.testing.assert_allclose(accuracy["sd"], ((0.07**2 + 0.03**2 + 0.04**2) / 2) ** 0.5)
    assert second["measures"]["linear.accuracy"]["sd"] is None and second["measures"]["steps"]["mean"] is None
    json.dumps(content, allow_nan=False)

    lines = sweep_table.markdown(content).splitlines()
    cells = [[c.strip() for c in line.replace("\\|", "/").strip("|").split("|")] for line in lines]
    assert cells[0] == ["config", "lr", *measures, "n", "time"]  # depth is not varied
    assert cells[2] == ["a", "1e-3", "57.0 ± 6.1", "10.0 (1)", "61 ± 1", "–", "3", "1 min 1 s"]
    assert cells[3] == ["b/c", "3e-3", "25.0", "–", "60", "–", "1 of 3, 1 diverged", "1 min 0 s"]
    assert len({len(line) for line in lines}) == 1 and set(lines[1]) == set("|-: ")


def test_the_measures_of_a_table():
    rows = [Row("a", {}, [entry(0, 0.5, classifier={"accuracy": float("nan")}), entry(1, state="failed")])]
    content = sweep_table.table(rows)
    assert content["measures"] == ["linear.accuracy"]
    assert "| 1 of 2, 1 failed |" in sweep_table.markdown(content)
    nothing = sweep_table.table([Row("a", {}, [entry(0, state="waiting")])])
    assert nothing["measures"] == [] and "| 0 of 1 |" in sweep_table.markdown(nothing)
    assert sweep_table.number("explanation.average_drop", 0.5) == "50.0"
    assert sweep_table.number("adversary.positive_after", 0.51239) == "0.5124"


# ---- how runs end, with a stand-in for `jaxcl train`

FAKE = """
import json, os, pathlib, signal, sys, time
options = dict(a.lstrip("-").split("=", 1) for a in sys.argv[1:])
workdir = pathlib.Path(options["workdir"])
with open("started", "a") as f:
    f.write(f"{workdir.relative_to('out')}\\n")
everything = json.loads(pathlib.Path("what.json").read_text())
what = everything.get(str(workdir.relative_to("out")), 0)
if what == "wait":  # as a run that is asked to end while it trains
    def save(*_):
        (workdir.parent / "saved").touch()
        print("jaxcl: stopped at step 3 of 9 on request", file=sys.stderr)
        sys.exit(75)
    signal.signal(signal.SIGTERM, save)
    workdir.with_name("ready").touch()
    while len(list(pathlib.Path("out").glob("*/ready"))) < list(everything.values()).count("wait"):
        time.sleep(0.01)
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)
if what == "stubborn":
    signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getppid(), signal.SIGINT))
    os.kill(os.getppid(), signal.SIGINT)
    until = time.monotonic() + 60
    while time.monotonic() < until:  # a sleep may be cut short by the signal
        time.sleep(1)
if what:
    print(f"jaxcl: it ends with {what}\\nand more", file=sys.stderr)
    sys.exit(what) if what > 0 else os.kill(os.getpid(), -what)
workdir.mkdir(parents=True, exist_ok=True)
seed = int(options["config.seed"])
cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
results = {"knn": {"accuracy": 0.5 + seed / 10}, "seconds": {"train": 1.0}, "cores": cores}
(workdir / "results.json").write_text(json.dumps(results))
"""


@pytest.fixture
def fake(here, monkeypatch, capfd):
    """`fake(arguments, run=exit code or "wait", ...)` -> (exit code, stdout, stderr, the runs that were started)."""
    (here / "fake.py").write_text(FAKE)
    monkeypatch.setattr(sweep, "PROGRAM", (sys.executable, "-S", "-E", str(here / "fake.py")))
    monkeypatch.setattr(sweep, "_POLL_SECONDS", 0.01)

    def run(*arguments, what=None):
        (here / "what.json").write_text(json.dumps(what or {}))
        (here / "started").write_text("")
        code, out, err = cli(["--out=out", *arguments], monkeypatch, capfd)
        assert "Traceback" not in err
        return code, out, err, (here / "started").read_text().split()

    return run


TWO = "--config=a.py", "--config=a.py:wide", "--seeds=0,1"
ORDER = ["a/seed-0", "a-wide/seed-0", "a/seed-1", "a-wide/seed-1"]


def test_a_sweep_and_the_same_again(fake, here, caplog):
    code, out, err, started = fake(*TWO)
    assert code == 0 and started == ORDER
    assert "| a:wide | 55.0 ± 7.1 | 2 | 1.0 s |" in squeezed(out)
    assert "[4/4] a:wide seed 1: knn 60.0 (" in caplog.text and "left" in caplog.text
    page = (here / "out" / "table.md").read_text()
    assert "python -m jaxcl sweep --out=out --config=a.py --config=a.py:wide --seeds=0,1\n" in page
    assert "4 of 4 runs finished" in page and page.endswith(out)
    content = json.loads((here / "out" / "table.json").read_text())
    assert content["seeds"] == [0, 1] and content["measures"] == ["knn.accuracy"]
    assert content["rows"][0]["measures"]["knn.accuracy"]["values"][1]["run"] == "a/seed-1"
    assert not list((here / "out").glob("*.tmp"))

    code, again, _, started = fake(*TWO)
    assert (code, again, started) == (0, out, [])  # nothing is left to do
    (here / "out" / "a" / "seed-1" / "results.json").unlink()
    code, again, _, started = fake(*TWO, "--config=b.py")
    assert code == 0 and started == ["b/seed-0", "a/seed-1", "b/seed-1"]


def test_a_folder_of_another_config(fake, here):
    fake("--config=a.py")
    folder = here / "out" / "a" / "seed-0"
    (run,) = plan(["a.py"], grids=[], sets=[], seeds=[0], out=here / "out")
    (folder / "config.json").write_text(json.dumps(run.config))
    assert fake("--config=a.py", "--set=log_every=3 steps")[0] == 0  # learns the same
    code, _, err, started = fake("--config=b.py", "--config=a.py", "--set=batch_size=3")
    assert code == 2 and started == []
    assert err.startswith("jaxcl: out/a/seed-0 holds a run of another config, batch_size: 256 -> 3; use another --out")


def test_results_of_another_evaluation(fake, here, caplog):
    fake("--config=a.py")
    (run,) = plan(["a.py"], grids=[], sets=[], seeds=[0], out=here / "out")
    (here / "out" / "a" / "seed-0" / "config.json").write_text(json.dumps(run.config))
    code, _, _, started = fake("--config=a.py", "--set=eval.knn_k=5")
    assert code == 0 and started == []
    assert "a seed 0 was evaluated with eval.knn_k = 200, not 5" in caplog.text


def test_a_run_that_diverges(fake, here, caplog):
    code, out, err, started = fake(*TWO, what={"a/seed-1": 3})
    assert code == 0 and started == ORDER
    assert "| 1 of 2, 1 diverged |" in squeezed(out) and "a seed 1: diverged: it ends with 3" in caplog.text
    assert fake(*TWO)[3] == []  # it would diverge again
    assert "a seed 1 diverged before (it ends with 3)" in caplog.text
    code, out, _, started = fake(*TWO, "--set=optimizer.lr=1e-9")
    assert code == 0 and started == ["a/seed-1"]  # another config, which may not; the fake has no config.json


def test_runs_that_fail(fake):
    code, out, err, started = fake(*TWO, what={"a/seed-0": 1, "a-wide/seed-1": -9})
    assert code == 1 and started == ORDER
    lines = [line for line in err.splitlines() if line.startswith("jaxcl: ")]
    assert lines == [
        "jaxcl: a seed 0 failed (exit code 1): it ends with 1; see out/a/seed-0.log",
        "jaxcl: a:wide seed 1 failed (killed by signal 9): it ends with -9; see out/a-wide/seed-1.log",
    ]
    assert "| 1 of 2, 1 failed |" in squeezed(out)
    assert fake(*TWO)[3] == ["a/seed-0", "a-wide/seed-1"]  # tried again


def test_a_mistake_that_a_run_finds(fake):
    code, _, err, started = fake(*TWO, what={"a-wide/seed-0": 2})
    assert code == 2 and started == ORDER[:2]
    assert err.splitlines()[-1] == "jaxcl: it ends with 2 (a:wide seed 0, see out/a-wide/seed-0.log)"


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_sweep_that_is_asked_to_end(fake, here):
    """Both runs are asked to save, whoever else was to come is not started, and the same command goes on."""
    code, out, err, started = fake(*TWO, "--jobs=2", what={"a/seed-1": "wait", "a-wide/seed-1": "wait"})
    assert code == 75 and sorted(started) == sorted(ORDER)
    assert (here / "out" / "a" / "saved").exists() and (here / "out" / "a-wide" / "saved").exists()
    assert err.splitlines()[-1] == "jaxcl: stopped on request, 2 of 4 runs done; the same command resumes"
    assert squeezed(out).count("| 1 of 2 |") == 2
    code, _, _, started = fake(*TWO)
    assert code == 0 and started == ORDER[2:]
    # A run that is stopped by itself, as by a scheduler, ends the sweep too.
    code, _, err, started = fake(*TWO, "--config=b.py", what={"b/seed-0": 75})
    assert code == 75 and started == ["b/seed-0"]
    assert err.splitlines()[-1].startswith("jaxcl: stopped on request, 4 of 6 runs done")


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_second_interrupt_does_not_wait(fake):
    # In the background of a shell, as CI may run, Ctrl-C is ignored from the start, and the sweep keeps to that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code, _, err, started = fake(*TWO, what={"a/seed-0": "stubborn"})
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 75 and started == ORDER[:1] and "0 of 4 runs done" in err


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this system")
def test_jobs_share_the_cores(fake, here):
    mine = os.sched_getaffinity(0)
    assert fake(*TWO, "--jobs=2")[0] == 0
    assert os.sched_getaffinity(0) == mine
    given = {tuple(json.loads(p.read_text())["cores"]) for p in (here / "out").glob("*/*/results.json")}
    assert given <= {tuple(sorted(mine)[k::2]) or tuple(sorted(mine)[:1]) for k in range(2)}
    with sweep._affinity(len(mine), len(mine) + 1):  # more jobs than cores
        assert len(os.sched_getaffinity(0)) == 1
    with sweep._affinity(0, 1):
        assert os.sched_getaffinity(0) == mine


# ---- the real thing

TINY = """
import tiny
from processes import ROOT, one_line, subprocess_run
from processes import cli as jaxcl
def get_config(preset=""):
    c = tiny.config(background=False, stage=False)
    with c.ignore_type():
        c.data.source = "npz:colours.npz"
    c.duration, c.devices, c.eval.every, c.checkpoint.every, c.report = "3 steps", 1, "0", "0", False
    c.eval.final, c.eval.batch_size, c.eval.knn_k = ("knn", "classifier"), 64, 5
    return c
"""


def test_two_real_runs(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
    (tmp_path / "small.py").write_text(TINY)
    parts = {"train": tiny.batch(64, seed=1), "test": tiny.batch(64, seed=2)}
    arrays = {f"{k}_{n}s": part[n] for k, part in parts.items() for n in ("image", "label")}
    np.savez(tmp_path / "colours.npz", **arrays)
    arguments = ["--config=small.py", "--seeds=0,1", "--grid=optimizer.lr=0.01", "--jobs=2"]
    code, out, err = cli(arguments, monkeypatch, capfd)
    folder = tmp_path / "runs" / "sweep" / "small_lr=0.01"
    assert code == 0, err + "".join(p.read_text() for p in folder.glob("*.log"))
    results = [json.loads((folder / f"seed-{s}" / "results.json").read_text()) for s in (0, 1)]
    assert [r["seed"] for r in results] == [0, 1] and all(r["steps"] == 3 for r in results)
    content = json.loads((tmp_path / "runs" / "sweep" / "table.json").read_text())
    assert content["measures"] == ["knn.accuracy", "classifier.accuracy"] and "jax" in content["machine"]
    accuracies = [r["knn"]["accuracy"] for r in results]
    assert content["rows"][0]["measures"]["knn.accuracy"]["mean"] == statistics.fmean(accuracies)
    assert f"| small | {100 * statistics.fmean(accuracies):.1f} ± " in squeezed(out)

    monkeypatch.setattr(sweep, "PROGRAM", ("/nothing",))
    assert cli(arguments, monkeypatch, capfd)[:2] == (0, out)
    with pytest.raises(UserError, match="holds a run of another config, batch_size: 16 -> 32; use another --out"):
        sweep.main(["", *arguments, "--set=batch_size=32"])
