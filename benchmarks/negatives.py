"""What negatives without meaning cost, as shares of a SimCLR step with ResNet-18: patches at most 2 %, texture at most
25 %, besides the forward pass on them.

    python -m benchmarks.negatives [--sizes 32 224] [--batch 0] [--rounds 9]

Each round times one update of SimCLR (two views, forward, backward, optimiser; data on the device) and then each part
by itself, one program each, so a machine that slows down slows all of them; the shares are taken round by round and
their median is printed. A part is for one view: SimCLR with negatives of both views pays twice, MoCo once.

- patches: `patch_negatives` with the published range scaled to the side.
- texture: `quilt_texture` with its defaults.
- texture's augmentation: the query's pipeline on the texture, as on every view.
- forward: the encoder and its head on the negatives, which the bounds leave out.
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
from jaxcl.augment import patch_negatives, quilt_texture
from jaxcl.augment.patches import scaled_range
from jaxcl.method.inputs import to_pixels
from jaxcl.runtime import huge_pages

BATCHES = {32: 128, 64: 64, 96: 32, 224: 8}
BOUNDS = {"patches": 0.02, "texture": 0.25}  # of a step


@dataclasses.dataclass(frozen=True)
class Noise:
    """A data source of noise: what is measured does not depend on what the pictures show."""

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
    """The published SimCLR of configs/simclr.py, ResNet-18, at this size."""
    c = load_config("simclr", "cifar10,paper,unlabelled")
    c.batch_size, c.size, c.duration = batch, side, "2 epochs"
    c.model.stem = "cifar" if side < 96 else "imagenet"
    return c


def parts(step: Step) -> dict[str, Callable[[], object]]:
    """Name -> a call of the compiled part on the step's own batch."""
    recipe, batch = step.recipe, step.batch
    side, name = recipe.image_shape[0], "view1"
    low, high = scaled_range(side)
    keys = jax.random.split(jax.random.key(0), recipe.batch_size)
    pixels = jax.jit(to_pixels)(batch["image"])
    view = jax.jit(recipe.views[name])(keys, pixels)[0]
    # Copies: the state's own are donated to the next step.
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
    """Seconds of the step and of every part, round by round."""
    step = Step(config, Noise(side, 4 * config.batch_size))
    calls = parts(step)
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
    huge_pages.ask("benchmarks")  # as the trainer does
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 224], help="sides in pixels")
    parser.add_argument("--batch", type=int, default=0, help="images a batch; 0: 128 at 32 pixels, 8 at 224")
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
