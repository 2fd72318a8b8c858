"""A recipe: the parts a config names, put together; what cannot work is refused here, before anything compiles."""

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import optax
from ml_collections import ConfigDict

from jaxcl import augment
from jaxcl import heads as head_parts
from jaxcl.durations import to_steps
from jaxcl.errors import UserError
from jaxcl.grad_cache import GradCache
from jaxcl.memory import LinearProbe
from jaxcl.models import Model, ModelOptions, ViTOptions, make_model
from jaxcl.optimizers import OptimizerOptions, Schedule, make_optimizer, make_schedule
from jaxcl.terms import (
    Attract,
    BarlowTwins,
    ClassConditionalInfoNCE,
    CrossEntropy,
    InstanceSpread,
    NTXent,
    OneWayInfoNCE,
    Reconstruction,
    Spread,
    SupCon,
)
from jaxcl.views.adversary import Adversary
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

    @property
    def embeddings(self) -> tuple[str, ...]:
        return tuple(embedding_name(self.encoder, v) for v in self.views)


def embedding_name(encoder: str, view: str) -> str:
    """What terms call a view as encoded by an encoder ("": the main one)."""
    return f"{encoder}/{view}" if encoder else view


def split_name(embedding: str) -> tuple[str, str]:
    """-> (encoder, view) of an embedding's name."""
    encoder, _, view = embedding.rpartition("/")
    return encoder, view


# The parts a config can name. A new part is a class (or factory) and one line here.
MODELS: Mapping[str, Callable] = {"resnet": ModelOptions, "vit": ViTOptions}
HEADS: Mapping[str, Callable] = {"classifier": head_parts.Classifier, "decoder": head_parts.Decoder}
VIEWS: Mapping[str, Callable] = {
    "random": augment.random_view,
    "standard": augment.standard_view,
    "classifier": augment.classifier_view,
}
STAGES: Mapping[str, Callable] = {"saliency": SaliencyMask, "adversary": Adversary}
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
}
MEMORY: Mapping[str, Callable] = {"linear_probe": LinearProbe}


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
    if kind not in registry:
        raise UserError(f"{name}.kind is {kind!r}; expected one of {', '.join(registry)}")
    extra = {k for k in node if k not in ("kind", "optimizer")}
    return construct(name, registry[kind], {k: node[k] for k in extra}, **supplied)


def construct(name: str, part: Callable, options: Mapping[str, Any], **supplied: Any) -> Any:
    """Call `part` with checked options; UserError names the config key of an unknown one."""
    known = fields(part)
    for key in options:
        if key not in known:
            raise UserError(f"{name} has no option {key!r}{suggestion(key, known)}")
        if not _fits(options[key], known[key]):
            raise UserError(f"{name}.{key} is {options[key]!r}; expected a value like {known[key]!r}")
    return part(**supplied, **{k: _tuples(v) for k, v in options.items()})


def _fits(value: Any, default: Any) -> bool:
    """Whether a value is of its default's kind; a string may be a number, since "0" and 0 steps are the same."""
    kinds = ((bool, bool), ((int, float), (int, float)), (str, (str, int)), ((list, tuple), (list, tuple)))
    for kind, accepted in kinds:
        if isinstance(default, kind):
            return isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
    return True


