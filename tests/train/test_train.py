"""The loop end to end, on the project's own configs made small: run, stop, go on, finish, and every way to be wrong."""

import collections
import contextlib
import errno
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from etils import epath
from jax import monitoring
from processes import ROOT, subprocess_run
from train_checks import STEPS, config, config_module, final_state, record, writer_that

from jaxcl.data import shuffle, source_of
from jaxcl.data.shuffle import Shuffled
from jaxcl.errors import Diverged, Preempted, UserError
from jaxcl.method import sharding
from jaxcl.method.init_state import init_state
from jaxcl.report import read_metrics
from jaxcl.runtime.lock import RunLock
from jaxcl.train import log, run_folder
from jaxcl.train import loop as train
from jaxcl.train.checkpoint import Checkpoints
from jaxcl.train.runs import evaluate_runs, load_run, open_run


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    return tiny.colours(tmp_path_factory.mktemp("data") / "colours.npz")


# ---- a whole run


@pytest.fixture(scope="module")
def undisturbed(npz, tmp_path_factory):
    workdir, c = tmp_path_factory.mktemp("undisturbed"), config(npz=npz)
    c.report = True
    with compiled() as COMPILED[str(workdir)]:
        return workdir, train.run(c, workdir)


COMPILED = {}


@contextlib.contextmanager
def compiled():
    """Counts the programs that are compiled meanwhile, or read from the cache of them, by name."""
    counts = collections.Counter()

    def heard(event, seconds, *, fun_name="", **_):
        if event.endswith("backend_compile_duration"):
            counts[fun_name] += 1

    monitoring.register_event_duration_secs_listener(heard)
    try:
        yield counts
    finally:
        monitoring.unregister_event_duration_listener(heard)


def test_the_run_folder(undisturbed):
    workdir, results = undisturbed
    names = {p.name for p in workdir.iterdir()}
    assert {"config.json", "environment.json", "metrics.jsonl", "results.json", "checkpoints"} <= names
    page = (workdir / "report" / "index.html").read_text()
    assert "<html" in page and "Traceback" not in page
    assert not [n for n in names if n.endswith(".tmp")]
    stored = json.loads((workdir / "results.json").read_text())
    assert stored == json.loads(json.dumps(results, default=float))
    assert stored["steps"] == STEPS and 0 <= stored["classifier"]["accuracy"] <= 1
    assert json.loads((workdir / "config.json").read_text())["stages"][0]["start"] == "50%"
    environment = json.loads((workdir / "environment.json").read_text())
    assert environment["packages"]["jax"] == jax.__version__ and environment["processes"] == 1
    steps = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    assert steps == [8, 12]  # every 4, the newest two kept


