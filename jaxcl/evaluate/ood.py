"""Out of domain: the linear probe of clean training features on shifted, corrupted, restyled and cut-up images.

B images, S side of what the encoder sees, K classes.
"""

import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.augment import ops, quilt_texture, tile_patches
from jaxcl.augment.patches import whole
from jaxcl.data import ArraySource, Source, source_of
from jaxcl.errors import UserError
from jaxcl.evaluate import corruptions
from jaxcl.evaluate.base import Metrics, accuracy, from_files, needs_labels
from jaxcl.evaluate.categories import plain
from jaxcl.evaluate.linear_probe import probe_logits

if TYPE_CHECKING:
    from jaxcl.evaluate.suite import EvalContext, Evaluation

Array = jax.Array
# What TFDS calls differently in cifar10_corrupted.
_IN_TFDS = {"glass_blur": "frosted_glass_blur", "elastic_transform": "elastic"}


def ood(f: "EvalContext") -> tuple[Metrics, dict]:
    """Accuracy of the linear probe where the images are not as in training; nothing is adapted to them.

    Metrics: "accuracy" in domain; "shifted", the data's own shifted test split; "corruption", the mean over corruptions
    and severities (not the mCE), and each of them; "shuffled", test images cut into GRID x GRID tiles in random order;
    "texture", texture quilted from each test image: of these two, lower is less reliant on texture; "sets", those that
    eval.ood names, see `by_class_name`.

    Source: papers/non_semantic_negatives.md e.
    """
    needs_labels(f, "train", "test")
    options, labels, side = f.options, f.test.labels, f.recipe.image_shape[0]
    chance = 1 / f.recipe.num_classes
    # In domain first: the features of the test split are those that other evaluators have, too.
    figures: Metrics = {"accuracy": accuracy(_predicted(f, f.features("test")), labels)}
    panel: dict[str, Any] = {"In domain": {"value": figures["accuracy"]}}
    if (shifted := f.source("test_shifted")) is not None:
        figures["shifted"] = {"accuracy": accuracy(_predicted(f, f.features("test_shifted")), shifted.labels)}
        panel["Shifted"] = {"value": figures["shifted"]["accuracy"]}
    if options.severities:
        figures["corruption"] = _corruptions(f)
        panel["Corrupted, mean"] = {"value": figures["corruption"]["accuracy"]}
    with from_files():
        for name, source in _sets(f.evaluation):
            figures.setdefault("sets", {})[name] = by_class_name(f, source)
            panel[name] = {"value": figures["sets"][name]["accuracy"]}
    for grid in options.shuffle_grids:
        shuffled = Changed(f.test, side, functools.partial(shuffle_patches, grid=grid), f.batch_size)
        value = accuracy(_predicted(f, f.features_of(shuffled)), labels)
        figures.setdefault("shuffled", {})[str(grid)] = {"accuracy": value}
        panel[f"Shuffled, {grid} x {grid}"] = {"value": value, "chance": chance, "lower": True}
    value = accuracy(_predicted(f, f.features_of(Changed(f.test, side, texture_only, f.batch_size))), labels)
    figures["texture"] = {"accuracy": value}
    panel["Texture only"] = {"value": value, "chance": chance, "lower": True}
    return figures, {"ood": panel}


def check(evaluation: "Evaluation") -> None:
    """UserError for options that name what there is not. Sets are opened, so that a wrong path is known early."""
    options = evaluation.options
    known = corruptions.NAMES if options.corrupted else corruptions.COMPUTED
    corruptions.check("eval", options.corruptions, options.severities, known)
    side = evaluation.recipe.image_shape[0]
    for grid in options.shuffle_grids:
        if not whole(grid) or not 2 <= grid <= side:
            raise UserError(
                f"eval.shuffle_grids has {grid!r}; expected tiles a side, from 2 to the {side} of the pixels"
            )
    if options.severities and options.corrupted:
        for name, severity in list(_asked(options))[:: 1 if _is_folder(options.corrupted) else len(options.severities)]:
            _stored(evaluation, name, severity)
    for name, source in _sets(evaluation):
        _shared(f"eval.ood: {name}", source, evaluation.source("train").class_names)


def _predicted(f: "EvalContext", features: np.ndarray) -> np.ndarray:
    return np.asarray(probe_logits(f.fitted_probe(), features)).argmax(-1)


# ---- corruptions


def _corruptions(f: "EvalContext") -> Metrics:
    """{"accuracy": mean, name: {"accuracy": mean, severity: {"accuracy"}}}."""
    by_name: dict[str, dict[str, Any]] = {}
    for name, severity in _asked(f.options):
        if f.options.corrupted:
            with from_files():
                value = by_class_name(f, _stored(f.evaluation, name, severity))["accuracy"]
        else:
            change = functools.partial(_corrupted, name=name, severity=severity)
            changed = Changed(f.test, f.recipe.image_shape[0], change, f.batch_size)
            value = accuracy(_predicted(f, f.features_of(changed)), f.test.labels)
        by_name.setdefault(name, {})[str(severity)] = {"accuracy": value}
    means = {name: float(np.mean([v["accuracy"] for v in values.values()])) for name, values in by_name.items()}
    figures: Metrics = {"accuracy": float(np.mean(list(means.values())))}
    return figures | {name: {"accuracy": means[name]} | values for name, values in by_name.items()}


