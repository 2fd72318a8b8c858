"""Processes of one run that differ, one of them with a mistake, and a port that is taken."""

import pathlib
import shutil
import socket
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.survival import kills
from benchmarks.survival.kills import ROOT
from benchmarks.survival.lab import Ended, Lab, ends_with_us, steps_of, told, wait
from benchmarks.survival.registry import BADLY, LOST, WELL, Trial, fault


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def command(work: pathlib.Path, *more: str) -> list[str]:
    """A run of two processes with one device each."""
    small = [a for a in kills.SMALL if "log_examples" not in a]
    return ["train", *small, f"--workdir={work}", "--config.devices=2", "--config.duration=4", *more]


def together(lab: Lab, commands: Sequence[Sequence[str]], options: Sequence[dict[str, Any]]) -> list[Ended]:
    """Run two processes of one run to their ends."""
    port = free_port()
    flags = " ".join(f for f in kills.environment()["XLA_FLAGS"].split() if "device_count" not in f)
    processes = []
    for i, arguments in enumerate(commands):
        more = {"XLA_FLAGS": f"--xla_force_host_platform_device_count=1 {flags}"} | options[i].pop("environ", {})
        joined = [*arguments, f"--distributed=127.0.0.1:{port},2,{i}", "--join_timeout=120"]
        processes.append(lab.start(joined, environ=more, **options[i]))
    with ends_with_us(*processes):
        return [wait(process, timeout=200) for process in processes]


def differ(lab: Lab, what: str, names: str, *more: Sequence[str], options: Sequence[dict] = ({}, {})) -> Trial:
    """Two processes that differ must both be refused, by the name of what differs, with nothing written."""
    work = lab.place("hosts")
    commands = [command(work, *(more[i] if i < len(more) else ())) for i in range(2)]
    ends = together(lab, commands, [dict(o) for o in options])
    return _refused(what, ends, work, names)


def _refused(what: str, ends: Sequence[Ended], work: pathlib.Path, names: str) -> Trial:
    if steps_of(work):
        return Trial(what, LOST, f"they trained: exit codes {[e.code for e in ends]}")
    for i, ended in enumerate(ends):
        if wrong := told(ended, 2):
            return Trial(what, BADLY, f"process {i}: {wrong}")
    if not any(names in e.error for e in ends):
        return Trial(what, BADLY, f"{names} is not named: {ends[0].error.strip()[-200:]}")
    return Trial(what, WELL)


def _npz(folder: pathlib.Path, seed: int, turn: int = 0) -> pathlib.Path:
    """A folder with a small set, data.npz."""
    import numpy as np

    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    labels = np.roll(np.arange(64) % 4, turn)
    images = rng.integers(0, 256, (64, 16, 16, 3)).astype(np.uint8)
    np.savez(folder / "data.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    return folder


@fault("hosts:same", "two processes that do not differ (the run must reach its end)")
def same(lab: Lab, rounds: int) -> Iterator[Trial]:
    work = lab.place("hosts")
    ends = together(lab, [command(work)] * 2, [{}, {}])
    wrong = next((w for e in ends if (w := told(e, 0))), "") or ("" if steps_of(work) else "no checkpoint")
    yield Trial("nothing differs", BADLY if wrong else WELL, wrong)


@fault("hosts:config", "two processes with another config")
def config(lab: Lab, rounds: int) -> Iterator[Trial]:
    yield differ(lab, "learning rate", "optimizer.lr", (), ("--config.optimizer.lr=0.001",))
    yield differ(lab, "seed", "seed", ("--config.seed=3",), ())
    yield differ(lab, "a view", "views.view1", (), ("--config.views.view1.flip=0.25",))


@fault("hosts:data", "two processes with other pixels or labels under one path")
def data(lab: Lab, rounds: int) -> Iterator[Trial]:
    for what, seed, turn in (("pixels", 1, 0), ("labels", 0, 1)):
        folders = _npz(lab.place("host"), 0), _npz(lab.place("host"), seed, turn)
        source = ("--config.data.source=npz:data.npz", "--config.data.limit=0", f"--config={ROOT}/configs/supcon.py")
        yield differ(lab, what, "data.source", source, source, options=[{"cwd": f} for f in folders])


@fault("hosts:code", "two processes with another copy of jaxcl")
def code(lab: Lab, rounds: int) -> Iterator[Trial]:
    other = lab.place("code")
    other.mkdir()
    for name in ("jaxcl", "configs"):
        shutil.copytree(ROOT / name, other / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "jaxcl" / "losses" / "__init__.py").open("a") as file:
        file.write("# another line\n")
    yield differ(lab, "code", "code of jaxcl", options=[{}, {"cwd": other, "environ": {"PYTHONPATH": str(other)}}])


@fault("hosts:flags", "two processes with other flags or run folders")
def flags(lab: Lab, rounds: int) -> Iterator[Trial]:
    yield differ(lab, "--profile", "--profile", (), ("--profile=2",))
    wide = {"environ": {"JAX_ENABLE_X64": "1"}}
    yield differ(lab, "JAX_ENABLE_X64", "jax_enable_x64", options=[{}, wide])
    held = lab.copy(lab.half)
    yield differ(lab, "--workdir", "--workdir", (), (f"--workdir={held}",))


@fault("hosts:mistake", "a mistake on one of two processes ends both with its code and line")
def mistake(lab: Lab, rounds: int) -> Iterator[Trial]:
    for i in range(2):
        wrong: list[Sequence[str]] = [(), ()]
        wrong[i] = ("--config.data.source=npz:/nothing.npz",)
        yield differ(lab, f"process {i} has no data", "data.source", *wrong)


@fault("hosts:port", "the port of process 0 is taken")
def port(lab: Lab, rounds: int) -> Iterator[Trial]:
    for address in ("127.0.0.1", "0.0.0.0"):
        for _ in range(rounds):
            with socket.socket() as server:
                server.bind((address, 0))
                server.listen()
                number, work = server.getsockname()[1], lab.place("hosts")
                ended = lab.run([*command(work), f"--distributed=127.0.0.1:{number},2,0", "--join_timeout=20"])
            wrong = told(ended, 2) or ("" if str(number) in ended.error else "the port is not named")
            yield Trial(f"taken on {address}", BADLY if wrong else WELL, wrong)
