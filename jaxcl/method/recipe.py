"""A recipe: the five slots, models and optimisers of one method, and what each phase of its schedule does."""

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated

import optax

from jaxcl import augment
from jaxcl.method.accumulate import Accumulate
from jaxcl.method.finetune import FineTune
from jaxcl.method.grad_cache import GradCache
from jaxcl.method.heads import Head, HeadInput
from jaxcl.method.memory import MemoryPart
from jaxcl.method.optimizers import Schedule
from jaxcl.method.stages.base import Stage
from jaxcl.method.terms.base import Term, embedding_name, split_name
from jaxcl.models import Model
from jaxcl.runtime.options import OptionError, Options, Range


@dataclasses.dataclass(frozen=True)
class ForwardPass(Options):
    """Views encoded together, as one batch of the batch norms; views that no stage has made yet are left out.

    Terms know an embedding by its view's name, with the encoder's name before it unless that is the main one: "view1",
    "auto/view1".
    """

    views: tuple[str, ...] = ()
    norm_set: str = ""  # the set of batch norms; "": the clean one
    encoder: str = ""  # its name; "": the main encoder
    bn_groups: Annotated[int, Range(1)] = 1  # parts of the batch, each normalised by itself as if on its own device
    shuffle: bool = False  # rows are assigned to the groups at random (MoCo's keys), and put back in order
    depth: Annotated[int, Range(0)] = 0  # stages of the network to run, then that stage's adapter and head; 0: all

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shuffle and self.bn_groups == 1:
            raise OptionError(
                "shuffle", "is True; expected bn_groups above 1, since one batch norm sees all rows anyway"
            )

    @property
    def embeddings(self) -> tuple[str, ...]:
        return tuple(embedding_name(self.encoder, v) for v in self.views)


@dataclasses.dataclass(frozen=True)
class Phase:
    """What one update does: what learns and which stages have begun. Each phase is one compiled program."""

    learns: str  # "encoder" or "probe"
    stages: tuple[int, ...] = ()
    warms: bool = False  # the main encoder does not learn yet, while what is on top of it does


