"""Memory: state carried from step to step besides the optimiser's. The online probe, an encoder's EMA, a queue.

`init` makes a part's state; `before` may change it before the views are encoded, `after` once the optimiser has
stepped. B batch, D features, E embedding, K length of a queue (or classes, of logits).
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcl import losses
from jaxcl.errors import UserError
from jaxcl.losses.common import unit
from jaxcl.method.terms import Embedding
from jaxcl.models.heads import EMBED, Dense
from jaxcl.runtime.options import SHARE, Options, Range
from jaxcl.runtime.registry import Contract

Array = jax.Array
Tree = Any


class InitContext(NamedTuple):
    """What a part may use when its state is made."""

    features: int  # D, of the representation
    num_classes: int
    embedding_features: Callable[[str], int]  # embedding's name -> E
    encoder: Callable[[str], tuple[Tree, Tree]]  # encoder's name -> its (params, batch statistics)
    tx: optax.GradientTransformation | None


class StepOutput(NamedTuple):
    """What one update computed, passed to `MemoryPart.after`."""

    represented: Callable[[str], Embedding]  # view -> the encoders of the representation, joined
    embeddings: dict[str, Embedding]
    label: Array
    encoder: Callable[[str], Tree]  # encoder's name -> its params after the optimiser's step
    progress: Array  # float32, share of the run that was done before the update
    tx: optax.GradientTransformation | None


@dataclasses.dataclass(frozen=True)
class MemoryPart(Options, Contract):
    """State carried from step to step besides the optimiser's: a frozen dataclass of its options.

    Attributes:
      trained: whether it has an optimiser of its own, `memory.NAME.optimizer` in the config.
      needs_labels: whether every training image must have a label.
      encodes: whether its state is an encoder ({"params", "batch_stats"}) that passes can name; it follows `of`.
      classifies: whether `logits` gives classes of the representation's features.
      schedule: "online" if it only acts within encoder updates; otherwise it learns in phases of its own (`learn`).
      reads: names of the embeddings `after` cannot do without.
      represented: views of which `after` reads the joined representation.
      own_view: the view it learns from in phases of its own.
    """

    trained: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False
    encodes: ClassVar[bool] = False
    classifies: ClassVar[bool] = False
    schedule: ClassVar[str] = "online"

    @property
    def reads(self) -> tuple[str, ...]:
        return ()

    @property
    def represented(self) -> tuple[str, ...]:
        return ()

    @property
    def own_view(self) -> str:
        return ""

    def check(self, where: str, recipe: Any) -> None:
        """Errors: UserError for what the recipe lacks."""

    def init(self, key: Array, context: InitContext) -> Tree:
        """The state at step 0."""
        raise NotImplementedError(f"{type(self).__name__} must define `init`")

    def before(self, memory: Tree, encoder: Callable[[str], Tree], progress: Array) -> Tree:
        """Its state while the views are encoded. encoder: name -> params before the update."""
        return memory

    def exposed(self, memory: Tree) -> Any:
        """What terms that name it in `memories` receive."""
        return memory

    def after(self, memory: Tree, out: StepOutput) -> tuple[Tree, dict[str, Array]]:
        """-> (its state after the update, metrics)."""
        return memory, {}

    def learn(
        self, memory: Tree, e: list[Embedding], label: Array, tx: optax.GradientTransformation | None
    ) -> tuple[Tree, dict[str, Array]]:
        """One step of a phase of its own, with the encoder frozen. -> (state, metrics)."""
        raise NotImplementedError(f"{type(self).__name__} must define `learn`: its schedule is {self.schedule!r}")

    def logits(self, memory: Tree, h: Array) -> Array:
        """features [B,D] -> logits [B,K]."""
        raise NotImplementedError(f"{type(self).__name__} classifies nothing")


@dataclasses.dataclass(frozen=True)
class LinearProbe(MemoryPart):
    """A linear classifier on pooled features, under stop-gradient, with its own optimiser.

    online: takes one step in each update, on the features that the update computes anyway.
    alternating: one epoch of the encoder, then one of the probe on the frozen encoder (as the ExCon code does).
    sequential: all epochs of the encoder, then as many of the probe (as SupCon does).
    """

    trained: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True
    classifies: ClassVar[bool] = True

    views: tuple[str, ...] = ("view2",)  # online: the views whose features it learns from
    schedule: Literal["online", "alternating", "sequential"] = "online"
    view: str = "classifier"  # alternating, sequential: its own view of the images
    duration: str = ""  # sequential: of its phase, any duration; "": as long as the encoder's
    batch_size: Annotated[int, Range(0)] = 0  # sequential: images a step of its own, a divisor of the run's; 0: those

    def check(self, where: str, recipe: Any) -> None:
        for key in ("duration", "batch_size"):
            if getattr(self, key) and self.schedule != "sequential":
                raise UserError(f"{where}.{key} is {getattr(self, key)!r}; expected schedule='sequential' with it")

    @property
    def represented(self) -> tuple[str, ...]:
        return self.views if self.schedule == "online" else ()

    @property
    def own_view(self) -> str:
        return "" if self.schedule == "online" else self.view

    def init(self, key: Array, context: InitContext) -> Tree:
        params = Dense(context.num_classes).init(key, jnp.zeros((1, context.features)))["params"]
        return {"params": params, "opt_state": context.tx.init(params)}

    def after(self, memory: Tree, out: StepOutput) -> tuple[Tree, dict[str, Array]]:
        return self.learn(memory, [out.represented(v) for v in self.views], out.label, out.tx)

    def logits(self, memory: Tree, h: Array) -> Array:
        kernel = memory["params"]["dense"]["kernel"]
        return Dense(kernel.shape[-1]).apply({"params": memory["params"]}, h)

    def learn(
        self, memory: Tree, e: list[Embedding], label: Array, tx: optax.GradientTransformation | None
    ) -> tuple[Tree, dict[str, Array]]:
        """One optimiser step on the features of the given embeddings, or one for each `batch_size` of them.

        Labels of -1 do not count.
        """
        h = jax.lax.stop_gradient(jnp.concatenate([v.h for v in e]))
        labels = jnp.concatenate([label if v.where is None else jnp.where(v.where, label, -1) for v in e])
        if self.schedule == "online" or self.batch_size in (0, len(label)):
            return self._step(memory, h, labels, tx)
        # Every n-th row: consecutive ones are on one device.
        parts = jax.tree.map(lambda x: x.reshape(self.batch_size, -1, *x.shape[1:]).swapaxes(0, 1), (h, labels))
        memory, metrics = jax.lax.scan(lambda m, part: self._step(m, *part, tx), memory, parts)
        return memory, jax.tree.map(lambda x: x.mean(0), metrics)

    def _step(
        self, memory: Tree, h: Array, labels: Array, tx: optax.GradientTransformation | None
    ) -> tuple[Tree, dict[str, Array]]:
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
class EMA(MemoryPart):
    """The moving average of an encoder and its head, the target of MoCo and BYOL; passes name it as their encoder.

    Only parameters are averaged. Its batch norms use the statistics of its own batches.
    """

    encodes: ClassVar[bool] = True

    of: str = ""  # the encoder it follows; "" is the main one
    decay: Annotated[float, SHARE] = 0.999  # share of the old values that an update keeps
    # cosine: from decay to decay_end at the end of the run (BYOL: to 1).
    decay_schedule: Literal["constant", "cosine"] = "constant"
    decay_end: Annotated[float, SHARE] = 1.0
    # Also average a conditioned head's layers on augmentation parameters; False: use the encoder's own there.
    average_embeds: bool = True
    # Update the average before the views are encoded (MoCo), or after the optimiser's step (BYOL).
    order: Literal["before", "after"] = "before"

    def check(self, where: str, recipe: Any) -> None:
        if self.of and self.of not in recipe.encoders:
            raise UserError(f"{where}.of is {self.of!r}, which is no trained encoder; '' is the main one")

    def init(self, key: Array, context: InitContext) -> Tree:
        params, stats = context.encoder(self.of)
        return {"params": params, "batch_stats": stats}

    def _averaged(self, memory: Tree, params: Tree, progress: Array) -> Tree:
        keep = jnp.float32(self.decay)
        if self.decay_schedule == "cosine":
            keep = self.decay_end - (self.decay_end - keep) * (1 + jnp.cos(jnp.pi * progress)) / 2

        def average(path: tuple, k: Array, q: Array) -> Array:
            own = not self.average_embeds and any(str(p.key).startswith(EMBED) for p in path)
            # Equal arrays, such as those of frozen layers, stay equal to the bit.
            return q if own else jnp.where(k == q, q, keep * k + (1 - keep) * q)

        return {**memory, "params": jax.tree_util.tree_map_with_path(average, memory["params"], params)}

    def before(self, memory: Tree, encoder: Callable[[str], Tree], progress: Array) -> Tree:
        return self._averaged(memory, encoder(self.of), progress) if self.order == "before" else memory

    def after(self, memory: Tree, out: StepOutput) -> tuple[Tree, dict[str, Array]]:
        if self.order == "before":
            return memory, {}
        return self._averaged(memory, out.encoder(self.of), out.progress), {}


@dataclasses.dataclass(frozen=True)
class Queue(MemoryPart):
    """The last K embeddings of a view as unit columns [E,K], first in, first out: the negatives of MoCo.

    The batch is enqueued after the update, in order, on any number of devices. K need not be a multiple of the batch
    size (unlike in the released code): slots wrap around. Rows that do not exist are left out.
    """

    of: str = "target/view2"  # the embedding that is enqueued
    length: Annotated[int, Range(1)] = 16384  # K

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.of,)

    def check(self, where: str, recipe: Any) -> None:
        if self.length < recipe.batch_size:
            raise UserError(f"{where}.length is {self.length}; expected at least batch_size, {recipe.batch_size}")

    def init(self, key: Array, context: InitContext) -> Tree:
        directions_KxE = jax.random.normal(key, (self.length, context.embedding_features(self.of)))
        return {"columns": unit(directions_KxE).T, "pointer": jnp.zeros((), jnp.int32)}

    def exposed(self, memory: Tree) -> Array:
        """The columns [E,K]."""
        return memory["columns"]

    def after(self, memory: Tree, out: StepOutput) -> tuple[Tree, dict[str, Array]]:
        e = out.embeddings[self.of]
        return enqueue(memory, unit(jax.lax.stop_gradient(e.z)), e.where), {}


def enqueue(memory: Tree, keys_BxE: Array, where: Array | None = None) -> Tree:
    """Write unit keys [B,E], B <= K, to slots pointer ... pointer + B - 1 (mod K) of {"columns" [E,K], "pointer"}.

    where: [B] bool, the rows that exist; only they take a slot, in order.
    """
    columns_ExK, pointer = memory["columns"], memory["pointer"]
    size, count = columns_ExK.shape[1], len(keys_BxE)
    # A scatter, since dynamic_update_slice clamps at the end instead of wrapping around.
    if where is None:
        slots = (pointer + jnp.arange(count)) % size
    else:
        slots = jnp.where(where, (pointer + jnp.cumsum(where) - 1) % size, size)  # beyond the end: dropped
        count = where.sum()
    columns_ExK = columns_ExK.at[:, slots].set(keys_BxE.T.astype(columns_ExK.dtype), mode="drop")
    return {"columns": columns_ExK, "pointer": ((pointer + count) % size).astype(pointer.dtype)}
