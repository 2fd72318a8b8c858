"""Commands as users start them: in a process of their own, or in this one up to their exit code."""

import os
import pathlib
import subprocess
import sys

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
