"""The config that --config=FILE[:PRESET] and --config.KEY=VALUE ... name."""

import ast
import difflib
import importlib.util
import inspect
import os
import pathlib
import re
import sys
import traceback
import types
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from jaxcl.errors import UserError
from jaxcl.runtime.options import SYNONYMS, Option, expected, quoted

_WEIGHTS = re.compile(r"(model|encoders\.\w+)\.weights")
_KEY = re.compile(r"\w+(\[\d+\])*(\.\w+(\[\d+\])*)*")


def read_config(argument: str, overrides: Sequence[str] = (), workdir: str | os.PathLike = "") -> ConfigDict:
    """The config of a command line, locked.

    Args:
      argument: FILE[:PRESET]. A file below configs/ that is not in the current folder is looked up among the configs
        that are installed with jaxcl.
      overrides: "--config.KEY=VALUE" each; "--config.KEY" and "--noconfig.KEY" set a Boolean. Another kind of a part
        (KEY ends in ".kind") is set first, with the options and defaults of that kind, then weights, with what they
        decide (`train.pretrained`).
      workdir: the run folder; a run in it remembers what weights decided.

    Raises:
      UserError: no such file, a file that does not run, an unknown preset or key, a value of the wrong type, or weights
        that cannot be read or are contradicted.
    """
    config = _load(argument)
    given: dict[str, list[str]] = {}
    for text in overrides:
        key = re.sub(r"^--?(no)?config\.", "", text.partition("=")[0])
        given.setdefault(key, []).append(text)
    for key in list(given):
        if key.endswith(".kind") and _set_kind(config, key, given[key][-1]):
            del given[key]
    stated = tuple(given)
    for key in [key for key in given if _WEIGHTS.fullmatch(key)]:
        _set(config, key, given.pop(key))
    named = "pretrained" in config and any(node.get("weights") for node in _encoders(config))
    if named:
        from jaxcl.train import pretrained  # late: it imports JAX

        new = pretrained.resolve(config, workdir)
    for key, texts in given.items():
        _set(config, key, texts)
    if named:
        pretrained.settle(config, new, stated)
    config.lock()
    return config


def _encoders(config: ConfigDict) -> list[ConfigDict]:
    nodes = [config.get("model"), *dict(config.get("encoders") or {}).values()]
    return [node for node in nodes if isinstance(node, ConfigDict)]


# ---- the file


def find(path: str) -> pathlib.Path:
    """The config file at a path. Raises: UserError if there is none, neither there nor among the installed ones."""
    here = pathlib.Path(path).expanduser()
    if here.is_file():
        return here
    folder = installed()
    if not here.is_absolute() and here.parts[:1] == ("configs",):
        there = folder.joinpath(*here.parts[1:])
        if there.is_file():
            return there
    names = sorted(p.stem for p in folder.glob("*.py"))
    close = difflib.get_close_matches(here.stem, names, n=1)
    raise UserError(f"no config file at {path}; for example --config=configs/{close[0] if close else 'excon'}.py")


def installed() -> pathlib.Path:
    """The folder of the configs that belong to this package: inside it if installed, beside it in a checkout."""
    package = pathlib.Path(__file__).resolve().parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.with_name("configs")


def _load(argument: str) -> ConfigDict:
    """What `get_config(preset)` of the file returns."""
    name, colon, preset = argument.partition(":")
    path = find(name)
    try:
        module = _module(path)
        get_config = getattr(module, "get_config", None)
        if not callable(get_config):
            raise UserError(f"{name} has no function get_config(preset); it must return the config")
        if colon and not inspect.signature(get_config).parameters:
            raise UserError(f"{name} has no presets, but the preset {preset!r} was given")
        config = get_config(preset) if colon else get_config()
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - a config file is the user's own code and may raise anything
        raise UserError(f"{name} does not run: {_what(error)} ({_where(error, path)})") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config of {name} returns {quoted(config)}; expected a ConfigDict, see jaxcl.config")
    return config


