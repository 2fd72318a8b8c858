"""`cifar:PATH`: CIFAR-10 and CIFAR-100 (Krizhevsky 2009) as distributed, python or binary version.

The python version is pickled, and a pickle can run anything. It is read by an unpickler that knows only the
few names that rebuild an array, each replaced by a few lines of this file, and refuses every other one.
"""

import dataclasses
import math
import pickle
from pathlib import Path
from typing import ClassVar

import numpy as np

from jaxcl.data import fingerprint
from jaxcl.data.kind import SourceKind
from jaxcl.data.label_levels import LEVELS
from jaxcl.data.selection import Select
from jaxcl.data.source import ArraySource
from jaxcl.errors import UserError

CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
# The published mean and standard deviation of the training images, which papers normalise with.
MOMENTS = {
    10: ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    100: ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}
PIXELS = 32 * 32 * 3
_BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
# (classes, file ending) -> training files, test file. The first that is found is read.
LAYOUTS = {
    (10, ""): (_BATCHES, "test_batch"),
    (10, ".bin"): ([f"{name}.bin" for name in _BATCHES], "test_batch.bin"),
    (100, ""): (["train"], "test"),
    (100, ".bin"): (["train.bin"], "test.bin"),
}
FOLDERS = ("", "cifar-10-batches-py", "cifar-10-batches-bin", "cifar-100-python", "cifar-100-binary")


@dataclasses.dataclass(frozen=True)
class Cifar(SourceKind):
    """The training or test images. PATH is the folder of the batches, or the one above it.

    Labels are the fine ones. extras["coarse"] holds the 20 superclasses of CIFAR-100; of CIFAR-10, vehicles and
    animals.

    Errors: UserError for missing or damaged files, or a pickle that asks for anything but arrays.
    """

    argument: ClassVar[str] = "PATH"
    config_keys: ClassVar[tuple[str, ...]] = ()

    def load(self, argument: str, *, split: str, base_split: str, select: Select) -> ArraySource:
        folder, (classes, ending) = _find(Path(argument).expanduser())
        train, test = LAYOUTS[classes, ending]
        read = _read_binary if ending else _read_python
        files = [folder / name for name in ([test] if base_split == "test" else train)]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise UserError(f"{folder} lacks {', '.join(missing)} of CIFAR-{classes}; unpack the archive again")
        columns = zip(*(read(file, classes) for file in files), strict=True)
        images, labels, coarse = (np.concatenate(column) for column in columns)
        names, coarse_names = _names(folder, classes, ending)
        rows = select(labels)
        mean, std = MOMENTS[classes]
        return ArraySource(
            images=images[rows].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1).copy(),
            labels=labels[rows],
            class_names=names,
            mean=mean,
            std=std,
            extras={"coarse": coarse[rows]},
            coarse_names=coarse_names,
            content=fingerprint.of_pixels(images) if split == "train" else "",
            name=f"cifar{classes}",
            split=split,
        )


def _find(path: Path) -> tuple[Path, tuple[int, str]]:
    if not path.is_dir():
        raise UserError(f"no folder at {path}; cifar:PATH expects the unpacked CIFAR-10 or CIFAR-100 archive")
    found = [
        (path / sub, layout)
        for sub in FOLDERS
        for layout, (train, test) in LAYOUTS.items()
        if (path / sub / train[0]).is_file() or (path / sub / test).is_file()
    ]
    if not found:
        raise UserError(
            f"{path} holds no CIFAR batches; expected data_batch_1 to data_batch_5 (CIFAR-10) or train and"
            " test (CIFAR-100), or the same with .bin"
        )
    if len({classes for _, (classes, _) in found}) > 1:
        raise UserError(f"{path} holds both CIFAR-10 and CIFAR-100; name one of {', '.join(str(f) for f, _ in found)}")
    return found[0]


