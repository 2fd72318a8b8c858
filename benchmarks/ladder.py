"""Cost of the stage ladder relative to the plain method, as measured and as predicted from multiply-adds.

    python -m benchmarks.ladder [--method=simsiam] [--preset=garments] [--rounds=15] [--batch_size=0]

Each round times one update of the plain method and one of the ladder (views, forward, backward, optimiser; data on the
device). Ratios are taken round by round. Multiply-adds of convolutions and matmuls are counted in the traced program of
one forward pass of all views, heads included. They do not include batch norms, depthwise convolutions that run as sums
(on a CPU) and augmentation, which have few multiply-adds but take time.
"""

import argparse
import math
import statistics

import jax
import numpy as np

from benchmarks.steps import Step, load_config
from jaxcl.data import make_source
from jaxcl.method import forward
from jaxcl.method.init_state import init_state
from jaxcl.method.recipe import Recipe
from jaxcl.method.views import View
from jaxcl.runtime import huge_pages


def macs(jaxpr) -> int:
    """Multiply-adds of all convolutions and matmuls of a jaxpr, inner programs included."""
    total = 0
    for equation in jaxpr.eqns:
        out = equation.outvars[0].aval.shape if equation.outvars else ()
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += math.prod(out) * math.prod(equation.invars[0].aval.shape[i] for i in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            kernel, spec = equation.invars[1].aval.shape, equation.params["dimension_numbers"].rhs_spec
            total += math.prod(out) * math.prod(kernel[i] for i in spec[1:])  # all axes but the output features
        else:
            inner = [v for p in equation.params.values() for v in (p if isinstance(p, (list, tuple)) else (p,))]
            repeats = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
            total += repeats * sum(
                macs(getattr(v, "jaxpr", v)) for v in inner if hasattr(getattr(v, "jaxpr", v), "eqns")
            )
    return total


def forward_macs(recipe: Recipe, *, heads: bool = True) -> int:
    """Multiply-adds of the forward passes of one update and of the heads on them, for the whole batch."""
    state = jax.eval_shape(lambda: init_state(recipe))
    image = jax.ShapeDtypeStruct((recipe.batch_size, *recipe.image_shape), np.float32)
    views = {n: View(image, {}) for n in recipe.views}
    names = recipe.head_views(tuple(recipe.terms)) if heads else {}

    def run(params, stats, memory, views):
        params = forward.with_targets(recipe, params, memory, "params")
        embeddings, stats = {}, forward.with_targets(recipe, stats, memory, "batch_stats")
        for spec in recipe.passes:
            encoded, stats = forward.run_pass(recipe, params, stats, views, spec)
            embeddings.update(encoded)
        return forward.run_heads(recipe, params, stats, embeddings, names)[0]

    return macs(jax.make_jaxpr(run)(state.params, state.batch_stats, state.memory, views).jaxpr)


def main() -> None:
    huge_pages.ask("benchmarks")  # the trainer does so too
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="simsiam")
    parser.add_argument("--preset", default="garments")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch_size", type=int, default=0, help="0: as in the config")
    arguments = parser.parse_args()
    words = f"{arguments.method},{arguments.preset}"
    configs = {mode: load_config("hierarchical", f"{words},{mode}") for mode in ("two_view", "addone")}
    for config in configs.values():
        config.batch_size = arguments.batch_size or config.batch_size
    source = make_source(configs["addone"].data.source)
    steps = {mode: Step(config, source) for mode, config in configs.items()}
    counted = {mode: forward_macs(step.recipe) for mode, step in steps.items()}
    for step in steps.values():
        step.seconds(), step.seconds()  # compilation, and a first warm run
    times: dict[str, list[float]] = {mode: [] for mode in steps}
    for _ in range(arguments.rounds):
        for mode, step in steps.items():
            times[mode].append(step.seconds())
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.platform} {device.device_kind}, batch {configs['addone'].batch_size}")
    for mode, seconds in times.items():
        print(f"{mode:12}{statistics.median(seconds):8.3f} s/step{counted[mode] / 1e9:10.2f} GMAC forward")
    ratios = [a / b for a, b in zip(times["addone"], times["two_view"], strict=True)]
    low, high = np.percentile(ratios, [25, 75])
    ratio, predicted = statistics.median(ratios), counted["addone"] / counted["two_view"]
    print(f"ratio {ratio:.2f} ({low:.2f} to {high:.2f}), predicted {predicted:.2f}: {ratio / predicted:.2f} times that")


if __name__ == "__main__":
    main()
