"""Images a second of the random view, whole and part by part, beside torchvision where it is installed.

    python -m benchmarks.augment                        # 32 px, batch 512 and 224 px, batch 32
    python -m benchmarks.augment --sizes 96 --batch 256 --seconds 5

Every line is the best and the median of repeated calls of one compiled program on the default device, inputs on the
device already. torchvision's v2 transforms run image by image, as a loader calls them, in this one process.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl import augment
from jaxcl.augment import color, ops

BATCHES = {32: 512, 64: 256, 96: 128, 224: 32}
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
STRENGTH = (0.4, 0.4, 0.4, 0.1)


def measure(function, *arguments, seconds: float) -> tuple[float, float, float]:
    """(best, median) seconds a call after compiling, and the seconds compiling took."""
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
    images = jax.jit(ops.to_unit)(raw)
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
    yield "normalize", lambda x: ops.normalize(x, MEAN, STD), (images,)


def torchvision_rate(size: int, batch: int, seconds: float) -> float | None:
    """Images a second of torchvision's v2 transforms on PIL images; None where torchvision is not installed."""
    try:
        import torch
        from PIL import Image
        from torchvision.transforms import v2
    except ImportError:
        return None
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.2, 1.0)),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(*STRENGTH)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    raw = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3)).astype(np.uint8)
    images = [Image.fromarray(image) for image in raw]
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        transform(images[count % batch])
        count += 1
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 224], help="sides in pixels")
    parser.add_argument("--batch", type=int, help="images a batch (default: 512 at 32 px down to 32 at 224 px)")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long each line is repeated")
    options = parser.parse_args()
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}")
    for size in options.sizes:
        batch = options.batch or BATCHES.get(size, 64)
        print(f"\n{size} px, batch {batch}: best ms, median ms a batch; best images/s; compile s")
        for name, function, arguments in programs(size, batch):
            best, median, compiling = measure(function, *arguments, seconds=options.seconds)
            print(
                f"  {name:32s}{best * 1e3:9.2f}{median * 1e3:9.2f}{batch / best:13,.0f}{compiling:8.1f}",
                flush=True,
            )
        rate = torchvision_rate(size, batch, options.seconds)
        print(f"  {'torchvision v2, one process':50s}" + (f"{rate:13,.0f}" if rate else "not installed"))


if __name__ == "__main__":
    main()