def _read_binary(file: Path, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A record is the label (CIFAR-100: coarse, then fine) and the pixels, one byte each."""
    head = 1 if classes == 10 else 2
    raw = np.fromfile(file, np.uint8)
    if not len(raw) or len(raw) % (head + PIXELS):
        raise UserError(
            f"{file} has {len(raw)} bytes, not a multiple of {head + PIXELS} as a CIFAR-{classes} batch;"
            " it is truncated or of another version"
        )
    records = raw.reshape(-1, head + PIXELS)
    return _checked(file, records[:, head:], records[:, head - 1], records[:, 0], classes)


def _read_python(file: Path, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    content = unpickle(file)
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no dictionary; expected a CIFAR-{classes} batch")

    def get(key: str):  # bytes from Python 2's pickles, text from Python 3's
        return content.get(key.encode(), content.get(key))

    data, labels = get("data"), get("labels" if classes == 10 else "fine_labels")
    coarse = labels if classes == 10 else get("coarse_labels")
    data = data.value if isinstance(data, _Array) else None
    if data is None or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != PIXELS:
        raise UserError(f"{file} has no uint8 [N, {PIXELS}] 'data'; expected a CIFAR-{classes} batch")
    columns = []
    for column in (labels, coarse):
        if not isinstance(column, list) or len(column) != len(data) or not all(type(v) is int for v in column):
            raise UserError(f"{file} does not hold one integer label for each of its {len(data)} images")
        columns.append(np.clip(np.array(column, object), -1, 1000).astype(np.int64))
    return _checked(file, data, *columns, classes)


def _checked(file: Path, data, labels, coarse, classes: int):
    labels, coarse = labels.astype(np.int32), coarse.astype(np.int32)
    if classes == 10 and labels.min() >= 0 and labels.max() < 10:
        return data, labels, LEVELS["cifar10"].of_class[labels]
    if labels.min() < 0 or labels.max() >= classes or coarse.min() < 0 or coarse.max() >= 20:
        raise UserError(f"{file} holds labels outside CIFAR-{classes}'s classes; it is damaged or of another set")
    return data, labels, coarse


def _names(folder: Path, classes: int, ending: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Fine and coarse class names, from the archive's list if it has one."""
    if classes == 10:
        return tuple(CIFAR10_CLASSES), LEVELS["cifar10"].names
    lists = {"fine_label_names": None, "coarse_label_names": None}
    if not ending and (folder / "meta").is_file():
        meta = unpickle(folder / "meta")
        meta = meta.items() if isinstance(meta, dict) else ()
        lists = {_text(k): [_text(v) for v in names] for k, names in meta if isinstance(names, list)}
    elif ending:
        lists = {k: (folder / f"{k}.txt").read_text().split() for k in lists if (folder / f"{k}.txt").is_file()}
    fine = lists.get("fine_label_names") or [f"class {c}" for c in range(100)]
    coarse = lists.get("coarse_label_names") or LEVELS["cifar100"].names
    return tuple(fine), tuple(coarse)


def _text(value) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def unpickle(file: Path):
    """Plain containers, numbers and strings, with arrays as `_Array`.

    Raises:
      UserError: the file is damaged, or asks for anything but NumPy's array reconstruction.
    """
    try:
        with open(file, "rb") as stream:
            return _Unpickler(stream, encoding="bytes").load()
    except UserError as error:
        raise UserError(f"{file} {error}") from error
    except Exception as error:  # a damaged pickle may raise anything
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{file} cannot be read ({why}); it is truncated or no CIFAR batch") from error


class _Array:
    """Takes the place of a pickled array until its state arrives."""

    value: np.ndarray | None = None

    def __setstate__(self, state):
        _version, shape, dtype, fortran, raw = state
        self.value = _frombuffer(raw, dtype, shape, "F" if fortran else "C").value


class _Dtype:
    """Takes the place of a pickled dtype. NumPy's own would accept state that is not needed here."""

    def __init__(self, name, *_):
        name = name.decode("ascii") if isinstance(name, bytes) else name
        if name not in ("u1", "|u1", "uint8"):
            raise UserError(f"holds an array of {name!r}; a CIFAR batch holds bytes (uint8) only")

    def __setstate__(self, state):
        pass


def _frombuffer(raw, dtype, shape, order, *_) -> _Array:
    if not isinstance(raw, bytes | bytearray) or not isinstance(dtype, _Dtype) or math.prod(shape) != len(raw):
        raise UserError("holds an array whose size and bytes disagree; it is damaged")
    array = _Array()
    array.value = np.frombuffer(bytes(raw), np.uint8).reshape(shape, order="F" if order in ("F", b"F") else "C")
    return array


def _encode(text, encoding) -> bytes:
    """`_codecs.encode`, with which Python 3 writes bytes in the older protocols."""
    if encoding not in ("latin1", b"latin1"):
        raise UserError(f"asks for the codec {encoding!r}")
    return text.encode("latin1")


# Where NumPy 1 and 2 keep the functions that rebuild an array.
_ARRAY_MODULES = (
    "numpy.core.multiarray",
    "numpy._core.multiarray",
    "numpy.core.numeric",
    "numpy._core.numeric",
)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        # Each function is wrapped anew every time: a pickle can set attributes on any object it gets.
        if (module, name) == ("_codecs", "encode"):
            return lambda *args: _encode(*args)
        if module in ("numpy", *_ARRAY_MODULES):
            known = {
                "ndarray": _Array,
                "dtype": _Dtype,
                "_reconstruct": lambda *_: _Array(),
                "_frombuffer": lambda *args: _frombuffer(*args),
            }
            if name in known:
                return known[name]
        raise UserError(f"asks for {module}.{name} when unpickled, which no CIFAR batch needs; it was not run")
