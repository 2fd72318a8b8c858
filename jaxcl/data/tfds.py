"""`tfds:NAME`: a prepared TensorFlow Datasets folder, read from ArrayRecord without TensorFlow."""

import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from jaxcl.data.base import TEST_PART, Select, Source, hold_out
from jaxcl.data.cifar import MOMENTS
from jaxcl.data.disk import COLUMNS, DiskSource, Reader, Row, in_threads, source_in_memory
from jaxcl.data.images import check_size, resize_and_crop
from jaxcl.data.label_levels import known_level
from jaxcl.errors import UserError

OWN_VALIDATION = True  # split="validation" without a hold-out is the set's own


class Records(Reader):
    """The examples of one TFDS split."""

    def __init__(
        self, builder: Any, split: str, image_size: int | None, spec: str, label: str | None, group: str | None
    ):
        self._spec, self._size = spec, image_size
        features = builder.info.features
        if not hasattr(features, "keys"):
            raise UserError(f"{spec} has no named features; expected an image and, optionally, a label")
        kinds = {key: type(feature).__name__ for key, feature in features.items()}
        image = "image" if kinds.get("image") == "Image" else _first(kinds, "Image")
        if image is None:
            raise UserError(f"{spec} holds no images; its features are {', '.join(kinds)}")
        self._image = image
        usual = "label" if kinds.get("label") == "ClassLabel" else _first(kinds, "ClassLabel")
        self._label, self.class_names = _attribute(features, label or usual, spec, "label")
        self._group, values = _attribute(features, group, spec, "group")
        self._values = len(values)
        if group and not self._label:
            raise UserError(f"{spec} has no classes to divide into groups; set label, for example label=Blond_Hair")
        self.group_names = tuple(f"{name}, {value}" for name in self.class_names for value in values)
        coarse = "coarse_label" if kinds.get("coarse_label") == "ClassLabel" else None
        self._coarse, self.coarse_names = _attribute(features, coarse, spec, "coarse")
        level = None if coarse or label else known_level(builder.name, self.class_names)
        self._coarse_of_class = level.of_class if level else None
        self.coarse_names = level.names if level else self.coarse_names

        shape = features[image].shape
        if image_size is None and None in shape[:2]:
            raise UserError(f"images of {spec} differ in size; set image_size, for example image_size=224")
        self.image_shape = (image_size, image_size, 3) if image_size else (*shape[:2], 3)
        if np.dtype(features[image].np_dtype) != np.uint8:
            raise UserError(f"images of {spec} are {np.dtype(features[image].np_dtype)}; expected uint8")
        try:
            # Pillow decodes here, not TFDS: twice as fast, and the same pixels with and without OpenCV.
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
        try:  # many records at once are read faster than one by one
            return [self._decode(example) for example in self._some(self._order[rows])]
        except Exception:  # one of them; reading singly says which
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
        """The place of each row, in the order of its id, train_00000 to train_49999.

        TFDS writes examples in the order of a hash. In their own order they are the rows that cifar:PATH reads, so
        that a seed gives the same batches, whichever way the set came.
        """
        ids = np.empty(len(self._records), object)

        def read(begin: int, end: int) -> None:
            try:
                ids[begin:end] = [_text(example["id"]) for example in self._some(np.arange(begin, end))]
            except Exception:  # a damaged example is named when its turn comes
                ids[begin:end] = ""

        in_threads(read, len(ids))
        return np.argsort(ids.astype(str), kind="stable")

    def _decode(self, example: dict) -> Row:
        with Image.open(io.BytesIO(example[self._image])) as encoded:
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


