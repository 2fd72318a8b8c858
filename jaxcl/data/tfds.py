"""`tfds:NAME`: a prepared TensorFlow Datasets folder, read from ArrayRecord without TensorFlow."""

import dataclasses
import io
import os
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from jaxcl.data import fingerprint
from jaxcl.data.cifar import MOMENTS
from jaxcl.data.disk import COLUMNS, DiskSource, Reader, Row, in_threads, source_in_memory
from jaxcl.data.images import open_image, resize_and_crop
from jaxcl.data.kind import Size, SourceKind
from jaxcl.data.label_levels import known_level
from jaxcl.data.selection import TEST_SPLIT, Select, hold_out
from jaxcl.data.source import Source
from jaxcl.errors import UserError


class Records(Reader):
    """The examples of one TFDS split."""

    knows_labels = False

    def __init__(self, builder: Any, split: str, image_size: int, spec: str, label: str, group: str):
        self._spec, self._size = spec, image_size
        features = builder.info.features
        if not hasattr(features, "keys"):
            raise UserError(f"{spec} has no named features; expected an image and, optionally, a label")
        kinds = {key: type(feature).__name__ for key, feature in features.items()}
        image = "image" if kinds.get("image") == "Image" else _first(kinds, "Image")
        if not image:
            raise UserError(f"{spec} holds no images; its features are {', '.join(kinds)}")
        self._image = image
        usual = "label" if kinds.get("label") == "ClassLabel" else _first(kinds, "ClassLabel")
        self._label, self.class_names = _attribute(features, label or usual, spec, "label")
        self._group, values = _attribute(features, group, spec, "group")
        self._values = len(values)
        if group and not self._label:
            raise UserError(f"{spec} has no classes to divide into groups; set label, for example label=Blond_Hair")
        self.group_names = tuple(f"{name}, {value}" for name in self.class_names for value in values)
        coarse = "coarse_label" if kinds.get("coarse_label") == "ClassLabel" else ""
        self._coarse, self.coarse_names = _attribute(features, coarse, spec, "coarse")
        level = None if coarse or label else known_level(builder.name, self.class_names)
        self._coarse_of_class = level.of_class if level else None
        self.coarse_names = level.names if level else self.coarse_names

        shape = features[image].shape
        if not image_size and None in shape[:2]:
            raise UserError(f"images of {spec} differ in size; set image_size, for example image_size=224")
        self.image_shape = (image_size, image_size, 3) if image_size else (*shape[:2], 3)
        if np.dtype(features[image].np_dtype) != np.uint8:
            raise UserError(f"images of {spec} are {np.dtype(features[image].np_dtype)}; expected uint8")
        about = builder.info.splits[split]
        self.content = fingerprint.digest(
            builder.info.full_name, about.num_bytes, about.shard_lengths, label, group, *map(str, self.image_shape)
        )
        try:
            # Pillow decodes here, not TFDS: it is faster, and the pixels are the same with and without OpenCV.
            self._records = builder.as_data_source(split=split, decoders={image: _skip_decoding()})
        except NotImplementedError as error:
            raise UserError(
                f"{spec} in {builder.data_path} is not in ArrayRecord form; prepare it in another data_dir"
                f" with `{_prepare_command(builder.name, '<data_dir>')}`"
            ) from error
        self._order = np.arange(len(self._records))
        if builder.name in ("cifar10", "cifar100") and kinds.get("id") == "Text":
            self._order = self._published_order()

    def __len__(self) -> int:
        return len(self._records)

    def __call__(self, row: int) -> Row:
        return self._read(row, self._decode)

    def block(self, rows: np.ndarray) -> Sequence[Row]:
        try:  # many records together are read faster than one by one
            return [self._decode(example) for example in self._some(self._order[rows])]
        except Exception:  # reading one by one names the bad one
            return super().block(rows)

    def columns(self, rows: np.ndarray) -> np.ndarray:
        out = np.empty((len(COLUMNS), len(rows)), np.int32)

        def read(begin: int, end: int) -> None:
            for i in range(begin, end):
                out[:, i] = self._read(rows[i], self._known)

        in_threads(read, len(rows))
        return out

    def _read(self, row: int, what):
        place = int(self._order[row])
        try:
            return what(self._records[place])
        except Exception as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(f"{self._spec}: example {place} cannot be read ({why}); prepare the set again") from error

    def _some(self, places: np.ndarray) -> Sequence[dict]:
        return self._records.__getitems__([int(place) for place in places])

    def _published_order(self) -> np.ndarray:
        """The record of each row, in the order of the ids, train_00000 to train_49999.

        TFDS writes examples in the order of a hash. In the order of the ids they are the rows that cifar:PATH reads,
        so a seed gives the same batches from either source.
        """
        ids = np.empty(len(self._records), object)

        def read(begin: int, end: int) -> None:
            try:
                ids[begin:end] = [_text(example["id"]) for example in self._some(np.arange(begin, end))]
            except Exception:  # a damaged example is named when it is read
                ids[begin:end] = ""

        in_threads(read, len(ids))
        return np.argsort(ids.astype(str), kind="stable")

    def _decode(self, example: dict) -> Row:
        with open_image(io.BytesIO(example[self._image]), formats=None) as encoded:
            rgb = encoded.convert("RGB")
        image = np.asarray(resize_and_crop(rgb, self._size) if self._size else rgb)
        if image.shape != self.image_shape:
            raise ValueError(f"image is {image.shape}, the set's are {self.image_shape}")
        return image, self._known(example)

    def _known(self, example: dict) -> tuple[int, int, int]:
        label = _value(example, self._label)
        coarse = _value(example, self._coarse)
        if self._coarse_of_class is not None and label >= 0:
            coarse = int(self._coarse_of_class[label])
        value = _value(example, self._group)
        return label, coarse, self._values * label + value if label >= 0 and value >= 0 else -1


