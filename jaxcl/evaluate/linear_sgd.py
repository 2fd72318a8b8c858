"""Linear probe by SGD on augmented images, with the usual schedule of each data set.

It is for numbers beside published ones. `linear`, which fits the same model to its optimum on features without
augmentation, is cheaper and gives nearly the same numbers. D features, K classes, B batch.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcl import augment, losses
from jaxcl.augment import to_float
from jaxcl.data import Loader
from jaxcl.evaluate.base import Evaluator, Metric, Metrics, Panels, accuracy
from jaxcl.evaluate.context import EvalContext
from jaxcl.evaluate.linear_probe import LinearFit, probe_logits
from jaxcl.method import sharding
from jaxcl.method.state import TrainState
from jaxcl.method.views import view_keys

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Protocol:
    """The training of a probe: without weight decay, on random crops (0.08 to 1 of the area) and flips.

    Attributes:
      lr: for batches of 256; it scales with the batch.
      decay: lr is divided by ten after these shares of the epochs.
      kind: "sgd", with momentum 0.9, or "adam".
      degrees: images are first rotated by an angle drawn from [-degrees, degrees].
      batch_size: images a step.
    """

    epochs: int = 200
    lr: float = 30.0
    decay: tuple[float, ...] = (0.6, 0.8)
    kind: str = "sgd"
    degrees: float = 0.0
    batch_size: int = 256


# By a word in the name of the data source; any other source has the first. From Zhang and Ma 2022, arXiv 2206.00227.
PROTOCOLS = {
    "imagenet100": Protocol(),
    "imagenet2012": Protocol(epochs=90),
    "caltech_birds": Protocol(),
    "cub": Protocol(),
    "flowers": Protocol(degrees=30.0),
    "naturalist": Protocol(),
    "cars": Protocol(kind="adam", lr=0.03, decay=()),
}


# By eval.sgd_protocol. moco: He et al. 2020, arXiv 1911.05722; nonsemantic: the released code of Ge et al. 2021, arXiv
# 2110.14189, lr 10 for batches of 128.
NAMED = {
    "moco": Protocol(epochs=100),
    "nonsemantic": Protocol(epochs=60, lr=20.0, decay=(1 / 2, 2 / 3, 5 / 6), batch_size=128),
}


def protocol_of(name: str, protocol: str = "customary") -> Protocol:
    """The protocol of that name; "customary": the one for a data source, by the source's name."""
    if protocol in NAMED:
        return NAMED[protocol]
    return next((p for word, p in PROTOCOLS.items() if word in name.lower()), PROTOCOLS["imagenet100"])


def schedule(protocol: Protocol, *, batch_size: int, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate by step: piecewise constant, with steps at whole epochs."""
    at = {round(share * protocol.epochs) * steps_per_epoch: 0.1 for share in protocol.decay}
    return optax.piecewise_constant_schedule(protocol.lr * batch_size / 256, at)


class LinearSGD(Evaluator):
    """A linear layer on frozen features of augmented training images, by the protocol `eval.sgd_protocol`.

    `eval.sgd_epochs` overrides the epochs.

    Weights start normal, with standard deviation 0.01. Test images are resized whole, without a crop.

    Metrics: "accuracy" on the test split after the last epoch; "best_epoch_accuracy", where the epoch is chosen on the
    images it is measured on, as in many papers, which is optimistic.
    """

    needs_labels = ("train", "test")
    intervals = ("accuracy",)
    metrics = {
        "accuracy": Metric("Linear probe, SGD", meaning="a linear layer trained by SGD on features of augmented images")
    }

    def __call__(self, context: EvalContext) -> tuple[Metrics, Panels]:
        train, recipe, mesh = context.source("train"), context.recipe, context.mesh
        protocol = protocol_of(train.name, context.options.sgd_protocol)
        protocol = dataclasses.replace(protocol, epochs=context.options.sgd_epochs or protocol.epochs)
        B = max(1, min(protocol.batch_size, len(train)) // mesh.size) * mesh.size
        steps = len(train) // B
        rate = schedule(protocol, batch_size=B, steps_per_epoch=steps)
        tx = optax.adam(rate) if protocol.kind == "adam" else optax.sgd(rate, momentum=0.9)
        view = _training_view(protocol, recipe.eval_size, recipe.mean, recipe.std)
        key = jax.random.key(recipe.seed, impl="threefry2x32")

        def step(state: TrainState, carry: Any, batch: dict[str, Array]) -> Any:
            probe, opt_state, count = carry
            keys = view_keys(key, count, batch["index"], "linear_sgd")
            h, _ = context.encode(state, view(keys, to_float(batch["image"]))[0])
            grads = jax.grad(lambda p: losses.cross_entropy(probe_logits(p, h), batch["label"]))(probe)
            updates, opt_state = tx.update(grads, opt_state)
            return optax.apply_updates(probe, updates), opt_state, count + 1

        replicated, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
        jitted = context.setup.compiled(
            f"linear_sgd {protocol} {B}",
            lambda: jax.jit(step, in_shardings=(replicated, replicated, rows), out_shardings=replicated),
        )
        test_h, labels = context.features("test", "h"), context.test.labels
        weights = 0.01 * jax.random.normal(jax.random.fold_in(key, 1), (test_h.shape[1], context.num_classes))
        probe = LinearFit(weights, jnp.zeros(context.num_classes))
        carry = sharding.device_put((probe, tx.init(probe), jnp.zeros((), jnp.int32)), replicated)
        accuracies = []
        with Loader(train, batch_size=B, seed=recipe.seed, sharding=rows) as loader:
            for _ in range(protocol.epochs):
                for _ in range(steps):
                    carry = jitted(context.state, carry, next(loader))
                logits = np.asarray(probe_logits(jax.device_get(carry[0]), test_h))
                accuracies.append(accuracy(logits.argmax(-1), labels))
        best = int(np.argmax(accuracies))
        metrics = {"accuracy": accuracies[-1], "epochs": protocol.epochs}
        return metrics | {"best_epoch_accuracy": accuracies[best], "best_epoch": best + 1}, {}


def _training_view(protocol: Protocol, size: int, mean: tuple, std: tuple) -> augment.Pipeline:
    rotate = (augment.RandomTilt(degrees=protocol.degrees),) if protocol.degrees else ()
    crop = augment.RandomResizedCrop(size=size, area=(0.08, 1.0))
    return augment.Pipeline((*rotate, crop, augment.RandomFlip(), augment.Normalize(mean=mean, std=std)))
