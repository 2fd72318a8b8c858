"""What every config starts from, and the small words configs are written in.

from jaxcl import config as base

def get_config(preset="garments"):
    c = base.default()
    c.views.view1 = base.view("random", crop_area=(0.2, 1.0))
    ...
"""

import dataclasses
import functools
import importlib.util
import inspect
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from ml_collections import ConfigDict

from jaxcl.errors import UserError
from jaxcl.method import registry
from jaxcl.method.accumulate import Accumulate
from jaxcl.method.grad_cache import GradCache
from jaxcl.method.optimizers import OptimizerOptions
from jaxcl.method.recipe import ForwardPass
from jaxcl.models.registry import MODELS
from jaxcl.runtime.options import POSITIVE, SHARE, Option, Options, Range, defaults, options_of, quoted, suggestion
from jaxcl.runtime.options import check as check_option
from jaxcl.runtime.registry import Registry

OF_IMAGES = ("neighbours", "clusters")  # evaluators of what a set holds; they need no labels
# Evaluators of a classifier that is trained beside the encoder, and attacks: not for a run without labels.
OF_CLASSIFIERS = (
    *("classifier", "calibration", "explanation"),
    *("fgsm", "pgd", "linear_fgsm", "linear_pgd", "adversary"),
)
# Keys that hold parts, which are checked where they are made: {name: part}, lists of parts, and single parts.
MAPPINGS, LISTS = ("views", "terms", "memory", "heads", "encoders"), ("stages", "passes")
PARTS = ("model", "optimizer", "grad_cache", "accumulate")
FREE_FORM = ("data.options", "pretrained")  # checked by the source that takes them; written by `train.pretrained`

Count, Size = Annotated[int, Range(1)], Annotated[int, Range(0)]  # Size: 0 is "automatic" or "none"


@dataclasses.dataclass(frozen=True)
class Garments(Options):
    """`data.garments`"""

    spurious: Annotated[float, SHARE] = 0.0  # how often the texture follows the class in training
    spurious_on: Literal["background", "fill"] = "background"


@dataclasses.dataclass(frozen=True)
class Tfds(Options):
    """`data.tfds`"""

    data_dir: str = ""  # where the prepared folders are; "": TFDS's own default
    image_size: Size = 0  # resize to this side when images differ in shape
    label: str = ""  # the feature that labels an image, if not the usual one: an attribute such as Blond_Hair
    group: str = ""  # a feature that divides every class into groups, such as Male


@dataclasses.dataclass(frozen=True)
class Files(Options):
    """`data.files`: of folder, csv, waterbirds, celeb_a and voc (whose default is 224)"""

    image_size: Size = 0  # side after resizing; 0: unchanged if all have one shape of at most 256, otherwise 64
    # How a resized image becomes a square. crop: the sides of a wide image are cut off; squash: all of it, out of
    # proportion; letterbox: all of it, with bars. "": squash for folder and csv, crop for sets whose protocols crop.
    fit: Literal["", "crop", "squash", "letterbox"] = ""
    max_pixels: Count = 2**30  # of an image; files with more count as bad, as an attack on the memory


@dataclasses.dataclass(frozen=True)
class CelebA(Options):
    """`data.celeb_a`"""

    target: str = "Blond_Hair"  # the attribute that is the class
    group: str = "Male"  # the attribute that divides each class into groups


@dataclasses.dataclass(frozen=True)
class Data(Options):
    """`data`"""

    # garments, fashion_mnist, npz:PATH, cifar:PATH, tfds:NAME, folder:PATH, csv:PATH, waterbirds:PATH, celeb_a:PATH,
    # voc:PATH, or one of your own: package.module:Name or package.module:Name:ARGUMENT
    source: str = "garments"
    options: dict = dataclasses.field(default_factory=dict)  # of a source of your own
    validation: Annotated[float, Range(0, below=1)] = 0.0  # share of the training set held out, to select settings on
    validation_split: Literal["balanced", "released"] = "balanced"  # class by class, or as Thanos's code splits
    limit: Size = 0  # use only this many training images, class-balanced; 0: all
    labels: Literal["fine", "coarse"] = "fine"  # coarse: train on the coarse classes, where the source has both
    imbalance: Literal["", "cifar100u"] = ""  # cifar100u: rare classes in each superclass, in training only
    # Moments by which images are normalised, one number a channel, in [0, 1] units; (): those of the source.
    mean: tuple[float, ...] = ()
    std: Annotated[tuple[float, ...], POSITIVE] = ()
    per_class: Size = 0  # images of each class in a batch of batch_size / per_class classes; 0: as the order gives
    textures: str = ""  # a folder by `jaxcl textures`: texture negatives are read there, not made in the update
    garments: Garments = Garments()
    tfds: Tfds = Tfds()
    files: Files = Files()
    on_bad_image: Literal["raise", "skip"] = "raise"  # of files that cannot be read; skip: train without them
    celeb_a: CelebA = CelebA()
    prefetch: Count = 2  # batches on the way to the devices


