"""`tfds:NAME`: a prepared TensorFlow Datasets folder, read from ArrayRecord without TensorFlow."""

import copy
import io
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from jaxcl.data import hashing
from jaxcl.data.base import TEST_PART, Select, Source, hold_out, moments
from jaxcl.data.cifar import MOMENTS
from jaxcl.data.label_levels import known_level
from jaxcl.errors import UserError

IN_MEMORY_BYTES = 2**30  # sets that fit are decoded once
SAMPLE = 2000  # training images from which mean and standard deviation of other sets are estimated
_THREADS = 8  # Pillow decodes outside the interpreter lock


class RecordSource:
    """A set that stays on disk: every batch is read and decoded when it is asked for.

    It has the attributes of `Source`, except that neither images nor labels nor extras are held.
    """

    in_memory = False
    fine_names: tuple[str, ...] = ()
    group_names: tuple[str, ...] = ()

    def __init__(self, reader: "Reader", rows: np.ndarray, mean, std, *, name: str, split: str):
        self._reader, self._rows, self._column = reader, rows, 1
        self.image_shape = reader.image_shape
        self.class_names, self.coarse_names = reader.class_names, reader.coarse_names
        self.num_classes = len(reader.class_names)
        self.labelled = reader.labelled
        self.mean, self.std, self.name, self.split = mean, std, name, split
        self.extras: dict[str, np.ndarray] = {}

    def coarse(self) -> "RecordSource":
        """The same set labelled with its coarse classes."""
        other = copy.copy(self)
        other._column = 2
        other.class_names, other.num_classes = self.coarse_names, len(self.coarse_names)
        other.fine_names = self.class_names
        return other

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The rows `indices` [B] as {"image" uint8 [B,H,W,C], "label" int32 [B], "index" int32 [B]}."""
        indices = np.asarray(indices)
        read = [self._reader(row) for row in self._rows[indices]]
        return {
            "image": np.stack([row[0] for row in read]),
            "label": np.array([row[self._column] for row in read], np.int32),
            "index": indices.astype(np.int32),
        }


class Reader:
    """Row of one TFDS split -> (image uint8 [H,W,3], label, coarse label), -1 where there is none."""

    def __init__(self, builder: Any, split: str, image_size: int | None, spec: str):
        self._spec, self._size = spec, image_size
        features = builder.info.features
        if not hasattr(features, "keys"):
            raise UserError(f"{spec} has no named features; expected an image and, optionally, a label")
        kinds = {key: type(feature).__name__ for key, feature in features.items()}
        image = "image" if kinds.get("image") == "Image" else _first(kinds, "Image")
        self._label = "label" if kinds.get("label") == "ClassLabel" else _first(kinds, "ClassLabel")
        if image is None:
            raise UserError(f"{spec} holds no images; its features are {', '.join(kinds)}")
        self._image = image
        self._coarse = "coarse_label" if kinds.get("coarse_label") == "ClassLabel" else None
        self.labelled = self._label is not None
        self.class_names = tuple(features[self._label].names) if self.labelled else ()
        level = None if self._coarse else known_level(builder.name, self.class_names)
        self._coarse_of_class = level.of_class if level else None
        self.coarse_names = tuple(features[self._coarse].names) if self._coarse else level.names if level else ()

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

    def __len__(self) -> int:
        return len(self._records)

    def __call__(self, row: int) -> tuple[np.ndarray, int, int]:
        try:
            return self._decode(self._records[int(row)])
        except Exception as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(
                f"{self._spec}: example {int(row)} cannot be read ({why}); prepare the set again"
            ) from error

    def _decode(self, example: dict) -> tuple[np.ndarray, int, int]:
        with Image.open(io.BytesIO(example[self._image])) as encoded:
            image = np.asarray(encoded.convert("RGB"))
        if self._size:
            image = resize_and_crop(image, self._size)
        if image.shape != self.image_shape:
            raise ValueError(f"image is {image.shape}, the set's are {self.image_shape}")
        label = int(example[self._label]) if self._label else -1
        coarse = int(example[self._coarse]) if self._coarse else -1
        if self._coarse_of_class is not None and label >= 0:
            coarse = int(self._coarse_of_class[label])
        return image, label, coarse

    def read_all(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Decodes `rows` in threads: images uint8 [N,H,W,3], labels int32 [N], coarse int32 [N]."""
        images = np.empty((len(rows), *self.image_shape), np.uint8)
        labels = np.empty((2, len(rows)), np.int32)

        def read(begin: int) -> None:
            part = range(begin, min(begin + 256, len(rows)))
            try:  # many records at once are read faster than one by one
                decoded = [self._decode(e) for e in self._records.__getitems__([int(rows[i]) for i in part])]
            except Exception:  # one of them; reading singly says which
                decoded = [self(rows[i]) for i in part]
            for i, (image, label, coarse) in zip(part, decoded, strict=True):
                images[i], labels[0, i], labels[1, i] = image, label, coarse

        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(read, range(0, len(rows), 256)))
        return images, labels[0], labels[1]


