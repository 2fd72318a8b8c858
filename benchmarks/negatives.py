"""Cost of non-semantic negatives as shares of an update of SimCLR with ResNet-18.

The bounds, without the forward pass on the negatives, are 2 % for patches and 25 % for textures.

    python -m benchmarks.negatives [--sizes 32 224] [--batch 0] [--rounds 9]

Each round times one update of SimCLR (two views, forward, backward, optimiser; data on the device) and then one program
for each of the pieces below. So a machine that slows down slows all of them. Shares are taken round by round, and their
median is printed. A piece is for one view: SimCLR with negatives for both views pays twice, MoCo once.

- patches: `patch_negatives` with the published range scaled to the side.
- texture: `quilt_texture` with its defaults.
- texture's augmentation: the pipeline of the query on the texture.
- forward: the encoder and its head on the negatives; the bounds do not include it.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _measure
from benchmarks.steps import Step, load_config
from jaxcl.augment import patch_negatives, quilt_texture, to_float
from jaxcl.augment.patches import scaled_range
from jaxcl.runtime import huge_pages

BATCHES = {32: 128, 64: 64, 96: 32, 224: 8}
BOUNDS = {"patches": 0.02, "texture": 0.25}  # shares of an update


@dataclasses.dataclass(frozen=True)
class Noise:
    """A data source of noise: times do not depend on the content of images."""

    side: int
    count: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.25, 0.25, 0.25)
    num_classes: int = 10
    labelled: bool = True

    def __len__(self) -> int:
        return self.count

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.side, self.side, 3

    def batch(self, index: np.ndarray) -> dict[str, np.ndarray]:
        image = np.random.default_rng(0).integers(0, 256, (len(index), *self.image_shape))
        label = index % self.num_classes
        return {
            "image": image.astype(np.uint8),
            "label": label.astype(np.int32),
            "index": index.astype(np.int32),
        }


def simclr(side: int, batch: int):
    """SimCLR as published (configs/simclr.py), with ResNet-18, at this size."""
    c = load_config("simclr", "cifar10,paper,unlabelled")
    c.batch_size, c.size, c.duration = batch, side, "2 epochs"
    c.model.stem = "cifar" if side < 96 else "imagenet"
    return c


def pieces(step: Step) -> dict[str, Callable[[], object]]:
    """Name -> a call of the compiled piece on the batch of the step."""
    recipe, batch = step.recipe, step.batch
    side, name = recipe.image_shape[0], "view1"
    low, high = scaled_range(side)
    keys = jax.random.split(jax.random.key(0), recipe.batch_size)
    pixels = jax.jit(to_float)(batch["image"])
    view = jax.jit(recipe.views[name])(keys, pixels)[0]
    # Copies, because the state is donated to the next update.
    params, stats = jax.tree.map(jnp.copy, (step.state.params, step.state.batch_stats))

    def forward(image):
        h, after = recipe.model.encode(params, stats, image, train=True)
        return recipe.model.embed(params, after, h, train=True)[0]

    programs = {
        "patches": (lambda k, x: patch_negatives(k, x, min_patch=low, max_patch=high), (keys, view)),
        "texture": (quilt_texture, (keys, pixels)),
        "texture's augmentation": (lambda k, x: recipe.views[name](k, x)[0], (keys, pixels)),
        "forward": (forward, (view,)),
    }

    def call(function, arguments):
        compiled = jax.jit(function).lower(*arguments).compile()
        return lambda: jax.block_until_ready(compiled(*arguments))

    return {n: call(*program) for n, program in programs.items()}


def measure(config, side: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of the update and of every piece, round by round."""
    step = Step(config, Noise(side, 4 * config.batch_size))
    calls = pieces(step)
    for _ in range(2):
        step.seconds()
        for call in calls.values():
            call()
    times = {"step": [], **{n: [] for n in calls}}
    for _ in range(rounds):
        times["step"].append(step.seconds())
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begun)
    return times


def main(arguments: list[str] | None = None) -> None:
    huge_pages.ask("benchmarks")  # the trainer does so too
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 224], help="sides in pixels")
    parser.add_argument("--batch", type=int, default=0, help="images per batch; 0: 128 at 32 pixels, 8 at 224")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(arguments)

    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.platform} {device.device_kind}, {_measure.cores()} cores")
    for side in options.sizes:
        batch = options.batch or BATCHES.get(side, 32)
        times = measure(simclr(side, batch), side, options.rounds)
        print(f"\n{side} px, batch {batch}: SimCLR step {_measure.duration(statistics.median(times['step']))}")
        for name, seconds in times.items():
            if name == "step":
                continue
            shares = [100 * a / b for a, b in zip(seconds, times["step"], strict=True)]
            share, (low, high) = statistics.median(shares), np.percentile(shares, [25, 75])
            bound = f"  at most {100 * BOUNDS[name]:.0f} %" if name in BOUNDS else ""
            took = _measure.duration(statistics.median(seconds))
            print(f"  {name:24}{took:>10}{share:8.2f} %  ({low:.2f} to {high:.2f}){bound}", flush=True)


if __name__ == "__main__":
    main()
