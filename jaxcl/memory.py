"""What is carried to the next step besides the optimiser: the online probe, an encoder's moving average, a queue.

A part is a frozen dataclass of its options. `init` makes what it carries; `before` may change that before the views
are encoded, `after` once the optimiser has stepped. B batch, D features, E embedding, K length of a queue.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcl import losses
from jaxcl.errors import UserError
from jaxcl.losses.common import unit
from jaxcl.models.heads import EMBED, Dense
from jaxcl.terms import Embedding

Array = jax.Array
Tree = Any
SCHEDULES = ("online", "alternating", "sequential")


class Start(NamedTuple):
    """What a part may know when it begins."""

    features: int  # D, of the representation
    num_classes: int
    embedding_features: Callable[[str], int]  # embedding's name -> E
    encoder: Callable[[str], tuple[Tree, Tree]]  # encoder's name -> its (params, batch statistics)
    tx: optax.GradientTransformation | None


class Done(NamedTuple):
    """What a part may learn from an update."""

    represented: Callable[[str], Embedding]  # view -> the encoders of the representation, joined
    embeddings: dict[str, Embedding]
    label: Array
    encoder: Callable[[str], Tree]  # encoder's name -> its params after the optimiser's step
    progress: Array  # float32, share of the run that was done before the update
    tx: optax.GradientTransformation | None


@dataclasses.dataclass(frozen=True)
class Part:
    """What all parts of memory have."""

    trained: ClassVar[bool] = False  # by an optimiser of its own
    needs_labels: ClassVar[bool] = False
    schedule: ClassVar[str] = "online"  # what it does rides on each update

    @property
    def reads(self) -> tuple[str, ...]:
        """Embeddings it cannot do without."""
        return ()

    def check(self, where: str, recipe: Any) -> None:
        """UserError for what the recipe lacks."""

    def before(self, memory: Tree, encoder: Callable[[str], Tree], progress: Array) -> Tree:
        """What it carries while the views are encoded."""
        return memory


@dataclasses.dataclass(frozen=True)
class LinearProbe(Part):
    """A linear classifier on pooled features behind stop-gradient, with an optimiser of its own.

    online: one step of it rides on each update, on the features that update computed anyway.
    alternating: one epoch of the encoder, then one of the probe on the frozen encoder (the ExCon code's schedule).
    sequential: all epochs of the encoder, then as many of the probe (SupCon's).
    """

    trained: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True

    views: tuple[str, ...] = ("view2",)  # online: the views whose features it learns from
    schedule: str = "online"
    view: str = "classifier"  # alternating, sequential: its own view of the images

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise UserError(f"probe: schedule is {self.schedule!r}; expected one of {', '.join(SCHEDULES)}")

    def init(self, key: Array, start: Start) -> Tree:
        params = Dense(start.num_classes).init(key, jnp.zeros((1, start.features)))["params"]
        return {"params": params, "opt_state": start.tx.init(params)}

    def after(self, memory: Tree, done: Done) -> tuple[Tree, dict[str, Array]]:
        return self.learn(memory, [done.represented(v) for v in self.views], done.label, done.tx)

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


@dataclasses.dataclass(frozen=True)
class EMA(Part):
    """The moving average of an encoder and its head, by whose name passes encode: the target of MoCo and BYOL.

    Only parameters are averaged. It normalises by its own batches, and has running statistics of its own.
    """

    of: str = ""  # the encoder it follows; "" is the main one
    decay: float = 0.999  # share of the old values that an update keeps
    decay_schedule: str = "constant"  # or "cosine": from decay to 1 at the end of the run (BYOL)
    average_embeds: bool = True  # also what a head makes of drawn parameters; False: there it is the encoder's own
    order: str = "before"  # averaged before the views are encoded (MoCo), or "after" the optimiser's step (BYOL)

    def __post_init__(self):
        if not 0 <= self.decay <= 1:
            raise UserError(f"memory ema: decay is {self.decay}; expected 0 to 1")
        for key, known in (("decay_schedule", ("constant", "cosine")), ("order", ("before", "after"))):
            if getattr(self, key) not in known:
                raise UserError(f"memory ema: {key} is {getattr(self, key)!r}; expected {' or '.join(known)}")

    def check(self, where: str, recipe: Any) -> None:
        if self.of and self.of not in recipe.encoders:
            raise UserError(f"{where}.of is {self.of!r}, which is no trained encoder; '' is the main one")

    def init(self, key: Array, start: Start) -> Tree:
        params, stats = start.encoder(self.of)
        return {"params": params, "batch_stats": stats}

    def _averaged(self, memory: Tree, params: Tree, progress: Array) -> Tree:
        keep = jnp.float32(self.decay)
        if self.decay_schedule == "cosine":
            keep = 1 - (1 - keep) * (1 + jnp.cos(jnp.pi * progress)) / 2

        def average(path: tuple, k: Array, q: Array) -> Array:
            own = not self.average_embeds and any(str(p.key).startswith(EMBED) for p in path)
            return q if own else keep * k + (1 - keep) * q

        return {**memory, "params": jax.tree_util.tree_map_with_path(average, memory["params"], params)}

    def before(self, memory: Tree, encoder: Callable[[str], Tree], progress: Array) -> Tree:
        return self._averaged(memory, encoder(self.of), progress) if self.order == "before" else memory

    def after(self, memory: Tree, done: Done) -> tuple[Tree, dict[str, Array]]:
        if self.order == "before":
            return memory, {}
        return self._averaged(memory, done.encoder(self.of), done.progress), {}


@dataclasses.dataclass(frozen=True)
class Queue(Part):
    """The last K embeddings of a view, as unit columns [E,K], first in, first out: the negatives of MoCo.

    The batch is enqueued after the update, in its order, whatever the number of devices. K need not be a multiple of
    the batch size (the released code demands it): the slots go round.
    """

    of: str = "target/view2"  # the embedding that is enqueued
    length: int = 16384  # K

    def __post_init__(self):
        if self.length < 1:
            raise UserError(f"memory queue: length is {self.length}; expected at least 1")

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.of,)

    def check(self, where: str, recipe: Any) -> None:
        if self.length < recipe.batch_size:
            raise UserError(f"{where}.length is {self.length}; expected at least batch_size, {recipe.batch_size}")

    def init(self, key: Array, start: Start) -> Tree:
        directions_KxE = jax.random.normal(key, (self.length, start.embedding_features(self.of)))
        return {"columns": unit(directions_KxE).T, "pointer": jnp.zeros((), jnp.int32)}

    def after(self, memory: Tree, done: Done) -> tuple[Tree, dict[str, Array]]:
        return enqueue(memory, unit(jax.lax.stop_gradient(done.embeddings[self.of].z))), {}


def enqueue(memory: Tree, keys_BxE: Array) -> Tree:
    """Unit keys [B,E] into the slots pointer .. pointer + B - 1 of {"columns" [E,K], "pointer"}, modulo K; B <= K."""
    columns_ExK, pointer = memory["columns"], memory["pointer"]
    size = columns_ExK.shape[1]
    # Scattered: dynamic_update_slice would not wrap but stop at the end.
    slots = (pointer + jnp.arange(len(keys_BxE))) % size
    columns_ExK = columns_ExK.at[:, slots].set(keys_BxE.T.astype(columns_ExK.dtype))
    return {"columns": columns_ExK, "pointer": (pointer + len(keys_BxE)) % size}
