"""W&B gets what it is to get, and a broken one never ends a run."""

import sys
import time
import types

import pytest

from jaxcl.report import MetricsWriter, open_wandb, read_metrics
from jaxcl.report import wandb as module

RESULTS = {"linear": {"accuracy": 0.75}, "seed": 3, "nan": float("nan"), "list": [1, 2], "command": "python"}


class Fake(types.ModuleType):
    """Notes what it is asked for; `fails` names what raises."""

    def __init__(self, fails=(), error=None):
        super().__init__("wandb")
        self.fails, self.error = fails, error
        self.given, self.logged, self.summary, self.ended = [], [], {}, []

    def _may(self, what):
        if what in self.fails:
            raise self.error

    def init(self, **options):
        self.given.append(options)
        self._may("init")
        return self

    def log(self, metrics, step):
        self._may("log")
        self.logged.append((step, metrics))

    def finish(self, exit_code):
        self._may("finish")
        self.ended.append(exit_code)


@pytest.fixture
def fake(monkeypatch):
    def install(**options):
        monkeypatch.setitem(sys.modules, "wandb", Fake(**options))
        return sys.modules["wandb"]

    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return install


def a_run(folder, wandb, results=RESULTS):
    """What the trainer does."""
    with MetricsWriter(folder, tensorboard=False, also=wandb.write if wandb else None) as writer:
        for step in (1, 2):
            writer.write(step, {"loss": 1.0 / step, "bad": float("inf")}, rows=[1, 2])
    if wandb:
        wandb.finish(results)
    return [row["loss"] for row in read_metrics(folder)]


def test_what_is_sent(fake, tmp_path, monkeypatch):
    wandb = fake()
    assert open_wandb("", tmp_path, {}) is None and not wandb.given  # not wanted
    assert a_run(tmp_path, open_wandb("mine", tmp_path, {"seed": 3})) == [1.0, 0.5]
    (given,) = wandb.given
    assert given["project"] == "mine" and given["config"] == {"seed": 3} and given["dir"] == str(tmp_path)
    assert wandb.logged == [(1, {"loss": 1.0}), (2, {"loss": 0.5})]
    assert wandb.summary == {"linear.accuracy": 0.75, "seed": 3, "command": "python"} and wandb.ended == [0]
    # The same run where it goes on; another in another folder; the project from the environment.
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    open_wandb("", tmp_path, {})
    (tmp_path / "other").mkdir()
    open_wandb("mine", tmp_path / "other", {})
    ids = [g["id"] for g in wandb.given]
    assert ids[0] == ids[1] != ids[2] and [g["project"] for g in wandb.given] == ["mine", "theirs", "mine"]
    a_run(tmp_path, open_wandb("", tmp_path, {}), results=None)
    assert wandb.ended == [0, 1]  # a run without results has failed


def test_not_installed(fake, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert open_wandb("", tmp_path, {}) is None and not caplog.messages
    assert open_wandb("mine", tmp_path, {}) is None
    assert caplog.messages == ["no W&B (mine): the package is not installed: pip install wandb"]


@pytest.mark.parametrize("what", ["init", "log", "finish"])
@pytest.mark.parametrize("error", [RuntimeError("no\nnetwork"), OSError(28, "No space left on device")])
def test_broken(fake, what, error, tmp_path, caplog):
    wandb = fake(fails=(what,), error=error)
    assert a_run(tmp_path, open_wandb("mine", tmp_path, {})) == [1.0, 0.5]
    assert len(caplog.messages) == 1 and "\n" not in caplog.messages[0] and str(error).split()[-1] in caplog.messages[0]
    assert "continues without it" in caplog.messages[0]
    assert len(wandb.logged) == {"init": 0, "log": 0, "finish": 2}[what]


def test_it_does_not_wait_for_a_dead_network(fake, tmp_path, monkeypatch, caplog):
    wandb = fake()
    monkeypatch.setattr(wandb, "finish", lambda exit_code: time.sleep(5))
    monkeypatch.setattr(module, "FINISH_SECONDS", 0.1)
    begun = time.perf_counter()
    a_run(tmp_path, open_wandb("mine", tmp_path, {}))
    assert time.perf_counter() - begun < 4 and "wandb sync" in caplog.text


def test_an_init_that_gives_nothing(fake, tmp_path, monkeypatch):
    wandb = fake()
    monkeypatch.setattr(wandb, "init", lambda **options: None)
    assert open_wandb("mine", tmp_path, {}) is None