def _module(path: pathlib.Path) -> types.ModuleType:
    name = f"jaxcl_config_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise UserError(f"{path} is no Python file; a config file ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def _what(error: Exception) -> str:
    text = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _where(error: Exception, path: pathlib.Path) -> str:
    """File and line of an error: of wrong syntax, else the last line of the config file that was running.

    A file that is no text has no line.
    """
    if isinstance(error, SyntaxError) and error.filename and not error.filename.startswith("<"):
        return f"{os.path.basename(error.filename)}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if os.path.abspath(f.filename) == os.path.abspath(path)]
    return f"{path.name}, line {own[-1].lineno}" if own else path.name


# ---- overrides


def _value(text: str) -> str:
    return text.partition("=")[2]


def _set_kind(config: ConfigDict, key: str, text: str) -> bool:
    """Change the kind of a part, with its options; False if the key is an ordinary option of that name."""
    from jaxcl import config as configs  # late: it imports JAX, and most command lines change no kind

    path = key.removesuffix(".kind")
    if configs.parts_of(path) is None:
        return False
    _find(config, key)
    configs.with_kind(config, path, _value(text))
    return True


def _set(config: ConfigDict, key: str, texts: Sequence[str]) -> None:
    """Set one key by ml_collections' own flags, which convert the text to the type that the key has."""
    if key.startswith("data.options."):  # options of a source of the user's own: any name, any value
        return _set_free(config, key, _value(texts[-1]))
    old = _find(config, key)
    for text in texts:
        if "=" not in text and not isinstance(old, bool):
            raise UserError(f"--config.{key} has no value; expected --config.{key}=VALUE")
    argv, values = ["", *texts], flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, lock_config=True, sys_argv=argv)
        values(argv)
    except (flags.Error, AttributeError, KeyError, IndexError, TypeError, ValueError):
        if isinstance(old, ConfigDict):
            example = next(iter(old), "KEY")
            raise UserError(f"{key} is a group of keys; set one of them, as --config.{key}.{example}=VALUE") from None
        what = expected(Option(old, type(old)))
        raise UserError(f"{key} is {quoted(_value(texts[-1]))}; expected {what}") from None


def _set_free(config: ConfigDict, key: str, text: str) -> None:
    _, _, name = key.split(".", 2)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):  # a word
        value = text
    with config.data.options.unlocked(), config.data.options.ignore_type():
        config.data.options[name] = value


def _find(config: ConfigDict, key: str) -> Any:
    """The value of a key. Raises: UserError for a key that the config does not have, with a suggestion."""
    if not _KEY.fullmatch(key):
        raise UserError(f"unknown config key {key}; keys are words with dots, and [0], [1], ... in a tuple")
    place, above = config, ""
    for word in re.findall(r"\w+|\[\d+\]", key):
        here = f"{above}{word}" if word.startswith("[") or not above else f"{above}.{word}"
        if word.startswith("["):
            if not isinstance(place, (tuple, list)):
                raise UserError(f"unknown config key {key}; {above} is no tuple")
            if int(word[1:-1]) >= len(place):
                raise UserError(f"unknown config key {key}; {above} has {len(place)} entries, counted from 0")
            place = place[int(word[1:-1])]
        elif not isinstance(place, ConfigDict):
            raise UserError(f"unknown config key {key}; {above} is {quoted(place)}, which has no keys")
        elif word not in place:
            raise UserError(f"unknown config key {key}; {_known(config, place, above, word)}")
        else:
            place = place[word]
        above = here
    return place


def _known(config: ConfigDict, node: ConfigDict, above: str, word: str) -> str:
    """The key that was probably meant, or all keys of the node."""
    dot = "." if above else ""
    if (synonym := SYNONYMS.get(word)) in node:
        return f"did you mean {above}{dot}{synonym}?"
    if close := difflib.get_close_matches(word, list(node), n=1, cutoff=0.75):
        return f"did you mean {above}{dot}{close[0]}?"
    elsewhere = [key for key in _leaves(config) if key.rpartition(".")[2] == word]
    if elsewhere and not above:
        return f"did you mean {' or '.join(elsewhere[:3])}?"
    kind = f" ({node.kind})" if above and isinstance(node.get("kind"), str) else ""
    return f"{above or 'the config'}{kind} has {', '.join(node) or 'no keys'}"


def _leaves(node: ConfigDict, above: str = "") -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, ConfigDict):
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}"
