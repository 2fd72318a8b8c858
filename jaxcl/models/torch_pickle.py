"""Files of `torch.save` read without torch and without unpickling: no code of the file is run, or named in Python.

A pickle is a program for a small stack machine. This one knows only the instructions that a state dict needs. It
imports nothing and calls nothing that the file names: an OrderedDict becomes a dict, a tensor becomes a view of the
bytes of its storage, and everything else is refused by its name.

Two formats are known. Since torch 1.6 a file is a zip archive: NAME/data.pkl, and NAME/data/KEY for each storage.
Before (and with `_use_new_zipfile_serialization=False`) it is a row of pickles, a magic number, the version, facts of
the machine, the object and the keys of its storages, after which each storage follows as its length and its bytes.
"""

import io
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxcl.errors import UserError

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
_STORAGES = {
    f"torch {name}Storage": np.dtype(dtype).newbyteorder("<") if name != "BFloat16" else np.dtype(dtype)
    for name, dtype in {
        "Double": np.float64,
        "Float": np.float32,
        "Half": np.float16,
        "BFloat16": ml_dtypes.bfloat16,
        "Long": np.int64,
        "Int": np.int32,
        "Short": np.int16,
        "Char": np.int8,
        "Byte": np.uint8,
        "Bool": np.bool_,
    }.items()
}
_DICT, _TENSOR, _PARAMETER = (
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
)
_GLOBALS = frozenset((_DICT, _TENSOR, _PARAMETER, *_STORAGES))
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = frozenset("BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8".split())
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_NESTS = ("state_dict", "model_state_dict", "model")  # where training scripts put the state dict
_DIMENSIONS = 16  # of a tensor
_SHARED = 4  # times the file's size, which all tensors together may have


class _Refused(Exception):
    """Why a file cannot be read."""


class _Global(NamedTuple):
    name: str  # "module name"


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    count: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.storage.dtype.itemsize


def looks_like(content: bytes) -> bool:
    """Whether the first bytes of a file are those of a zip archive or of a pickle, and not of safetensors."""
    return content[:2] in (b"PK", b"\x80\x02")


def read(content: bytes, where: str) -> dict[str, np.ndarray]:
    """The tensors of a state dict, or of the one in a training script's checkpoint.

    Args:
      content: of a file that `torch.save` wrote, in either format.
      where: the file, for messages.

    Returns:
      name -> array of the file's own type; views of `content`, which cannot be written to.

    Raises:
      UserError: the file is cut off or damaged, or holds something else than tensors in dicts; one line.
    """
    try:
        if not looks_like(content):
            raise ValueError("it does not begin as torch.save writes it")
        read_format = _zip_archive if content[:2] == b"PK" else _row_of_pickles
        found, storage_of = read_format(memoryview(content))
        tensors = _state_dict(found)
        # Some share a storage, as tied weights do. Thousands that share one would fill the memory when they are copied.
        if sum(t.bytes for t in tensors.values()) > _SHARED * len(content):
            raise ValueError("its tensors overlap")
        return {name: _array(name, tensor, storage_of) for name, tensor in tensors.items()}
    except _Refused as error:
        raise UserError(f"{where} cannot be read without running code: {error}") from None
    except (
        *(ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, NotImplementedError, OSError),
        *(RecursionError, RuntimeError, TypeError, ValueError, struct.error, zipfile.BadZipFile),
    ) as error:
        why = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"{where} is no file of torch.save, or damaged ({why}); fetch it again") from error


# ---- the two formats: -> (the object, the bytes of a storage by its key)