def test_what_is_logged(undisturbed):
    workdir, _ = undisturbed
    rows = read_metrics(workdir)
    lines = [row for row in rows if "loss" in row]
    assert [row["step"] for row in lines] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows if "eval/classifier_accuracy" in row] == [6]
    for row in lines:
        assert np.isfinite(row["loss"]) and row["lr"] >= 0 and row["images_per_second"] > 0
        assert ("saliency/accepted" in row) == (row["step"] > STEPS // 2)
        assert 0 <= row["data_wait"] <= 1 and "probe/accuracy" in row


def test_each_program_is_compiled_once(undisturbed):
    counts = COMPILED[str(undisturbed[0])]
    assert counts["jit(update)"] == 2  # before and after the stage begins
    assert counts["jit(monitor)"] <= 1
    # Arithmetic outside of any program, ours or Orbax's, has one for each shape; other names stand for one program.
    ours = {n for n in counts if not {*dir(jnp), *dir(jax.lax)} & {n.removeprefix("jit(").removesuffix(")")}}
    assert {n: k for n, k in counts.items() if k > 1 and n in ours} == {"jit(update)": 2}


def test_a_traced_run_learns_the_same_and_measures_every_scope(undisturbed, npz, tmp_path, caplog):
    c = config(npz=npz)
    c.checkpoint.every = "0"
    with compiled() as counts, caplog.at_level("INFO", logger="jaxcl"):
        train.run(c, tmp_path, profile=3)
    assert record(tmp_path) == record(undisturbed[0])
    assert counts["jit(update)"] == 2
    # Update 7 is the first of another program, an evaluation follows on update 6.
    assert f"updates 4 to 6: {tmp_path / 'profile'}" in caplog.text
    found = json.loads((tmp_path / "profile" / "step_time.json").read_text())
    whole = "encode view1 + view2"
    assert {"augment", whole, f"{whole}, backward", "term supcon", "optimizer", "memory probe"} <= found["parts"].keys()
    total = sum(found["parts"].values()) + found["data"] + found["rest"]
    assert total == pytest.approx(found["seconds"]) and found["updates"] == [4, 6]
    assert min(found["parts"].values()) > 0 and found["data"] >= 0
    assert list((tmp_path / "profile").glob("plugins/profile/*/*.xplane.pb"))


def test_a_finished_run_returns_at_once(undisturbed, npz, monkeypatch, caplog):
    workdir, results = undisturbed
    before = (workdir / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(train, "prepare", None)  # whatever would begin to work fails
    with caplog.at_level("INFO", logger="jaxcl"):
        again = train.run(config(npz=npz), workdir)
    assert again == json.loads(json.dumps(results, default=float))
    assert "is finished" in caplog.text
    c = config(npz=npz)
    c.log_every, c.devices = "3 steps", 1  # changes nothing of what was learned
    assert train.run(c, workdir) == again
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_another_config_in_the_same_folder(undisturbed, npz):
    workdir, _ = undisturbed
    c = config(npz=npz)
    c.stages[0].threshold, c.seed = 0.4, 1
    with pytest.raises(UserError) as error:
        train.run(c, workdir)
    text = str(error.value)
    assert str(workdir) in text and "seed: 0 -> 1 (and 1 more)" in text and "--workdir" in text and "\n" not in text


def test_a_run_under_another_order_of_the_rows_is_not_continued(tmp_path, npz):
    """Older versions, whose data.json names no order, drew the rows in another one: going on would repeat images."""
    c = config(npz=npz)
    tiny.saved_run(tmp_path, c)
    with pytest.raises(UserError, match="order of the training rows .*hash-1.* --workdir") as error:
        train.run(c, tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert not (tmp_path / "lock.json").exists()
    found = evaluate_runs([load_run(tmp_path)])  # it can still be evaluated
    assert 0 <= found["classifier"]["accuracy"] <= 1


def test_data_that_changed_in_the_same_folder(tmp_path, npz):
    """Cases B.4: refused before anything is written; a folder of an older version has no hash and goes on."""
    source = tmp_path / "data.npz"
    arrays = dict(np.load(npz))
    np.savez(source, **arrays)
    c = config(npz=source)
    workdir = tmp_path / "run"
    known = {run_folder.ROW_ORDER: shuffle.ORDER, run_folder.FINGERPRINT: source_of(c, "train").fingerprint}
    tiny.saved_run(workdir, c, **known)
    before = (workdir / "data.json").read_bytes()
    np.savez(source, **arrays | dict(train_labels=np.roll(arrays["train_labels"], 1)))
    with pytest.raises(UserError) as error:
        train.run(c, workdir)
    assert "\n" not in str(error.value) and str(workdir) in str(error.value)
    assert (workdir / "data.json").read_bytes() == before and not (workdir / "lock.json").exists()
    assert 0 <= evaluate_runs([load_run(workdir)])["classifier"]["accuracy"] <= 1
    facts = json.loads(before)
    del facts[run_folder.FINGERPRINT]
    run_folder.write_json(workdir / "data.json", facts)
    now = facts | {run_folder.FINGERPRINT: source_of(c, "train").fingerprint}
    run_folder.claim(workdir, json.loads((workdir / "config.json").read_text()), now, True).close()
    assert json.loads((workdir / "data.json").read_text()) == now


def test_a_workdir_in_the_home(undisturbed, npz, tmp_path, monkeypatch):
    """Cases B.2: all of ~/[1] is in the home; from another folder the same command finds the finished run."""
    for name in ("home", "here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    c = config(npz=npz)
    train.run(c, "~/[1]")
    assert list((tmp_path / "here").iterdir()) == []
    assert record(tmp_path / "home" / "[1]") == record(undisturbed[0])
    monkeypatch.chdir(tmp_path / "there")
    monkeypatch.setattr(train, "prepare", None)  # whatever would begin to work fails
    assert train.run(config(npz=npz), "~/[1]")["steps"] == STEPS
    assert open_run("~/[1]").step == STEPS and list((tmp_path / "there").iterdir()) == []


# ---- stopped and resumed


class _Pulled(Exception):
    """The plug."""


def same_run(workdir, reference, c):
    for a, b in zip(*(jax.tree.leaves(final_state(w, c)) for w in (workdir, reference)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert record(workdir) == record(reference)


def test_a_crash_and_the_same_command(undisturbed, npz, tmp_path, monkeypatch):
    """It goes on from the last checkpoint, at step 4; what was logged of steps 5 to 7 is logged again, once."""
    reference, _ = undisturbed

    def pull():
        raise _Pulled

    c = config(npz=npz)
    with monkeypatch.context() as m:
        m.setattr(log, "MetricsWriter", writer_that(pull, 7))
        with pytest.raises(_Pulled):
            train.run(c, tmp_path)
    assert not (tmp_path / "results.json").exists()
    train.run(c, tmp_path)
    same_run(tmp_path, reference, c)
    assert not (tmp_path / "report").exists()  # switched off


def test_sigterm_in_this_process(undisturbed, npz, tmp_path, monkeypatch):
    """At the step of an evaluation, whose line has just been written."""
    reference, _ = undisturbed
    c = config(npz=npz)
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as m:
        m.setattr(log, "MetricsWriter", writer_that(lambda: os.kill(os.getpid(), signal.SIGTERM), 5))
        with pytest.raises(Preempted, match=f"stopped at step 6 of {STEPS} "):
            train.run(c, tmp_path)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert (tmp_path / "checkpoints" / "6").exists()
    c.devices = 1  # on another machine
    train.run(c, tmp_path)
    for a, b in zip(*(jax.tree.leaves(final_state(w, c).params) for w in (tmp_path, reference)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
    assert list(record(tmp_path)) == list(record(reference))


DRIVER = """
import os, signal, sys, time
from jaxcl import main
from jaxcl.train import log
class Writer(log.MetricsWriter):
    def write(self, step, metrics, **extra):
        super().write(step, metrics, **extra)
        if step == 5 and not os.path.exists("killed"):
            open("killed", "w").close()
            for name in os.environ.get("SIGNALS", "SIGTERM").split():
                os.kill(os.getpid(), getattr(signal, name))
                time.sleep(0.3)
log.MetricsWriter = Writer
main.cli()
"""


CONFIG_FILE = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests" / "train")!r})
import train_checks
def get_config(preset=""):
    return train_checks.config(npz={{npz!r}})
"""


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_killed_process_goes_on(undisturbed, npz, tmp_path):
    """The real command, a real SIGTERM: exit code 75, then the same command; the same bits and the same lines."""
    reference, _ = undisturbed
    (tmp_path / "shrunk.py").write_text(CONFIG_FILE.format(npz=str(npz)))
    arguments = ["--config=shrunk.py", "--workdir=run"]
    first = subprocess_run(arguments, tmp_path, ("-c", DRIVER))
    assert first.returncode == 75, first.stderr
    assert first.stderr.strip().splitlines()[-1].startswith(f"jaxcl: stopped at step 6 of {STEPS} ")
    assert "Traceback" not in first.stderr
    second = subprocess_run(arguments, tmp_path, ("-c", DRIVER))
    assert second.returncode == 0, second.stderr
    assert "resuming run from step 6" in second.stderr and "Traceback" not in second.stderr
    same_run(tmp_path / "run", reference, config(npz=npz))
    third = subprocess_run(arguments, tmp_path, ("-c", DRIVER))
    assert third.returncode == 0 and "run is finished" in third.stderr


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(
    "asked, saved", [("SIGINT", True), ("SIGHUP", True), ("SIGHUP SIGHUP", True), ("SIGINT SIGTERM", False)]
)
@pytest.mark.usefixtures("usual_signals")
def test_other_requests_save_too_and_a_second_one_does_not(asked, saved, npz, tmp_path, monkeypatch):
    """Cases B.10: Ctrl-C and a closed terminal are answered like SIGTERM; whoever asks again does not wait."""
    (tmp_path / "shrunk.py").write_text(CONFIG_FILE.format(npz=str(npz)))
    monkeypatch.setenv("SIGNALS", asked)
    done = subprocess_run(["--config=shrunk.py", "--workdir=run"], tmp_path, ("-c", DRIVER))
    assert done.returncode == 75, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("jaxcl: ") == 1
    assert (tmp_path / "run" / "checkpoints" / "6" / "manifest.json").exists() == saved
    assert (tmp_path / "run" / "lock.json").exists() != saved  # void, since its process is gone


def test_a_checkpoint_of_another_model(npz, tmp_path):
    """The folder's config is gone, so only the checkpoint can tell."""
    (tmp_path / "shrunk.py").write_text(CONFIG_FILE.format(npz=str(npz)))
    c = config("supcon", npz=npz)
    c.model.head_features = 20
    state = tiny.fill(jax.eval_shape(lambda: init_state(tiny.recipe(c))))
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        checkpoints.save(1, sharding.device_put(state, sharding.replicated(sharding.make_mesh(1))))
    done = subprocess_run(["--config=shrunk.py", "--workdir=run"], tmp_path, ("-c", DRIVER))
    assert done.returncode == 2 and "does not fit this model" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


# ---- divergence


def test_a_loss_that_is_not_finite_stops_the_run(npz, tmp_path):
    c = config("supcon", npz=npz)
    c.optimizer.kind, c.optimizer.lr, c.optimizer.schedule, c.optimizer.warmup = "sgd", 1e30, "constant", "0"
    with pytest.raises(Diverged) as error:
        train.run(c, tmp_path)
    text = str(error.value)
    assert text.startswith("loss is nan at step 2; no checkpoint ") and "optimizer.lr" in text and "\n" not in text
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    assert not (tmp_path / "results.json").exists()
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]


def test_divergence_just_after_an_evaluation(npz, tmp_path, monkeypatch):
    """The log has begun anew and holds nothing, which must not hide the message; and the last good step is named."""
    c = config("supcon", npz=npz)
    c.log_every, c.checkpoint.every = "10 steps", "3 steps"
    compile_update = train.compile_update

    def poisoned(*args):
        update = compile_update(*args)

        def run(state, batch):
            state, metrics = update(state, batch)
            with jax.transfer_guard("allow"):
                return state, metrics | {"loss": metrics["loss"] * (np.nan if int(state.step) == 7 else 1)}

        return run

    monkeypatch.setattr(train, "compile_update", poisoned)
    with pytest.raises(Diverged, match="loss is nan at step 7; .*checkpoint is step 3 "):
        train.run(c, tmp_path)
    # Cases C.5: what step 6 saved has not stood the next update; it can still be examined.
    assert {p.name for p in (tmp_path / "checkpoints").iterdir() if p.is_dir()} == {"3"}
    assert {p.name for p in (tmp_path / "nan" / "checkpoints").iterdir()} == {"6"}


@pytest.mark.parametrize("lr", [1e38, 1e25, 1e15])
def test_no_start_from_ruined_parameters(npz, tmp_path, lr, monkeypatch):
    """Cases C.5: the same command ends in the same way, and never begins with parameters that are ruined."""
    c = config("supcon", npz=npz)
    c.optimizer.kind, c.optimizer.lr, c.optimizer.schedule, c.optimizer.warmup = "sgd", lr, "constant", "0"
    c.log_every, c.eval.every, c.checkpoint.every = "10 steps", "0 steps", "1 step"
    for _ in range(2):
        with pytest.raises(Diverged) as error:
            train.run(c, tmp_path)
        last = error.value.step
        assert last <= 3 and "\n" not in str(error.value)
        saved = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
        assert all(step < last - 1 for step in saved)  # the loss of the update after each was finite


# ---- the reports and the other schedules


@pytest.mark.slow
def test_every_evaluator_and_the_report(tmp_path):
    """ExConB on garments, with a validation split."""
    c = config("excon")
    c.size, c.duration, c.report = 16, "4 steps", True
    c.data.limit = 96
    c.eval.quick, c.eval.final = ("knn", "classifier"), config_module("excon").get_config().eval.final
    c.eval.fgsm, c.eval.batch_size, c.eval.every, c.eval.tap = (4,), 500, "2 steps", "stage1"
    c.data.validation = 0.1
    results = train.run(c, tmp_path)
    page = (tmp_path / "report" / "index.html").read_text()
    assert "<html" in page and "Traceback" not in page
    assert set(c.eval.final) <= results.keys()
    assert 0 <= results["best"]["classifier_accuracy"] <= 1 and results["best"]["step"] in (2, 4)
    assert results["fgsm"]["4"]["accuracy"] <= 1 and {"clean", "test_shifted"} <= results["calibration"].keys()
    assert {"average_drop", "rate_of_increase"} <= results["explanation"].keys()


@pytest.mark.parametrize("schedule", ["alternating", pytest.param("sequential", marks=pytest.mark.slow)])
def test_schedules_that_train_the_probe_apart(npz, tmp_path, schedule):
    c = config("supcon", f"garments,{schedule}", npz=npz)
    c.duration, c.eval.every = "8 steps", "0"
    results = train.run(c, tmp_path)
    assert results["steps"] == 16
    learns = ["probe" if "probe/loss" in row else "encoder" for row in read_metrics(tmp_path) if "lr" in row]
    apart = {"alternating": 4, "sequential": 8}[schedule]
    assert learns == (["encoder"] * apart + ["probe"] * apart) * (8 // apart)


def test_json_is_whole_or_not_there(tmp_path):
    path = tmp_path / "results.json"
    run_folder.write_json(path, {"a": np.float32(0.5), "b": np.arange(2), "c": jax.numpy.float32(1)})
    assert json.loads(path.read_text()) == {"a": 0.5, "b": [0, 1], "c": 1.0}
    with pytest.raises(TypeError):
        run_folder.write_json(path, {"a": object()})
    assert json.loads(path.read_text())["a"] == 0.5


# ---- the folder


def test_data_that_changed_since(tmp_path):
    facts = {"num_examples": 64, "mean": (0.1, 0.2), "labelled": True}
    folder = epath.Path(tmp_path)
    run_folder.claim(folder, {"seed": 0}, facts, True).close()
    run_folder.claim(folder, {"seed": 0}, facts | {"mean": (0.1 + 1e-9, 0.2)}, True).close()  # another machine's sum
    with pytest.raises(UserError) as error:
        run_folder.claim(folder, {"seed": 0}, facts | {"num_examples": 65}, True)
    text = str(error.value)
    assert str(tmp_path) in text and "num_examples: 64 -> 65" in text and "--workdir" in text and "\n" not in text
    assert not (tmp_path / "lock.json").exists()


def test_a_full_disk_ends_the_run_in_one_line(undisturbed, npz, tmp_path, monkeypatch):
    """While the metrics are written; with room again the same command comes to the same end."""
    reference, _ = undisturbed
    c = config(npz=npz)

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(log, "MetricsWriter", writer_that(full, 7))
        with pytest.raises(UserError) as error:
            train.run(c, tmp_path)
    text = str(error.value)
    assert f"{tmp_path}: no space left on the device" in text and "step 4" in text and "\n" not in text
    with pytest.raises(UserError, match=f"{tmp_path} is in use by process {os.getpid()}"), RunLock(tmp_path):
        train.run(c, tmp_path)
    c.log_examples = True
    train.run(c, tmp_path)
    same_run(tmp_path, reference, c)
    rows = [json.loads(line) for line in (tmp_path / "examples.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(5, STEPS + 1))  # it was switched on at step 4
    order = Shuffled(64, batch_size=16, seed=0)
    assert [r["index"] for r in rows] == [order(r["step"] - 1).tolist() for r in rows]


STALLED = """
import concurrent.futures, os, signal, threading
from jaxcl import main
from jaxcl.data.source import ArraySource
whole, seen, pool = ArraySource.batch, [], concurrent.futures.ThreadPoolExecutor(1)
def batch(self, rows):
    if self.split == STALLS and len(seen) >= AFTER:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        pool.submit(threading.Event().wait).result()
    seen.append(1)
    return whole(self, rows)
ArraySource.batch = batch
main.cli()
"""


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("stalls, after, step", [("train", 4, None), ("test", 0, 6)])
def test_sigterm_while_data_does_not_come(npz, tmp_path, stalls, after, step):
    """Cases C.3: a read that never returns, of a batch or in an evaluation. What was trained is saved, code 75."""
    (tmp_path / "shrunk.py").write_text(CONFIG_FILE.format(npz=str(npz)))
    program = f"STALLS, AFTER = {stalls!r}, {after}\n{STALLED}"
    done = subprocess_run(["--config=shrunk.py", "--workdir=run"], tmp_path, ("-c", program), timeout=200)
    assert done.returncode == 75 and "Traceback" not in done.stderr, done.stderr
    saved = max(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit())
    assert saved == step if step else saved > 0
    assert done.stderr.strip().splitlines()[-1].startswith(f"jaxcl: stopped at step {saved} of {STEPS} ")
    assert not (tmp_path / "run" / "lock.json").exists()
