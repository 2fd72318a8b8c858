"""Whole updates compared: ExCon and ExConB with SupCon, CLAE with the methods it extends, GradCache with whole batches.

    python -m benchmarks.steps [--preset=garments] [--rounds=15] [--batch_size=128]

Each round times one update of every method in turn (views, stages, forward, backward, optimiser; data on the device).
So a machine that slows down slows all of them. Ratios are taken round by round, and their median and quartiles are
printed. jaxcl/method/stages/saliency.py and adversary.py give the ratios expected from counts of encoder passes.
"""

import argparse
import importlib.util
import pathlib
import statistics
import time

import jax
import numpy as np

from jaxcl.data import make_source
from jaxcl.method import sharding
from jaxcl.method.build import build_recipe, data_facts
from jaxcl.method.init_state import init_state
from jaxcl.method.update import compile_update
from jaxcl.runtime import huge_pages

ROOT = pathlib.Path(__file__).resolve().parents[1]


def load_config(name: str, preset: str):
    """The config of configs/<name>.py."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(preset)


class Step:
    """The compiled update of one method, on a batch that stays on the device."""

    def __init__(self, config, source):
        self.recipe = build_recipe(config, **data_facts(source))
        mesh = sharding.make_mesh(1)
        replicated, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
        self.state = jax.jit(lambda s: init_state(self.recipe, s), out_shardings=replicated)(0)
        self.batch = sharding.device_put(source.batch(np.arange(config.batch_size)), rows)
        phase = self.recipe.phase(self.recipe.total_steps - self.recipe.steps_per_epoch - 1)
        self.update = compile_update(self.recipe, phase, replicated, rows)

    def seconds(self) -> float:
        begun = time.perf_counter()
        self.state, metrics = self.update(self.state, self.batch)
        jax.block_until_ready((self.state.params, metrics))
        return time.perf_counter() - begun


def main() -> None:
    huge_pages.ask("benchmarks")  # the trainer does so too
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="garments")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--only",
        default="",
        help="some of supcon,simclr,plain,uel,group_norm,batch_norm (the last two: GradCache), with their extensions",
    )
    parser.add_argument("--batch_size", type=int, default=0, help="0: as in the config")
    arguments = parser.parse_args()

    preset = arguments.preset
    methods = {
        "supcon": load_config("supcon", preset),
        "excon": load_config("excon", f"{preset},excon"),
        "exconb": load_config("excon", f"{preset},exconb"),
        "exconb, room for B/2": load_config("excon", f"{preset},exconb"),
    }
    methods["exconb, room for B/2"].stages[0].background_capacity = 0.5
    base_of = dict.fromkeys(methods, "supcon")
    for method in ("simclr", "plain", "uel"):
        more = {
            method: load_config(method, preset),
            f"clae on {method}": load_config("clae", f"{preset},{method}"),
            f"clean pair on {method}": load_config("clae", f"{preset},{method},clean_pair"),
        }
        methods |= more
        base_of |= dict.fromkeys(more, method)
    for norm, batch_norm in (("group", "refuse"), ("batch", "first_pass")):
        base_name = f"{norm}_norm"
        for micro_batch in (0, 32, 16):
            name = f"{base_name}, {micro_batch}" if micro_batch else base_name
            methods[name], base_of[name] = load_config("supcon", preset), base_name
            methods[name].model.norm = norm
            if micro_batch:
                methods[name].grad_cache.micro_batch = micro_batch
                methods[name].grad_cache.batch_norm = batch_norm
    if arguments.only:
        chosen = [n for n in methods if base_of[n] in arguments.only.split(",")]
        methods = {n: methods[n] for n in chosen}
    for config in methods.values():
        config.batch_size = arguments.batch_size or config.batch_size
    first = next(iter(methods.values()))
    source = make_source(first.data.source)
    steps = {name: Step(config, source) for name, config in methods.items()}
    for step in steps.values():
        step.seconds(), step.seconds()  # compilation, and a first warm run

    times = {name: [] for name in steps}
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            times[name].append(step.seconds())

    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.platform} {device.device_kind}, batch {first.batch_size}")
    print(f"{'':24}{'s/step':>8}{'ratio':>8}   (quartiles) to")
    for name, seconds in times.items():
        ratios = sorted(a / b for a, b in zip(seconds, times[base_of[name]], strict=True))
        low, high = np.percentile(ratios, [25, 75])
        median, ratio = statistics.median(seconds), statistics.median(ratios)
        print(f"{name:24}{median:8.3f}{ratio:8.2f}   ({low:.2f} to {high:.2f}) {base_of[name]}")


if __name__ == "__main__":
    main()
