"""Out of domain: a linear probe, fitted to clean training images, on shifted, corrupted, restyled and shuffled images.

B images of a batch, N images of a set, S side of an encoder's input, H W C of an image, K classes.
"""

import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.augment import ops, quilt_texture, tile_patches
from jaxcl.augment.patches import whole
from jaxcl.data import ArraySource, Source, default_fit, source_of
from jaxcl.errors import UserError
from jaxcl.evaluate import corruptions
from jaxcl.evaluate.base import Evaluator, Metric, Metrics, Panels, accuracy, from_files
from jaxcl.evaluate.categories import plain
from jaxcl.evaluate.context import EvalContext, EvalSetup
from jaxcl.evaluate.linear_probe import probe_logits

Array = jax.Array
# Other names in cifar10_corrupted of TFDS.
_IN_TFDS = {"glass_blur": "frosted_glass_blur", "elastic_transform": "elastic"}


class OutOfDomain(Evaluator):
    """Accuracy of the linear probe on images that differ from training; nothing is adapted to them.

    Metrics: "accuracy" in domain; "shifted", the data's own shifted test split; "corruption", the mean over corruptions
    and severities (not the mCE), and each of them; "shuffled", test images cut into tiles in random order, by tiles a
    side; "texture", texture quilted from each test image; "sets", the sets in `eval.ood`, see `by_class_name`. For
    "shuffled" and "texture" a lower accuracy means that the features rely less on texture.

    References:
      Ge et al. 2021, arXiv 2110.14189.
    """

    needs_labels = ("train", "test")
    features_only = True
    metrics = {
        "accuracy": Metric("Linear probe, in domain", meaning="a linear probe on the test images, for comparison"),
        "shifted.accuracy": Metric(
            "Linear probe, shifted test", meaning="on test images from another distribution than training images"
        ),
        "corruption.accuracy": Metric(
            "Linear probe, corrupted test",
            meaning="on test images with noise, blur, weather and compression, the mean over all of them",
        ),
        "texture.accuracy": Metric(
            "Texture only", "lower", meaning="a linear probe on texture made from each test image, without its object"
        ),
        "shuffled.*.accuracy": Metric(
            "Shuffled, {0} x {0}", "lower", meaning="a linear probe on test images with their tiles in random order"
        ),
        "sets.*.accuracy": Metric("Set {}", meaning="a linear probe on images of another set, matched by class name"),
    }

    def check(self, setup: EvalSetup) -> None:
        options = setup.options
        known = corruptions.NAMES if options.corrupted else corruptions.COMPUTED
        for name in options.corruptions:
            corruptions.check_name("eval.corruptions has", name, known)
        for severity in options.severities:
            corruptions.check_severity("eval.severities has", severity)
        side = setup.recipe.eval_size
        for grid in options.shuffle_grids:
            if not whole(grid) or not 2 <= grid <= side:
                raise UserError(
                    f"eval.shuffle_grids has {grid!r}; expected tiles a side, from 2 to the {side} of the pixels"
                )
        if options.severities and options.corrupted:
            every = 1 if _is_folder(options.corrupted) else len(options.severities)
            for name, severity in list(_wanted(options))[::every]:
                _stored(setup, name, severity)
        for name, source in _sets(setup):
            _shared(f"eval.ood: {name}", source, setup.source("train").class_names)

    def __call__(self, context: EvalContext) -> tuple[Metrics, Panels]:
        options, test, side = context.options, context.test, context.recipe.eval_size
        chance = 1 / context.num_classes
        # The test split first: other evaluators read the same features.
        metrics: Metrics = {"accuracy": accuracy(_predicted(context, context.features("test")), test.labels)}
        panel: dict[str, Any] = {"In domain": {"value": metrics["accuracy"]}}
        if (shifted := context.source("test_shifted")) is not None:
            predicted = _predicted(context, context.features("test_shifted"))
            metrics["shifted"] = {"accuracy": accuracy(predicted, shifted.labels)}
            panel["Shifted"] = {"value": metrics["shifted"]["accuracy"]}
        if options.severities:
            metrics["corruption"] = _corruptions(context)
            panel["Corrupted, mean"] = {"value": metrics["corruption"]["accuracy"]}
        with from_files():
            for name, source in _sets(context.setup):
                metrics.setdefault("sets", {})[name] = by_class_name(context, source)
                panel[name] = {"value": metrics["sets"][name]["accuracy"]}

        def changed(change: Callable) -> float:
            images = Changed(test, side, change, context.batch_size)
            return accuracy(_predicted(context, context.features_of(images)), test.labels)

        for grid in options.shuffle_grids:
            value = changed(functools.partial(shuffle_patches, grid=grid))
            metrics.setdefault("shuffled", {})[str(grid)] = {"accuracy": value}
            panel[f"Shuffled, {grid} x {grid}"] = {"value": value, "chance": chance, "lower": True}
        value = changed(texture_only)
        metrics["texture"] = {"accuracy": value}
        panel["Texture only"] = {"value": value, "chance": chance, "lower": True}
        return metrics, {"ood": panel}


