"""Training on from weights: what of the main encoder learns, from when on, and by how large steps.

Frozen layers are no part of what the update differentiates: no backward pass runs through them, the optimiser keeps
nothing for them, and their batch norms normalise by the running statistics, which stay. A layer's number is that of
`Encoder.layer_of`: 0 the stem, 1 .. num_layers the blocks, num_layers + 1 what follows.
"""

import dataclasses
import logging
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import optax

from jaxcl.errors import UserError
from jaxcl.models import Model
from jaxcl.models.encoder import Encoder
from jaxcl.models.norms import replace
from jaxcl.models.trees import ENCODER, ENCODERS, HEADS, LORA, encoder_stats

logger = logging.getLogger("jaxcl")
Array = jax.Array
Tree = Any
Path = tuple[str, ...]
Schedule = Callable[[Array], Array]

_PLACE = re.compile(r"(stage|layer)(\d+)")
_SHARE = re.compile(r"(\d+)%")
EXAMPLES = "'' for none, 'stem', 'stage2', 'layer5' and '70%' of the layers (up to it, from the input on) or 'encoder'"


@dataclasses.dataclass(frozen=True)
class FineTune:
    """How the main encoder is trained on. The defaults: as everything else.

    Attributes:
      model: the main encoder and its head, before anything is frozen.
      frozen: the last frozen layer; -1: none, inf: the whole encoder.
      layer_decay, encoder_lr: the steps of layer i are multiplied by encoder_lr * layer_decay ** (num_layers + 1 - i),
        those of what is not the main encoder by 1.
      warmup_steps: updates of the encoder's phase in which all but the main encoder learns.
    """

    model: Model
    frozen: float = -1
    layer_decay: float = 1.0
    encoder_lr: float = 1.0
    warmup_steps: int = 0

    def layer(self, path: Path) -> int | None:
        """The layer of a parameter of the run by its path; None outside of the main encoder."""
        if path[0] not in (ENCODER, LORA):
            return None
        return self.model.encoder.layer_of(path[1:]) if self.model.encoder.num_layers else 0

    def learns(self, path: Path, warms: bool = False) -> bool:
        """Whether a parameter is trained; warms: in the warm-up of the heads."""
        layer = self.layer(path)
        if layer is None:
            return True
        if warms or layer <= self.frozen:
            return False
        return not (self.model.lora and path[0] == ENCODER)

    @property
    def trains_all(self) -> bool:
        """Whether all parameters learn once the warm-up is over."""
        return self.frozen < 0 and not self.model.lora

    def split(self, params: Tree, warms: bool = False) -> tuple[Tree, Tree]:
        """-> (the parameters that learn, the others); `merge` joins them."""
        if self.trains_all and not warms:
            return params, {}
        return _split(params, lambda path: self.learns(path, warms))

    def scale(self, path: Path) -> float:
        """The factor of a parameter's steps."""
        layer = self.layer(path)
        if layer is None:
            return 1.0
        return self.encoder_lr * self.layer_decay ** (self.model.encoder.num_layers + 1 - layer)

    def optimizer(
        self, make: Callable[[Schedule], optax.GradientTransformation], schedule: Schedule
    ) -> optax.GradientTransformation:
        """The optimiser of what learns. It takes `warms=True` as a further argument of `update` in the warm-up.

        Args:
          make: schedule -> an optimiser, in which no parameter changes the step of another.
          schedule: by updates of the run. The encoder's counts them too, so it begins at the rate of that time.
        """
        tx = make(schedule)
        if self.warmup_steps:
            late = _after_warmup(make(lambda count: schedule(count + self.warmup_steps)))
            places = {True: "heads", False: "encoder"}
            tx = optax.partition(
                {"heads": tx, "encoder": late},
                lambda params: _map(lambda path, _: places[self.layer(path) is None], params),
            )
        if self.layer_decay == self.encoder_lr == 1:
            return tx
        return optax.chain(tx, optax.stateless(lambda u, _: _map(lambda path, x: x * self.scale(path), u)))

    def say(self, params: Callable[[], Tree]) -> None:
        """Logs in one line what is frozen. params: makes the parameters of a run, or their shapes."""
        parts = []
        if not self.trains_all:
            counts = [sum(math.prod(x.shape) for x in jax.tree.leaves(t)) for t in _split(params(), self.learns)]
            parts.append(f"{counts[0]:,} parameters are trained and {counts[1]:,} of the encoder are not")
        if self.frozen >= 0 and self.model.encoder.norm == "batch":
            parts.append("batch norms of frozen layers normalise by their running statistics, which stay")
        elif self.model.frozen_norms == math.inf and self.model.encoder.norm == "batch":
            parts.append("batch norms of the encoder normalise by their running statistics, which stay")
        if self.warmup_steps:
            parts.append(f"the encoder is not trained in the first {self.warmup_steps} updates")
        if (self.layer_decay, self.encoder_lr) != (1, 1):
            first = self.encoder_lr * self.layer_decay ** (self.model.encoder.num_layers + 1)
            parts.append(f"learning rates fall through the encoder to {first:.3g} of the heads'")
        if parts:
            logger.info("continued training: %s", "; ".join(parts))


