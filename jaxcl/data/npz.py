"""`npz:PATH`: the user's own arrays in one NumPy file, which is never unpickled. N images, H height, W width."""

import dataclasses
import io
import logging
from typing import ClassVar

import numpy as np
from etils import epath

from jaxcl.data import fingerprint
from jaxcl.data.kind import SourceKind
from jaxcl.data.listing import check_classes, untrained
from jaxcl.data.moments import as_rgb, moments
from jaxcl.data.selection import TEST_SPLIT, Select, hold_out
from jaxcl.data.source import ArraySource
from jaxcl.errors import UserError
from jaxcl.runtime import messages
from jaxcl.runtime.storage import is_remote

logger = logging.getLogger("jaxcl")
# Integer columns beside the images, and the word for one of their values.
COLUMNS = {"labels": "class", "coarse_labels": "coarse", "groups": "group"}


@dataclasses.dataclass(frozen=True)
class Npz(SourceKind):
    """Reads `images` (and `labels`), or `train_images`, `train_labels`, `test_images`, `test_labels`.

    Images are uint8 [N,H,W], [N,H,W,1] or [N,H,W,3]; greyscale is repeated to three channels. Labels are
    integers from 0, or -1 where unlabelled; a file without labels is an unlabelled set. `class_names`, an array of
    strings, is optional. `coarse_labels` (names: `coarse_names`), the coarse classes, and `groups` (names:
    `group_names`), for worst-group accuracy, have the same form as the labels; they too may begin with `train_` and
    `test_`. In a file without test images a fixed tenth of every class is the test split, whatever the run's seed.

    Errors: UserError for a file that cannot be read, or arrays of another form.
    """

    argument: ClassVar[str] = "PATH"
    config_keys: ClassVar[tuple[str, ...]] = ()
    prefix: ClassVar[str] = "npz"  # of the spec

    def arrays(self, path: epath.Path) -> dict[str, np.ndarray]:
        """The arrays of the set by the names above."""
        return _read(path)

    def load(self, argument: str, *, split: str, base_split: str, select: Select) -> ArraySource:
        path, arrays = argument, self.arrays(epath.Path(argument).expanduser())
        splits = {}
        for name, prefix in (("train", "" if "images" in arrays else "train_"), ("test", "test_")):
            images = arrays.get(f"{prefix}images")
            if images is not None:
                columns = [_column(path, f"{prefix}{key}", arrays, len(images)) for key in COLUMNS]
                splits[name] = _checked(path, f"{prefix}images", images), *columns
        if not splits or (base_split == "train" and "train" not in splits):
            raise UserError(
                f"{path} holds {', '.join(sorted(arrays)) or 'nothing'}; expected images (and labels) or"
                " train_images, train_labels, test_images, test_labels"
            )
        if len(splits) == 2 and splits["test"][0].shape[1:] != splits["train"][0].shape[1:]:
            shapes = [splits[s][0].shape[1:] for s in ("train", "test")]
            raise UserError(f"{path}: training images are {shapes[0]} and test images {shapes[1]}; they must agree")

        names = {}
        for i, (key, word) in enumerate(COLUMNS.items(), 1):
            count = 1 + max(int(columns[i].max()) for columns in splits.values())
            check_classes(f"{path}: {key}", count, sum(len(columns[i]) for columns in splits.values()))
            names[word] = _names(path, f"{word}_names", arrays, count, word)
        if len(splits) == 2 and split == "train":
            parts = np.repeat(("train", "test"), [len(splits[s][1]) for s in ("train", "test")])
            labels = np.concatenate([splits[s][1] for s in ("train", "test")])
            for line in untrained(parts, labels, names["class"]):
                logger.info("%s:%s: %s", self.prefix, path, line)
        # Rows of a split are drawn from all images; only training asks whether they have changed.
        content = fingerprint.of_pixels(splits["train"][0]) if split == "train" else ""
        if "test" not in splits:
            images, labels, *_ = splits["train"]
            held = hold_out(labels, 0.1, seed=0, stream=TEST_SPLIT)
            if split == "test" and not held.any():
                raise UserError(
                    f"{path}: a tenth of {len(images)} images in {len(names['class']) or 1} classes leaves none to test"
                    " on; add test_images (and test_labels) to the file"
                )
            splits = {s: tuple(x[rows] for x in splits["train"]) for s, rows in (("train", ~held), ("test", held))}
        mean, std = moments(splits["train" if "train" in splits else "test"][0])
        images, labels, coarse, groups = splits[base_split]
        rows = select(labels)
        channels = 3 // len(mean)
        return ArraySource(
            images=as_rgb(images[rows]),
            labels=labels[rows],
            class_names=names["class"],
            mean=mean * channels,
            std=std * channels,
            extras={k: v[rows] for k, v in (("coarse", coarse), ("group", groups)) if names[k]},
            coarse_names=names["coarse"],
            group_names=names["group"],
            content=content,
            name=f"{self.prefix}:{path}",
            split=split,
        )


def _read(path: epath.Path) -> dict[str, np.ndarray]:
    if not path.exists() or path.is_dir():
        raise UserError(f"no file at {path}; npz:PATH expects a file written with numpy.savez")
    try:
        whole = io.BytesIO(path.read_bytes()) if is_remote(path) else path
        file = np.load(whole, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise UserError(f"{path} is a single array; npz:PATH expects a file written with numpy.savez")
        with file:
            return {key: file[key] for key in file.files}
    except UserError:
        raise
    except ValueError as error:
        if messages.PICKLED in str(error):
            raise UserError(
                f"{path} holds pickled objects (or is no npz file), which are never loaded; save plain arrays"
            ) from error
        raise UserError(f"{path} cannot be read as npz ({_one_line(error)}); write it again") from error
    except MemoryError as error:  # a damaged header may declare petabytes
        raise UserError(f"{path} does not fit into memory, or is damaged ({_one_line(error)})") from error
    except Exception as error:  # zip, zlib and NumPy raise anything
        raise UserError(f"{path} is truncated or damaged ({_one_line(error)}); copy or write it again") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _checked(path: str, key: str, images: np.ndarray) -> np.ndarray:
    """Images uint8 [N,H,W,C]."""
    if images.dtype != np.uint8:
        raise UserError(f"{path}: {key} is {images.dtype}; expected uint8 from 0 to 255")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or not images.size:
        raise UserError(f"{path}: {key} has shape {images.shape}; expected [N,H,W], [N,H,W,1] or [N,H,W,3], N > 0")
    return images


def _column(path: str, key: str, arrays: dict[str, np.ndarray], count: int) -> np.ndarray:
    """The array `key` as int32 [count], -1 throughout where it is missing."""
    labels = arrays.get(key)
    if labels is None:
        return np.full(count, -1, np.int32)
    if labels.ndim != 1 or len(labels) != count or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"{path}: {key} is {labels.dtype} {list(labels.shape)}; expected one integer for each of the {count} images"
        )
    if labels.min() < -1 or labels.max() >= 2**31:
        raise UserError(f"{path}: {key} runs from {labels.min()} to {labels.max()}; expected classes from 0, or -1")
    return labels.astype(np.int32)


def _names(path: str, key: str, arrays: dict[str, np.ndarray], count: int, word: str) -> tuple[str, ...]:
    names = arrays.get(key)
    if names is None or (word != "class" and not count):
        return tuple(f"{word} {c}" for c in range(count))
    if names.ndim != 1 or names.dtype.kind not in "US" or len(names) < count:
        raise UserError(f"{path}: {key} must be an array of at least {count} strings")
    return tuple(n.decode("utf-8", "replace") if isinstance(n, bytes) else str(n) for n in names)