@dataclasses.dataclass(frozen=True)
class Tfds(SourceKind):
    """Reads a set that TFDS has prepared in ArrayRecord form. NAME is TFDS's: "cifar10" or "imagenet2012:5.1.0".

    Sets of up to 1 GiB of pixels are decoded once into memory. Larger ones stay on disk, and since their labels are
    not known in advance, a hold-out or cut-down of them is not balanced over classes.

    "test" is the validation split of a set whose test split is missing or unlabelled. A set with a training split only
    is tested on a fixed tenth of it. A set without a training split (ImageNet-R) has "test" only.

    Options:
      data_dir: where the set was prepared; "": $TFDS_DATA_DIR, then TFDS's default.
      image_size: side to which images are resized (bilinear with antialiasing, shorter side, then a centre
        crop); required for sets whose images differ in size. 0: they keep their size.
      label: the feature that labels an image, if not the usual one: classes, or a yes or no such as Blond_Hair among
        the attributes of celeb_a.
      group: a feature of the same kind that divides every class into groups: extras["group"] = values * label + value.

    Errors: UserError for a set that is not prepared, has no images, or cannot be read.
    """

    argument: ClassVar[str] = "NAME"
    own_validation: ClassVar[bool] = True
    config_keys: ClassVar[tuple[str, ...]] = ("tfds",)

    data_dir: str = ""
    image_size: Size = 0
    label: str = ""
    group: str = ""

    def load(self, argument: str, *, split: str, base_split: str, select: Select) -> Source:
        spec = f"tfds:{argument}"
        builder = _builder(argument, self.data_dir)
        readers = {
            s: Records(builder, s, self.image_size, spec, self.label, self.group)
            for s in _splits(builder, spec, base_split)
        }
        train, test = readers.get("train"), _test_split(readers)
        own = readers.get("validation") if test is not readers.get("validation") else None
        wanted = {"train": train, "test": test or train, "validation": own}[base_split]
        if wanted is None:
            raise UserError(f"{spec} has no validation split besides its test split; set validation, such as 0.2")

        in_memory = wanted.fits(len(wanted))
        if in_memory:
            images, columns = wanted.read_all(np.arange(len(wanted)))
            labels = columns[0]
        else:
            labels = np.full(len(wanted), -1, np.int32)
        kept = np.arange(len(wanted))
        if test is None:
            held = hold_out(labels, 0.1, seed=0, stream=TEST_SPLIT)
            kept = np.flatnonzero(held if base_split == "test" else ~held)
        rows = kept[select(labels[kept])]

        if builder.name in ("cifar10", "cifar100") and not self.image_size:
            mean, std = MOMENTS[10 if builder.name == "cifar10" else 100]
        else:
            measured = test if train is None else train
            mean, std = measured.moments(np.arange(len(measured)))
        about = dict(mean=mean, std=std, name=spec, split=split)
        if not in_memory:
            return DiskSource(reader=wanted, rows=rows, **about)
        return source_in_memory(wanted, images, columns, **about).take(rows)