def _predicted(context: EvalContext, features: np.ndarray) -> np.ndarray:
    return np.asarray(probe_logits(context.fitted_probe(), features)).argmax(-1)


# ---- corruptions


def _corruptions(context: EvalContext) -> Metrics:
    """{"accuracy": mean, name: {"accuracy": mean, severity: {"accuracy"}}}."""
    test = context.test
    by_name: dict[str, dict[str, Any]] = {}
    for name, severity in _wanted(context.options):
        if context.options.corrupted:
            with from_files():
                value = by_class_name(context, _stored(context.setup, name, severity))["accuracy"]
        else:
            change = functools.partial(_corrupted, name=name, severity=severity)
            changed = Changed(test, context.recipe.eval_size, change, context.batch_size)
            value = accuracy(_predicted(context, context.features_of(changed)), test.labels)
        by_name.setdefault(name, {})[str(severity)] = {"accuracy": value}
    means = {name: float(np.mean([v["accuracy"] for v in values.values()])) for name, values in by_name.items()}
    metrics: Metrics = {"accuracy": float(np.mean(list(means.values())))}
    return metrics | {name: {"accuracy": means[name]} | values for name, values in by_name.items()}


def _wanted(options: Any) -> Iterator[tuple[str, int]]:
    """(corruption, severity) pairs to measure."""
    names = options.corruptions or (corruptions.NAMES if options.corrupted else corruptions.COMPUTED)
    return ((name, severity) for name in names for severity in options.severities)


def _corrupted(images: np.ndarray, index: np.ndarray, *, name: str, severity: int) -> np.ndarray:
    return corruptions.corrupt(images, name, severity, index)


def _is_folder(corrupted: str) -> bool:
    return "{corruption}" not in corrupted


def _stored(setup: EvalSetup, name: str, severity: int) -> Source:
    """A corrupted set from files: `eval.corrupted` is a folder of NumPy files, or the name of a source for each set."""
    pattern = setup.options.corrupted
    if _is_folder(pattern):
        return _from_numpy(pathlib.Path(pattern).expanduser(), name, severity, setup.source("train"))
    in_set = _IN_TFDS.get(name, name) if pattern.startswith("tfds:cifar10_corrupted") else name
    spec = pattern.replace("{corruption}", in_set).replace("{severity}", str(severity))
    source = _open(setup, spec, "")
    _shared(spec, source, setup.source("train").class_names)
    return source


def _from_numpy(folder: pathlib.Path, name: str, severity: int, train: Source) -> Source:
    """A fifth of NAME.npy, uint8 [5N,H,W,3], which holds the severities one after the other, as in CIFAR-10-C."""
    arrays = {}
    for stem in (name, "labels"):
        path = folder / f"{stem}.npy"
        if not path.is_file():
            raise UserError(
                f"eval.corrupted: no file at {path}; expected the NumPy files of CIFAR-10-C, or a source with "
                "{corruption} and {severity} in its name"
            )
        try:
            arrays[stem] = np.load(path, mmap_mode="r", allow_pickle=False)
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
            f"{train.num_classes} classes; expected the same classes"
        )
    return ArraySource(
        images=images[rows], labels=labels, class_names=train.class_names, mean=train.mean, std=train.std,
        name=f"{folder}/{name}", split=str(severity),
    )  # fmt: skip


# ---- other sets


def by_class_name(context: EvalContext, source: Source) -> Metrics:
    """Accuracy on a set whose classes have the names of training classes; images of other classes do not count.

    Returns:
      "accuracy", where the prediction is the largest logit; "masked_accuracy", the largest logit among the classes of
      the set; "images" and "classes", the numbers of those that count.

    Raises:
      UserError: no class in common.
    """
    names = context.source("train").class_names
    to_own = _shared(source.name, source, names)
    labels = np.where(source.labels >= 0, to_own[source.labels], -1)
    known = np.flatnonzero(labels >= 0)
    present = np.unique(labels[known])
    logits = np.asarray(probe_logits(context.fitted_probe(), context.features_of(source.take(known))))
    masked = np.full_like(logits, -np.inf)
    masked[:, present] = logits[:, present]
    return {
        "accuracy": accuracy(logits.argmax(-1), labels[known]),
        "masked_accuracy": accuracy(masked.argmax(-1), labels[known]),
        "images": len(known),
        "classes": len(present),
    }


