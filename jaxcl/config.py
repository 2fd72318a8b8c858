"""What every config starts from, and the small words configs are written in.

from jaxcl import config as base

def get_config(preset="garments"):
    c = base.default()
    c.views.view1 = base.view("random", crop_area=(0.2, 1.0))
    ...
"""

import hashlib
import importlib.util
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from jaxcl import config_check, recipe
from jaxcl.accumulate import Accumulate
from jaxcl.errors import UserError
from jaxcl.grad_cache import GradCache
from jaxcl.optimizers import OptimizerOptions

# Keys that may differ between a run and its continuation: they change nothing of what is learned.
FREE_KEYS = (
    "log_every",
    "collapse_every",
    "log_examples",
    "checkpoint",
    "report",
    "wandb",
    "eval",
    "devices",
    "hosts",
    "sharding",
    "data.prefetch",
    "data.tfds.data_dir",
)


def default() -> ConfigDict:
    """Every key a config has, without views, stages, passes, terms and memory: those are the method."""
    c = ConfigDict()
    c.name = ""  # shown in the report; the config's file name if empty
    c.seed = 0
    c.batch_size = 256  # images an update, over all devices
    c.duration = "10 epochs"  # of the encoder; any duration: steps, epochs, examples
    c.size = 0  # side of the views in pixels; 0: the images' own
    c.devices = 0  # 0: all there are
    c.sharding = "data"  # or "zero1", "fsdp": state is split between the devices of a host; see jaxcl/sharding.py
    c.hosts = 0  # groups of devices that split a state between them; 0: one a process; 1: all devices are one

    c.data = ConfigDict()
    # garments, fashion_mnist, npz:PATH, cifar:PATH, tfds:NAME, folder:PATH, csv:PATH, waterbirds:PATH, celeb_a:PATH,
    # voc:PATH
    c.data.source = "garments"
    c.data.validation = 0.0  # share of the training set held out; evaluation then selects on it, not on the test set
    c.data.validation_split = "balanced"  # class by class; or "released", as Thanos's code splits
    c.data.limit = 0  # use only this many training images, class-balanced; 0: all
    c.data.labels = "fine"  # or "coarse": train on the coarse classes, where the source has both
    c.data.imbalance = ""  # or "cifar100u": CIFAR-100 with rare classes in each superclass, in training only
    c.data.per_class = (
        0  # images of each class in a batch, which then has batch_size / per_class classes; 0: as it comes
    )
    c.data.textures = ""  # a folder by jaxcl.data.textures: texture negatives are read there, not made in the update
    c.data.garments = ConfigDict()
    c.data.garments.spurious = 0.0  # how often the texture follows the class in training, 0 to 1
    c.data.garments.spurious_on = "background"  # or "fill"
    c.data.tfds = ConfigDict()
    c.data.tfds.data_dir = ""  # where the prepared folders are; "": TFDS's own default
    c.data.tfds.image_size = 0  # resize to this side when images differ in shape
    c.data.tfds.label = ""  # the feature that labels an image, if not the usual one: an attribute such as Blond_Hair
    c.data.tfds.group = ""  # a feature that divides every class into groups, such as Male
    c.data.files = ConfigDict()  # of folder, csv, waterbirds and celeb_a; and of voc, whose own size is 224
    c.data.files.image_size = 0  # side after resizing; 0: as they are if all alike and at most 256, otherwise 64
    c.data.on_bad_image = "raise"  # of files that cannot be read; "skip": train without them
    c.data.celeb_a = ConfigDict()
    c.data.celeb_a.target = "Blond_Hair"  # the attribute that is the class
    c.data.celeb_a.group = "Male"  # the one that divides each class into groups
    c.data.prefetch = 2  # batches on the way to the devices

    c.model = model("resnet")  # the main encoder
    c.encoders = ConfigDict()  # others beside it, trained in the same update: name -> model(...)
    c.representation = ("",)  # encoders whose features, side by side, classify and are evaluated; "": the main one
    c.heads = ConfigDict()  # trained parts on top of encoders, which terms read: name -> head(...)
    c.optimizer = options(OptimizerOptions)
    c.grad_cache = options(GradCache)  # micro_batch above 0: a larger batch than activations have room for
    c.accumulate = options(Accumulate)  # the same for losses that take each image by itself; cheaper

    c.views = ConfigDict()  # slot 1: name -> view(...)
    c.stages = ()  # slot 2: stage(...), in this order
    c.passes = ()  # slot 3: encode(...)
    c.terms = ConfigDict()  # slot 4: name -> term(...)
    c.memory = ConfigDict()  # slot 5: name -> memory(...)

    c.log_every = "10 steps"  # any duration, between lines of metrics.jsonl
    c.collapse_every = "0"  # spread and collapse of the embeddings, any duration; 0: never while training
    c.log_examples = False  # the example ids of every update to examples.jsonl, to see that none is lost or repeated
    c.eval = ConfigDict()
    c.eval.every = "50%"  # the quick suite, any duration; 0: never before the end
    c.eval.quick = ("knn", "classifier")  # every `every`
    c.eval.final = ("knn", "linear", "raw_pixels", "classifier", "explanation", "fgsm", "calibration")
    # Also known: logistic (the protocol of CLAE); pgd, and the attacks on the linear probe, linear_fgsm and linear_pgd
    # (PGD is slow); adversary (what the adversary of the training does to a batch); transfer (fine classes from an
    # encoder of coarse ones), transfer_augmented (the same by the protocol of its paper); worst_group (where groups are
    # known); collapse (spread of the embeddings); ood (shifted, corrupted, shuffled and other images); shape_bias
    # (of images whose texture speaks for another class); linear_sgd (a probe on augmented images, by the data set's
    # usual schedule); neighbours (the nearest images, and near-duplicates; needs no labels); invariance (of each stage,
    # to what); color (what is kept of it) and tint (its quickest part); dense (labels of pixels from each stage's map).
    c.eval.split = "test"  # what the final suite is measured on; "validation" to choose settings by
    c.eval.batch_size = 500
    c.eval.features = "h"  # what knn, linear and logistic see: h, pooled features; z, the embedding at unit length
    c.eval.knn_features = ""  # knn's own choice of the two; "": as above
    c.eval.knn_k = 200
    c.eval.knn_temperature = 0.1
    c.eval.neighbours = 8  # of each image, in the evaluator of that name
    c.eval.duplicate_cosine = 0.95  # near-duplicates: features at least so alike,
    c.eval.duplicate_pixels = 0.06  # and pixels no further apart, root mean square, as a share of their range
    c.eval.logistic_epochs = 1000
    c.eval.logistic_batch_size = 256
    c.eval.logistic_lr = 3e-4  # of Adam, constant
    c.eval.transfer_epochs = 100  # of transfer_augmented
    c.eval.sgd_epochs = 0  # of linear_sgd; 0: as is customary for the data set
    c.eval.fgsm = (1, 2, 4, 8)  # epsilon in 1/255
    c.eval.pgd = (1, 2, 4, 8)  # the same
    c.eval.pgd_steps = 20
    # Of ood, on the linear probe; what is made of test images is made at the end, the same for all runs.
    c.eval.corruptions = ()  # names as of ImageNet-C; (): all there are (computed here: all but frost)
    c.eval.severities = (1, 2, 3, 4, 5)  # (): no corruptions
    c.eval.corrupted = ""  # read instead of computed: a folder of CIFAR-10-C's NumPy files, or any source by its name,
    # such as "tfds:imagenet2012_corrupted/{corruption}_{severity}" or "folder:PATH/{corruption}/{severity}"
    c.eval.ood = ()  # other sets, classes matched by name: "sketch=folder:PATH"; "sketch@test=..." for one split of it
    c.eval.shuffle_grids = (2, 4, 8)  # tiles a side of the test images with their patches shuffled
    c.eval.cue_conflict = ""  # shape_bias: a folder of stimuli named like airplane/airplane1-bicycle2.png
    c.eval.explanation_fraction = 0.15  # share of pixels kept for drop and increase in confidence
    c.eval.tap = "stage2"  # the layer GradCAM explains
    c.checkpoint = ConfigDict()
    c.checkpoint.every = "25%"  # any duration; the last step is always saved; 0: only that one
    c.checkpoint.keep = 2
    c.checkpoint.keep_best = True  # also keep the best by the classifier on the validation split, where there is one
    c.wandb = ""  # a project of Weights & Biases to log to as well, if the package is installed; "": $WANDB_PROJECT
    c.report = True  # write report/index.html at the end
    return c