def load(
    name: str,
    *,
    split: str,
    part: str,
    select: Select,
    data_dir: str | None = None,
    image_size: int | None = None,
    label: str | None = None,
    group: str | None = None,
) -> Source | DiskSource:
    """Reads a set that TFDS has prepared in ArrayRecord form.

    Sets of up to 1 GiB of pixels are decoded once into memory; larger ones stay on disk, and as their labels
    are not known beforehand, a hold-out or cut-down of them is not balanced over classes.

    Args:
      name: as TFDS writes it, "cifar10" or "imagenet2012:5.1.0".
      part: "train", "test" or "validation": of the set, which `split` is taken from. "test" is the validation part of
        a set whose test part is missing or unlabelled; a set with a training part only gives up a fixed tenth of it. A
        set without a training part (ImageNet-R) has "test" only.
      data_dir: where it was prepared; default $TFDS_DATA_DIR, then TFDS's own default.
      image_size: side to which images are resized (bilinear with antialiasing, shorter side, then a centre
        crop); required for sets whose images differ in size.
      label: the feature that labels an image, if not the usual one: classes, or a yes or no such as Blond_Hair among
        the attributes of celeb_a.
      group: a feature of the same kind that divides every class into groups: extras["group"] = values * label + value.
    """
    spec = f"tfds:{name}"
    check_size(spec, image_size)
    builder = _builder(name, data_dir)
    reader_of = {p: Records(builder, p, image_size, spec, label, group) for p in _parts(builder, spec, part)}
    train, test = reader_of.get("train"), _test_part(reader_of)
    own = reader_of.get("validation") if test is not reader_of.get("validation") else None
    wanted = {"train": train, "test": test or train, "validation": own}[part]
    if wanted is None:
        raise UserError(f"{spec} has no validation part besides its test part; set validation, for example 0.2")

    in_memory = wanted.fits(len(wanted))
    if in_memory:
        images, columns = wanted.read_all(np.arange(len(wanted)))
        labels = columns[0]
    else:
        labels = np.full(len(wanted), -1, np.int32)
    kept = np.arange(len(wanted))
    if test is None:
        held = hold_out(labels, 0.1, seed=0, stream=TEST_PART)
        kept = np.flatnonzero(held if part == "test" else ~held)
    rows = kept[select(labels[kept])]

    if builder.name in ("cifar10", "cifar100") and not image_size:
        mean, std = MOMENTS[10 if builder.name == "cifar10" else 100]
    else:
        of = test if train is None else train
        mean, std = of.moments(np.arange(len(of)))
    about = dict(mean=mean, std=std, name=spec, split=split)
    if not in_memory:
        return DiskSource(reader=wanted, rows=rows, **about)
    return source_in_memory(wanted, images, columns, **about).take(rows)


def _builder(name: str, data_dir: str | None):
    try:
        import tensorflow_datasets as tfds

        open_builder = tfds.builder  # absent when TFDS lacks a module of its own: it imports all the same
    except (ImportError, AttributeError) as error:
        raise UserError(f"tfds:{name} needs tensorflow-datasets: pip install 'jaxcl[tfds]' ({error})") from error
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR")
    data_dir = os.path.expanduser(data_dir) if data_dir else None
    try:
        builder = open_builder(name, data_dir=data_dir)
    except Exception as error:  # TFDS raises what it likes for an unknown name, version or config
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"tfds:{name} cannot be opened in {data_dir or 'the default data_dir'}: {why}") from error
    # Asked for a missing set, TFDS tries to download it, for minutes when there is no network.
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


def _parts(builder, spec: str, part: str) -> list[str]:
    parts = [p for p in ("train", "test", "validation") if p in builder.info.splits]
    if not parts or ("train" not in parts and part != "test"):
        raise UserError(f"{spec} has no train part; it has {', '.join(builder.info.splits) or 'none'}")
    return parts


def _test_part(readers: dict[str, Records]) -> Records | None:
    """The labelled test part, otherwise the validation part, otherwise the test part as it is."""
    test, validation = readers.get("test"), readers.get("validation")
    if test and validation and test.class_names and len(test) and test.columns(np.arange(1))[0, 0] < 0:
        return validation
    return test or validation


def _first(kinds: dict[str, str], kind: str) -> str | None:
    return next((key for key, k in kinds.items() if k == kind), None)


def _attribute(features, name: str | None, spec: str, option: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """A feature by its name, or one level below (celeb_a's attributes): where it is, and what its values are called."""
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
    """The number at a place of an example, -1 where there is no such place."""
    if not place:
        return -1
    for key in place:
        example = example[key]
    return int(example)
