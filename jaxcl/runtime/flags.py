"""The one parser of command lines: absl's flags and ml_collections' configs, with every mistake in one plain line."""

import logging
import os
import pathlib
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from jaxcl.errors import Diverged, LostHost, Preempted, UserError
from jaxcl.runtime import huge_pages


def parse(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
    """absl's own parser, with a config's mistakes in one line instead of a traceback; --help prints, and ends."""
    if {"--help", "-help", "-h"} & set(argv[1:]):
        print(_help(values))
        raise SystemExit(0)
    _check_config_file(argv)
    try:
        rest = values(argv)
    except flags.Error as error:
        raise UserError(_reason(str(error))) from None
    except (AttributeError, KeyError) as error:
        # ml_collections raises these for a key that a locked config does not have.
        why = f"unknown config key: {_first_line(error)}; the keys are those of the config file"
        raise UserError(_below_a_value(argv) or why) from None
    except (IndexError, OSError, TypeError, ValueError) as error:
        raise UserError(_below_a_value(argv) or _first_line(error)) from None
    except Exception as error:  # noqa: BLE001 - a config file is the user's own code and may raise anything
        where = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {_first_line(error)}"
        raise UserError(f"the config file does not run: {what} ({where.filename}, line {where.lineno})") from None
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; options are written --name=value")


def read_config(argument: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The config that `--config=ARGUMENT` and `--config.KEY=VALUE ...` would run; the flags of this process are not
    touched. Errors: UserError."""
    argv, values = ["", f"--config={argument}", *overrides], flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True, sys_argv=argv)
    parse(argv, values)
    return holder.value


def _help(values: flags.FlagValues) -> str:
    """What the command's module says of itself, and its own flags."""
    lines = [sys.modules["__main__"].__doc__ or __doc__]
    for module, own in sorted(values.flags_by_module_dict().items()):
        for flag in () if module.startswith("absl") else own:
            default = "" if flag.default in (None, [], "") else f" (default: {flag.default_as_str})"
            lines.append(f"  --{flag.name}: {flag.help}{default}")
    return "\n".join(lines)


def _below_a_value(argv: list[str]) -> str | None:
    """What to say of --config.KEY.MORE=... where KEY holds a value and no keys; Python's own words name neither."""
    asked = [a.lstrip("-").partition("=")[0].split(".")[1:] for a in argv if a.lstrip("-").startswith("config.")]
    given = config_argument(argv)
    if not given or not any(len(path) > 1 for path in asked):
        return None
    config = read_config(given)
    for path in asked:
        place = config
        for i, key in enumerate(path):
            if not isinstance(place, ConfigDict):
                if isinstance(place, tuple | list):  # indexed, which has errors of its own
                    break
                above = ".".join(path[:i])
                return f"unknown config key: {'.'.join(path)}; {above} is {place!r}, which has no keys of its own"
            if key not in place:
                break
            place = place[key]
    return None


def config_argument(argv: list[str]) -> str | None:
    """FILE[:PRESET] as the user wrote it (the last one counts)."""
    given = None
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            given = value if equals else following
    return given


def _check_config_file(argv: list[str]) -> None:
    """ml_collections puts the news of a missing file off until the config is first used."""
    if given := config_argument(argv):
        path = pathlib.Path(given.partition(":")[0])
        if not path.is_file():
            raise UserError(f"no config file at {path}; for example --config=configs/excon.py")


def _reason(text: str) -> str:
    """The one line that matters: of a config that raised, its own error rather than the traceback around it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if "Error whilst parsing config file" not in text:
        return lines[0]
    kind, _, message = lines[-1].partition(": ")
    return message if kind.endswith("UserError") else f"{lines[0].split(':', 1)[0]}: {lines[-1]}"


def _first_line(error: BaseException) -> str:
    # A KeyError's text may have been quoted on its way here: quotes and line ends then stand escaped in it.
    text = str(error.args[0] if error.args else error).replace("\\'", "'").replace("\\n", ". ").strip().strip('"')
    text = text[1:-1] if len(text) > 1 and text[0] == text[-1] == "'" else text
    return text.splitlines()[0] if text else type(error).__name__


def leave(main: Callable[[list[str]], int]) -> NoReturn:
    """End this process with the exit code of `main(sys.argv)`, and what ends it early in one plain line."""
    huge_pages.ask()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)  # libraries: warnings; ours: progress too
    logging.getLogger("jaxcl").setLevel(logging.INFO)
    absl_logging.set_verbosity(absl_logging.WARNING)
    # Of damaged metadata, large images and the like: a file that cannot be used is named in a line of ours.
    warnings.filterwarnings("ignore", module=r"PIL\b")
    # Of a save that fails Orbax prints pages; what is to be known of it stands in our one line.
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    codes = {UserError: 2, Diverged: 3, Preempted: 75, LostHost: 75}
    try:
        code = main(sys.argv)
    except tuple(codes) as error:
        print(f"jaxcl: {error}", file=sys.stderr)
        code = codes[type(error)]
        if isinstance(error, LostHost):
            sys.stderr.flush()
            os._exit(code)  # an orderly end would wait for the one that is gone
    sys.exit(code)