@dataclasses.dataclass(frozen=True)
class Eval(Options):
    """`eval`"""

    every: str = "50%"  # the quick suite, any duration; 0: never before the end
    quick: tuple[str, ...] = ("knn", "classifier")  # at each `every`
    # Evaluators by name (`jaxcl evaluate --help` lists them), or package.module:Name.
    final: tuple[str, ...] = ("knn", "linear", "untrained", "raw_pixels", "majority", "classifier", "calibration")
    state: Literal["last", "best"] = "last"  # that the final suite measures; best: on validation images, as in best/
    split: Literal["test", "validation"] = "test"  # that the final suite is measured on; validation to choose settings
    batch_size: Count = 500
    # Side of the images that are evaluated, embedded and exported for, in pixels; 0: that of the views. Encoders see
    # most at the size they were first trained on, and training on at half the side takes a quarter of the time.
    size: Annotated[int, Range(0, 2**15)] = 0
    features: Literal["h", "z"] = "h"  # of knn, linear, logistic: h, pooled features; z, embeddings at unit length
    knn_features: Literal["", "h", "z"] = ""  # knn's own choice of the two; "": as above
    knn_k: Count = 200
    knn_temperature: Annotated[float, POSITIVE] = 0.1
    neighbours: Count = 8  # shown for each image, by the evaluator of that name
    clusters: Size = 0  # groups of alike images, by the evaluator of that name; 0: the square root of half the images
    duplicate_score: float = 0.7  # near-duplicates: of what is at least so alike in structure; 1: the same picture
    logistic_epochs: Count = 1000
    logistic_batch_size: Count = 256
    logistic_lr: Annotated[float, POSITIVE] = 3e-4  # of Adam, constant
    transfer_epochs: Count = 100  # of transfer_augmented
    # Of linear_sgd. customary: by the data set, as of the hierarchical paper; moco, nonsemantic: as of those papers.
    sgd_protocol: Literal["customary", "moco", "nonsemantic"] = "customary"
    sgd_epochs: Size = 0  # of linear_sgd; 0: those of the protocol
    fgsm: Annotated[tuple[float, ...], Range(0)] = (1, 2, 4, 8)  # epsilon in 1/255
    pgd: Annotated[tuple[float, ...], Range(0)] = (1, 2, 4, 8)  # the same
    pgd_steps: Count = 20
    # Of ood, on the linear probe.
    corruptions: tuple[str, ...] = ()  # names as of ImageNet-C; (): all there are (computed here: all but frost)
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)  # (): no corruptions
    # Read instead of computed: a folder of CIFAR-10-C's NumPy files, or any source by its name, such as
    # "tfds:imagenet2012_corrupted/{corruption}_{severity}" or "folder:PATH/{corruption}/{severity}".
    corrupted: str = ""
    ood: tuple[str, ...] = ()  # other sets, classes matched by name: "sketch=folder:PATH"; "sketch@test=..." one split
    shuffle_grids: Annotated[tuple[int, ...], Range(1)] = (2, 4, 8)  # tiles a side of images with shuffled patches
    cue_conflict: str = ""  # shape_bias: a folder of stimuli named like airplane/airplane1-bicycle2.png
    explanation_fraction: Annotated[float, Range(above=0, at_most=1)] = 0.15  # share of pixels kept for drop, increase
    tap: str = "stage2"  # the layer GradCAM explains


@dataclasses.dataclass(frozen=True)
class Checkpoint(Options):
    """`checkpoint`"""

    every: str = "25%"  # any duration; the last step is always saved; 0: only that one
    keep: Count = 2
    keep_best: bool = True  # also keep the best by the classifier on the validation split, where there is one


