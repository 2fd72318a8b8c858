"""A disk that is full at one kind of write: a small file system in memory, filled just before that write begins."""

import contextlib
import pathlib
import shutil
import subprocess
from collections.abc import Iterator

from benchmarks.survival.lab import Lab, contents, gone, told, training
from benchmarks.survival.registry import BADLY, LOST, WELL, Trial, fault

SIZE = "64m"
# (event, pattern): the write that meets the full disk. A temporary name precedes every file that is written whole.
WRITES = {
    "lock.json": ("open", r"/lock\.json\..*tmp$"),
    "config.json": ("open", r"/config\.json\..*tmp$"),
    "data.json": ("open", r"/data\.json\..*tmp$"),
    "environment.json": ("open", r"/environment\.json\..*tmp$"),
    "metrics.jsonl": ("open", r"/metrics\.jsonl$"),
    "examples.jsonl": ("open", r"/examples\.jsonl$"),
    "tensorboard": ("os.mkdir", r"/tensorboard$"),
    "the first checkpoint": ("os.mkdir", r"/checkpoints/4\b"),
    "a later checkpoint": ("os.mkdir", r"/checkpoints/16\b"),
    "the last checkpoint": ("os.mkdir", r"/checkpoints/24\b"),
    "a manifest": ("open", r"/checkpoints/8/manifest\.json\..*tmp$"),
    "results.json": ("open", r"/results\.json\..*tmp$"),
}


@contextlib.contextmanager
def small_disk(lab: Lab) -> Iterator[pathlib.Path | None]:
    """A file system of its own; None where this process may not mount one."""
    place = lab.place("disk")
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(place)], capture_output=True, check=False
    )
    try:
        yield None if mounted.returncode else place
    finally:
        if not mounted.returncode:
            subprocess.run(["umount", "-l", str(place)], check=False)
        place.rmdir()


def meet(lab: Lab, what: str, event: str, name: str, *more: str, start: pathlib.Path | None = None) -> Trial:
    """Train until the write meets the full disk, make room, and continue."""
    with small_disk(lab) as disk:
        if disk is None:
            return Trial(what, BADLY, "left out: this process may not mount a file system")
        work = disk / "run"
        if start:
            lab.copy(start, work)
        ended = lab.run(training(work, *more), at={"event": event, "name": name, "do": f"fill {disk}"})
        if not (disk / "filler").exists():
            return Trial(what, BADLY, f"the write was not met; exit code {ended.code}")
        wrong = told(ended, 2)
        (disk / "filler").unlink()
        lost = lab.nothing_lost(work, lab.done)
        if lost:
            return Trial(what, LOST, lost)
    return Trial(what, BADLY if wrong else WELL, wrong)


def _register(what: str, event: str, name: str) -> None:
    @fault(f"disk:{what}", f"the disk is full when {what} is written")
    def tries(lab: Lab, rounds: int) -> Iterator[Trial]:
        yield meet(lab, what, event, name)


for _what, (_event, _name) in WRITES.items():
    _register(_what, _event, _name)


@fault("disk:report", "the disk is full when the report's folder, pictures or page are written")
def report(lab: Lab, rounds: int) -> Iterator[Trial]:
    for name, at in {
        "its folder": ("os.mkdir", r"/report$"),
        "its pictures": ("open", r"/report/.*\.(png|svg|jpg)"),
        "its page": ("open", r"/report/index\.html"),
    }.items():
        with small_disk(lab) as disk:
            if disk is None:
                yield Trial(name, BADLY, "left out: this process may not mount a file system")
                continue
            work = disk / "run"
            command = training(work, "--config.report=True")
            ended = lab.run(command, at={"event": at[0], "name": at[1], "do": f"fill {disk}"})
            if not (disk / "filler").exists():
                yield Trial(name, BADLY, f"the write was not met; exit code {ended.code}: {ended.error[-200:]}")
                continue
            wrong = told(ended, 2)
            (disk / "filler").unlink()
            ended = lab.quick(command)
            lost = f"exit code {ended.code}" if ended.code else lab.same_end(work)
            if not lost and not (work / "report" / "index.html").is_file():
                lost = "no page"
            yield Trial(name, LOST if lost else BADLY if wrong else WELL, lost or wrong)


@fault("disk:outputs", "the disk is full when evaluate, embed, export or compare writes what it was asked for")
def outputs(lab: Lab, rounds: int) -> Iterator[Trial]:
    for command, file, more in (
        ("evaluate", "out.json", ["--suite=knn"]),
        ("embed", "out.npz", ["--split=test"]),
        ("export", "out.safetensors", []),
        ("compare", "out", []),
    ):
        with small_disk(lab) as disk:
            if disk is None:
                yield Trial(command, BADLY, "left out: this process may not mount a file system")
                continue
            work, target = lab.copy(lab.done), disk / file
            before = contents(work)
            arguments = [command, f"--workdir={work}", f"--out={target}", *more]
            at = {"event": "open", "name": rf"{disk}/(?!filler)", "do": f"fill {disk}"}
            ended = lab.run(arguments, at=at)
            wrong, lost = told(ended, 2), gone(before, work)
            if not wrong and target.is_file():
                wrong = "half a file is left"
            shutil.rmtree(work)
            if not (disk / "filler").exists():
                wrong = f"the write was not met; exit code {ended.code}: {ended.error[-200:]}"
            yield Trial(command, LOST if lost else BADLY if wrong else WELL, lost or wrong)