def _asked(options: Any) -> Iterator[tuple[str, int]]:
    names = options.corruptions or (corruptions.NAMES if options.corrupted else corruptions.COMPUTED)
    return ((name, severity) for name in names for severity in options.severities)


def _corrupted(images: np.ndarray, index: np.ndarray, *, name: str, severity: int) -> np.ndarray:
    return corruptions.corrupt(images, name, severity, index)


def _is_folder(corrupted: str) -> bool:
    return "{corruption}" not in corrupted


def _stored(evaluation: "Evaluation", name: str, severity: int) -> Source:
    """A corrupted set from files: eval.corrupted is a folder of NumPy files, or names a source for each."""
    pattern = evaluation.options.corrupted
    if _is_folder(pattern):
        return _from_numpy(pathlib.Path(pattern).expanduser(), name, severity, evaluation.source("train"))
    in_set = _IN_TFDS.get(name, name) if pattern.startswith("tfds:cifar10_corrupted") else name
    spec = pattern.replace("{corruption}", in_set).replace("{severity}", str(severity))
    source = _open(evaluation, spec, "")
    _shared(spec, source, evaluation.source("train").class_names)
    return source


def _from_numpy(folder: pathlib.Path, name: str, severity: int, train: Source) -> Source:
    """A fifth of NAME.npy, uint8 [5N,H,W,3] with the severities one after the other, as CIFAR-10-C is published."""
    arrays = {}
    for part in (name, "labels"):
        path = folder / f"{part}.npy"
        if not path.is_file():
            raise UserError(
                f"eval.corrupted: no file at {path}; expected the NumPy files of CIFAR-10-C, or a source with "
                "{corruption} and {severity} in its name"
            )
        try:
            arrays[part] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"eval.corrupted: {path} cannot be read ({error}); copy it again") from error
    images, labels = arrays[name], arrays["labels"]
    good = images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3
    if not good or labels.shape != images.shape[:1] or len(labels) % 5 or not len(labels):
        raise UserError(
            f"eval.corrupted: {name}.npy and labels.npy of {folder} are {images.dtype} {list(images.shape)} and "
            f"{list(labels.shape)}; expected uint8 [5N,H,W,3] and [5N]"
        )
    count = len(labels) // 5
    rows = slice((severity - 1) * count, severity * count)
    labels = np.asarray(labels[rows], np.int32)
    if labels.min() < 0 or labels.max() >= train.num_classes:
        raise UserError(
            f"eval.corrupted: labels of {folder} run from {labels.min()} to {labels.max()}, and the data has "
            f"{train.num_classes} classes; expected the same ones"
        )
    return ArraySource(
        images=images[rows], labels=labels, class_names=train.class_names, mean=train.mean, std=train.std,
        name=f"{folder}/{name}", split=str(severity),
    )  # fmt: skip


# ---- sets of their own


def by_class_name(f: "EvalContext", source: Source) -> Metrics:
    """Accuracy on a set whose classes are found among the probe's by their names; images of other classes do not count.

    "accuracy" is that of the largest of all logits, "masked_accuracy" of those only whose classes the set has; "images"
    and "classes" are how many took part.
    """
    names = f.source("train").class_names
    to_own = _shared(source.name, source, names)
    labels = np.where(source.labels >= 0, to_own[source.labels], -1)
    known = np.flatnonzero(labels >= 0)
    present = np.unique(labels[known])
    logits = np.asarray(probe_logits(f.fitted_probe(), f.features_of(source.take(known))))
    masked = np.full_like(logits, -np.inf)
    masked[:, present] = logits[:, present]
    return {
        "accuracy": accuracy(logits.argmax(-1), labels[known]),
        "masked_accuracy": accuracy(masked.argmax(-1), labels[known]),
        "images": len(known),
        "classes": len(present),
    }


def _shared(where: str, source: Source, names: tuple[str, ...]) -> np.ndarray:
    """Of each class of a source the class of the data with its name, int [K'], -1 for none. UserError if all are -1."""
    numbers: dict[str, int] = {}
    for i, name in enumerate(names):
        numbers[plain(name)] = -1 if plain(name) in numbers else i  # two classes of one name: neither is meant
    found = np.array([numbers.get(plain(name), -1) for name in source.class_names], int)
    if not (found >= 0).any():
        few = lambda names: ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") or "none"  # noqa: E731
        raise UserError(
            f"{where} has no class of the training data by name: it has {few(source.class_names)}, the data "
            f"{few(names)}; name its classes (folders) as the data does"
        )
    return found


