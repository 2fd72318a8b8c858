"""The contract of a stage: what it receives and returns.

B batch, H W image, S side of a view, C channels.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax

from jaxcl.method.views import View
from jaxcl.runtime.options import Options
from jaxcl.runtime.registry import Contract

Array = jax.Array
Tree = Any


class StageContext(NamedTuple):
    """What a stage may use of the running update."""

    model: Any
    params: Tree
    batch_stats: Tree
    memory: dict[str, Tree]
    pixels: Array  # [B,H,W,C] float32 in [0,1]
    mean: tuple[float, ...]  # [C] the colour that is 0 once normalised
    std: tuple[float, ...]  # [C] what normalising divides by
    label: Array  # [B] int32
    classifier: Callable[[Tree, Array], Array] | None  # (memory, features [B,D]) -> logits [B,classes]
    augment: Callable[[str, str, Array], View]  # (view's pipeline, name for its keys, pixels) -> view
    loss: Callable[[str, dict[str, Any]], Array]  # (term, embeddings by name) -> its value on the global batch
    reads: Callable[[str], tuple[str, ...]]  # term -> names of the embeddings it cannot do without
    embed: Callable[[str, View, str], Any]  # (encoder, view, set of batch norms) -> its embedding, in training mode
    keys: Callable[[str], Array]  # name -> one key an image [B]
    textures: Array | None = None  # [B,H,W,C] float32 in [0,1], made beforehand of the images, where the data has them


class StageOutput(NamedTuple):
    """What a stage returns.

    views: those it adds or replaces, by name. batch_stats: the encoder's, if its forward passes are to move them; None:
    they are left alone. metrics: scalars to log, by name.
    """

    views: dict[str, View]
    batch_stats: Tree | None = None
    metrics: dict[str, Array] = {}  # noqa: RUF012 - never changed


@dataclasses.dataclass(frozen=True)
class Stage(Options, Contract):
    """Makes views from views, without gradient: a frozen dataclass of its options.

    Attributes:
      start: when it begins, in encoder updates; any duration ("25%", "2 epochs", "100 steps").
      classifier: the memory part whose `logits` it uses, as `StageContext.classifier`; "": none.
      reads: names of the views it cannot do without.
      writes: names of the views it returns.
      creates: those of them that must not exist before.
    """

    classifier: ClassVar[str] = ""

    start: str = dataclasses.field(default="0", kw_only=True)

    @property
    def reads(self) -> tuple[str, ...]:
        raise NotImplementedError(f"{type(self).__name__} must define `reads`")

    @property
    def writes(self) -> tuple[str, ...]:
        raise NotImplementedError(f"{type(self).__name__} must define `writes`")

    @property
    def creates(self) -> tuple[str, ...]:
        return tuple(name for name in self.writes if name not in self.reads)

    def check(self, where: str, recipe: Any, num_devices: int) -> None:
        """Errors: UserError for what the recipe lacks. where: the stage's config key."""

    def __call__(self, context: StageContext, views: dict[str, View]) -> StageOutput:
        """Runs inside the jitted update, on the global batch; what it returns is under stop-gradient."""
        raise NotImplementedError(f"{type(self).__name__} must define `__call__`")