def _builder(name: str, data_dir: str):
    try:
        import tensorflow_datasets as tfds

        open_builder = tfds.builder  # missing where TFDS lacks one of its modules: importing it succeeds anyway
    except (ImportError, AttributeError) as error:
        raise UserError(f"tfds:{name} needs tensorflow-datasets: pip install 'jaxcl[tfds]' ({error})") from error
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR")
    data_dir = os.path.expanduser(data_dir) if data_dir else None
    try:
        builder = open_builder(name, data_dir=data_dir)
    except Exception as error:  # for an unknown name, version or config TFDS may raise anything
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"tfds:{name} cannot be opened in {data_dir or 'the default data_dir'}: {why}") from error
    # TFDS would try to download a missing set, for minutes where there is no network.
    if not builder.data_path.exists():
        raise UserError(
            f"tfds:{name} is not prepared in {builder.data_path}; run `pip install 'jaxcl[prepare]' &&"
            f" {_prepare_command(name, data_dir)}`, or set data_dir to where it is"
        )
    return builder


def _skip_decoding():
    import tensorflow_datasets as tfds

    return tfds.decode.SkipDecoding()


def _prepare_command(name: str, data_dir: str | None) -> str:
    return f"python -m jaxcl prepare {name}" + (f" --data_dir={data_dir}" if data_dir else "")


def _splits(builder, spec: str, wanted: str) -> list[str]:
    splits = [s for s in ("train", "test", "validation") if s in builder.info.splits]
    if not splits or ("train" not in splits and wanted != "test"):
        raise UserError(f"{spec} has no train split; it has {', '.join(builder.info.splits) or 'none'}")
    return splits


def _test_split(readers: dict[str, Records]) -> Records | None:
    """The labelled test split, otherwise the validation split, otherwise the test split as it is."""
    test, validation = readers.get("test"), readers.get("validation")
    if test and validation and test.class_names and len(test) and test.columns(np.arange(1))[0, 0] < 0:
        return validation
    return test or validation


def _first(kinds: dict[str, str], kind: str) -> str:
    """The first feature of a kind, "" for none."""
    return next((key for key, k in kinds.items() if k == kind), "")


def _attribute(features, name: str, spec: str, option: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The keys that lead to a feature, and the names of its values. It may be one level down (celeb_a's attributes)."""
    if not name:
        return (), ()
    inner = {k: f for k, f in features.items() if hasattr(f, "keys")}
    places = [(name,)] * (name in features) + [(k, name) for k, f in inner.items() if name in f]
    if not places:
        known = [k for k in features if k not in inner] + [k for f in inner.values() for k in f]
        raise UserError(f"{spec} has no feature {name!r} for {option}; its features are {', '.join(known)}")
    feature = features
    for key in places[0]:
        feature = feature[key]
    if type(feature).__name__ == "ClassLabel":
        return places[0], tuple(feature.names)
    if feature.shape == () and np.dtype(feature.np_dtype) == bool:
        return places[0], (f"not {name}", name)
    raise UserError(f"{spec}: {option}={name!r} is {type(feature).__name__}; expected classes, or a yes or no")


def _text(value: bytes | str) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _value(example: dict, place: tuple[str, ...]) -> int:
    """The number that these keys lead to in an example, -1 for no keys."""
    if not place:
        return -1
    for key in place:
        example = example[key]
    return int(example)
