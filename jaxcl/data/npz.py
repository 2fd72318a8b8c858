"""`npz:PATH`: the reader's own arrays, in one NumPy file. Never unpickles."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from jaxcl.data.base import TEST_PART, Select, Source, as_rgb, hold_out, moments
from jaxcl.errors import UserError


def load(path: str, *, split: str, select: Select) -> Source:
    """Reads `images` (and `labels`), or `train_images`, `train_labels`, `test_images`, `test_labels`.

    Images are uint8 [N,H,W], [N,H,W,1] or [N,H,W,3]; greyscale is repeated to three channels. Labels are
    integers from 0, or -1 where unlabelled; without any the set is unlabelled. `class_names`, an array of
    strings, is optional. A file without a test part gives up a fixed tenth of every class as test, the same
    whatever the seed of the run.
    """
    arrays = _read(Path(path).expanduser())
    parts = {}
    for part, prefix in (("train", "" if "images" in arrays else "train_"), ("test", "test_")):
        images = arrays.get(f"{prefix}images")
        if images is not None:
            parts[part] = _checked(path, f"{prefix}images", images, arrays.get(f"{prefix}labels"))
    if "train" not in parts:
        raise UserError(
            f"{path} holds {', '.join(sorted(arrays)) or 'nothing'}; expected images (and labels) or"
            " train_images, train_labels, test_images, test_labels"
        )
    if "test" in parts and parts["test"][0].shape[1:] != parts["train"][0].shape[1:]:
        shapes = [parts[p][0].shape[1:] for p in ("train", "test")]
        raise UserError(f"{path}: training images are {shapes[0]} and test images {shapes[1]}; they must agree")

    num_classes = 1 + max(int(labels.max()) for _, labels in parts.values())
    names = _class_names(path, arrays.get("class_names"), num_classes)
    parts.setdefault("test", None)
    if parts["test"] is None:
        images, labels = parts["train"]
        held = hold_out(labels, 0.1, seed=0, stream=TEST_PART)
        if split == "test" and not held.any():
            raise UserError(
                f"{path}: a tenth of {len(images)} images in {num_classes or 1} classes leaves none to test"
                " on; add test_images (and test_labels) to the file"
            )
        parts = {"train": (images[~held], labels[~held]), "test": (images[held], labels[held])}
    mean, std = moments(parts["train"][0])
    images, labels = parts["test" if split == "test" else "train"]
    rows = select(labels)
    channels = 3 // len(mean)
    return Source(
        images=as_rgb(images[rows]),
        labels=labels[rows],
        class_names=names,
        mean=mean * channels,
        std=std * channels,
        name=f"npz:{path}",
        split=split,
    )


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise UserError(f"no file at {path}; npz:PATH expects a file written with numpy.savez")
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise UserError(f"{path} is a single array; npz:PATH expects a file written with numpy.savez")
        with file:
            return {key: file[key] for key in file.files}
    except UserError:
        raise
    except ValueError as error:
        if "pickle" in str(error):
            raise UserError(
                f"{path} holds pickled objects (or is no npz file), which are never loaded; save plain arrays"
            ) from error
        raise UserError(f"{path} cannot be read as npz ({_one_line(error)}); write it again") from error
    except (OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise UserError(f"{path} is truncated or damaged ({_one_line(error)}); copy or write it again") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _checked(path: str, key: str, images: np.ndarray, labels: np.ndarray | None):
    """Images uint8 [N,H,W,C], labels int32 [N]."""
    if images.dtype != np.uint8:
        raise UserError(f"{path}: {key} is {images.dtype}; expected uint8 from 0 to 255")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or not images.size:
        raise UserError(f"{path}: {key} has shape {images.shape}; expected [N,H,W], [N,H,W,1] or [N,H,W,3], N > 0")
    if labels is None:
        return images, np.full(len(images), -1, np.int32)
    key = key.replace("images", "labels")
    if labels.ndim != 1 or len(labels) != len(images) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"{path}: {key} is {labels.dtype} {list(labels.shape)}; expected one integer for each of the"
            f" {len(images)} images"
        )
    if labels.min() < -1 or labels.max() >= 2**31:
        raise UserError(f"{path}: {key} runs from {labels.min()} to {labels.max()}; expected classes from 0, or -1")
    return images, labels.astype(np.int32)


def _class_names(path: str, names: np.ndarray | None, num_classes: int) -> tuple[str, ...]:
    if names is None:
        return tuple(f"class {c}" for c in range(num_classes))
    if names.ndim != 1 or names.dtype.kind not in "US" or len(names) < num_classes:
        raise UserError(f"{path}: class_names must be an array of at least {num_classes} strings")
    return tuple(n.decode("utf-8", "replace") if isinstance(n, bytes) else str(n) for n in names)
