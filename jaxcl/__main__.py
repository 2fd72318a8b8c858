"""`jaxcl NAME ...` and `python -m jaxcl NAME ...`: one entry for all commands."""

import importlib
import os
import sys
from typing import NamedTuple

from jaxcl import __version__
from jaxcl.errors import UserError
from jaxcl.runtime import entry
from jaxcl.runtime.options import suggestion


class Command(NamedTuple):
    """The module of a command, which has `main(argv) -> exit code`, and one line about it."""

    module: str
    line: str


COMMANDS = {
    "train": Command("jaxcl.main", "train one config; the same command resumes a run"),
    "evaluate": Command("jaxcl.commands.evaluate", "evaluate trained runs again, alone or joined"),
    "embed": Command("jaxcl.commands.embed", "write the features of images to a file"),
    "export": Command("jaxcl.commands.export", "write a trained encoder as safetensors"),
    "sweep": Command("jaxcl.commands.sweep.main", "train configs over seeds and a grid, into one table"),
    "compare": Command("jaxcl.commands.compare.main", "compare runs, or draw the curves of a sweep"),
    "claims": Command("jaxcl.commands.claims.main", "train the papers' methods and test their claims"),
    "plan": Command("jaxcl.commands.plan.main", "estimate memory and time of a run on a pod, without the pod"),
    "textures": Command("jaxcl.commands.textures", "make a set of textures for texture negatives"),
    "prepare": Command("jaxcl.commands.prepare", "download a TFDS set and prepare it for reading without TensorFlow"),
}


def usage() -> str:
    """The list of commands."""
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "jaxcl: contrastive learning in JAX.",
            "",
            "    jaxcl COMMAND [--name=VALUE ...]     the same as python -m jaxcl COMMAND ...",
            "    jaxcl train --config=configs/excon.py",
            "",
            "Commands (jaxcl COMMAND --help shows the flags):",
            *(f"  {name:<{width}}  {command.line}" for name, command in COMMANDS.items()),
        ]
    )


def main(argv: list[str]) -> int:
    """Run a command; -> exit code."""
    name, *rest = argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name == "--version":
        print(__version__)
        return 0
    if name.startswith("-"):
        raise UserError(f"{name} comes before the command; write for example jaxcl train --config=configs/excon.py")
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}{suggestion(name, COMMANDS)}")
    # A run folder records sys.argv as the flags of its command.
    sys.argv = [f"jaxcl {name}", *rest]
    return importlib.import_module(COMMANDS[name].module).main(sys.argv)


def cli() -> None:
    """`python -m jaxcl`. The exit code is that of the command; 2 for an unknown command."""
    entry.leave(main)


def script() -> None:
    """The console script. Modules of the current folder can be imported, as with `python -m`."""
    if not sys.flags.safe_path:
        sys.path.insert(0, os.getcwd())
    entry.leave(main, script=True)


if __name__ == "__main__":
    cli()
