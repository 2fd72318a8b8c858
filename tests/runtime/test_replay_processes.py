"""Two processes: the ids that are kept are those of the whole batch, one process writes, and both replay."""

import json

import pytest
from processes import ROOT
from test_distributed import FLAGS, free_address, launch

from jaxcl.data.shuffle import Shuffled

OWN = ("configs/", "stages[", "duration")
COMMAND = [
    *(f for f in FLAGS if not any(word in f for word in OWN)),
    f"--config={ROOT}/configs/supcon.py",
    "--config.duration=4 steps",
    "--config.optimizer.kind=sgd",
    "--config.optimizer.lr=1e30",
    "--config.optimizer.warmup=0",
    "--config.optimizer.schedule=constant",
]


def ended(workdir, *flags):
    """Two processes of the command -> (exit codes, what each said)."""
    address = free_address()
    common = ["-m", "jaxcl.main", *COMMAND, f"--workdir={workdir}", *flags]
    processes = [launch(1, *common, f"--distributed={address},2,{i}") for i in range(2)]
    try:
        said = [p.communicate(timeout=400)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [p.returncode for p in processes], said


@pytest.mark.slow
def test_parameters_that_are_not_finite(tmp_path):
    """Cases C.2, C.5: found before they are saved; both processes end with the code of a divergence."""
    codes, said = ended(tmp_path, "--config.checkpoint.every=1 step")
    assert codes == [3, 3], "\n=====\n".join(said)
    kept = json.loads((tmp_path / "nan" / "batch_1.json").read_text())
    assert kept["batch"]["index"] == Shuffled(64, batch_size=16, seed=0)(0).tolist()


@pytest.mark.slow
def test_two_processes(tmp_path):
    codes, said = ended(tmp_path, "--config.checkpoint.every=0")
    assert codes == [3, 3], "\n=====\n".join(said)
    kept = json.loads((tmp_path / "nan" / "batch_2.json").read_text())
    assert kept["batch"]["index"] == Shuffled(64, batch_size=16, seed=0)(1).tolist()
    codes, said = ended(tmp_path, "--config.checkpoint.every=0", "--replay=2")
    assert codes == [0, 0], "\n=====\n".join(said)
    assert ["first array" in text for text in said] == [True, False]
    found = json.loads((tmp_path / "nan" / "replay_2.json").read_text())
    assert found["batch"] == kept["batch"] and found["recorded"]["differ"] == {} and found["metrics"]["loss"] == "nan"
    assert found["first"]["name"].startswith("encode view1 + view2: ResNet/stem")
    assert not (tmp_path / "lock.json").exists()
