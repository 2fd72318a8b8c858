"""A process that runs commands of jaxcl one after the other: they share the imports, which take most of their time.

It reads lines with a JSON list of arguments and answers each with the exit code; what the command writes goes to the
files that the caller names. Only commands that end by themselves are run here.
"""

import contextlib
import gc
import json
import os
import sys
import traceback

from jaxcl import __main__ as commands
from jaxcl.runtime import entry


def run(arguments: list[str]) -> int:
    """`jaxcl ARGUMENTS`, up to its end; -> exit code."""
    sys.argv = ["jaxcl", *arguments]
    try:
        entry.leave(commands.main)
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:  # noqa: BLE001 - as the interpreter does at its end
        traceback.print_exc()
        return 1


@contextlib.contextmanager
def _written_to(out: str, error: str):
    kept = os.dup(1), os.dup(2)
    try:
        for number, path in enumerate((out, error), 1):
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, number)
            os.close(file)
        yield
    finally:
        for number, file in enumerate(kept, 1):
            (sys.stdout, sys.stderr)[number - 1].flush()
            os.dup2(file, number)
            os.close(file)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        given = json.loads(line)
        with _written_to(given["out"], given["error"]):
            code = run(given["arguments"])
        answers.write(f"{code}\n")
        answers.flush()
        gc.collect()


if __name__ == "__main__":
    main()