def suggestion(word: str, known: Any) -> str:
    """'; did you mean ...?' or the list of what there is."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; expected one of {', '.join(known)}"


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
    seed: int
    batch_size: int
    steps_per_epoch: int
    encoder_steps: int
    image_shape: tuple[int, int, int]  # of a view
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int
    labelled: bool  # every training image is

    def encoder(self, name: str) -> Model:
        """The model of that name, "" the main one."""
        return self.encoders[name] if name else self.model

    def features_of(self, encoders: tuple[str, ...]) -> int:
        """Number of features of some encoders together."""
        return sum(self.encoder(n).features for n in encoders)

    def head_facts(self, name: str) -> head_parts.Facts:
        """What a head has to know of the rest."""
        return head_parts.Facts(self.features_of(self.heads[name].encoders), self.num_classes, self.image_shape)

    def head_views(self, term_names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        """The views that each head is applied to, for these terms."""
        wanted = {
            n: dict.fromkeys(split_name(e)[1] for t in term_names for e, head in _heads_of(self.terms[t]) if head == n)
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

    def term_names(self, phase: Phase) -> tuple[str, ...]:
        """The terms of a phase: those whose views exist, whatever stages have not begun."""
        made = set(self.views) | {n for i in phase.stages for n in self.stages[i].writes}
        return tuple(n for n, term in self.terms.items() if made.issuperset(split_name(e)[1] for e in term.reads))


def _heads_of(term: Any) -> tuple[tuple[str, str], ...]:
    """(embedding, head) pairs whose output a term reads."""
    return getattr(term, "heads", ())


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
    schedule = make_schedule(options, name="optimizer", steps=steps, **unit)
    memory_schedule, memory_tx = {}, {}
    for n, node in config.memory.items():
        name = f"memory.{n}.optimizer"
        own = construct(name, OptimizerOptions, node.optimizer)
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
    _check(recipe, num_devices=num_devices)
    return recipe


def _make_pass(views: tuple[str, ...] = (), norm_set: str = "", encoder: str = "") -> Pass:
    return Pass(tuple(views), norm_set, encoder)


def _make_model(name: str, node: ConfigDict) -> Model:
    return make_model(make_part(name, node, MODELS))


def _check(recipe: Recipe, *, num_devices: int) -> None:
    """Refuse names that nothing makes and parts whose needs are not met."""
    for model in (recipe.model, *recipe.encoders.values()):
        recipe.grad_cache.check(model, recipe.batch_size, num_devices)
    for name in (*recipe.views, *recipe.encoders):
        if "/" in name:
            raise UserError(f"{name!r} may not contain '/', which joins an encoder's name and a view's")
    for name in recipe.representation:
        _known_encoder(recipe, "representation", name)
    if not recipe.representation:
        raise UserError("representation names no encoder; expected ('',) for the main one")
    made = set(recipe.views) | {n for s in recipe.stages for n in s.writes}

    def exists(name: str, where: str, known: set[str]) -> None:
        if name not in known:
            raise UserError(f"{where} names view {name!r}, which nothing makes{suggestion(name, sorted(known))}")

    available = set(recipe.views)
    for i, stage in enumerate(recipe.stages):
        for name in stage.reads:
            exists(name, f"stages[{i}]", available)
        for name in stage.creates:
            if name in available:
                raise UserError(f"stages[{i}] makes view {name!r}, which is a view already; choose a new name")
        available |= set(stage.writes)
        stage.check(f"stages[{i}]", recipe, num_devices)
    if not recipe.passes or not recipe.terms:
        raise UserError("a recipe needs at least one pass and one term; see configs/supcon.py")
    encoded: set[str] = set()
    for i, p in enumerate(recipe.passes):
        _known_encoder(recipe, f"passes[{i}].encoder", p.encoder)
        recipe.encoder(p.encoder).check_norm_set(f"passes[{i}].norm_set", p.norm_set)
        for name, embedding in zip(p.views, p.embeddings, strict=True):
            exists(name, f"passes[{i}]", made)
            if embedding in encoded:
                raise UserError(f"passes[{i}] encodes view {embedding!r} a second time; name it once")
            encoded.add(embedding)
    for name, part in recipe.heads.items():
        for encoder in part.encoders:
            _known_encoder(recipe, f"heads.{name}.encoders", encoder)
        if not part.encoders:
            raise UserError(f"heads.{name}.encoders is empty; expected ('',) for the main one")
        part.check(f"heads.{name}", recipe.head_facts(name))
    for n, term in recipe.terms.items():
        for name in (*term.reads, *term.optional):
            exists(name, f"terms.{n}", encoded)
        for embedding, head in _heads_of(term):
            _check_head(recipe, n, embedding, head, encoded)
    used = recipe.head_views(tuple(recipe.terms))
    for name in recipe.heads:
        if name not in used:
            raise UserError(f"heads.{name} is read by no term; remove it, or name it as the head of a term")
    for n, part in recipe.memory.items():
        for name in part.views if part.schedule == "online" else ():
            for encoder in recipe.representation:
                exists(embedding_name(encoder, name), f"memory.{n}", encoded)
            exists(name, f"memory.{n}", set(recipe.views))
        if part.schedule != "online":
            exists(part.view, f"memory.{n}", set(recipe.views))
    needs = [f"terms.{n}" for n, t in recipe.terms.items() if t.needs_labels]
    needs += [f"memory.{n}" for n in recipe.memory]
    if needs and not recipe.labelled:
        raise UserError(
            f"{needs[0]} needs a label on every training image, which the data lacks; give labels, or use a "
            "config without labels, such as configs/simclr.py:unlabelled"
        )


def _known_encoder(recipe: Recipe, where: str, name: str) -> None:
    if name and name not in recipe.encoders:
        known = ", ".join(map(repr, ("", *recipe.encoders)))
        raise UserError(f"{where} names encoder {name!r}; expected one of {known} ('' is the main one)")


def _check_head(recipe: Recipe, term: str, embedding: str, head: str, encoded: set[str]) -> None:
    if head not in recipe.heads:
        raise UserError(f"terms.{term}.head is {head!r}, which the config lacks{suggestion(head, recipe.heads)}")
    part, (encoder, view) = recipe.heads[head], split_name(embedding)
    if encoder != part.encoders[0]:
        expected = embedding_name(part.encoders[0], view)
        raise UserError(f"terms.{term} reads heads.{head} of {embedding!r}; that head is of {expected!r}")
    for other in part.encoders:
        if embedding_name(other, view) not in encoded:
            raise UserError(f"heads.{head} reads {embedding_name(other, view)!r}, which no pass encodes")