def frozen_layer(freeze: str, encoder: Encoder) -> float:
    """The last frozen layer by `optimizer.freeze`, as in `FineTune.frozen`. Raises UserError."""
    if not freeze:
        return -1
    if freeze == "encoder":
        return math.inf
    if not encoder.num_layers:
        raise UserError(f"optimizer.freeze is {freeze!r}; expected '' or 'encoder': this encoder has no known layers")
    share = _SHARE.fullmatch(freeze)
    if share and int(share[1]) <= 100:
        return encoder.num_layers * int(share[1]) // 100
    place = _PLACE.fullmatch(freeze) or ([0, "layer", 0] if freeze == "stem" else None)
    if place is None:
        raise UserError(f"optimizer.freeze is {freeze!r}; expected {EXAMPLES}")
    kind, number = place[1], int(place[2])
    first, last = (0, encoder.num_layers) if kind == "layer" else (1, encoder.num_stages)
    if not first <= number <= last:
        known = f"{kind}{first} to {kind}{last}" if last else "layers, since this encoder has no stages"
        raise UserError(f"optimizer.freeze is {freeze!r}; expected {known}")
    return number if kind == "layer" else encoder.layer_of_stage(number)


def merge(learns: Tree, others: Tree) -> Tree:
    """The inverse of `FineTune.split`."""
    out = dict(learns)
    for name, node in others.items():
        out[name] = merge(out[name], node) if name in out and isinstance(node, dict) else node
    return out


def keep_statistics(model: Model, old: Tree, new: Tree) -> Tree:
    """New batch statistics with the old ones, to the bit, of the encoder's batch norms that keep them.

    Averages over groups and micro-batches round even equal numbers.
    """
    if model.frozen_norms < 0 or model.encoder.norm != "batch":
        return new
    kept, _ = _split({k: old[k] for k in encoder_stats(old) if k not in (ENCODERS, HEADS)}, model.keeps_statistics)
    return replace(new, kept, lambda _, own: own)


def _split(tree: Tree, chosen: Callable[[Path], bool], path: Path = ()) -> tuple[Tree, Tree]:
    yes, no = {}, {}
    for name, node in tree.items():
        here = (*path, name)
        parts = _split(node, chosen, here) if isinstance(node, dict) and node else None
        if parts is None:
            (yes if not isinstance(node, dict) and chosen(here) else no)[name] = node  # no: also an empty dict
            continue
        for side, part in zip((yes, no), parts, strict=True):
            if part:
                side[name] = part
    return yes, no


def _map(f: Callable[[Path, Array], Any], params: Tree) -> Tree:
    def one(path: tuple, x: Array) -> Any:
        return f(tuple(str(getattr(p, "key", p)) for p in path), x)

    return jax.tree_util.tree_map_with_path(one, params)


def _after_warmup(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """An optimiser that does nothing, and counts nothing, in the warm-up of the heads."""

    def update(grads: Tree, state: Tree, params: Tree = None, *, warms: bool = False, **_: Any) -> tuple[Tree, Tree]:
        return (grads, state) if warms else tx.update(grads, state, params)  # the gradients are zeros

    return optax.GradientTransformationExtraArgs(tx.init, update)
