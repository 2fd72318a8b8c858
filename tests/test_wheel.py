"""Cases B.11: a wheel holds what a checkout holds: configs, embedded data, type marker and console script."""

import os
import shutil
import subprocess
import sys

import pytest
from processes import ROOT, one_line

pytestmark = pytest.mark.slow
FILES = ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the package, installed from a wheel that was built without the network."""
    pytest.importorskip("setuptools", minversion="77", reason="the build system of pyproject.toml")
    source, wheels, target = (tmp_path_factory.mktemp(n) for n in ("source", "wheels", "target"))
    for name in ("jaxcl", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "wheel", str(source), *offline, f"--wheel-dir={wheels}"], check=True, timeout=300)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run(
        [*pip, "install", str(wheel), "--no-deps", "--no-index", f"--target={target}"], check=True, timeout=300
    )
    return target


def run(installed, folder, *command):
    environment = os.environ | {"PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def test_what_is_in_it(installed):
    package = installed / "jaxcl"
    assert (package / "py.typed").is_file()
    for folder, pattern in ((ROOT / "configs", "*.py"), (ROOT / "jaxcl" / "data" / "embedded", "*")):
        names = {p.name for p in folder.glob(pattern)}
        inside = package / folder.relative_to(ROOT).as_posix().removeprefix("jaxcl/")
        assert names and names <= {p.name for p in inside.iterdir()}


def test_both_ways_to_start_it(installed, tmp_path):
    module = run(installed, tmp_path, "-m", "jaxcl", "--help")
    script = run(installed, tmp_path, installed / "bin" / "jaxcl", "--help")
    assert module.returncode == script.returncode == 0, module.stderr + script.stderr
    assert module.stdout == script.stdout and "evaluate" in module.stdout


def test_an_installed_config_by_its_name(installed, tmp_path):
    """Read, with its preset and the config that it extends, up to the embedded data and a mistake in a duration."""
    train = ("-m", "jaxcl", "train", "--config=configs/excon.py:fashion_mnist", "--config.duration=4 weeks")
    done = run(installed, tmp_path, *train)
    assert done.returncode == 2 and "duration" in one_line(done.stderr) and "4 weeks" in done.stderr
    done = run(installed, tmp_path, *train[:3], "--config=configs/excn.py")
    assert done.returncode == 2 and "configs/excon.py" in one_line(done.stderr)
    assert list(tmp_path.iterdir()) == []