def _zip_archive(content: memoryview) -> tuple[Any, Callable[[_Storage], Any]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
    objects = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(objects) != 1:
        raise ValueError("the zip archive has no data.pkl, as torch.save writes it")
    root = objects[0].removesuffix("data.pkl")

    def bytes_of(name: str) -> memoryview:
        if name not in entries:
            raise ValueError(f"it has no {name[-60:]!r}")
        entry = entries[name]
        # torch stores without compression. What is compressed might fill the memory.
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise ValueError("its entries are compressed or encrypted, which torch.save never does")
        begin = entry.header_offset
        signature, lengths = bytes(content[begin : begin + 4]), struct.unpack_from("<2H", content, begin + 26)
        begin += 30 + sum(lengths)
        data = content[begin : begin + entry.file_size]
        if signature != b"PK\x03\x04" or len(data) != entry.file_size:
            raise ValueError("it is cut off")
        return data

    if f"{root}byteorder" in entries and bytes(bytes_of(f"{root}byteorder")) != b"little":
        raise ValueError("its numbers are big-endian")
    found = _run(io.BytesIO(bytes_of(objects[0])))
    return found, lambda storage: bytes_of(f"{root}data/{storage.key}")


def _row_of_pickles(content: memoryview) -> tuple[Any, Callable[[_Storage], Any]]:
    stream, storages = io.BytesIO(content), {}
    if _run(stream) != _MAGIC or _run(stream) != _VERSION:
        raise ValueError("it does not begin as torch.save writes it")
    machine = _run(stream)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ValueError("its numbers are big-endian")
    found, keys = _run(stream, storages), _run(stream)
    end = stream.tell()
    data = {}
    for key in keys:
        storage = storages[key]
        (count,) = struct.unpack_from("<q", content, end)
        begin, end = end + 8, end + 8 + count * storage.dtype.itemsize
        if count != storage.count or end > len(content):
            raise ValueError("it is cut off")
        data[key] = content[begin:end]
    return found, lambda storage: data[storage.key]


# ---- the stack machine


def _run(stream: io.BytesIO, storages: dict[str, _Storage] | None = None) -> Any:
    """Run one pickle, from the position of the stream to its end -> the object. `storages` collects what it names."""
    storages = {} if storages is None else storages
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        begin = marks.pop()
        out = stack[begin:]
        del stack[begin:]
        return out

    def last(kind: type) -> Any:
        if not stack or type(stack[-1]) is not kind:
            raise ValueError("its instructions make no sense")
        return stack[-1]

    for op, value, _ in pickletools.genops(stream):
        name = op.name
        if name in _VALUES:
            stack.append(value)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name in _TUPLES:
            count = _TUPLES[name]
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[value] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[value])
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _set(last(dict), [key, value])
        elif name == "SETITEMS":
            items = since_mark()
            _set(last(dict), items)
        elif name == "APPEND":
            value = stack.pop()
            last(list).append(value)
        elif name == "APPENDS":
            items = since_mark()
            last(list).extend(items)
        elif name == "GLOBAL":
            if value not in _GLOBALS:
                raise _Refused(f"it asks for {_shown(value)}, which no state dict needs; {_ADVICE}")
            stack.append(_Global(value))
        elif name == "BINPERSID":
            storage = _storage(stack.pop())
            storages[storage.key] = storage
            stack.append(storage)
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_call(function, arguments))
        elif name == "BUILD":  # of an OrderedDict: its attribute _metadata, versions of modules
            stack.pop()
            last(dict)
        elif name == "STOP":
            if len(stack) != 1 or marks:
                raise ValueError("its instructions make no sense")
            return stack[0]
        elif name != "PROTO":
            raise _Refused(f"it has the instruction {name}, which no state dict needs; {_ADVICE}")
    raise ValueError("it is cut off")


_ADVICE = "where you trust it, convert it by safetensors.torch.save_file(model.state_dict(), PATH)"


def _shown(text: str) -> str:
    return repr(text.replace(" ", ".")[:80])


def _set(into: dict, items: list[Any]) -> None:
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) not in (str, int):  # others may take for ever to hash
            raise ValueError("a key is neither a text nor a number")
        into[key] = value


def _storage(about: Any) -> _Storage:
    kind, dtype, key, _, count, *view = about  # and the device that it was on
    if kind != "storage" or type(dtype) is not _Global or dtype.name not in _STORAGES or type(key) is not str:
        raise ValueError("a storage is not as torch.save writes it")
    if view not in ([], [None]):
        raise ValueError("a storage is a part of another one, as very old versions of torch wrote it")
    return _Storage(key, _STORAGES[dtype.name], _whole(count))


def _call(function: Any, arguments: Any) -> Any:
    """What torch would make of a call: of the three functions that are known, none of which is called."""
    if type(function) is not _Global or type(arguments) is not tuple:
        raise ValueError("its instructions make no sense")
    if function.name == _DICT and not arguments:
        return {}
    if function.name == _PARAMETER:
        return arguments[0]
    if function.name != _TENSOR:
        raise ValueError("its instructions make no sense")
    storage, offset, shape, strides = arguments[:4]
    if type(storage) is not _Storage or type(shape) is not tuple or type(strides) is not tuple:
        raise ValueError("a tensor is not as torch.save writes it")
    if len(shape) != len(strides) or len(shape) > _DIMENSIONS:
        raise ValueError("a tensor is not as torch.save writes it")
    return _Tensor(storage, _whole(offset), tuple(map(_whole, shape)), tuple(map(_whole, strides)))


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**48:
        raise ValueError("a size is no whole number, or far too large")
    return value


# ---- the tensors


def _state_dict(found: Any) -> dict[str, _Tensor]:
    for _ in range(2):
        if type(found) is not dict:
            break
        tensors = {name: value for name, value in found.items() if type(name) is str and type(value) is _Tensor}
        if tensors:
            prefix = "module." if all(name.startswith("module.") for name in tensors) else ""  # of DataParallel
            return {name.removeprefix(prefix): value for name, value in tensors.items()}
        found = next((found[key] for key in _NESTS if key in found), None)
    raise ValueError(f"it holds no state dict, neither at the top nor under {' or '.join(_NESTS)}")


def _array(name: str, tensor: _Tensor, bytes_of: Callable[[_Storage], Any]) -> np.ndarray:
    storage, offset, shape, strides = tensor
    count = math.prod(shape)
    if not count:
        return np.zeros(shape, storage.dtype)
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    # Overlapping elements could make a small file fill the memory.
    if last >= storage.count or count > storage.count:
        raise ValueError(f"{name[:60]!r} is larger than its storage")
    values = np.frombuffer(bytes_of(storage), storage.dtype)
    if len(values) != storage.count:
        raise ValueError("it is cut off")
    steps = [step * storage.dtype.itemsize for step in strides]
    return np.lib.stride_tricks.as_strided(values[offset:], shape, steps, writeable=False)