def options(part: Callable, **overrides: Any) -> ConfigDict:
    """All options of a part with their defaults, some overridden; a misspelt one is refused."""
    return _options(getattr(part, "__name__", part), recipe.fields(part), overrides)


def _options(name: str, known: Mapping[str, Any], overrides: Mapping[str, Any]) -> ConfigDict:
    for key in overrides:
        if key not in known:
            raise UserError(f"{name} has no option {key!r}{recipe.suggestion(key, known)}")
    return ConfigDict({**known, **overrides})


# Named here so that configs need import nothing else.
__all__ = [
    "OptimizerOptions",
    "choose",
    "default",
    "encode",
    "extend",
    "head",
    "memory",
    "model",
    "options",
    "stage",
    "term",
    "title",
    "view",
    "without_labels",
]


def _part(registry: Mapping[str, Callable], what: str, kind: str, overrides: Mapping[str, Any]) -> ConfigDict:
    if kind not in registry:
        raise UserError(f"no {what} is called {kind!r}{recipe.suggestion(kind, registry)}")
    c = options(registry[kind], **overrides)
    c.kind = kind
    return c


def view(kind: str, **overrides: Any) -> ConfigDict:
    """A view by kind: random, standard, classifier."""
    return _part(recipe.VIEWS, "view", kind, overrides)


