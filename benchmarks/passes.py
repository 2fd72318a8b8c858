"""Cost of a whole update relative to the encoder passes that it needs.

    python -m benchmarks.passes [--methods=simclr,supcon,excon,clae] [--rounds=9] [--steps=4] [--batch_size=0]

The update is that of the trainer: a batch of the loader, augmentation, stages, passes, losses, optimiser. The passes
are counted from the recipe. Each is timed as a separate program, on ready images of the same shapes and network:

* train: a forward and a full backward pass, for every pass of the recipe, on the same number of rows;
* forward: the pass of an EMA encoder, and the pass that tests a mask;
* explain: a forward pass and a backward pass to the tap (GradCAM);
* attack: a forward pass and a backward pass to the images, once per step of an attack.

Each round times some updates of every method and the same number of every pass, in turn. So a machine that slows down
slows all of them. Ratios are taken round by round; medians and quartiles are printed. The table also has

* views per second of each method over images per second of a supervised update (one view, cross-entropy), in the same
  rounds;
* the losses alone, with their gradients, at batches of 512, as a share of a whole update of that size, in separate
  rounds.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._measure import machine
from benchmarks._report import markdown
from benchmarks.steps import Step, load_config
from jaxcl import config as base
from jaxcl.data import Loader, make_source
from jaxcl.method.forward import of_encoder
from jaxcl.method.recipe import Recipe
from jaxcl.method.run_terms import make_terms
from jaxcl.method.sharding import batch_sharding, make_mesh
from jaxcl.method.stages.adversary import Adversary
from jaxcl.method.stages.saliency import SaliencyMask
from jaxcl.method.terms import Embedding
from jaxcl.runtime import huge_pages

METHODS = ("simclr", "supcon", "excon", "clae")
LARGE = 512  # the batch size at which the share of the losses is measured


@dataclasses.dataclass(frozen=True)
class Passes:
    """Passes of one kind through one encoder."""

    kind: str  # train, forward, explain, attack
    images: int
    encoder: str = ""
    norm_set: str = ""
    tap: str = ""


def needed(recipe: Recipe) -> list[Passes]:
    """The passes of one update of a recipe. Errors: ValueError for a stage that is not counted here."""
    B, found = recipe.batch_size, []
    room = {}
    for stage in recipe.stages:
        if isinstance(stage, SaliencyMask) and stage.method == "grad_cam":
            found += [Passes("explain", B, tap=stage.tap), Passes("forward", B)]
            room |= {stage.rejected: stage.capacity(B)}
        elif isinstance(stage, Adversary):
            # One step from the images of the anchor: the attack reuses the forward pass of the anchor.
            shared = stage.num_steps == 1 and stage.attack_view == "same" and not stage.random_start
            found += [] if shared else [Passes("forward", B, norm_set=stage.norm_set)]
            found += [Passes("attack", B, norm_set=stage.norm_set)] * stage.num_steps
        else:
            raise ValueError(f"{type(stage).__name__} is not counted")
    for spec in recipe.passes:
        kind = "forward" if spec.encoder in recipe.targets else "train"
        found.append(Passes(kind, sum(room.get(v, B) for v in spec.views), spec.encoder, spec.norm_set))
    return found


def program(step: Step, of: Passes, times: int = 1) -> Callable[[], object]:
    """These passes alone, `times` in a row; like updates, they are waited for at the end only."""
    run, given = function_of(step, of)
    run = jax.jit(run)
    return lambda: jax.block_until_ready([run(*given) for _ in range(times)])


def function_of(step: Step, of: Passes) -> tuple[Callable[..., object], tuple]:
    """(the passes, their arguments)."""
    model = step.recipe.for_one_device().encoder(of.encoder)  # in the form that the update uses
    # Copies, because the update donates its state.
    params, stats = jax.tree.map(
        jnp.copy, tuple(of_encoder(t, of.encoder) for t in (step.state.params, step.state.batch_stats))
    )
    images = jax.random.normal(jax.random.key(0), (of.images, *step.recipe.image_shape))
    mode = dict(train=True, norm_set=of.norm_set)

    def loss(params, images):
        h, _ = model.encode(params, stats, images, **mode)
        return jnp.square(h).mean()

    def explain(params, images):
        a, tail, _ = model.split_at(params, stats, images, of.tap, train=True)
        return jax.grad(lambda a: jnp.square(tail(a)[0]).mean())(a)

    run = {
        "train": jax.grad(loss),
        "forward": loss,
        "explain": explain,
        "attack": jax.grad(loss, argnums=1),
    }[of.kind]
    return run, (params, images)


class Whole(Step):
    """The update of a method, fed by the loader as in the trainer."""

    def __init__(self, config, source):
        super().__init__(config, source)
        self.loader = Loader(source, batch_size=config.batch_size, seed=0, sharding=batch_sharding(make_mesh(1)))

    def run(self, steps: int) -> Callable[[], None]:
        def several():
            for _ in range(steps):
                self.state, metrics = self.update(self.state, next(self.loader))
            jax.block_until_ready((self.state.params, metrics))

        return several


def losses(step: Step, batch: int) -> Callable[[], object]:
    """All terms with their gradients, on embeddings of `batch` images per view."""
    recipe, key = step.recipe, jax.random.key(1)
    names = sorted({view for p in recipe.passes for view in p.embeddings})
    shapes = (recipe.model.features, recipe.model.embedding_features)
    e = {
        n: Embedding(*(jax.random.normal(jax.random.fold_in(key, 2 * i + j), (batch, f)) for j, f in enumerate(shapes)))
        for i, n in enumerate(names)
    }
    label = jnp.arange(batch, dtype=jnp.int32) % max(recipe.num_classes, 1)
    values = make_terms(recipe, None, recipe.terms)
    memory = jax.tree.map(jnp.copy, step.state.memory)

    def total(z):
        return sum(values({n: e[n]._replace(z=z[n]) for n in names}, label, memory).values())

    run = jax.jit(jax.grad(total))
    z = {n: x.z for n, x in e.items()}
    return lambda: jax.block_until_ready(run(z))


def supervised(config, source) -> Whole:
    """Cross-entropy on one view, with the same network, optimiser and batch size."""
    of = load_config("l_spread", "ce")
    of.model, of.optimizer, of.batch_size = config.model, config.optimizer, config.batch_size
    of.views.view1 = config.views.view1
    del of.views.view2, of.memory.probe
    of.passes = (base.encode("view1"),)
    of.terms.ce.views = ("view1",)
    return Whole(of, source)


def seconds(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def main() -> None:
    huge_pages.ask("benchmarks")  # the trainer does so too
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default=",".join(METHODS), help="FILE or FILE:PRESET in configs/, with commas")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4, help="updates of a method per round")
    parser.add_argument("--batch_size", type=int, default=0, help="0: as in the config")
    arguments = parser.parse_args()
    print(report(arguments.methods.split(","), arguments.rounds, arguments.steps, arguments.batch_size))


def report(names: list[str], rounds: int, steps: int, batch_size: int = 0) -> str:
    """All measurements as a table."""
    configs = {n: load_config(*(n.split(":") if ":" in n else (n, ""))) for n in names}
    for config in configs.values():
        config.batch_size = batch_size or config.batch_size
    source = make_source(next(iter(configs.values())).data.source)
    methods = {n: Whole(c, source) for n, c in configs.items()}
    plain = supervised(next(iter(configs.values())), source)
    wanted = {n: needed(m.recipe) for n, m in methods.items()}
    timed: dict[object, Callable[[], object]] = {n: m.run(steps) for n, m in methods.items()}
    timed["supervised"] = plain.run(steps)
    for n, m in methods.items():
        large = configs[n].copy_and_resolve_references()
        large.batch_size = LARGE
        timed["large", n] = Whole(large, source).run(1)
        timed["loss", n] = losses(m, LARGE)
        for p in wanted[n]:
            timed.setdefault(("passes", p), program(m, p, steps))
    for run in timed.values():  # compiles
        run(), run()
    times: dict[object, list[float]] = {key: [] for key in timed}
    # In separate rounds, because a large update changes the state of the memory for small programs.
    of_losses = [key for key in timed if isinstance(key, tuple) and key[0] in ("large", "loss")]
    for keys in ([key for key in timed if key not in of_losses], of_losses):
        for _ in range(rounds):
            for key in keys:
                times[key].append(seconds(timed[key]))

    lines = []
    for n, m in methods.items():
        step = np.array(times[n]) / steps
        bare = sum(np.array(times["passes", p]) for p in wanted[n]) / steps
        B = m.recipe.batch_size
        share = np.array(times["loss", n]) / times["large", n]
        views = sum(p.images for p in wanted[n] if p.kind == "train") / step
        images = B / (np.array(times["supervised"]) / steps)
        low, high = np.percentile(step / bare, [25, 75])
        lines.append(
            [
                n,
                f"{statistics.median(step):.3f}",
                f"{statistics.median(bare):.3f}",
                f"{np.median(step / bare):.2f} ({low:.2f} to {high:.2f})",
                f"{100 * np.median(share):.2f} %",
                f"{np.median(views / images):.2f}",
                ", ".join(f"{p.kind} {p.images}" for p in wanted[n]),
            ]
        )
    head = [
        "method", "s/update", "s of passes", "ratio (quartiles)", f"loss at batch {LARGE}", "views/s / supervised",
        "passes",
    ]  # fmt: skip
    about = ", ".join(v if k == "processor" else f"{k} {v}" for k, v in machine(("jax", "jaxlib", "flax")).items())
    return f"{about}. Batch {plain.recipe.batch_size}.\n\n{markdown(head, lines)}"


if __name__ == "__main__":
    main()
