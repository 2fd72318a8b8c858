"""Images a second from a folder of JPEG files: jaxcl's loader beside torchvision's ImageFolder with torch's DataLoader.

    python -m benchmarks.loader [--images=1920] [--sizes=224,64] [--rounds=5] [--workers=2]

needs `pip install 'jaxcl[bench]'`. Photos of about 500 x 375 pixels are made for it, ten folders of them, decoded,
resized (shorter side, antialiased, then the centre) and put together to uint8 batches of 128. Every round runs every
contestant in turn, each in a process of its own, so a machine that slows down slows all of them; ratios are taken round
by round and their median is printed. Timed is the first epoch, from listing the files to the last batch, imports apart
(of whole batches: images that fill none are decoded into memory for nothing):

* jaxcl, in memory: what a set of up to 1 GiB of pixels does; it is decoded once, and later epochs only copy;
* jaxcl, from disk: what a larger set does in every epoch, after its files have been looked at once;
* torchvision: its loader, with so many workers.

The files come from the operating system's cache for all three. Processor time is counted over all processes.
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from benchmarks._measure import figures, fresh_process, machine
from benchmarks._report import markdown

BATCH = 128
SIDES = ((500, 375), (375, 500), (512, 384), (480, 360), (640, 427), (400, 300))
CONTESTANTS = {"memory": "jaxcl, in memory", "disk": "jaxcl, from disk", "torch": "torchvision"}


def write_photos(folder: pathlib.Path, count: int) -> int:
    """Files with the spectrum of photographs (1/f), some 60 kB each, in ten folders -> bytes in all."""
    rng, total = np.random.default_rng(0), 0
    for i in range(count):
        width, height = SIDES[i % len(SIDES)]
        radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]) + 1 / width
        shape = (height, width // 2 + 1, 3)
        noise = rng.standard_normal(shape, np.float32) + 1j * rng.standard_normal(shape, np.float32)
        photo = np.fft.irfft2(noise / radius[..., None], (height, width), axes=(0, 1))
        photo = np.clip(127 + 55 * photo / photo.std(), 0, 255).astype(np.uint8)
        path = folder / f"class{i % 10}" / f"{i:06d}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(photo).save(path, quality=90)
        total += path.stat().st_size
    return total


# ---- contestants: an epoch of batches, uint8


def of_jaxcl(folder: str, size: int, workers: int) -> Iterator[np.ndarray]:
    from jaxcl.data import Loader, make_source

    source = make_source(f"folder:{folder}", image_size=size)
    with Loader(source, batch_size=BATCH, seed=0) as loader:
        for _ in range(loader.steps_per_epoch):
            yield next(loader)["image"]


def of_torch(folder: str, size: int, workers: int) -> Iterator[np.ndarray]:
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    transform = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()])
    loader = DataLoader(
        ImageFolder(f"{folder}/train", transform), BATCH, shuffle=True, num_workers=workers, drop_last=True
    )
    for images, _ in loader:
        yield images.numpy()


def measure(contestant: str, folder: str, size: int, workers: int) -> dict[str, float]:
    """Images, seconds and processor seconds of one epoch."""
    epoch: Callable[..., Iterator[np.ndarray]] = of_torch if contestant == "torch" else of_jaxcl
    if contestant == "torch":
        import torchvision.datasets  # noqa: F401 - imports are not timed
    else:
        from jaxcl.data import disk, files  # noqa: F401

    if contestant == "disk":
        disk.IN_MEMORY_BYTES = 0
        from jaxcl.data import make_source

        source = make_source(f"folder:{folder}", image_size=size)  # looked at, once
        assert not source.in_memory
    cpu, begun = _processor_seconds(), time.perf_counter()
    batches = epoch(folder, size, workers)
    count = total = 0
    for batch in batches:
        count, total = count + len(batch), total + int(batch[:, 0].sum())
    return {"images": count, "seconds": time.perf_counter() - begun, "processor": _processor_seconds() - cpu}


def _processor_seconds() -> float:
    uses = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(use.ru_utime + use.ru_stime for use in uses)


# ---- rounds


def compare(folder: str, sizes: list[int], rounds: int, workers: int) -> str:
    """Everything measured, in words."""
    found = {(size, c): [] for size in sizes for c in CONTESTANTS}
    for r in range(rounds):
        for size in sizes:
            order = list(CONTESTANTS)[r % 3 :] + list(CONTESTANTS)[: r % 3]  # nobody is always the first
            for contestant in order:
                one = [f"--one={contestant}", f"--folder={folder}", f"--sizes={size}", f"--workers={workers}"]
                lines, error = fresh_process("benchmarks.loader", *one, environment={"JAX_PLATFORMS": "cpu"})
                if error:
                    sys.exit(f"{CONTESTANTS[contestant]}: {error}")
                found[size, contestant].append(json.loads(lines[-1]))
    rows = []
    for size in sizes:
        reference = found[size, "torch"]
        for contestant, name in CONTESTANTS.items():
            runs = found[size, contestant]
            speed = [run["images"] / run["seconds"] for run in runs]
            effort = [1000 * run["processor"] / run["images"] for run in runs]
            ratio = [s / (t["images"] / t["seconds"]) for s, t in zip(speed, reference, strict=True)]
            cheaper = [
                t["processor"] / t["images"] / (run["processor"] / run["images"])
                for run, t in zip(runs, reference, strict=True)
            ]
            medians = map(statistics.median, (speed, ratio, effort, cheaper))
            rows.append([f"{name}, {size} pixels", *map(figures, medians), f"{min(ratio):.2f} to {max(ratio):.2f}"])
    head = [
        "loader",
        "images/s",
        "times torchvision's",
        "processor ms an image",
        "times cheaper",
        "ratios of the rounds",
    ]
    return markdown(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=15 * BATCH)
    parser.add_argument("--sizes", default="224,64")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="of torch's DataLoader")
    parser.add_argument("--folder", default="", help="where the photos are kept; default: a temporary folder")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.sizes.split(",")]
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.folder, sizes[0], arguments.workers)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(arguments.folder or temporary)
        if not (folder / "train").exists():
            for part, count in (("train", arguments.images), ("test", 10)):
                (folder / part).mkdir(parents=True)
                write_photos(folder / part, count)
        load = os.getloadavg()[0]
        table = compare(str(folder), sizes, arguments.rounds, arguments.workers)
        words = machine(("jaxcl", "grain", "pillow", "torch", "torchvision"))
        about = ", ".join(v if k == "processor" else f"{k} {v}" for k, v in words.items())
        print(f"{about}. Load average {load:.1f} to {os.getloadavg()[0]:.1f}.\n\n{table}")


if __name__ == "__main__":
    main()
