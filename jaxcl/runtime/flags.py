"""The parser of command lines. Each command declares its own flags; no flag belongs to the whole program."""

import os
import re
import types
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from jaxcl.errors import UserError
from jaxcl.runtime import storage
from jaxcl.runtime.options import suggestion

_HELP = {"-h", "-help", "--help"}
_REPEAT = ";\n"  # absl appends a line after this to the help of a flag that may be repeated


class Flags:
    """The flags of one command, written --name=VALUE.

        FLAGS = Flags(__doc__)
        FLAGS.path("out", "", "A folder for the figures.")

        def main(argv):
            given = FLAGS.parse(argv)
            ... given.out

    Args:
      about: the text that --help prints above the flags.
      more: called by --help only; it returns text that follows the flags, such as a list that takes time to make.
      positional: the name of one value that is given without a flag; "": there is none.
      config: whether the command takes one --config=FILE[:PRESET] and any --config.KEY=VALUE.
    """

    def __init__(
        self, about: str | None, *, more: Callable[[], str] | None = None, positional: str = "", config: bool = False
    ):
        self._about, self._more, self._positional, self._config = about or "", more, positional, config
        self._values = flags.FlagValues()
        self._paths: set[str] = set()
        self._values.set_gnu_getopt(True)  # flags may follow the positional value
        self._own = dict(flag_values=self._values)

    def text(self, name: str, default: str, help: str) -> None:
        flags.DEFINE_string(name, default, help, **self._own)

    def path(self, name: str, default: str, help: str) -> None:
        """A file or folder, local or remote; a leading "~" is the home."""
        self._paths.add(name)
        self.text(name, default, help)

    def paths(self, name: str, help: str) -> None:
        """A flag that may be given several times; its value is a list of paths."""
        self._paths.add(name)
        self.texts(name, help)

    def texts(self, name: str, help: str) -> None:
        """A flag that may be given several times; its value is a list."""
        flags.DEFINE_multi_string(name, [], help, **self._own)

    def choice(self, name: str, default: str, known: Sequence[str], help: str) -> None:
        flags.DEFINE_enum(name, default, list(known), help, **self._own)

    def number(self, name: str, default: int | None, help: str, *, at_least: int | None = None) -> None:
        flags.DEFINE_integer(name, default, help, lower_bound=at_least, **self._own)

    def switch(self, name: str, help: str) -> None:
        """True if given, otherwise False."""
        flags.DEFINE_bool(name, False, help, **self._own)

    def parse(self, argv: Sequence[str]) -> types.SimpleNamespace:
        """The values of all flags by name; argv[0] is the program. --help prints and ends the process.

        With `config`, the result also has `config` (FILE[:PRESET], None if not given) and `overrides` (every
        --config.KEY=VALUE, for `read_config`).

        Raises:
          UserError: an unknown flag, a value of the wrong type or an unexpected argument.
        """
        if _HELP & set(argv[1:]):
            print(self.help())
            raise SystemExit(0)
        argv, found = list(argv), {}
        if self._config:
            argv, found["config"], found["overrides"] = _split(argv)
        self._values.unparse_flags()
        try:
            _, *rest = self._values(argv)
        except flags.UnrecognizedFlagError as error:
            raise UserError(f"unknown flag --{error.flagname}{suggestion(error.flagname, self._names())}") from None
        except flags.Error as error:
            raise UserError(str(error).splitlines()[0]) from None
        if self._positional:
            found[self._positional] = rest.pop(0) if rest else ""
        if rest:
            raise UserError(f"unexpected argument {rest[0]!r}; flags are written --name=value")
        values = {name: self._values[name].value for name in self._names()}
        for name in self._paths:
            values[name] = [_home(v) for v in values[name]] if isinstance(values[name], list) else _home(values[name])
        return types.SimpleNamespace(**found, **values)

    def help(self) -> str:
        """The text of --help."""
        lines = [self._about.strip(), "", "Flags:"]
        if self._config:
            lines.append("  --config: Config file, with a preset after a colon.")
            lines.append("  --config.KEY: Another value for one key of the config.")
        for name in self._names():
            flag = self._values[name]
            default = "" if flag.default in (None, [], "", False) else f" (default: {flag.default})"
            lines.append(f"  --{name}: {flag.help.partition(_REPEAT)[0]}{default}")
        return "\n".join([*lines, *(["", self._more()] if self._more else [])])

    def default(self, name: str) -> Any:
        """The value of a flag that is not given."""
        return self._values[name].default

    def _names(self) -> list[str]:
        return list(self._values)


def _home(path: str) -> str:
    """A path without "~", which shells do not expand behind "="."""
    return os.fspath(storage.expanded(path)) if path else path


def _split(argv: Sequence[str]) -> tuple[list[str], str | None, list[str]]:
    """-> (argv without what concerns the config, the value of --config, every override as --config.KEY=VALUE).

    A value may also follow its flag as a separate argument. The last --config counts.
    """
    rest, config, overrides = [argv[0]], None, []
    following = list(argv[1:])
    while following:
        argument = following.pop(0)
        name, equals, value = argument.partition("=")
        if not re.match(r"--?(no)?config(\.|$)", name):
            rest.append(argument)
            continue
        if not equals and following and not re.match(r"--?[A-Za-z]", following[0]):
            value, equals = following.pop(0), "="
        if "." in name:
            overrides.append(f"{name}{equals}{value}")
        elif not value:
            raise UserError("--config has no value; for example --config=configs/excon.py")
        else:
            config = value
    return rest, config, overrides
