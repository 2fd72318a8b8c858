"""`jaxcl` with something that happens at one moment: `python -m benchmarks.survival.hooked train --config=...`.

SURVIVAL_AT is JSON with

    event   of Python's audit: "open" (for writing only), "os.mkdir", "os.rename" or "import"
    name    a regular expression for the path, or the module
    do      what happens just before it: names of signals that this process gets ("TERM TERM"), "fill FOLDER" (its disk
            is filled to the last page), "wait FILE" (this process waits until the file is there)
    lazy    true: sets of image files count as too large for the memory, and are read batch by batch

So a signal or a full disk meets the same write in every trial.
"""

import json
import os
import pathlib
import re
import runpy
import signal
import sys
import time

WRITES = os.O_WRONLY | os.O_RDWR


def watch(event: str, name: str, do: str) -> None:
    """Call `do` at the first event of that name."""
    pattern, over = re.compile(name), []

    def hook(what: str, arguments: tuple) -> None:
        if over or what != event:
            return
        if what == "open" and not (set(str(arguments[1])) & set("wax+") or int(arguments[2] or 0) & WRITES):
            return
        try:
            text = os.fsdecode(arguments[0])
        except TypeError:  # an open file
            return
        if pattern.search(text):
            over.append(1)
            _do(*do.split())

    sys.addaudithook(hook)


def _do(word: str, *more: str) -> None:
    if word == "fill":
        fill(pathlib.Path(more[0]))
    elif word == "wait":
        until = time.monotonic() + 120
        while not os.path.exists(more[0]) and time.monotonic() < until:
            time.sleep(0.001)
    else:
        for i, name in enumerate((word, *more)):
            if i:
                time.sleep(0.3)  # two signals at once are one request
            os.kill(os.getpid(), getattr(signal, f"SIG{name}"))


def fill(folder: pathlib.Path) -> None:
    """Leave no room on the disk of a folder."""
    with open(folder / "filler", "ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue


def main() -> None:
    spec = json.loads(os.environ["SURVIVAL_AT"])
    if spec.pop("lazy", False):
        from jaxcl.runtime import xla_flags

        xla_flags.set_flags()
        from jaxcl.data import disk

        disk.IN_MEMORY_BYTES = 0
    if spec:
        watch(**spec)
    runpy.run_module("jaxcl", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
