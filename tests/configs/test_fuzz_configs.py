"""Two hundred broken configs: each ends in one plain line before anything compiles, or is right after all."""

import random
import time

import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict
from processes import ROOT

from jaxcl.commands import config_file
from jaxcl.errors import UserError
from jaxcl.train import loop as train
from jaxcl.train import run_folder

CONFIGS = ("supcon", "excon", "simclr", "clae", "thanos", "byol", "moco", "nonsemantic", "barlow_twins", "simsiam",
           "hierarchical", "l_spread", "plain", "uel")  # fmt: skip
WORDS = [
    "banana", "", "-1", "0", "1", "7", "-0.5", "2.5", "1e400", "nan", "inf", "-inf", "True", "None", "()", "(1,)",
    "('x',)", "('view1','view1')", "(0.1,'a')", "[1,2", "{'a': 1}", "99999999999999999999999", "1000000000", "'", '"',
    "${x}", "../..", "猫", "a\\nb", "view1", "stage9", "3 weeks", "-5 steps", "110%", "1e9 epochs", "(((((",
    "__import__", "(None,)", "0x10", "folder:nowhere", "npz:", "csv:.", "tfds:x", "b'x'", "1,2", "lambda: 0", "%s",
    "<script>",
]  # fmt: skip
VALUES = [
    None, 0, 1, -1, 3, -7, 10**9, 10**30, 0.0, 0.5, -0.25, 1e308, float("nan"), float("inf"), True, False, "", "x",
    "view1", "50%", "cosine", (), (1,), ("x",), (0.5, None), ((1, 2), 3), [], ["a"], ("view1", "view1"), {},
    {"kind": 3}, b"raw", 1j, object, {"kind": "supcon", "views": 4}, ("",), (float("nan"),),
]  # fmt: skip


class Reached(Exception):
    """The run would begin now."""


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """Images with two levels of labels."""
    path = tiny.colours(tmp_path_factory.mktemp("data") / "colours.npz")
    with np.load(path) as arrays:
        arrays = dict(arrays)
    coarse = {f"{part}_coarse_labels": arrays[f"{part}_labels"] // 2 for part in ("train", "test")}
    np.savez(path, **arrays, **coarse)
    return path


@pytest.fixture
def outcome(tmp_path, monkeypatch):
    """(overrides or None, config) -> None where a run would begin, or the line it ends in; all else is an error."""
    monkeypatch.chdir(tmp_path)

    def reached(*_):
        raise Reached

    monkeypatch.setattr(run_folder, "claim", reached)

    def of(make):
        begun = time.perf_counter()
        try:
            train.run(make(), "run")
        except Reached:
            line = None
        except UserError as error:
            line = str(error)
            assert line.strip() and len(line.splitlines()) == 1 and line.isprintable(), repr(line)
            assert len(line) < 1000
        assert time.perf_counter() - begun < 60
        assert not list(tmp_path.iterdir())  # nothing is left behind
        return line

    return of


def leaves(node, prefix=""):
    """Dotted names of all values below a config node, as the command line writes them."""
    items = node.items() if isinstance(node, ConfigDict) else enumerate(node)
    for key, value in items:
        name = f"{prefix}[{key}]" if isinstance(key, int) else f"{prefix}.{key}".lstrip(".")
        holds = isinstance(value, (tuple, list)) and any(isinstance(v, ConfigDict) for v in value)
        if isinstance(value, ConfigDict) or holds:
            yield from leaves(value, name)
        else:
            yield name


def small(npz, name):
    """The arguments of a config, on 64 images."""
    return f"{ROOT}/configs/{name}.py", [f"--config.data.source=npz:{npz}", "--config.batch_size=16"]


def misspelt(rng, word):
    i = rng.randrange(len(word))
    return rng.choice([word[:i] + word[i + 1 :], word[:i] + rng.choice("_xQ9-") + word[i:], word.upper(), word + "[0]"])


@pytest.mark.parametrize("part", range(4))
def test_overrides_on_the_command_line(part, npz, outcome):
    lines = []
    for i in range(25 * part, 25 * part + 25):
        rng = random.Random(i)
        argument, usual = small(npz, rng.choice(CONFIGS))
        key = rng.choice(list(leaves(config_file.read_config(argument))))
        how = rng.random()
        if how < 0.15:
            key = misspelt(rng, key)
        elif how < 0.25:
            argument += ":" + rng.choice(["nothing", "garments,cifar10", ",,", "unlabelled=1", "猫", "cpu:cpu", "None"])
        override = f"--config.{key}={rng.choice(WORDS)}"
        try:
            line = outcome(lambda a=argument, o=(*usual, override): config_file.read_config(a, o))
        except BaseException as error:
            raise AssertionError(f"seed {i}: {argument} {override}") from error
        lines.append(line)
    assert sum(line is not None for line in lines) > 12  # broken indeed


def set_leaf(config, name, value, remove=False):
    """As a config file may, which no parser watches."""
    *path, last = name.replace("[", ".[").split(".")
    node = config
    for word in path:
        node = node[int(word[1:-1])] if word.startswith("[") else node[word]
    with config.unlocked(), config.ignore_type():
        if last.startswith("["):
            raise ValueError(name)
        if isinstance(node, ConfigDict):
            with node.unlocked(), node.ignore_type():
                if remove:
                    del node[last]
                else:
                    node[last] = value


def nodes(config):
    """Names of whole parts."""
    for name in ("views", "terms", "memory", "heads"):
        yield from (f"{name}.{key}" for key in config[name])
    yield from ("model", "optimizer", "data", "eval", "checkpoint", "views", "passes", "stages", "terms", "memory",
                "representation", "encoders", "heads", "grad_cache", "data.files", "data.tfds")  # fmt: skip


@pytest.mark.parametrize("part", range(4))
def test_values_in_a_config_file(part, npz, outcome):
    lines = []
    for i in range(100 + 25 * part, 125 + 25 * part):
        rng = random.Random(i)
        argument, usual = small(npz, rng.choice(CONFIGS))
        config = config_file.read_config(argument, usual)
        name = rng.choice(list(nodes(config)) if rng.random() < 0.3 else list(leaves(config)))
        value, remove = rng.choice(VALUES), rng.random() < 0.1
        set_leaf(config, name, value, remove)
        try:
            line = outcome(lambda c=config: c)
        except BaseException as error:
            raise AssertionError(f"seed {i}: {argument} {name} = {'removed' if remove else repr(value)}") from error
        lines.append(line)
    assert sum(line is not None for line in lines) > 12
