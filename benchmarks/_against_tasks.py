"""The tasks of benchmarks/against.py, in a process that imports the jaxcl of its folder. It uses public names only."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator

os.sched_setaffinity(0, {int(sys.argv[2])})  # before JAX makes its threads

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from jaxcl import adversarial, losses, models  # noqa: E402

N, D, CLASSES, LARGE = 1024, 128, 128, 8192
NETWORK = {"depth": 50, "stem": "patch4", "stage_sizes": (1, 1), "stage_widths": (16, 32), "strides": (1, 2)}


def rows(count: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, D)).astype(np.float32))


def labels(count: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, CLASSES, count)


def tasks() -> Iterator[tuple[str, Callable, tuple]]:
    """(name, function that is jitted with its gradient, arrays)."""
    z1, z2 = rows(N // 2, 1), rows(N // 2, 2)
    ids, views = jnp.asarray(labels(N // 2)), jnp.stack([z1, z2])
    pairs = jnp.stack([z1, z2], axis=1)
    yield "supcon", lambda z, y: losses.supcon(z, y), (pairs, ids)
    yield "nt_xent", lambda z, w: losses.nt_xent(z, w), (z1, z2)
    yield "one_way_infonce", lambda z, w: losses.one_way_infonce(z, w), (z1, z2)
    yield "instance_spread", lambda z: losses.instance_spread(z), (jnp.concatenate([z1, z2]),)
    yield "class_conditional_infonce", lambda v, y: losses.class_conditional_infonce(v, y), (views, ids)
    yield "spread", lambda v, y: losses.spread(v, y)[0], (views, ids)
    yield "barlow_twins", lambda z, w: losses.barlow_twins(z, w), (z1, z2)
    yield "byol", lambda p, q: losses.byol(p, q, z1, z2), (z2, z1)
    yield "moco", lambda q, k: losses.moco(q, k, rows(4096, 3).T), (z1, z2)
    yield "cross_entropy", lambda x, y: losses.cross_entropy(x, y), (rows(N), jnp.asarray(labels(N)))
    yield (
        "cross_entropy, smoothed",
        lambda x, y: losses.cross_entropy(x, y, label_smoothing=0.1),
        (
            rows(N),
            jnp.asarray(labels(N)),
        ),
    )
    large = jnp.stack([rows(LARGE // 2, 1), rows(LARGE // 2, 2)], axis=1)
    yield (
        f"supcon, {LARGE:,} rows, tiled",
        lambda z, y: losses.supcon(z, y, implementation="tiled"),
        (large, jnp.asarray(labels(LARGE // 2))),
    )
    yield (
        f"nt_xent, {LARGE:,} rows, tiled",
        lambda z: losses.nt_xent(z[:, 0], z[:, 1], implementation="tiled"),
        (large,),
    )


def attacks() -> Iterator[tuple[str, Callable[[], object]]]:
    model = models.make_model(models.ResNetOptions(**NETWORK, head_features=0))
    params, stats = model.init(jax.random.key(0), (32, 32, 3))
    model = model.for_loops()
    rng = np.random.default_rng(2)
    images = jnp.asarray(rng.random((16, 32, 32, 3), np.float32))
    kernel = jnp.asarray(rng.normal(0, 0.1, (model.features, 10)).astype(np.float32))
    targets = jnp.asarray(rng.integers(0, 10, 16))

    def loss(x):
        return losses.cross_entropy(model.encode(params, stats, x, train=False)[0] @ kernel, targets)

    for name, attack in {
        "FGSM": lambda x: adversarial.fgsm(loss, x, epsilon=8 / 255),
        "PGD, 3 steps": lambda x: adversarial.pgd(loss, x, epsilon=8 / 255, num_steps=3),
        "PGD, 3 steps, l2, random start": lambda x: adversarial.pgd(
            loss, x, epsilon=0.5, num_steps=3, norm="l2", key=jax.random.key(1)
        ),
    }.items():
        jitted = jax.jit(attack)
        yield f"{name}, small ResNet", lambda jitted=jitted: jitted(images)


def eager() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls without jit, which look at their labels and options."""
    x, y = rows(N), labels(N)
    z1, z2 = rows(N // 2, 1), rows(N // 2, 2)
    on_device, pairs, ids = jnp.asarray(y), jnp.stack([z1, z2], axis=1), jnp.asarray(labels(N // 2))
    yield "cross_entropy, not jitted", lambda: losses.cross_entropy(x, on_device)
    yield "cross_entropy, not jitted, labels of NumPy", lambda: losses.cross_entropy(x, y)
    yield "supcon, not jitted", lambda: losses.supcon(pairs, ids)
    yield "nt_xent, not jitted", lambda: losses.nt_xent(z1, z2)


def calls() -> dict[str, Callable[[], object]]:
    found = {}
    for name, function, arrays in tasks():
        jitted = jax.jit(jax.value_and_grad(function))
        found[name] = lambda jitted=jitted, arrays=arrays: jitted(*arrays)
    return found | dict(attacks()) | dict(eager())


def main() -> None:
    known, counts = calls(), {}
    for line in sys.stdin:
        task, seconds = json.loads(line)
        if task == "tasks":
            print(json.dumps(list(known)), flush=True)
            continue
        call = known[task]
        if task not in counts:
            jax.block_until_ready(call())
            begun = time.process_time()
            for _ in range(3):
                jax.block_until_ready(call())
            counts[task] = max(1, round(3 * seconds / max(time.process_time() - begun, 1e-6)))
        begun = time.process_time()
        for _ in range(counts[task]):
            jax.block_until_ready(call())
        print(json.dumps((time.process_time() - begun) / counts[task]), flush=True)


if __name__ == "__main__":
    main()
