"""Images per second from a folder of JPEG files: jaxcl's loader, and torchvision's ImageFolder with torch's DataLoader.

    python -m benchmarks.loader [--images=1920] [--sizes=224,64] [--rounds=5] [--workers=2]

It needs `pip install 'jaxcl[bench]'`. The benchmark makes ten folders of photos of about 500 x 375 pixels. They are
decoded, resized (the shorter side, antialiased, then the centre is cut out) and batched as uint8 batches of 128. Every
round runs every contestant in its own process, in turn, so a machine that slows down slows all of them. Ratios are
taken round by round, and their median is printed. Times are of the first epoch of whole batches, from listing the files
to the last batch, without imports:

* jaxcl, in memory: a set of up to 1 GiB of pixels is decoded once, and later epochs only copy;
* jaxcl, from disk: a larger set is decoded in every epoch, after its files have been checked once;
* torchvision: its loader, with this number of workers.

All three read the files from the operating system's cache. Processor time is counted over all processes.
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

from benchmarks import _paired
from benchmarks._measure import cores, figures, fresh_process, installed, machine
from benchmarks._report import markdown
from benchmarks._table import Row, Settings
from benchmarks._task import Contestant, Needs, Ready

TITLE = "Input pipeline"
NOTE = (
    "Images per second as uint8 batches of 128, shuffled, no augmentation. Array: an epoch from memory. Folder: an "
    "epoch of JPEG files of about 500 x 375 pixels, from listing them to the last batch, decoded and resized. A set of "
    "up to 1 GiB of pixels is kept in memory, and only its first epoch decodes; a larger set is decoded in every "
    "epoch. TFDS: an epoch of PNG images of 32 px in ArrayRecord form. torch's loader has one worker per core and "
    "always decodes."
)
BATCH = 128
SIDES = ((500, 375), (375, 500), (512, 384), (480, 360), (640, 427), (400, 300))
CONTESTANTS = {"memory": "jaxcl, in memory", "disk": "jaxcl, from disk", "torch": "torchvision"}


def write_photos(folder: pathlib.Path, count: int) -> int:
    """Writes files with the spectrum of photographs (1/f), about 60 kB each, in ten folders -> total bytes."""
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
    from jaxcl.data import make_source

    yield from _batches(make_source(f"folder:{folder}", image_size=size))


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

        source = make_source(f"folder:{folder}", image_size=size)  # checks the files once
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


# ---- for benchmarks.run

ARRAYS = (
    Contestant("memory", "jaxcl", ours=True),
    Contestant("torch", "torch's DataLoader", package="torch", differs="TensorDataset, no workers"),
    Contestant("numpy", "numpy", differs="indexed by a permutation, nothing in the background"),
)
KEPT, READ = (Contestant(key, "jaxcl", ours=True) for key in ("memory", "disk"))
FOLDER = Contestant("torch", "torchvision's ImageFolder", package="torchvision")
TFDS = Contestant("torch", "tfds.data_source, torch's DataLoader", package="torch")
# A process keeps the pixels of a folder that it decoded; a TFDS source decodes again when it is made.
WAYS = {
    "folder": {"kept in memory, later epochs": KEPT, "from disk, every epoch": READ},
    "tfds": {"kept in memory, first epoch": KEPT, "from disk, every epoch": READ},
}


def rows(settings: Settings) -> list[Row]:
    """Images per second from memory, from folders and from TFDS."""
    images, out = (BATCH, []) if settings.quick else (5 * BATCH, [])
    options = dict(unit="images/s", cores=cores())
    with tempfile.TemporaryDirectory() as folder:

        def compare(task: str, contestants: tuple[Contestant, ...], **arguments) -> None:
            arguments = {"folder": folder, **arguments}
            out.extend(_paired.rows("benchmarks.loader", task, contestants, settings, arguments=arguments, **options))

        compare("array, 32 px", ARRAYS, kind="arrays", size=32, images=16 * images)
        settings.note("making photos")
        for split, count in (("train", images), ("test", 10)):
            (pathlib.Path(folder) / split).mkdir()
            write_photos(pathlib.Path(folder) / split, count)
        for size in (224, 64)[: 1 if settings.quick else 2]:
            for way, ours in WAYS["folder"].items():
                compare(f"folder, {size} px, {way}", (ours, FOLDER), kind="folder", size=size, images=images)
        if absent := [name for name in ("tensorflow-datasets", "array-record") if not installed(name)]:
            left_out = f"{' and '.join(absent)} not installed"
            return [*out, Row("TFDS, 32 px", "jaxcl", "images/s", ours=True, left_out=left_out)]
        write_tfds(folder, 4 * images)
        for way, ours in WAYS["tfds"].items():
            compare(f"TFDS, 32 px, {way}", (ours, TFDS), kind="tfds", size=32, images=4 * images)
    return out


def write_tfds(folder: str, count: int) -> None:
    """CIFAR-10 in the form of TFDS, with images of noise; nothing is downloaded."""
    import io

    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered

    rng = np.random.default_rng(0)

    def examples(count: int):
        for i in range(count):
            png, image = io.BytesIO(), rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(image).save(png, "png")
            png.seek(0)
            yield i, {"id": f"{i}", "image": png, "label": i % 10}

    official = tfds.builder_cls("cifar10")
    with registered.skip_registration():

        class Local(official):
            def _split_generators(self, dl_manager):
                return {"train": examples(count), "test": examples(10)}

    Local.name = "cifar10"
    Local(data_dir=folder, file_format="array_record").download_and_prepare()


def prepare(contestant: str, *, kind: str, folder: str, size: int, images: int) -> Ready:
    if contestant == "disk":
        from jaxcl.data import disk

        disk.IN_MEMORY_BYTES = 0
    epoch = {"arrays": of_arrays, "folder": of_folder, "tfds": of_tfds}[kind](contestant, folder, size, images)
    expected = images // BATCH * BATCH

    def run():
        count = sum(len(batch) for batch in epoch() if batch[:, 0].sum() >= 0)  # reads every batch
        assert count >= expected, f"{count} images of {expected}"

    # Every pixel is read once and written once into a batch. Files are not counted.
    return Ready(run, expected, needs=Needs(0, 2 * 3 * size**2 * expected))


def of_arrays(contestant: str, folder: str, size: int, images: int) -> Callable[[], Iterator[np.ndarray]]:
    pixels = np.random.default_rng(0).integers(0, 256, (images, size, size, 3), dtype=np.uint8)
    if contestant == "numpy":
        order = np.random.default_rng(0).permutation(images)
        return lambda: (pixels[order[i : i + BATCH]] for i in range(0, images, BATCH))
    if contestant == "torch":
        torch = _paired.torch_threads()
        dataset = torch.utils.data.TensorDataset(torch.from_numpy(pixels), torch.zeros(images, dtype=torch.long))
        loader = torch.utils.data.DataLoader(dataset, BATCH, shuffle=True, drop_last=True)
        return lambda: (batch.numpy() for batch, _ in loader)
    from jaxcl.data import ArraySource

    mean = std = (0.5, 0.5, 0.5)
    source = ArraySource(images=pixels, labels=np.zeros(images, np.int32), class_names=("one",), mean=mean, std=std)
    return lambda: _batches(source)


def of_folder(contestant: str, folder: str, size: int, images: int) -> Callable[[], Iterator[np.ndarray]]:
    if contestant == "torch":
        return lambda: of_torch(folder, size, cores())
    return _of_source(contestant, f"folder:{folder}", image_size=size)


def of_tfds(contestant: str, folder: str, size: int, images: int) -> Callable[[], Iterator[np.ndarray]]:
    if contestant == "torch":
        torch = _paired.torch_threads()
        import tensorflow_datasets as tfds

        data = tfds.data_source("cifar10", split="train", data_dir=folder)
        options = dict(shuffle=True, drop_last=True, num_workers=cores())
        # torch cannot batch the feature "id", a string of bytes.
        loader = torch.utils.data.DataLoader(data, BATCH, collate_fn=_stacked, **options)
        return lambda: iter(loader)
    return _of_source(contestant, "tfds:cifar10", data_dir=folder)


def _stacked(examples: list[dict]) -> np.ndarray:
    return np.stack([example["image"] for example in examples])


def _of_source(contestant: str, spec: str, **options) -> Callable[[], Iterator[np.ndarray]]:
    from jaxcl.data import make_source

    if contestant == "disk":
        source = make_source(spec, **options)  # checks the files once
        assert not source.in_memory
        return lambda: _batches(source)
    return lambda: _batches(make_source(spec, **options))


def _batches(source) -> Iterator[np.ndarray]:
    """An epoch."""
    from jaxcl.data import Loader

    with Loader(source, batch_size=BATCH, seed=0) as loader:
        for _ in range(loader.steps_per_epoch):
            yield next(loader)["image"]


# ---- rounds


def compare(folder: str, sizes: list[int], rounds: int, workers: int) -> str:
    """All measurements as a table."""
    found = {(size, c): [] for size in sizes for c in CONTESTANTS}
    for r in range(rounds):
        for size in sizes:
            order = list(CONTESTANTS)[r % 3 :] + list(CONTESTANTS)[: r % 3]  # another one is first in each round
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
        "processor ms per image",
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
    parser.add_argument("--folder", default="", help="folder that keeps the photos; default: a temporary one")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.sizes.split(",")]
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.folder, sizes[0], arguments.workers)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(arguments.folder or temporary)
        if not (folder / "train").exists():
            for split, count in (("train", arguments.images), ("test", 10)):
                (folder / split).mkdir(parents=True)
                write_photos(folder / split, count)
        load = os.getloadavg()[0]
        table = compare(str(folder), sizes, arguments.rounds, arguments.workers)
        words = machine(("jaxcl", "grain", "pillow", "torch", "torchvision"))
        about = ", ".join(v if k == "processor" else f"{k} {v}" for k, v in words.items())
        print(f"{about}. Load average {load:.1f} to {os.getloadavg()[0]:.1f}.\n\n{table}")


if __name__ == "__main__":
    main()
