"""Speed of the random view and of each of its operations; and, as `rows`, of the same chain in other libraries.

    python -m benchmarks.augment                        # 32 px, batch 512 and 224 px, batch 32
    python -m benchmarks.augment --sizes 96 --batch 256 --seconds 5

Every line gives the best and the median of repeated calls of one compiled program on the default device, with inputs on
the device. `python -m benchmarks.run --only=augment` measures the other libraries.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _paired
from benchmarks._augmenters import CONTESTANTS, MEAN, STD
from benchmarks._augmenters import JITTER as STRENGTH
from benchmarks._measure import cores
from benchmarks._table import Row, Settings
from jaxcl import augment
from jaxcl.augment import color, ops

TITLE = "Augmentation"
NOTE = (
    "Random resized crop, flip, colour jitter, grey, normalise: from a uint8 batch in memory to a float32 batch. Each "
    "contestant has one core, like a worker of a loader; jaxcl is also measured on all cores."
)
BATCHES = {32: 512, 64: 256, 96: 128, 224: 32}


def measure(function, *arguments, seconds: float) -> tuple[float, float, float]:
    """(best, median, compilation) seconds: the first two per call, after compiling."""
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    compile_seconds = time.perf_counter() - start
    jax.block_until_ready(compiled(*arguments))
    times = []
    while sum(times) < seconds or len(times) < 5:
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        times.append(time.perf_counter() - start)
    return min(times), statistics.median(times), compile_seconds


def programs(size: int, batch: int):
    """(name, function, arguments) of every line of the table."""
    rng = np.random.default_rng(0)
    raw = jnp.asarray(rng.integers(0, 256, (batch, size, size, 3)).astype(np.uint8))
    images = jax.jit(augment.to_float)(raw)
    keys = jax.random.split(jax.random.key(0), batch)
    boxes = jax.jit(lambda k: ops.draw_resized_crop(k, size, size))(keys)
    factors, order, applied = jax.jit(lambda k: color.draw_color_jitter(k, strength=STRENGTH))(keys)
    sigma = jax.jit(ops.draw_blur_sigma)(keys)

    yield "random_view", augment.random_view(size, MEAN, STD), (keys, raw)
    yield (
        "random_view, blur and solarize",
        augment.random_view(size, MEAN, STD, blur=0.5, solarize=0.2),
        (keys, raw),
    )
    yield "classifier_view", augment.classifier_view(size, MEAN, STD), (keys, raw)
    yield "standard_view", augment.standard_view(size, MEAN, STD), (keys, raw)
    yield "draw crop", lambda k: ops.draw_resized_crop(k, size, size), (keys,)
    yield "draw jitter", lambda k: color.draw_color_jitter(k, strength=STRENGTH), (keys,)
    yield "resized_crop", lambda x, b: ops.resized_crop(x, b, size), (images, boxes)
    yield "flip", ops.flip, (images, applied)
    yield "color_jitter", color.color_jitter, (images, factors, order)
    yield "adjust_brightness", color.adjust_brightness, (images, factors[:, 0])
    yield "adjust_contrast", color.adjust_contrast, (images, factors[:, 1])
    yield "adjust_saturation", color.adjust_saturation, (images, factors[:, 2])
    yield "adjust_hue", color.adjust_hue, (images, factors[:, 3])
    yield "grayscale", color.grayscale, (images, applied)
    yield "gaussian_blur", ops.gaussian_blur, (images, sigma)
    yield "solarize", ops.solarize, (images, applied)
    yield "normalize", lambda x: augment.normalize(x, MEAN, STD), (images,)


def rows(settings: Settings) -> list[Row]:
    """The whole chain at 32 and 224 pixels, on one core per contestant; and jaxcl on all cores."""
    out = []
    for size, batch in ((16, 8),) if settings.quick else ((32, BATCHES[32]), (224, BATCHES[224])):
        task = f"{size} px, batches of {batch}, one core"
        arguments = {"size": size, "batch": batch}
        options = dict(arguments=arguments, unit="images/s")
        out += _paired.rows("benchmarks._augmenters", task, CONTESTANTS, settings, cores=1, **options)
        if cores() > 1 and not settings.quick:
            ours = [c for c in CONTESTANTS if c.ours]
            task = f"{size} px, batches of {batch}, {cores()} cores"
            out += _paired.rows("benchmarks._augmenters", task, ours, settings, cores=cores(), **options)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 224], help="sides in pixels")
    parser.add_argument("--batch", type=int, help="images per batch (default: 512 at 32 px, 32 at 224 px)")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long each program is repeated")
    options = parser.parse_args()
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}")
    for size in options.sizes:
        batch = options.batch or BATCHES.get(size, 64)
        print(f"\n{size} px, batch {batch}: best and median ms per batch; best images/s; seconds to compile")
        for name, function, arguments in programs(size, batch):
            best, median, compiling = measure(function, *arguments, seconds=options.seconds)
            print(
                f"  {name:32s}{best * 1e3:9.2f}{median * 1e3:9.2f}{batch / best:13,.0f}{compiling:8.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
