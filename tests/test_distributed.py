"""Two real processes over JAX's own runtime on loopback learn what one process learns."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxcl.evaluate.runs import load_run

ROOT = pathlib.Path(__file__).resolve().parents[1]
FLAGS = [
    "--config=configs/excon.py",
    "--config.data.limit=64",
    "--config.batch_size=16",
    "--config.duration=4",
    "--config.stages[0].start=2",
    "--config.model.stage_sizes=(1,)",
    "--config.model.stage_widths=(8,)",
    "--config.model.strides=(1,)",
    *(f"--config.views.{v}.{p}=0.0" for v in ("view1", "view2") for p in ("jitter_p", "grayscale")),  # compile slowly
    "--config.eval.final=('knn',)",
    "--config.eval.every=0",
    "--config.report=False",
    "--config.log_every=1",
]


def start(workdir: pathlib.Path, devices: int, distributed: str) -> subprocess.Popen:
    own = [f"--workdir={workdir}", f"--distributed={distributed}"]
    return launch(devices, "-m", "jaxcl.main", *FLAGS, *own)


def launch(devices: int, *command: str) -> subprocess.Popen:
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": str(devices),
        "XLA_FLAGS": " ".join(flags),
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def free_address() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{s.getsockname()[1]}"


def finish(*processes: subprocess.Popen) -> None:
    try:
        outputs = [p.communicate(timeout=300)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()  # does nothing to one that has ended
    assert [p.returncode for p in processes] == [0] * len(processes), "\n".join(outputs)


def losses(workdir: pathlib.Path) -> list[float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_two_processes_equal_one(tmp_path):
    address = free_address()
    finish(*(start(tmp_path / "two", 1, f"{address},2,{i}") for i in range(2)))
    finish(start(tmp_path / "one", 2, "off"))

    two, one = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert len(two) == len(one) == 4
    # Rows of the global batch lie in another order, so sums differ in their last bits and AdamW widens that a little.
    np.testing.assert_allclose(two, one, rtol=2e-3)
    np.testing.assert_allclose(two[0], one[0], rtol=1e-5)
    results = [json.loads((tmp_path / n / "results.json").read_text()) for n in ("two", "one")]
    assert results[0]["steps"] == results[1]["steps"] == 4


SMALL = ("stage_sizes=(1,)", "stage_widths=(8,)", "strides=(1,)")
CONFIGS = {
    "excon": [*(f"model.{o}" for o in SMALL), "stages[0].start=4"],
    "clae": [f"model.{o}" for o in SMALL],
    "thanos": [f"{part}.{o}" for part in ("model", "encoders.auto") for o in SMALL],
    "nonsemantic": [*(f"model.{o}" for o in SMALL), "memory.queue.length=64"],
    "hierarchical": ["model.stage_widths=(4, 4, 8, 8)"],
}
# After 20 steps, relative: of each loss, and of all parameters together (the norm of the difference).
LOSS, PARAMETERS = 2e-3, 2e-3


def twenty_steps(name: str, workdir: pathlib.Path, devices: int, distributed: str) -> subprocess.Popen:
    # Plain gradient descent: Adam makes a whole step of a gradient that is nothing but rounding.
    own = ["data.limit=64", "batch_size=16", "duration=20", "optimizer.kind=sgd", "optimizer.lr=0.02", *CONFIGS[name]]
    own += ["eval.final=('knn',)", "eval.every=0", "report=False", "log_every=1", "collapse_every=0"]
    flags = [f"--config.{o}" for o in own]
    own = [f"--workdir={workdir}", f"--distributed={distributed}"]
    return launch(devices, "-m", "jaxcl.main", f"--config=configs/{name}.py", *flags, *own)


def parameters(workdir: pathlib.Path) -> np.ndarray:
    run = load_run(workdir)
    assert run.step == 20
    return np.concatenate([np.ravel(jax.device_get(x)) for x in jax.tree.leaves(run.state.params)])


@pytest.mark.parametrize("name", [n if n == "clae" else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS])
def test_two_processes_of_two_devices(tmp_path, name):
    """Against one process of four devices and one of one: the losses of 20 steps, and the parameters after them."""
    address = free_address()
    finish(*(twenty_steps(name, tmp_path / "2x2", 2, f"{address},2,{i}") for i in range(2)))
    finish(twenty_steps(name, tmp_path / "1x4", 4, "off"), twenty_steps(name, tmp_path / "1x1", 1, "off"))
    two, learned = losses(tmp_path / "2x2"), parameters(tmp_path / "2x2")
    assert len(two) == 20
    for other in ("1x4", "1x1"):
        one, same = losses(tmp_path / other), parameters(tmp_path / other)
        far = np.max(np.abs(np.subtract(two, one)) / np.abs(one)), np.linalg.norm(learned - same) / np.linalg.norm(same)
        print(f"{name}, 2x2 against {other}: losses {far[0]:.1e}, parameters {far[1]:.1e}")
        assert far[0] < LOSS and far[1] < PARAMETERS, (other, far)


def test_losses_over_two_processes(tmp_path):
    """The ring and the gathered tiles over 2 processes of 2 devices: values and gradients of one process, dense."""
    script, address = str(ROOT / "tests" / "ring_of_processes.py"), free_address()
    finish(*(launch(2, script, f"{address},2,{i}", str(tmp_path / "two.npz")) for i in range(2)))
    finish(launch(1, script, ",0,0", str(tmp_path / "one.npz")))
    with np.load(tmp_path / "two.npz") as two, np.load(tmp_path / "one.npz") as one:
        np.testing.assert_allclose(two["values"], one["values"], rtol=1e-5)
        for got, want in zip(two["grads"], one["grads"], strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
            assert np.abs(want).max() > 1e-4
