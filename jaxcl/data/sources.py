"""`make_source`: the image set that a spec such as "garments" or "folder:PATH" names."""

import importlib.util
import os
import sys

import numpy as np

from jaxcl.data.kind import SourceKind
from jaxcl.data.label_levels import LEVELS, at_level
from jaxcl.data.listing import check_classes
from jaxcl.data.paths import is_idx
from jaxcl.data.registry import SOURCES
from jaxcl.data.selection import selector
from jaxcl.data.source import Source
from jaxcl.errors import UserError
from jaxcl.runtime.options import construct, suggestion

UNBALANCED = (500, 250, 100, 50, 50)  # images of the classes of a superclass, in the order of their numbers


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
        test_images / test_labels; without test images a fixed tenth of every class is the test split,
        whatever the seed), "cifar:PATH" (the folder of CIFAR-10 or CIFAR-100, python or binary version),
        "tfds:NAME" (a prepared TFDS folder; options `data_dir`, `image_size`, and `label` and `group`, which name
        features). Image files, local or remote ("gs://..."), with the options `image_size`, `fit` and `on_bad_image`:
        "folder:PATH" (one folder per class, or one without labels; with train/ and test/ or val/, otherwise a fixed
        tenth is the test split), "csv:PATH" (path,label[,coarse][,group][,split]), "waterbirds:PATH" and
        "celeb_a:PATH" (as published; extras["group"]; options of celeb_a: `target`, `group`). "voc:PATH" is a folder
        like PASCAL VOC's, with a class for each pixel (option `image_size`). "package.module:Name" or
        "package.module:Name:ARGUMENT" is a `SourceKind` of your own.
      split: "train", "test" or "validation"; garments also has "test_shifted" and "cue_conflict".
      seed: of the hold-out and of the cut-down choice.
      validation: fraction of every class of the training split to hold out: split="train" is without it,
        split="validation" is it. In [0, 1). At 0, split="validation" is the set's own validation split, which tfds,
        folder, csv, waterbirds and celeb_a may have besides the test split. It is never trained on.
      limit: the largest number of examples, a seeded class-balanced choice; None: all.
      labels: "fine", or "coarse": the coarse classes become the labels and the fine ones extras["fine"], for
        garments and fashion_mnist (10 -> 4), CIFAR-10 (2), CIFAR-100 (20), tfds:mnist (2), a tfds:tiny_imagenet (67
        ids, of which 52 occur), npz files with coarse_labels and csv files with a column coarse. The images do not
        change: hold-out, limit and imbalance always use the fine classes.
      validation_split: "balanced", or "released": Thanos's released code holds out the end of one seeded permutation
        (torch.randperm, seed 42), which is not balanced over classes and does not depend on `seed`.
      imbalance: "", or "cifar100u": at most 500, 250, 100, 50 and 50 training images of the five classes of each
        superclass of CIFAR-100, in the order of their numbers, a seeded choice without replacement. Validation
        and test splits stay natural.
      **options: of this kind of source.

    Returns:
      The rows of the split as a `Source`.

    Raises:
      UserError: unknown spec, split or option, unreadable data, or labels="coarse" of a set without coarse classes.
    """
    kind, argument = parse(spec)
    made = construct(f"data source {spec}", kind, options)
    return load(
        made,
        argument,
        spec,
        split=split,
        seed=seed,
        validation=validation,
        limit=limit,
        labels=labels,
        validation_split=validation_split,
        imbalance=imbalance,
    )


def load(
    kind: SourceKind,
    argument: str,
    spec: str,
    *,
    split: str,
    seed: int,
    validation: float,
    limit: int | None,
    labels: str,
    validation_split: str,
    imbalance: str,
) -> Source:
    """`make_source` of a kind that has been made with its options."""
    if not 0.0 <= validation < 1.0:
        raise UserError(f"validation={validation} must be a fraction from 0 up to, not including, 1")
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit} must be at least 1")
    if labels not in ("fine", "coarse"):
        raise UserError(f"labels={labels!r} must be 'fine' or 'coarse'")
    if validation_split not in ("balanced", "released"):
        raise UserError(f"validation_split={validation_split!r} must be 'balanced' or 'released'")
    if imbalance not in ("", "cifar100u"):
        raise UserError(f"imbalance={imbalance!r} must be 'cifar100u', or '' for none")
    splits = ("train", "test", "validation", *kind.extra_splits)
    if split not in splits:
        raise UserError(f"unknown split {split!r} of {spec}; known: {', '.join(splits)}")
    if split == "validation" and not (validation or kind.own_validation):
        raise UserError("split='validation' is held out of the training split: set validation, for example 0.2")
    select = selector(
        split=split,
        validation=validation,
        limit=limit,
        seed=seed,
        spec=spec,
        released=validation_split == "released",
        counts=cifar100u() if imbalance else None,
    )
    base_split = "train" if split == "validation" and validation else split
    source = kind.load(argument, split=split, base_split=base_split, select=select)
    if split == "train" and limit is None and kind.argument and len(source):  # the user's own files, all of them
        check_classes(f"{spec}: labels", source.num_classes, len(source))
        for key in ("coarse", "group"):
            if len(values := source.extras.get(key, ())):
                check_classes(f"{spec}: values of {key}", int(values.max()) + 1, len(source))
    if imbalance and (source.num_classes != 100 or not source.in_memory):
        raise UserError(f"{spec}: imbalance='cifar100u' is for CIFAR-100, and this has {source.num_classes} classes")
    return at_level(source, labels, spec=spec)


def parse(spec: str, where: str = "the data source") -> tuple[type[SourceKind], str]:
    """The kind of source that a spec names, and the argument that follows it ("" for none).

    where: the config key that holds the spec, for messages.

    Errors: UserError for an unknown kind, or an argument that is missing or too many.
    """
    name, colon, argument = spec.partition(":")
    if name not in SOURCES:
        module, (attribute, colon, argument) = name, argument.partition(":")
        if not _is_dotted(module) or not _is_dotted(attribute) or not _may_exist(module):
            raise UserError(_unknown(spec))
        name = f"{module}:{attribute}"
    kind = SOURCES.resolve(name, where)
    if not isinstance(kind, type):
        raise UserError(f"{where} is {name!r}, a function; expected a subclass of {SOURCES.contract.__name__}")
    if bool(kind.argument) != bool(argument) or bool(colon) != bool(kind.argument):
        raise UserError(f"data source {spec!r} must be written {_form(name)}; known: {_known()}")
    return kind, argument


def has_own_validation(spec: str) -> bool:
    """Whether a set of this kind may have its own validation split. Only reading the set shows whether it does.

    False for an unknown kind, which is refused when the set is read.
    """
    try:
        return parse(spec)[0].own_validation
    except UserError:
        return False


def keeps_size(spec: str) -> bool:
    """Whether images of this kind keep the size of their files where no image_size is given."""
    return parse(spec)[0].keeps_size


def default_fit(spec: str) -> str:
    """How images of this kind become squares where the config does not say; "" for kinds that are no image files."""
    return getattr(parse(spec)[0], "default_fit", "")


def _is_dotted(name: str) -> bool:
    return all(word.isidentifier() for word in name.split("."))


def _may_exist(module: str) -> bool:
    """Whether a name may be a module: a misspelt kind is one word, and no module has that name."""
    return "." in module or module in sys.modules or importlib.util.find_spec(module) is not None


def _form(name: str) -> str:
    """How a spec of this kind is written."""
    argument = SOURCES.resolve(name).argument
    return f"{name}:{argument}" if argument else name


def _known() -> str:
    return f"{', '.join(map(_form, SOURCES))}, or one of your own as package.module:Name[:ARGUMENT]"


def _unknown(spec: str) -> str:
    path = os.path.expanduser(spec)
    if "://" in spec:
        return f"data source {spec!r} is a path; write its kind before it: folder:{spec}"
    if os.path.exists(path):
        return f"data source {spec!r} is a path; write its kind before it: {_of_path(spec, path)}"
    if "/" in spec.partition(":")[0]:
        return f"data source {spec!r} is a path that does not exist; a path is written with its kind, as in {_known()}"
    hint = suggestion(spec.partition(":")[0], SOURCES)
    return f"unknown data source {spec!r}{hint if 'did you mean' in hint else ''}; known: {_known()}"


def _of_path(spec: str, path: str) -> str:
    """The likely kind of something that exists."""
    if os.path.isdir(path):
        if os.access(path, os.R_OK) and any(map(is_idx, os.listdir(path))):
            return "npz:PATH, a file with arrays `images` and `labels`; idx files such as those there are not read"
        return f"folder:{spec}"
    kinds = {".npz": "npz", ".csv": "csv"}
    ending = os.path.splitext(path)[1].lower()
    return f"{kinds[ending]}:{spec}" if ending in kinds else f"one of {_known()}"


def cifar100u() -> np.ndarray:
    """Training images of each class in the unbalanced CIFAR-100, int64 [100]."""
    counts = np.empty(100, np.int64)
    of_class = LEVELS["cifar100"].of_class
    for superclass in range(20):
        counts[of_class == superclass] = UNBALANCED
    return counts