def load(
    name: str, *, split: str, select: Select, data_dir: str | None = None, image_size: int | None = None
) -> Source | RecordSource:
    """Reads a set that TFDS has prepared in ArrayRecord form.

    Sets of up to 1 GiB of pixels are decoded once into memory; larger ones stay on disk, and as their labels
    are not known beforehand, a hold-out or cut-down of them is not balanced over classes.

    Args:
      name: as TFDS writes it, "cifar10" or "imagenet2012:5.1.0".
      split: "test" is the validation part of a set whose test part is missing or unlabelled; a set with a
        training part only gives up a fixed tenth of it.
      data_dir: where it was prepared; default $TFDS_DATA_DIR, then TFDS's own default.
      image_size: side to which images are resized (bilinear with antialiasing, shorter side, then a centre
        crop); required for sets whose images differ in size.
    """
    spec = f"tfds:{name}"
    if image_size is not None and image_size < 1:
        raise UserError(f"{spec}: image_size={image_size} must be at least 1")
    builder = _builder(name, data_dir)
    reader_of = {part: Reader(builder, part, image_size, spec) for part in _parts(builder, spec)}
    train, test = reader_of.get("train"), _test_part(reader_of)
    wanted = test if split == "test" and test else train
    in_memory = len(wanted) * int(np.prod(wanted.image_shape)) <= IN_MEMORY_BYTES

    if in_memory:
        images, labels, coarse = wanted.read_all(np.arange(len(wanted)))
    else:
        labels = np.full(len(wanted), -1, np.int32)
    kept = np.arange(len(wanted))
    if test is None:
        held = hold_out(labels, 0.1, seed=0, stream=TEST_PART)
        kept = np.flatnonzero(held if split == "test" else ~held)
    rows = kept[select(labels[kept])]

    if builder.name in ("cifar10", "cifar100") and not image_size:
        mean, std = MOMENTS[10 if builder.name == "cifar10" else 100]
    else:
        sample = np.sort(hashing.order(0, 0, len(train))[:SAMPLE])
        mean, std = moments(images[sample] if in_memory and wanted is train else train.read_all(sample)[0])
    if not in_memory:
        return RecordSource(wanted, rows, mean, std, name=spec, split=split)
    return Source(
        images=images[rows],
        labels=labels[rows],
        class_names=wanted.class_names,
        mean=mean,
        std=std,
        extras={"coarse": coarse[rows]} if wanted.coarse_names else {},
        coarse_names=wanted.coarse_names,
        name=spec,
        split=split,
    )


def resize_and_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Shorter side to `size` (bilinear, antialiased), then the centre: uint8 [H,W,3] -> [size,size,3]."""
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    scale = size / min(height, width)
    shape = max(size, round(width * scale)), max(size, round(height * scale))
    # Pillow widens the bilinear filter when it shrinks an image: that is the antialiasing.
    resized = np.asarray(Image.fromarray(image).resize(shape, Image.Resampling.BILINEAR))
    top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
    return resized[top : top + size, left : left + size]


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
    return f"python -m jaxcl.data.prepare {name}" + (f" --data_dir={data_dir}" if data_dir else "")


def _parts(builder, spec: str) -> list[str]:
    parts = [p for p in ("train", "test", "validation") if p in builder.info.splits]
    if "train" not in parts:
        raise UserError(f"{spec} has no train part; it has {', '.join(builder.info.splits) or 'none'}")
    return parts


def _test_part(readers: dict[str, Reader]) -> Reader | None:
    """The labelled test part, otherwise the validation part, otherwise the test part as it is."""
    test, validation = readers.get("test"), readers.get("validation")
    if test and validation and test.labelled and len(test) and test(0)[1] < 0:
        return validation
    return test or validation


def _first(kinds: dict[str, str], kind: str) -> str | None:
    return next((key for key, k in kinds.items() if k == kind), None)
