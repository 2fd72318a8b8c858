"""The runs of a sweep: every config with every combination of the grid and every seed. Nothing is started here.

A setting is a config with its preset and with one value for each key of the grid. A run is a setting with a seed.
"""

import dataclasses
import hashlib
import itertools
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxcl import config as configs
from jaxcl.commands.config_file import read_config
from jaxcl.errors import UserError

_PAIRS = {"(": ")", "[": "]", "{": "}"}
_LONGEST = 120  # characters of a folder's name; file systems allow 255


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """One row of the table."""

    argument: str  # FILE[:PRESET]
    name: str  # as shown: the stem of the file with the preset
    grid: dict[str, str]  # key -> value, as on the command line
    labels: dict[str, str]  # key -> the shortest end of the key that no other key of the grid has
    folder: str  # below the folder of the sweep; its runs are in it
    config: dict[str, Any]  # with the first seed

    @property
    def title(self) -> str:
        return " ".join([self.name, *(f"{self.labels[k]}={v}" for k, v in self.grid.items())])


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One process of `jaxcl train`."""

    setting: Setting
    seed: int
    workdir: pathlib.Path
    arguments: tuple[str, ...]  # of jaxcl train
    config: dict[str, Any]

    @property
    def title(self) -> str:
        return f"{self.setting.title} seed {self.seed}"

    @property
    def log(self) -> pathlib.Path:
        """The output of the process, beside the run folder, which only the run itself may create."""
        return self.workdir.with_name(f"{self.workdir.name}.log")


def plan(
    arguments: Sequence[str], *, grids: Sequence[str], sets: Sequence[str], seeds: Sequence[int], out: pathlib.Path
) -> list[Run]:
    """All runs: all settings with the first seed, then all settings with the second.

    Args:
      arguments: FILE[:PRESET], one for each config.
      grids: "KEY=V1,V2,...", one for each key.
      sets: "KEY=VALUE" for every run.
      seeds: values of config.seed.
      out: the folder of the sweep.

    Raises:
      UserError: a config or a key that does not exist, a value of the wrong type, anything given twice.
    """
    grid, fixed = _grid(grids), _assignments(sets, "--set")
    for key in fixed:
        if key in grid:
            raise UserError(f"{key} is in both --grid and --set; choose one")
    if not arguments:
        raise UserError("no --config; for example --config=configs/simclr.py --config=configs/clae.py:clean_pair")
    _refuse_twice(arguments, "--config={} is given twice; each config is one row")
    _refuse_twice(seeds, "--seeds names {} twice")
    labels, settings, taken = _labels(list(grid)), [], set()
    for argument in arguments:
        name = _name(argument, arguments)
        for values in itertools.product(*grid.values()):
            chosen = dict(zip(grid, values, strict=True))
            config = _read(argument, [f"--config.seed={seeds[0]}", *_flags(fixed), *_flags(chosen)])
            folder = folder_name(argument, {labels[k]: v for k, v in chosen.items()}, taken)
            taken.add(folder.casefold())
            settings.append(Setting(argument, name, chosen, labels, folder, config))
    _refuse_equal(settings)
    return [_run(setting, seed, fixed, out) for seed in seeds for setting in settings]


def _run(setting: Setting, seed: int, fixed: Mapping[str, str], out: pathlib.Path) -> Run:
    workdir = out / setting.folder / f"seed-{seed}"
    overrides = [f"--config.seed={seed}", *_flags(fixed), *_flags(setting.grid)]
    arguments = (f"--config={setting.argument}", f"--workdir={workdir}", *overrides)
    return Run(setting, seed, workdir, arguments, setting.config | {"seed": seed})


def _read(argument: str, overrides: Sequence[str]) -> dict[str, Any]:
    try:
        config = read_config(argument, overrides)
        configs.check(config)
        return configs.to_dict(config)
    except UserError as error:
        where = "" if argument.partition(":")[0] in str(error) else f"{argument}: "
        raise UserError(f"{where}{error}") from None


def _flags(assignments: Mapping[str, str]) -> list[str]:
    return [f"--config.{key}={value}" for key, value in assignments.items()]


# ---- parsing the command line


def split_values(text: str) -> list[str]:
    """ "1e-3,3e-3" -> two values; a comma inside brackets or quotes does not split: "('knn',),('knn','linear')".

    A value that is one quoted string loses its quotes: "'4 epochs','8 epochs'". Errors: ValueError.
    """
    values, start, closing, quote = [], 0, [], ""
    for i, c in enumerate(text):
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        elif c in _PAIRS:
            closing.append(_PAIRS[c])
        elif c in _PAIRS.values():
            if not closing or closing.pop() != c:
                raise ValueError(f"has a {c!r} that nothing opens")
        elif c == "," and not closing:
            values.append(text[start:i])
            start = i + 1
    if quote or closing:
        raise ValueError(f"lacks a closing {quote or closing[-1]!r}")
    values = [_unquoted(v.strip()) for v in [*values, text[start:]]]
    if not all(values):
        raise ValueError("has an empty value")
    return values


def _unquoted(value: str) -> str:
    whole = re.fullmatch(r"'([^']*)'|\"([^\"]*)\"", value)
    return (whole[1] or whole[2] or "") if whole else value


def _assignments(texts: Sequence[str], flag: str) -> dict[str, str]:
    """["a.b=1"] -> {"a.b": "1"}."""
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key and equals):
            values = "VALUE,VALUE,..." if flag == "--grid" else "VALUE"
            raise UserError(f"{flag}={text} is not {flag}=KEY={values}; for example {flag}=optimizer.lr=1e-3")
        if key == "seed":
            raise UserError(f"{flag} sets seed; use --seeds")
        if key in found:
            raise UserError(f"{flag} names {key} twice")
        found[key] = value
    return found


def _grid(texts: Sequence[str]) -> dict[str, list[str]]:
    grid = {}
    for key, text in _assignments(texts, "--grid").items():
        try:
            grid[key] = split_values(text)
        except ValueError as error:
            raise UserError(f"--grid={key}={text} {error}; expected KEY=VALUE,VALUE,...") from None
        _refuse_twice(grid[key], f"--grid={key} names the value {{}} twice")
    return grid


def _refuse_twice(items: Sequence[Any], message: str) -> None:
    for i, item in enumerate(items):
        if item in items[:i]:
            raise UserError(message.format(item))


def _refuse_equal(settings: Sequence[Setting]) -> None:
    """Refuse two spellings of one config, such as a default preset or 0.1 and 1e-1: it would be trained twice."""
    first: dict[str, str] = {}
    for setting in settings:
        text = json.dumps(setting.config, sort_keys=True)
        if text in first:
            raise UserError(f"{first[text]!r} and {setting.title!r} are the same config; leave one out")
        first[text] = setting.title


# ---- names


def _labels(keys: Sequence[str]) -> dict[str, str]:
    """{"terms.clean.temperature": "temperature"}, or the shortest end of the key that no other key has."""
    labels = {}
    for key in keys:
        parts = key.split(".")
        ends = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
        labels[key] = next((e for e in ends if not any(k != key and f".{k}".endswith(f".{e}") for k in keys)), key)
    return labels


def _name(argument: str, arguments: Sequence[str]) -> str:
    """ "configs/clae.py:plain" -> "clae:plain"; unchanged if another file has the same stem."""
    path, colon, preset = argument.partition(":")
    others = {a.partition(":")[0] for a in arguments} - {path}
    stem = pathlib.Path(path).stem
    return argument if stem in {pathlib.Path(o).stem for o in others} else f"{stem}{colon}{preset}"


def folder_name(argument: str, values: Mapping[str, str], taken: set[str] = frozenset()) -> str:
    """The folder of a setting: "clae-plain-clean_pair_temperature=0.1_lr=1e-3", for any file system.

    A name that has other characters, is too long or is in `taken` (without regard to case) ends in a short hash. The
    folder of a setting therefore does not depend on the other settings, unless two names clash.
    """
    path, _, preset = argument.partition(":")
    words = [w.strip() for w in preset.split(",") if w.strip()]
    said = "_".join(["-".join([pathlib.Path(path).stem, *words]), *(f"{k}={v}" for k, v in values.items())])
    name = re.sub(r"[^A-Za-z0-9._=+-]+", "-", said)[:_LONGEST].strip("-.") or "setting"
    if name != said or name.casefold() in taken:
        name += "-" + hashlib.sha256(json.dumps([argument, dict(values)]).encode()).hexdigest()[:8]
    return name
