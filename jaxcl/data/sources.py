"""`make_source`: one string in the config names an image set."""

import inspect
from collections.abc import Callable
from importlib import import_module

import numpy as np

from jaxcl.data.base import Source, selector
from jaxcl.data.label_levels import LEVELS, at_level
from jaxcl.errors import UserError

__all__ = ["KINDS", "Source", "make_source"]

# kind -> (module, whether the spec carries an argument, how it is written). Modules load when they are asked
# for.
KINDS = {
    "garments": ("jaxcl.data.garments", False, "garments"),
    "fashion_mnist": ("jaxcl.data.fashion_mnist", False, "fashion_mnist"),
    "npz": ("jaxcl.data.npz", True, "npz:PATH"),
    "cifar": ("jaxcl.data.cifar", True, "cifar:PATH"),
    "tfds": ("jaxcl.data.tfds", True, "tfds:NAME"),
    "folder": ("jaxcl.data.folder", True, "folder:PATH"),
    "csv": ("jaxcl.data.csv_file", True, "csv:PATH"),
    "waterbirds": ("jaxcl.data.waterbirds", True, "waterbirds:PATH"),
    "celeb_a": ("jaxcl.data.celeb_a", True, "celeb_a:PATH"),
    "voc": ("jaxcl.data.voc", True, "voc:PATH"),
}


UNBALANCED = (500, 250, 100, 50, 50)  # images of the classes of a superclass, in their order


def make_source(
    spec: str,
    *,
    split: str = "train",
    seed: int = 0,
    validation: float = 0.0,
    limit: int | None = None,
    labels: str = "fine",
    validation_split: str = "balanced",
    imbalance: str = "",
    **options,
) -> Source:
    """The image set that `spec` names.

    Args:
      spec: "garments" (embedded, composed in colour, with true masks), "fashion_mnist" (embedded, 10,000 +
        2,000), "npz:PATH" (arrays `images` and optionally `labels`, or train_images / train_labels /
        test_images / test_labels; a file without a test part gives up a fixed tenth of every class as test,
        whatever the seed), "cifar:PATH" (the folder of CIFAR-10 or CIFAR-100, python or binary version),
        "tfds:NAME" (a prepared TFDS folder; options `data_dir`, `image_size`, and `label` and `group`, which name
        attributes). Of image files, with the options `image_size` and `on_bad_image`, local or remote ("gs://..."):
        "folder:PATH" (one folder a class, or one without labels; in train/ and test/ or val/, or else tested on a fixed
        tenth), "csv:PATH" (path,label[,coarse][,group][,split]), "waterbirds:PATH" and "celeb_a:PATH" (as published;
        extras["group"]; options of celeb_a: `target`, `group`). "voc:PATH" is a folder like PASCAL VOC's, with a class
        for each pixel (option `image_size`).
      split: "train", "test" or "validation"; garments has "test_shifted" and "cue_conflict" too.
      seed: of the hold-out and of the cut-down choice.
      validation: fraction of every class of the training part that is held out: split="train" is without it,
        split="validation" is it. In [0, 1). At 0, split="validation" is the validation part that tfds, folder, csv,
        waterbirds and celeb_a may have besides their test part; nothing of it is ever trained on.
      limit: at most so many examples, a seeded class-balanced choice.
      labels: "fine", or "coarse": the coarse classes become the labels and the fine ones extras["fine"], for
        garments and fashion_mnist (10 -> 4), CIFAR-10 (2), CIFAR-100 (20), tfds:mnist (2), a tfds:tiny_imagenet (67
        ids, of which 52 occur), npz files with coarse_labels and csv files with a column coarse. The images are the
        same ones: hold-out, limit and imbalance always go by the fine classes.
      validation_split: "balanced", or "released": the one seeded permutation (torch.randperm, seed 42) of which the
        released code of Thanos holds out the end, not balanced over classes and the same whatever `seed`.
      imbalance: "", or "cifar100u": of the five classes of each superclass of CIFAR-100, in the order of their
        numbers, at most 500, 250, 100, 50 and 50 training images, a seeded choice without replacement. Validation
        and test stay natural.
      **options: of that kind of source.

    Raises:
      UserError: unknown spec, split or option, unreadable data, or labels="coarse" of a set without a second level.
    """
    kind, colon, argument = spec.partition(":")
    known = ", ".join(form for _, _, form in KINDS.values())
    if kind not in KINDS:
        raise UserError(f"unknown data source {spec!r}; known: {known}")
    module, wants_argument, form = KINDS[kind]
    if wants_argument != bool(argument) or bool(colon) != wants_argument:
        raise UserError(f"data source {spec!r} must be written {form}; known: {known}")
    if not 0.0 <= validation < 1.0:
        raise UserError(f"validation={validation} must be a fraction from 0 up to, not including, 1")
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit} must be at least 1")
    if validation_split not in ("balanced", "released"):
        raise UserError(f"validation_split={validation_split!r} must be 'balanced' or 'released'")
    if imbalance not in ("", "cifar100u"):
        raise UserError(f"imbalance={imbalance!r} must be 'cifar100u', or '' for none")

    reader = import_module(module)
    splits = ("train", "test", "validation", *getattr(reader, "EXTRA_SPLITS", ()))
    if split not in splits:
        raise UserError(f"unknown split {split!r} of {spec}; known: {', '.join(splits)}")
    _check_options(spec, reader.load, options)
    own = has_own_validation(spec)
    if split == "validation" and not (validation or own):
        raise UserError("split='validation' is held out of the training part: set validation, for example 0.2")
    select = selector(
        split=split,
        validation=validation,
        limit=limit,
        seed=seed,
        spec=spec,
        released=validation_split == "released",
        counts=cifar100u() if imbalance else None,
    )
    arguments = (argument,) if wants_argument else ()
    if own:  # which part of the set the split is taken from
        options["part"] = "train" if split == "validation" and validation else split
    source = reader.load(*arguments, split=split, select=select, **options)
    if imbalance and (source.num_classes != 100 or not source.in_memory):
        raise UserError(f"{spec}: imbalance='cifar100u' is for CIFAR-100, and this has {source.num_classes} classes")
    return at_level(source, labels, spec=spec)


def has_own_validation(spec: str) -> bool:
    """Whether a set of this kind may have a validation part of its own; only reading it tells."""
    module = KINDS.get(spec.partition(":")[0], ("",))[0]
    return bool(module) and getattr(import_module(module), "OWN_VALIDATION", False)


def cifar100u() -> np.ndarray:
    """Training images of each class in the unbalanced CIFAR-100, int64 [100]."""
    counts = np.empty(100, np.int64)
    of_class = LEVELS["cifar100"].of_class
    for superclass in range(20):
        counts[of_class == superclass] = UNBALANCED
    return counts


def _check_options(spec: str, load: Callable, options: dict) -> None:
    parameters = inspect.signature(load).parameters.values()
    names = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ("split", "part", "select")]
    for option in options:
        if option not in names:
            raise UserError(f"unknown option {option!r} of data source {spec}; known: {', '.join(names) or 'none'}")
