"""Reads that never return: an image file that becomes a named pipe which nobody writes to."""

import os
import pathlib
import shutil
import signal
import time
from collections.abc import Iterator

from benchmarks.survival import kills
from benchmarks.survival.lab import Lab, ends_with_us, steps_of, told, training, wait
from benchmarks.survival.registry import BADLY, LOST, WELL, Trial, fault


def photos(folder: pathlib.Path) -> pathlib.Path:
    """64 training and 16 test images of two classes, as PNG files."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for part, count in (("train", 32), ("test", 8)):
        for label in ("cat", "dog"):
            (folder / part / label).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / label / f"{i}.png")
    return folder


def _stalled(folder: pathlib.Path) -> None:
    """Every training image of one class becomes a named pipe."""
    for path in sorted((folder / "train" / "dog").iterdir()):
        path.unlink()
        os.mkfifo(path)


def _command(work: pathlib.Path, images: pathlib.Path) -> list[str]:
    # The limit is of an embedded set.
    return training(work, f"--config.data.source=folder:{images}", "--config.data.limit=0")


@fault("stall:training", "image files stop answering while a run trains; then TERM, INT or HUP")
def training_data(lab: Lab, rounds: int) -> Iterator[Trial]:
    images, alone = photos(lab.place("photos")), lab.place("alone")
    ended = lab.run(_command(alone, images), at={"lazy": True})
    assert ended.code == 0, ended.error
    whole = lab.copy(images)
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        work, what = lab.place("stalled"), f"{name[3:]} while a batch does not come"
        process = lab.start(_command(work, images), at={"lazy": True})
        with ends_with_us(process):
            while process.poll() is None and kills.last_step(work) < 5:
                time.sleep(0.002)
            _stalled(images)
            time.sleep(1.5)
            running = process.poll() is None
            if running:
                process.send_signal(getattr(signal, name))
            ended = wait(process, timeout=60)
        shutil.rmtree(images)
        lab.copy(whole, images)
        if not running:
            yield Trial(what, BADLY, f"the run ended before it stalled, exit code {ended.code}")
            continue
        wrong = told(ended, 75)
        saved = steps_of(work)
        if not saved or saved[-1] < kills.last_step(work):
            yield Trial(what, LOST, f"step {kills.last_step(work)} was trained, {saved} saved; {wrong}")
            continue
        ended = lab.run(_command(work, images), at={"lazy": True})
        lost = f"exit code {ended.code}" if ended.code else ""
        try:
            kills.compare(work, alone, exact=True)
        except Exception as error:  # noqa: BLE001 - in the table
            lost = lost or str(error)
        yield Trial(what, LOST if lost else BADLY if wrong else WELL, lost or wrong)


@fault("stall:start", "image files do not answer when a set is opened; then TERM, INT or HUP")
def opening(lab: Lab, rounds: int) -> Iterator[Trial]:
    images = photos(lab.place("photos"))
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        work, what = lab.place("stalled"), f"{name[3:]} while the set is opened"
        # A pipe is no image file, so it must come after the folder was listed: at the first import of the decoder.
        ready = lab.place("ready")
        at = {"event": "import", "name": r"^PIL\.Image$|^jaxcl\.train\.loop$", "do": f"wait {ready}"}
        process = lab.start(_command(work, images), at=at)
        with ends_with_us(process):
            path = images / "train" / "dog" / "0.png"
            kept = path.read_bytes()
            path.unlink()
            path.symlink_to("/dev/stdin")  # a file by its name, which waits for what never comes
            os.mkfifo(images / "pipe")
            path.unlink()
            path.symlink_to(images / "pipe")
            ready.write_text("")
            time.sleep(8)
            running = process.poll() is None
            if running:
                process.send_signal(getattr(signal, name))
            ended = wait(process, timeout=60)
            path.unlink()
            path.write_bytes(kept)
            (images / "pipe").unlink()
        # A pipe in place of an image may also be refused by name.
        wrong = told(ended, 75, 130) if running else told(ended, 2)
        lost = "a checkpoint is there" if steps_of(work) else ""
        yield Trial(what, LOST if lost else BADLY if wrong else WELL, lost or wrong)