def _sets(evaluation: "Evaluation") -> Iterator[tuple[str, Source]]:
    """(name, source) of eval.ood: "NAME=SOURCE", or "NAME@SPLIT=SOURCE" for one of its splits instead of all images."""
    seen = set()
    for entry in evaluation.options.ood:
        name, equals, spec = str(entry).partition("=")
        name, _, split = name.partition("@")
        if not equals or not name.isidentifier() or name in seen:
            raise UserError(
                f"eval.ood has {entry!r}; expected NAME=SOURCE or NAME@SPLIT=SOURCE, each with a name of its own, for "
                "example sketch=folder:PATH"
            )
        seen.add(name)
        yield name, _open(evaluation, spec, split)


def _open(evaluation: "Evaluation", spec: str, split: str) -> Source:
    """A source by its name, at the size of the training images; no split: all its images, in whichever part."""
    config = evaluation.config.copy_and_resolve_references()
    config.data.source, config.data.validation, config.data.labels, config.data.imbalance = spec, 0.0, "fine", ""
    config.data.limit = 0
    config.data.files.image_size = config.data.tfds.image_size = evaluation.source("train").image_shape[0]
    if split:
        return source_of(config, split)
    parts, errors = [], []
    for part in ("train", "test"):
        try:
            parts.append(source_of(config, part))
        except UserError as error:  # a set may have a test part only
            errors.append(error)
    if not parts:
        raise errors[0]
    return parts[0] if len(parts) == 1 else Both(*parts)


class Both(Source):
    """Two parts of one set, one after the other."""

    def __init__(self, first: Source, second: Source):
        self._parts, self.name, self.class_names = (first, second), first.name, first.class_names
        self.labels = np.concatenate([first.labels, second.labels])

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> "Both":
        cut = len(self._parts[0])
        return Both(self._parts[0].take(rows[rows < cut]), self._parts[1].take(rows[rows >= cut] - cut))

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        cut, indices = len(self._parts[0]), np.asarray(indices)
        order = np.argsort(indices >= cut, kind="stable")  # the first part's rows before the second's
        parts = [
            part.batch(rows)
            for part, rows in zip(self._parts, (indices[indices < cut], indices[indices >= cut] - cut), strict=True)
            if len(rows)
        ]
        back = np.argsort(order, kind="stable")
        joined = {k: np.concatenate([part[k] for part in parts])[back] for k in ("image", "label")}
        return joined | {"index": indices.astype(np.int32)}


# ---- test images made anew


class Changed(Source):
    """A source whose images go through a function: (uint8 [B,S,S,3], index [B]) -> the same, of always one shape."""

    def __init__(self, source: Source, side: int, change: Callable, batch_size: int):
        self._source, self._side, self._change, self._size = source, side, change, batch_size
        self.labels, self.class_names = source.labels, source.class_names

    def __len__(self) -> int:
        return len(self._source)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        batch = self._source.batch(indices)
        count = len(batch["image"])
        rows = np.minimum(np.arange(max(count, self._size)), count - 1)  # padded: compiled once
        images = batch["image"][rows]
        if images.shape[1:3] != (self._side, self._side):
            images = np.asarray(_resized(images, self._side))
        changed = np.asarray(self._change(images, batch["index"][rows]))
        return batch | {"image": changed[:count]}


@functools.partial(jax.jit, static_argnames="side")
def _resized(images: Array, side: int) -> Array:
    return jnp.round(ops.resize(images.astype(jnp.float32), side)).astype(jnp.uint8)


def shuffle_patches(images: np.ndarray, index: np.ndarray, *, grid: int) -> Array:
    """Images [B,S,S,C] cut into grid x grid tiles, which change places at random: an image's order follows its index.

    Where the side is no multiple of the grid, the tiles are a little larger and overlap at the last rows and columns.
    """
    return _shuffled(images, np.asarray(index, np.int32), grid)


@functools.partial(jax.jit, static_argnames="grid")
def _shuffled(images: Array, index_B: Array, grid: int) -> Array:
    S = images.shape[1]
    size = -(-S // grid)
    corner = jnp.minimum(jnp.arange(grid) * size, S - size)

    def one(key: Array, image: Array) -> Array:
        order = jax.random.permutation(key, grid**2).reshape(grid, grid)
        return tile_patches(image, size, corner[order // grid], corner[order % grid])

    return jax.vmap(one)(_keys(0, index_B), images)


def texture_only(images: np.ndarray, index: np.ndarray) -> Array:
    """Images [B,S,S,C] replaced by texture quilted from each (views.quilt_texture); it follows from the index."""
    return quilt_texture(_keys(1, np.asarray(index, np.int32)), images)


def _keys(stream: int, index_B: Array) -> Array:
    """A key an image, whatever the seed of the run: these are test images like any other."""
    key = jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), stream)
    return jax.vmap(functools.partial(jax.random.fold_in, key))(index_B)