@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
    """The five slots, the models and the optimisers, with every duration in steps."""

    model: Model  # the main encoder
    encoders: dict[str, Model]  # the others, by name
    representation: tuple[str, ...]  # the encoders whose features, side by side, classify and are evaluated
    heads: dict[str, Head]
    views: dict[str, augment.Pipeline]
    stages: tuple[Stage, ...]
    stage_kinds: tuple[str, ...]  # as the config calls them
    stage_starts: tuple[int, ...]  # in encoder steps
    passes: tuple[ForwardPass, ...]
    terms: dict[str, Term]
    memory: dict[str, MemoryPart]
    tx: optax.GradientTransformation
    schedule: Schedule
    memory_tx: dict[str, optax.GradientTransformation]
    memory_schedule: dict[str, Schedule]
    grad_cache: GradCache
    accumulate: Accumulate
    sharding: str  # of the state: data, zero1, fsdp
    seed: int
    batch_size: int
    steps_per_epoch: int
    encoder_steps: int
    probe_steps: int  # updates of the phase in which only the probe learns, if its schedule is sequential
    image_shape: tuple[int, int, int]  # of a view
    eval_size: int  # side of the images that are evaluated
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int
    labelled: bool  # every training image is
    finetune: FineTune  # what of the main encoder learns

    def for_loops(self) -> "Recipe":
        """The same recipe, with encoders to be differentiated inside a loop."""
        return self._with_encoders(Model.for_loops)

    def for_one_device(self) -> "Recipe":
        """The same recipe, with encoders for a batch that is all on one device."""
        return self._with_encoders(Model.for_one_device)

    def warming(self) -> "Recipe":
        """The same recipe, with all batch norms of the main encoder as they are when it is frozen."""
        return dataclasses.replace(self, model=dataclasses.replace(self.model, frozen_norms=math.inf))

    def _with_encoders(self, change: Callable[[Model], Model]) -> "Recipe":
        encoders = {n: change(m) for n, m in self.encoders.items()}
        return dataclasses.replace(self, model=change(self.model), encoders=encoders)

    def encoder(self, name: str) -> Model:
        """The model of that name, "" the main one; a moving average has the model of the encoder it follows."""
        if name in self.targets:
            return self.encoder(self.memory[name].of)
        return self.encoders[name] if name else self.model

    @property
    def targets(self) -> tuple[str, ...]:
        """The encoders that are memory parts, which no gradient trains: moving averages."""
        return tuple(n for n, part in self.memory.items() if part.encodes)

    def features_of(self, encoders: tuple[str, ...]) -> int:
        """Number of features of some encoders together."""
        return sum(self.encoder(n).features for n in encoders)

    def embedding_features_of(self, encoders: tuple[str, ...]) -> int:
        """Size of the embeddings of some encoders together."""
        return sum(self.encoder(n).embedding_features for n in encoders)

    def head_input(self, name: str) -> HeadInput:
        """The sizes a head is made for."""
        head = self.heads[name]
        count = self.features_of if head.reads == "h" else self.embedding_features_of
        return HeadInput(count(head.encoders), self.num_classes, self.image_shape)

    def head_views(self, term_names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        """The views that each head is applied to, for these terms."""
        wanted = {
            n: dict.fromkeys(split_name(e)[1] for t in term_names for e, head in self.terms[t].heads if head == n)
            for n in self.heads
        }
        return {n: tuple(views) for n, views in wanted.items() if views}

    @property
    def probe_schedule(self) -> str:
        """ "alternating" or "sequential" where a memory part learns in phases of its own, otherwise "online"."""
        return next((p.schedule for p in self.memory.values() if p.schedule != "online"), "online")

    @property
    def total_steps(self) -> int:
        """Updates in the whole run, including those in which only the probe learns."""
        if self.probe_schedule == "sequential":
            return self.encoder_steps + self.probe_steps
        return self.encoder_steps * (1 if self.probe_schedule == "online" else 2)

    def encoder_step(self, step: int) -> int:
        """Encoder updates done before update `step` of the run."""
        if self.probe_schedule == "online":
            return step
        if self.probe_schedule == "sequential":
            return min(step, self.encoder_steps)
        cycle, position = divmod(step, 2 * self.steps_per_epoch)
        return min(cycle * self.steps_per_epoch + min(position, self.steps_per_epoch), self.encoder_steps)

    def phase(self, step: int) -> Phase:
        """What update `step` (from 0) does."""
        done = self.encoder_step(step)
        if self.encoder_step(step + 1) == done:
            return Phase("probe")
        begun = tuple(i for i, start in enumerate(self.stage_starts) if done >= start)
        return Phase("encoder", begun, done < self.finetune.warmup_steps)

    def view_names(self, phase: Phase) -> tuple[str, ...]:
        """The view pipelines that run in a phase: those its passes and stages read."""
        wanted = {n for p in self.passes for n in p.views} | {n for i in phase.stages for n in self.stages[i].reads}
        return tuple(n for n in self.views if n in wanted)

    def whole_view_names(self, phase: Phase) -> tuple[str, ...]:
        """Those of them that the main encoder encodes to its full depth."""
        whole = {n for p in self.passes for n in p.views if not p.depth and not p.encoder}
        return tuple(n for n in self.view_names(phase) if n in whole)

    def stage_name(self, i: int) -> str:
        """A stage's kind and the views it writes, for profiles."""
        return f"{self.stage_kinds[i]} {' + '.join(self.stages[i].writes)}"

    def term_names(self, phase: Phase) -> tuple[str, ...]:
        """The terms of a phase: those whose views all exist, given the stages that have begun."""
        made = set(self.views) | {n for i in phase.stages for n in self.stages[i].writes}
        return tuple(n for n, term in self.terms.items() if made.issuperset(split_name(e)[1] for e in term.reads))
