"""A recipe: the parts a config names, put together; what cannot work is refused here, before anything compiles."""

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import optax
from ml_collections import ConfigDict

from jaxcl import augment
from jaxcl import heads as head_parts
from jaxcl import sharding as shardings
from jaxcl.accumulate import Accumulate
from jaxcl.durations import to_steps
from jaxcl.errors import UserError
from jaxcl.grad_cache import GradCache
from jaxcl.memory import EMA, LinearProbe, Queue
from jaxcl.models import Model, ModelOptions, ViTOptions, make_model
from jaxcl.optimizers import OptimizerOptions, Schedule, make_optimizer, make_schedule
from jaxcl.recipe_check import check, check_paths, fits, heads_of, quoted, suggestion
from jaxcl.terms import (
    BYOL,
    Attract,
    BarlowTwins,
    ClassConditionalInfoNCE,
    CrossEntropy,
    InstanceSpread,
    MoCo,
    NTXent,
    OneWayInfoNCE,
    Reconstruction,
    SimSiam,
    Spread,
    SupCon,
)
from jaxcl.terms.base import embedding_name, split_name
from jaxcl.views.adversary import Adversary
from jaxcl.views.patches import PatchNegatives
from jaxcl.views.quilting import TextureNegatives
from jaxcl.views.saliency import SaliencyMask


@dataclasses.dataclass(frozen=True)
class Pass:
    """Views encoded together, as one batch of the batch norm; views that do not exist (yet) are left out.

    What they become is known to terms by the view's name, behind the encoder's name where that is not the main one:
    "view1", "auto/view1".
    """

    views: tuple[str, ...]
    norm_set: str = ""  # the set of batch norms; "": the clean one
    encoder: str = ""  # the one of that name; "": the main encoder
    bn_groups: int = 1  # parts of the batch that batch norm takes each by itself, as so many devices would
    shuffle: bool = False  # the batch is dealt to the groups at random (MoCo's keys), and put back in order
    depth: int = 0  # only so many stages of the network, then that stage's own adapter and head; 0: all of it

    def __post_init__(self):
        if self.bn_groups < 1:
            raise UserError(f"a pass has bn_groups {self.bn_groups}; expected at least 1")
        if self.shuffle and self.bn_groups == 1:
            raise UserError("a pass with shuffle=True needs bn_groups above 1; one batch norm sees all rows anyway")

    @property
    def embeddings(self) -> tuple[str, ...]:
        return tuple(embedding_name(self.encoder, v) for v in self.views)


# The parts a config can name. A new part is a class (or factory) and one line here.
MODELS: Mapping[str, Callable] = {"resnet": ModelOptions, "vit": ViTOptions}
HEADS: Mapping[str, Callable] = {
    "classifier": head_parts.Classifier,
    "decoder": head_parts.Decoder,
    "mlp": head_parts.MLP,
}
VIEWS: Mapping[str, Callable] = {
    "random": augment.random_view,
    "standard": augment.standard_view,
    "classifier": augment.classifier_view,
}
STAGES: Mapping[str, Callable] = {
    "saliency": SaliencyMask,
    "adversary": Adversary,
    "patch_negatives": PatchNegatives,
    "texture_negatives": TextureNegatives,
}
TERMS: Mapping[str, Callable] = {
    "supcon": SupCon,
    "nt_xent": NTXent,
    "one_way_infonce": OneWayInfoNCE,
    "instance_spread": InstanceSpread,
    "spread": Spread,
    "attract": Attract,
    "class_conditional_infonce": ClassConditionalInfoNCE,
    "barlow_twins": BarlowTwins,
    "cross_entropy": CrossEntropy,
    "reconstruction": Reconstruction,
    "moco": MoCo,
    "byol": BYOL,
    "simsiam": SimSiam,
}
MEMORY: Mapping[str, Callable] = {"linear_probe": LinearProbe, "ema": EMA, "queue": Queue}


def fields(part: Callable) -> dict[str, Any]:
    """The options of a part with their defaults, in order; what the recipe itself supplies is not among them."""
    supplied = {"size", "mean", "std"}
    return {
        name: p.default
        for name, p in inspect.signature(part).parameters.items()
        if name not in supplied and p.default is not inspect.Parameter.empty
    }


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


def make_part(name: str, node: ConfigDict, registry: Mapping[str, Callable], **supplied: Any) -> Any:
    """The part a config node means: `kind` chooses it, the other keys are its options."""
    kind = node.get("kind")
    if not isinstance(kind, str) or kind not in registry:
        raise UserError(f"{name}.kind is {quoted(kind)}; expected one of {', '.join(registry)}")
    extra = {k for k in node if k not in ("kind", "optimizer")}
    return construct(name, registry[kind], {k: node[k] for k in extra}, **supplied)


