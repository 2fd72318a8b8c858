"""Commands as users start them: in a process of their own, or in this one up to their exit code."""

import os
import pathlib
import subprocess
import sys

import pytest

from jaxcl import __main__ as commands
from jaxcl.runtime import entry

ROOT = pathlib.Path(__file__).resolve().parents[1]


def subprocess_run(arguments, cwd, program=("-m", "jaxcl.main"), timeout=300):
    """`python PROGRAM ARGUMENTS` in `cwd`; the configs and helpers of the tests can be imported there."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    return subprocess.run(
        [sys.executable, *program, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def cli(arguments, monkeypatch, capture):
    """`jaxcl ARGUMENTS` in this process, up to its end -> (exit code, stdout, stderr). capture: capsys or capfd."""
    monkeypatch.setattr(sys, "argv", ["jaxcl", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        entry.leave(commands.main)
    return end.value.code, *capture.readouterr()


def one_line(text):
    """The message of a command that ended with a mistake; nothing else may be in `text`."""
    (line,) = text.strip().splitlines()
    assert line.startswith("jaxcl: ")
    return line
