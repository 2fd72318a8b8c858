"""Linear probe by SGD on augmented images, with the schedule that is customary for each data set.

The cheaper `linear`, which fits the same model to its optimum on features without augmentation, says nearly the same;
this one is for figures beside published ones. N images, S side, D features, K classes, B batch.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcl import augment, losses
from jaxcl.data import Loader
from jaxcl.evaluate.base import Metrics, accuracy, needs_labels
from jaxcl.evaluate.linear_probe import LinearProbe, probe_logits
from jaxcl.method import sharding
from jaxcl.method.state import TrainState
from jaxcl.method.update import represent, to_pixels
from jaxcl.method.views import view_keys

if TYPE_CHECKING:
    from jaxcl.evaluate.suite import EvalContext

Array = jax.Array
BATCH = 256


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a probe is trained: without weight decay, crops of 0.08 to 1 of the area, flips. lr is for batches of 256."""

    epochs: int = 200
    lr: float = 30.0
    decay: tuple[float, ...] = (0.6, 0.8)  # lr is divided by ten after these shares of the epochs
    kind: str = "sgd"  # with momentum 0.9; or "adam"
    degrees: float = 0.0  # images are first turned by up to so much, either way


# By what a data source's name contains (papers/hierarchical_augmentation.md 8.1); others are trained like the first.
PROTOCOLS = {
    "imagenet100": Protocol(),
    "imagenet2012": Protocol(epochs=90),
    "caltech_birds": Protocol(),
    "cub": Protocol(),
    "flowers": Protocol(degrees=30.0),
    "naturalist": Protocol(),
    "cars": Protocol(kind="adam", lr=0.03, decay=()),
}


def protocol_of(name: str) -> Protocol:
    """The protocol of a data source by its name."""
    return next((p for word, p in PROTOCOLS.items() if word in name.lower()), PROTOCOLS["imagenet100"])


def schedule(protocol: Protocol, *, batch_size: int, steps_per_epoch: int) -> optax.Schedule:
    """Learning rate by step: stairs at whole epochs."""
    at = {round(share * protocol.epochs) * steps_per_epoch: 0.1 for share in protocol.decay}
    return optax.piecewise_constant_schedule(protocol.lr * batch_size / 256, at)


def linear_sgd(f: "EvalContext") -> tuple[Metrics, dict]:
    """A linear layer on frozen features of augmented images: accuracy on the test split after the last epoch.

    Weights begin normal, of deviation 0.01. Test images are the standard view, resized whole. "best_epoch_accuracy" is
    chosen on the images it is measured on, as published figures often are; it is optimistic.
    """
    needs_labels(f, "train", "test")
    train, recipe = f.source("train"), f.recipe
    protocol = protocol_of(train.name)
    protocol = dataclasses.replace(protocol, epochs=f.options.sgd_epochs or protocol.epochs)
    devices = f.mesh.size
    B = max(1, min(BATCH, len(train)) // devices) * devices
    steps = len(train) // B
    rate = schedule(protocol, batch_size=B, steps_per_epoch=steps)
    tx = optax.adam(rate) if protocol.kind == "adam" else optax.sgd(rate, momentum=0.9)
    size = recipe.image_shape[0]
    turn = (augment.RandomTilt(degrees=protocol.degrees),) if protocol.degrees else ()
    crop = augment.RandomResizedCrop(size=size, area=(0.08, 1.0))
    normalize = augment.Normalize(mean=recipe.mean, std=recipe.std)
    view = augment.Pipeline((*turn, crop, augment.RandomFlip(), normalize))
    key = jax.random.key(recipe.seed, impl="threefry2x32")

    def step(state: TrainState, carry: Any, batch: dict[str, Array]) -> Any:
        probe, opt_state, count = carry
        keys = view_keys(key, count, batch["index"], "linear_sgd")
        h, _ = represent(recipe, state.params, state.batch_stats, view(keys, to_pixels(batch["image"]))[0])
        grads = jax.grad(lambda p: losses.cross_entropy(probe_logits(p, h), batch["label"]))(probe)
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(probe, updates), opt_state, count + 1

    replicated, rows = sharding.replicated(f.mesh), sharding.batch_sharding(f.mesh)
    jitted = f.evaluation.compiled(
        f"linear_sgd {protocol} {B}",
        lambda: jax.jit(step, in_shardings=(replicated, replicated, rows), out_shardings=replicated),
    )
    D = f.features("test", "h").shape[1]
    weights = 0.01 * jax.random.normal(jax.random.fold_in(key, 1), (D, recipe.num_classes))
    probe = LinearProbe(weights, jnp.zeros(recipe.num_classes))
    carry = sharding.device_put((probe, tx.init(probe), jnp.zeros((), jnp.int32)), replicated)
    accuracies = []
    with Loader(train, batch_size=B, seed=recipe.seed, sharding=rows) as loader:
        for _ in range(protocol.epochs):
            for _ in range(steps):
                carry = jitted(f.state, carry, next(loader))
            logits = np.asarray(probe_logits(jax.device_get(carry[0]), f.features("test", "h")))
            accuracies.append(accuracy(logits.argmax(-1), f.test.labels))
    best = int(np.argmax(accuracies))
    figures = {"accuracy": accuracies[-1], "epochs": protocol.epochs}
    return figures | {"best_epoch_accuracy": accuracies[best], "best_epoch": best + 1}, {}