def construct(name: str, part: Callable, options: Mapping[str, Any], **supplied: Any) -> Any:
    """Call `part` with checked options; UserError names the config key of an unknown one."""
    known, signature = fields(part), inspect.signature(part).parameters
    for key in options:
        if key not in known:
            raise UserError(f"{name} has no option {key!r}{suggestion(key, known)}")
        element = re.search(r"\[(str|int|float)\b", str(signature[key].annotation))
        if not fits(options[key], known[key], element[1] if element else ""):
            like = repr(known[key]) if known[key] != () else f"(), a tuple of {element[1] if element else 'them'}"
            raise UserError(f"{name}.{key} is {quoted(options[key])}; expected a value like {like}")
    try:
        return part(**supplied, **{k: _tuples(v) for k, v in options.items()})
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{name} cannot be made of these options: {quoted(error)}") from error


@dataclasses.dataclass(frozen=True)
class Phase:
    """What one update does: which part learns and which stages have begun. One compiled program each."""

    learns: str  # "encoder" or "probe"
    stages: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
    """The five slots, the models and the optimisers, with every duration in steps."""

    model: Model  # the main encoder
    encoders: dict[str, Model]  # the others, by name
    representation: tuple[str, ...]  # the encoders whose features, side by side, classify and are evaluated
    heads: dict[str, Any]
    views: dict[str, augment.Pipeline]
    stages: tuple[Any, ...]
    stage_starts: tuple[int, ...]  # in encoder steps
    passes: tuple[Pass, ...]
    terms: dict[str, Any]
    memory: dict[str, Any]
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
    image_shape: tuple[int, int, int]  # of a view
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int
    labelled: bool  # every training image is

    def for_loops(self) -> "Recipe":
        """The same, with encoders to be differentiated inside a loop."""
        return self._with_encoders(Model.for_loops)

    def for_one_device(self) -> "Recipe":
        """The same, with encoders to be differentiated on a batch that is all on one device."""
        return self._with_encoders(Model.for_one_device)

    def _with_encoders(self, change: Callable[[Model], Model]) -> "Recipe":
        encoders = {n: change(m) for n, m in self.encoders.items()}
        return dataclasses.replace(self, model=change(self.model), encoders=encoders)

    def encoder(self, name: str) -> Model:
        """The model of that name, "" the main one; a moving average has that of the encoder it follows."""
        if name in self.targets:
            return self.encoder(self.memory[name].of)
        return self.encoders[name] if name else self.model

    @property
    def targets(self) -> tuple[str, ...]:
        """The encoders that nothing trains: moving averages, parts of memory."""
        return tuple(n for n, part in self.memory.items() if isinstance(part, EMA))

    def features_of(self, encoders: tuple[str, ...]) -> int:
        """Number of features of some encoders together."""
        return sum(self.encoder(n).features for n in encoders)

    def embedding_features_of(self, encoders: tuple[str, ...]) -> int:
        """Size of the embeddings of some encoders together."""
        return sum(self.encoder(n).embedding_features for n in encoders)

    def head_facts(self, name: str) -> head_parts.Facts:
        """What a head has to know of the rest."""
        part = self.heads[name]
        count = self.features_of if part.reads == "h" else self.embedding_features_of
        return head_parts.Facts(count(part.encoders), self.num_classes, self.image_shape)

    def head_views(self, term_names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        """The views that each head is applied to, for these terms."""
        wanted = {
            n: dict.fromkeys(split_name(e)[1] for t in term_names for e, head in heads_of(self.terms[t]) if head == n)
            for n in self.heads
        }
        return {n: tuple(views) for n, views in wanted.items() if views}

    @property
    def probe_schedule(self) -> str:
        """How the classifier learns; "online" where there is none."""
        return next((p.schedule for p in self.memory.values() if p.schedule != "online"), "online")

    @property
    def total_steps(self) -> int:
        """Updates in the whole run, those of a probe that learns by itself included."""
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
        return Phase("encoder", tuple(i for i, start in enumerate(self.stage_starts) if done >= start))

    def view_names(self, phase: Phase) -> tuple[str, ...]:
        """The pipelines that run in a phase: what its passes and stages read, less what only a stage makes."""
        wanted = {n for p in self.passes for n in p.views} | {n for i in phase.stages for n in self.stages[i].reads}
        return tuple(n for n in self.views if n in wanted)

    def whole_view_names(self, phase: Phase) -> tuple[str, ...]:
        """Those of them that the whole of the main encoder sees, not a part of it only."""
        whole = {n for p in self.passes for n in p.views if not p.depth and not p.encoder}
        return tuple(n for n in self.view_names(phase) if n in whole)

    def stage_name(self, i: int) -> str:
        """The kind of a stage as a config calls it, and what it makes."""
        kind = next(k for k, part in STAGES.items() if isinstance(self.stages[i], part))
        return f"{kind} {' + '.join(self.stages[i].writes)}"

    def term_names(self, phase: Phase) -> tuple[str, ...]:
        """The terms of a phase: those whose views exist, whatever stages have not begun."""
        made = set(self.views) | {n for i in phase.stages for n in self.stages[i].writes}
        return tuple(n for n, term in self.terms.items() if made.issuperset(split_name(e)[1] for e in term.reads))


def data_facts(source: Any) -> dict[str, Any]:
    """What `build_recipe` has to know of its training data."""
    return dict(
        num_examples=len(source),
        image_shape=source.image_shape,
        mean=source.mean,
        std=source.std,
        num_classes=source.num_classes,
        labelled=source.labelled,
    )


def build_recipe(
    config: ConfigDict,
    *,
    num_examples: int,
    image_shape: tuple[int, int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    num_classes: int,
    labelled: bool,
    num_devices: int = 1,
) -> Recipe:
    """Parts from a config and the facts of its data. Errors: UserError, one line, naming the config key."""
    B = config.batch_size
    if config.sharding not in shardings.KINDS:
        raise UserError(f"sharding is {config.sharding!r}; expected one of {', '.join(shardings.KINDS)}")
    if B < 1 or B % num_devices:
        raise UserError(f"batch_size {B} does not divide over {num_devices} devices; use a multiple of {num_devices}")
    if B > num_examples:
        raise UserError(f"batch_size {B} is larger than the training set ({num_examples} images); use a smaller one")
    per_epoch = num_examples // B
    unit = dict(steps_per_epoch=per_epoch, batch_size=B)
    steps = to_steps(config.duration, name="duration", **unit)
    if steps < 1:
        raise UserError(f"duration {config.duration!r} is less than one step; expected at least one")

    size = config.size or image_shape[0]
    pixels = dict(size=size, mean=mean, std=std)
    views = {n: make_part(f"views.{n}", v, VIEWS, **pixels) for n, v in config.views.items()}
    stages = tuple(make_part(f"stages[{i}]", s, STAGES) for i, s in enumerate(config.stages))
    passes = tuple(construct(f"passes[{i}]", _make_pass, p) for i, p in enumerate(config.passes))
    terms = {n: make_part(f"terms.{n}", t, TERMS) for n, t in config.terms.items()}
    memory = {n: make_part(f"memory.{n}", m, MEMORY) for n, m in config.memory.items()}

    heads = {n: make_part(f"heads.{n}", h, HEADS) for n, h in config.heads.items()}

    model = _make_model("model", config.model)
    encoders = {n: _make_model(f"encoders.{n}", node) for n, node in config.encoders.items()}
    options = construct("optimizer", OptimizerOptions, config.optimizer)
    check_paths("optimizer.constant_lr", options.constant_lr, heads, encoders)
    schedule = make_schedule(options, name="optimizer", steps=steps, **unit)
    memory_schedule, memory_tx = {}, {}
    for n, node in config.memory.items():
        name = f"memory.{n}.optimizer"
        if not memory[n].trained:
            continue
        own = construct(name, OptimizerOptions, node.get("optimizer", {}))
        if own.constant_lr:
            raise UserError(f"{name}.constant_lr is {own.constant_lr}; expected (): all of it has one rate")
        memory_schedule[n] = make_schedule(own, name=name, steps=steps, **unit)
        memory_tx[n] = make_optimizer(own, memory_schedule[n], name=name)

    recipe = Recipe(
        model=model,
        encoders=encoders,
        representation=tuple(config.representation),
        heads=heads,
        views=views,
        stages=stages,
        stage_starts=tuple(
            to_steps(s.start, name=f"stages[{i}].start", total=steps, **unit) for i, s in enumerate(stages)
        ),
        passes=passes,
        terms=terms,
        memory=memory,
        tx=make_optimizer(options, schedule, name="optimizer"),
        schedule=schedule,
        memory_tx=memory_tx,
        memory_schedule=memory_schedule,
        grad_cache=construct("grad_cache", GradCache, config.grad_cache),
        accumulate=construct("accumulate", Accumulate, config.accumulate),
        sharding=config.sharding,
        seed=config.seed,
        batch_size=B,
        steps_per_epoch=per_epoch,
        encoder_steps=steps,
        image_shape=(size, size, image_shape[2]),
        mean=tuple(mean),
        std=tuple(std),
        num_classes=num_classes,
        labelled=labelled,
    )
    check(recipe, num_devices=num_devices)
    return recipe


def _make_pass(
    views: tuple[str, ...] = (),
    norm_set: str = "",
    encoder: str = "",
    bn_groups: int = 1,
    shuffle: bool = False,
    depth: int = 0,
) -> Pass:
    return Pass(tuple(views), norm_set, encoder, bn_groups, shuffle, depth)


def _make_model(name: str, node: ConfigDict) -> Model:
    return make_model(make_part(name, node, MODELS))
