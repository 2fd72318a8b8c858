"""What is carried to the next step besides the optimiser: here the online probe, the classifier of explainers.

B batch, D features.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcl import losses
from jaxcl.errors import UserError
from jaxcl.models.heads import Dense
from jaxcl.terms import Embedding

Array = jax.Array
Tree = Any
SCHEDULES = ("online", "alternating", "sequential")


@dataclasses.dataclass(frozen=True)
class LinearProbe:
    """A linear classifier on pooled features behind stop-gradient, with an optimiser of its own.

    online: one step of it rides on each update, on the features that update computed anyway.
    alternating: one epoch of the encoder, then one of the probe on the frozen encoder (the ExCon code's schedule).
    sequential: all epochs of the encoder, then as many of the probe (SupCon's).
    """

    views: tuple[str, ...] = ("view2",)  # online: the views whose features it learns from
    schedule: str = "online"
    view: str = "classifier"  # alternating, sequential: its own view of the images

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise UserError(f"probe: schedule is {self.schedule!r}; expected one of {', '.join(SCHEDULES)}")

    def init(self, key: Array, features: int, num_classes: int, tx: optax.GradientTransformation) -> Tree:
        params = Dense(num_classes).init(key, jnp.zeros((1, features)))["params"]
        return {"params": params, "opt_state": tx.init(params)}

    def logits(self, memory: Tree, h: Array) -> Array:
        """features [B,D] -> logits [B,classes]."""
        kernel = memory["params"]["dense"]["kernel"]
        return Dense(kernel.shape[-1]).apply({"params": memory["params"]}, h)

    def learn(
        self, memory: Tree, e: list[Embedding], label: Array, tx: optax.GradientTransformation
    ) -> tuple[Tree, dict[str, Array]]:
        """One optimiser step on the features of the given embeddings; labels of -1 do not count."""
        h = jax.lax.stop_gradient(jnp.concatenate([v.h for v in e]))
        labels = jnp.concatenate([label if v.where is None else jnp.where(v.where, label, -1) for v in e])

        def objective(params: Tree) -> tuple[Array, Array]:
            logits = self.logits({"params": params}, h)
            return losses.cross_entropy(logits, labels), logits

        (loss, logits), grads = jax.value_and_grad(objective, has_aux=True)(memory["params"])
        updates, opt_state = tx.update(grads, memory["opt_state"], memory["params"])
        known = labels >= 0
        accuracy = ((logits.argmax(-1) == labels) & known).sum() / jnp.maximum(known.sum(), 1)
        new = {"params": optax.apply_updates(memory["params"], updates), "opt_state": opt_state}
        return new, {"probe/loss": loss, "probe/accuracy": accuracy}