@dataclasses.dataclass(frozen=True)
class Base(Options):
    """The base keys of a config, in order. Views, stages, passes, terms and memory are the method: empty here."""

    name: str = ""  # shown in the report; the config's file name if empty
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    batch_size: Annotated[int, Range(1, 2**31 - 1)] = 256  # images an update, over all devices
    duration: str = "10 epochs"  # of the encoder's training; any duration: steps, epochs, examples
    size: Annotated[int, Range(0, 2**15)] = 0  # side of the views in pixels; 0: that of the images
    devices: Size = 0  # 0: all there are
    sharding: Literal["data", "zero1", "fsdp"] = "data"  # how the state is split between devices: method/sharding.py
    hosts: Size = 0  # groups of devices that split a state between them; 0: one a process; 1: all devices are one
    data: Data = Data()
    log_every: str = "10 steps"  # any duration, between lines of metrics.jsonl
    collapse_every: str = "0"  # spread and collapse of the embeddings, any duration; 0: never while training
    log_examples: bool = False  # the example ids of every update to examples.jsonl
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    pretrained: dict = dataclasses.field(default_factory=dict)  # what model.weights tells; filled in by the program
    wandb: str = ""  # a Weights & Biases project to log to as well, if the package is installed; "": $WANDB_PROJECT
    report: bool = True  # write report/index.html at the end


def default() -> ConfigDict:
    """Every key a config has, with its default; the slots of the method are empty."""
    c = _node(Base)
    c.model = model("resnet")  # the main encoder
    c.encoders = ConfigDict()  # others beside it, trained in the same update: name -> model(...)
    c.representation = ("",)  # encoders whose features, side by side, classify and are evaluated; "": the main one
    c.heads = ConfigDict()  # trained networks on top of encoders, which terms read: name -> head(...)
    c.optimizer = options(OptimizerOptions)
    c.grad_cache = options(GradCache)  # micro_batch above 0: a larger batch than activations have room for
    c.accumulate = options(Accumulate)  # the same for losses that take each image by itself; cheaper
    c.views = ConfigDict()  # slot 1: name -> view(...)
    c.stages = ()  # slot 2: stage(...), in this order
    c.passes = ()  # slot 3: encode(...)
    c.terms = ConfigDict()  # slot 4: name -> term(...)
    c.memory = ConfigDict()  # slot 5: name -> memory(...)
    return c


def _node(schema: type[Options]) -> ConfigDict:
    values = defaults(schema)
    return ConfigDict({k: _node(type(v)) if isinstance(v, Options) else v for k, v in values.items()})


def options(part: Callable, **overrides: Any) -> ConfigDict:
    """All options of a part with their defaults, some overridden; a misspelt one is refused."""
    return _options(getattr(part, "__name__", str(part)), defaults(part), overrides)


def _options(name: str, known: Mapping[str, Any], overrides: Mapping[str, Any]) -> ConfigDict:
    for key in overrides:
        if key not in known:
            raise UserError(f"{name} has no option {key!r}{suggestion(key, known)}")
    return ConfigDict({**known, **overrides})


def parts_of(path: str) -> Registry | None:
    """The registry of the part at a config path such as "terms.supcon", "stages[0]" or "model"; None for other keys."""
    slot, _, rest = path.replace("[", ".").partition(".")
    single = slot == "model"
    return _REGISTRIES.get(slot) if single == (not rest) and "." not in rest else None


def with_kind(config: ConfigDict, path: str, kind: str) -> None:
    """Replace the part at `path` by one of another kind, in place.

    Options that a common base class of both kinds declares, such as `weight` of a term, keep their values. All others
    are those of the new kind, with its defaults.

    Raises:
      UserError: an unknown kind.
    """
    parts, (slot, _, name) = parts_of(path), path.replace("[", ".").rstrip("]").partition(".")
    old = config[slot] if not name else config[slot][int(name) if slot in LISTS else name]
    if old.kind == kind:
        return
    of_new, of_old = parts.resolve(kind, f"{path}.kind"), parts.resolve(old.kind)
    common = set(getattr(of_new, "__mro__", ())).intersection(getattr(of_old, "__mro__", ()))
    shared = {option for base in common for option in inspect.get_annotations(base)}
    new = memory(kind) if slot == "memory" else _part(parts, kind, {})
    with new.ignore_type():
        for option in shared.intersection(old, new):
            new[option] = old[option]
        if "optimizer" in new and "optimizer" in old:
            new.optimizer = old.optimizer
    with config.unlocked(), config.ignore_type():
        if slot in LISTS:
            config[slot] = tuple(new if i == int(name) else part for i, part in enumerate(config[slot]))
        elif name:
            config[slot][name] = new
        else:
            config[slot] = new
    if (path == "model" or slot == "encoders") and "norm_sets" not in new:
        _without_norm_sets(config, name)


def _without_norm_sets(config: ConfigDict, encoder: str) -> None:
    """Passes and stages of an encoder without batch norms, in a config for one that has several sets of them."""
    for p in config.passes:
        if p.encoder == encoder:
            p.norm_set = ""
    for stage in config.stages:
        if "norm_set" in stage and not encoder:
            stage.norm_set = ""