def _shared(where: str, source: Source, names: tuple[str, ...]) -> np.ndarray:
    """The training class with the name of each class of a source, int, -1 for none. UserError if all are -1."""
    numbers: dict[str, int] = {}
    for i, name in enumerate(names):
        numbers[plain(name)] = -1 if plain(name) in numbers else i  # a name of two classes is ambiguous
    found = np.array([numbers.get(plain(name), -1) for name in source.class_names], int)
    if not (found >= 0).any():
        few = lambda names: ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") or "none"  # noqa: E731
        raise UserError(
            f"{where} has no class of the training data by name: it has {few(source.class_names)}, the data "
            f"has {few(names)}; give its classes (folders) the names of the data"
        )
    return found


def _sets(setup: EvalSetup) -> Iterator[tuple[str, Source]]:
    """(name, source) for each entry of `eval.ood`: "NAME=SOURCE" for all images, "NAME@SPLIT=SOURCE" for one split."""
    seen = set()
    for entry in setup.options.ood:
        name, equals, spec = str(entry).partition("=")
        name, _, split = name.partition("@")
        if not equals or not name.isidentifier() or name in seen:
            raise UserError(
                f"eval.ood has {entry!r}; expected NAME=SOURCE or NAME@SPLIT=SOURCE, each with another name, for "
                "example sketch=folder:PATH"
            )
        seen.add(name)
        yield name, _open(setup, spec, split)


def _open(setup: EvalSetup, spec: str, split: str) -> Source:
    """A source by its name, at the size of the training images. split: "" for all its images."""
    config = setup.config.copy_and_resolve_references()
    config.data.source, config.data.validation, config.data.labels, config.data.imbalance = spec, 0.0, "fine", ""
    config.data.limit = 0
    config.data.files.image_size = config.data.tfds.image_size = setup.source("train").image_shape[0]
    # As the training images are made square; beside sets that are no files, as is customary for benchmarks.
    config.data.files.fit = config.data.files.fit or default_fit(setup.config.data.source) or "crop"
    if split:
        return source_of(config, split)
    sources, errors = [], []
    for split in ("train", "test"):
        try:
            sources.append(source_of(config, split))
        except UserError as error:  # a set may have a test split only
            errors.append(error)
    if not sources:
        raise errors[0]
    return sources[0] if len(sources) == 1 else Both(*sources)


class Both(Source):
    """Two splits of one set, one after the other."""

    def __init__(self, first: Source, second: Source):
        self._splits, self.name, self.class_names = (first, second), first.name, first.class_names
        self.labels = np.concatenate([first.labels, second.labels])

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> "Both":
        cut = len(self._splits[0])
        return Both(self._splits[0].take(rows[rows < cut]), self._splits[1].take(rows[rows >= cut] - cut))

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        cut, indices = len(self._splits[0]), np.asarray(indices)
        order = np.argsort(indices >= cut, kind="stable")  # the rows of the first split come first
        rows_of_each = (indices[indices < cut], indices[indices >= cut] - cut)
        found = [source.batch(rows) for source, rows in zip(self._splits, rows_of_each, strict=True) if len(rows)]
        back = np.argsort(order, kind="stable")
        joined = {k: np.concatenate([batch[k] for batch in found])[back] for k in ("image", "label")}
        return joined | {"index": indices.astype(np.int32)}


# ---- changed test images


class Changed(Source):
    """A source with changed images.

    change: (uint8 [B,S,S,3], index [B]) -> images of the same shape; B is always `batch_size`.
    """

    def __init__(self, source: Source, side: int, change: Callable, batch_size: int):
        self._source, self._side, self._change, self._size = source, side, change, batch_size
        self.labels, self.class_names = source.labels, source.class_names

    def __len__(self) -> int:
        return len(self._source)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        batch = self._source.batch(indices)
        count = len(batch["image"])
        rows = np.minimum(np.arange(max(count, self._size)), count - 1)  # padded, so that `change` compiles once
        images = batch["image"][rows]
        if images.shape[1:3] != (self._side, self._side):
            images = np.asarray(_resized(images, self._side))
        changed = np.asarray(self._change(images, batch["index"][rows]))
        return batch | {"image": changed[:count]}


@functools.partial(jax.jit, static_argnames="side")
def _resized(images: Array, side: int) -> Array:
    return jnp.round(ops.resize(images.astype(jnp.float32), side)).astype(jnp.uint8)


def shuffle_patches(images: np.ndarray, index: np.ndarray, *, grid: int) -> Array:
    """Images [B,S,S,C], each cut into grid x grid tiles in random order; the order depends on the image's index only.

    If the side is no multiple of the grid, tiles are a little larger and overlap in the last rows and columns.
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
    """Texture quilted from each image [B,S,S,C] (`augment.quilt_texture`); random numbers follow from its index."""
    return quilt_texture(_keys(1, np.asarray(index, np.int32)), images)


def _keys(stream: int, index_B: Array) -> Array:
    """A key for each image, independent of the seed of the run, so that all runs see the same test images."""
    key = jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), stream)
    return jax.vmap(functools.partial(jax.random.fold_in, key))(index_B)