def stage(kind: str, **overrides: Any) -> ConfigDict:
    """A stage by kind: saliency, adversary, patch_negatives, texture_negatives."""
    return _part(recipe.STAGES, "stage", kind, overrides)


def model(kind: str, **overrides: Any) -> ConfigDict:
    """An encoder by kind: resnet, vit."""
    return _part(recipe.MODELS, "model", kind, overrides)


def head(kind: str, **overrides: Any) -> ConfigDict:
    """A head by kind: classifier, decoder, mlp."""
    return _part(recipe.HEADS, "head", kind, overrides)


def encode(*views: str, **options: Any) -> ConfigDict:
    """A pass: these views are encoded together, by an encoder ("": the main one) and one of its sets of batch norms.

    Terms know the embeddings by the views' names: "view1", or "auto/view1" from the encoder called auto. Options:
    norm_set, encoder, bn_groups, shuffle, depth; see `recipe.Pass`.
    """
    c = _options("a pass", recipe.fields(recipe.Pass), options)
    c.views = tuple(views)
    return c


def term(kind: str, **overrides: Any) -> ConfigDict:
    """A term by kind: supcon, nt_xent, one_way_infonce, instance_spread, spread, ..."""
    return _part(recipe.TERMS, "term", kind, overrides)


def memory(kind: str, *, optimizer: Mapping[str, Any] | None = None, **overrides: Any) -> ConfigDict:
    """A memory part by kind: linear_probe, with an optimiser of its own; ema, queue."""
    c = _part(recipe.MEMORY, "memory", kind, overrides)
    if recipe.MEMORY[kind].trained:
        c.optimizer = options(OptimizerOptions, **(optimizer or {}))
    return c


def without_labels(c: ConfigDict) -> None:
    """No classifier beside the encoder, and an evaluation that needs none: what lies near what."""
    if "probe" in c.memory:
        del c.memory.probe
    if "neighbours" not in c.eval.final:
        c.eval.final += ("neighbours",)


def choose(argument: str | None, *axes: Sequence[str]) -> tuple[str, ...]:
    """One word an axis from a config's suffix: choose("cifar100,excon", datasets, variants).

    The first word of an axis is its default; words come in any order, separated by commas.
    """
    words = [w.strip() for w in (argument or "").split(",") if w.strip()]
    chosen = []
    for axis in axes:
        mine = [w for w in words if w in axis]
        if len(mine) > 1:
            raise UserError(f"preset {argument!r} names both {mine[0]!r} and {mine[1]!r}; choose one")
        chosen.append(mine[0] if mine else axis[0])
    known = [w for axis in axes for w in axis]
    for w in words:
        if w not in known:
            raise UserError(f"unknown preset {w!r}{recipe.suggestion(w, known)}")
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
    """UserError for what no config has; a config file, unlike the command line, can set any key to anything."""
    config_check.check(config, default())


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """Plain containers, as written to config.json."""
    return json.loads(config.to_json_best_effort())


def from_dict(plain: Mapping[str, Any]) -> ConfigDict:
    """A config from what `to_dict` gave; keys that have come since have their defaults."""
    config = default()
    with config.unlocked():
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


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"model.depth": 18, "stages[0].tap": "stage2", ...}"""
    if isinstance(tree, dict):
        items = [(f"{prefix}.{k}" if prefix else k, v) for k, v in tree.items()]
    elif isinstance(tree, list) and any(isinstance(v, dict) for v in tree):
        items = [(f"{prefix}[{i}]", v) for i, v in enumerate(tree)]
    else:
        return {prefix: tree}
    return {k: v for key, value in items for k, v in flatten(value, key).items()}


def _learned(config: dict[str, Any]) -> dict[str, Any]:
    """The keys that decide what is learned, flat."""

    def free(key: str) -> bool:
        return any(key == f or key.startswith((f"{f}.", f"{f}[")) for f in FREE_KEYS)

    return {k: v for k, v in flatten(config).items() if not free(k)}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Keys in which two configs would learn something else, as "key: old -> new"."""
    a, b = _learned(old), _learned(new)
    return [f"{k}: {a.get(k)!r} -> {b.get(k)!r}" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]


def fingerprint(config: dict[str, Any]) -> str:
    """A short hash of what a config learns; equal for a run and its continuation."""
    return hashlib.sha256(json.dumps(_learned(config), sort_keys=True).encode()).hexdigest()[:12]