# Named here so that configs need import nothing else.
__all__ = [
    "OptimizerOptions",
    "choose",
    "default",
    "encode",
    "extend",
    "finetune",
    "head",
    "memory",
    "model",
    "options",
    "parts_of",
    "stage",
    "term",
    "title",
    "view",
    "with_finetune",
    "with_kind",
    "without_labels",
]


def _part(parts: Registry, kind: str, overrides: Mapping[str, Any]) -> ConfigDict:
    c = options(parts.resolve(kind), **overrides)
    c.kind = kind
    return c


_REGISTRIES = {
    "views": registry.VIEWS,
    "stages": registry.STAGES,
    "terms": registry.TERMS,
    "memory": registry.MEMORY,
    "heads": registry.HEADS,
    "encoders": MODELS,
    "model": MODELS,
}


def view(kind: str, **overrides: Any) -> ConfigDict:
    """A view by kind: random, standard, classifier."""
    return _part(registry.VIEWS, kind, overrides)


def stage(kind: str, **overrides: Any) -> ConfigDict:
    """A stage by kind: saliency, adversary, patch_negatives, texture_negatives."""
    return _part(registry.STAGES, kind, overrides)


def model(kind: str, **overrides: Any) -> ConfigDict:
    """An encoder by kind: resnet, vision_transformer, vit."""
    return _part(MODELS, kind, overrides)


def head(kind: str, **overrides: Any) -> ConfigDict:
    """A head by kind: classifier, decoder, mlp."""
    return _part(registry.HEADS, kind, overrides)


def encode(*views: str, **options: Any) -> ConfigDict:
    """A pass: these views are encoded together, by an encoder ("": the main one) and one of its sets of batch norms.

    Terms know the embeddings by the views' names: "view1", or "auto/view1" from the encoder called auto. Options:
    norm_set, encoder, bn_groups, shuffle, depth; see `jaxcl.method.recipe.ForwardPass`.
    """
    c = _options("a pass", defaults(ForwardPass), options)
    c.views = tuple(views)
    return c


def term(kind: str, **overrides: Any) -> ConfigDict:
    """A term by kind: supcon, nt_xent, one_way_infonce, instance_spread, spread, ..."""
    return _part(registry.TERMS, kind, overrides)


def memory(kind: str, *, optimizer: Mapping[str, Any] | None = None, **overrides: Any) -> ConfigDict:
    """A memory part by kind: linear_probe, with an optimiser of its own; ema, queue."""
    c = _part(registry.MEMORY, kind, overrides)
    if registry.MEMORY.resolve(kind).trained:
        c.optimizer = options(OptimizerOptions, **(optimizer or {}))
    return c


def without_labels(c: ConfigDict) -> None:
    """No classifier beside the encoder, and an evaluation that needs none: what lies near what; nothing is attacked."""
    if "probe" in c.memory:
        del c.memory.probe
    kept = tuple(name for name in c.eval.final if name not in OF_CLASSIFIERS and name not in OF_IMAGES)
    c.eval.final = (*OF_IMAGES, *kept)


def finetune(c: ConfigDict) -> None:
    """Train on from weights, on a few images: smaller steps, the heads first, milder views, and what it changed.

    Conventions all, none of them measured: see docs/finetune.md.
    """
    c.duration = "200 steps"  # in place of epochs: folders of any size get enough updates
    c.optimizer = options(
        OptimizerOptions,
        kind="adamw",
        lr=1e-3,  # of the heads, which are new
        encoder_lr=0.1,  # of the encoder, which is not
        layer_decay=0.0,  # as is usual for its kind
        weight_decay=1e-4,
        schedule="cosine",
        warmup="20%",
        head_warmup="10%",  # then the encoder joins, at half of the rate's peak
        constant_lr=c.optimizer.constant_lr,
    )
    c.model.norm_statistics = "frozen"  # those of few images lose more than training on gains
    for view in c.views.values():
        if view.kind == "random":  # small crops and strong colours are for learning from nothing
            view.crop_area = (max(0.4, view.crop_area[0]), view.crop_area[1])
            view.jitter = tuple(map(min, view.jitter, (0.4, 0.4, 0.2, 0.1)))
    c.eval.final += ("pretrained", "drift")


def with_finetune(get_config: Callable[[str], ConfigDict]) -> Callable[[str], ConfigDict]:
    """A config's function that also takes the word "finetune" among its presets, see `finetune`."""

    @functools.wraps(get_config)
    def get(preset: str = "") -> ConfigDict:
        words = [w.strip() for w in (preset or "").split(",")]
        c = get_config(",".join(w for w in words if w != "finetune"))
        if "finetune" in words:
            finetune(c)
            c.name += " finetune"
        return c

    return get


def choose(argument: str | None, *axes: Sequence[str]) -> tuple[str, ...]:
    """One word an axis from a config's suffix: choose("cifar100,excon", datasets, variants).

    The first word of an axis is its default; words come in any order, separated by commas.
    """
    words = [w.strip() for w in (argument or "").split(",") if w.strip()]
    words = ["unlabelled" if w == "unlabeled" else w for w in words]  # either spelling
    chosen = []
    for axis in axes:
        mine = [w for w in words if w in axis]
        if len(mine) > 1:
            raise UserError(f"preset {argument!r} names both {mine[0]!r} and {mine[1]!r}; choose one")
        chosen.append(mine[0] if mine else axis[0])
    known = [w for axis in axes for w in axis if w]
    for w in words:
        if w not in known:
            raise UserError(f"unknown preset {w!r}{suggestion(w, known)}")
    return tuple(chosen)


def title(method: str, chosen: Sequence[str], usual: Sequence[str]) -> str:
    """A run's name for people: the method and what is not as usual, "excon cifar100 alternating"."""
    return " ".join([method, chosen[0], *(w for w, u in zip(chosen[1:], usual[1:], strict=True) if w != u)])


def extend(config_file: str, sibling: str, preset: str) -> ConfigDict:
    """The config of another file in the same folder, to change from there: the file then holds the difference."""
    path = pathlib.Path(config_file).with_name(sibling)
    spec = importlib.util.spec_from_file_location(f"jaxcl_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(preset)


def check(config: ConfigDict) -> None:
    """Check the base keys: names, types, ranges. Parts are checked where they are made.

    Errors: UserError, one line that begins with the key, for anything a config file or the command line set wrongly.
    """
    _check_node(config, Base, "", (*MAPPINGS, *LISTS, *PARTS, "representation"))
    check_option("representation", config.representation, REPRESENTATION)
    for name in (*MAPPINGS, *PARTS):
        _check_mapping(name, config[name])
    for name in MAPPINGS:
        for key, node in config[name].items():
            _check_mapping(f"{name}.{key}", node)
    for name, node in config.memory.items():
        if "optimizer" in node:
            _check_mapping(f"memory.{name}.optimizer", node.optimizer)
    for name in LISTS:
        if not isinstance(config[name], (tuple, list)):
            raise UserError(f"{name} is {quoted(config[name])}; expected a tuple of them")
        for i, node in enumerate(config[name]):
            _check_mapping(f"{name}[{i}]", node)


REPRESENTATION = Option(("",), tuple[str, ...])


def _check_node(node: ConfigDict, schema: type[Options], prefix: str, others: Sequence[str] = ()) -> None:
    known = options_of(schema)
    for key in node:
        if key not in known and key not in others:
            raise UserError(f"unknown config key {prefix}{key}{suggestion(key, [*known, *others])}")
    for key in (*known, *others):
        if key not in node:
            raise UserError(f"config key {prefix}{key} is missing; start from jaxcl.config.default()")
    for key, option in known.items():
        name = f"{prefix}{key}"
        if name in FREE_FORM:
            _check_mapping(name, node[key])
        elif isinstance(option.default, Options):
            _check_mapping(name, node[key])
            _check_node(node[key], type(option.default), f"{name}.")
        else:
            check_option(name, node[key], option)


def _check_mapping(name: str, node: Any) -> None:
    if not isinstance(node, (ConfigDict, Mapping)):
        raise UserError(f"{name} is {quoted(node)}; expected keys and values, as jaxcl.config makes them")


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """Plain containers, as written to config.json."""
    return json.loads(config.to_json_best_effort())


def from_dict(plain: Mapping[str, Any]) -> ConfigDict:
    """A config from what `to_dict` gave; keys that have come since have their defaults."""
    config = default()
    with config.unlocked():
        if plain.get("model", {}).get("kind", config.model.kind) != config.model.kind:
            del config.model  # else options of the default kind would remain beside those of this one
        _fill(config, plain)
    return config


def _fill(config: ConfigDict, plain: Mapping[str, Any]) -> None:
    for key, value in plain.items():
        if isinstance(value, Mapping) and isinstance(config.get(key), ConfigDict):
            _fill(config[key], value)
        else:
            # Not checked against the default's type: a tuple comes back as a list.
            if key in config:
                del config[key]
            config[key] = ConfigDict(value) if isinstance(value, Mapping) else _frozen(value)


def _frozen(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(ConfigDict(v) if isinstance(v, Mapping) else _frozen(v) for v in value)
    return value
