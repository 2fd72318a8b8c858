"""Hashes that tell whether a set is still the one that a run began with. N images."""

import hashlib
import zlib
from collections.abc import Iterable, Mapping

import numpy as np


def digest(*parts: object) -> str:
    """A short hash of numbers, texts, arrays and mappings of them, in this order; the same on every machine."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        for piece in _pieces(part):
            found.update(len(piece).to_bytes(8, "little") + piece)
    return found.hexdigest()


def _pieces(part: object) -> Iterable[bytes]:
    if isinstance(part, Mapping):
        for key in sorted(part):
            yield from (*_pieces(key), *_pieces(part[key]))
    elif isinstance(part, np.ndarray) and part.dtype.kind in "iub":
        values = np.ascontiguousarray(part, part.dtype.newbyteorder("<"))
        yield f"{part.dtype.kind}{part.dtype.itemsize} {part.shape}".encode()
        yield values.tobytes()
    elif isinstance(part, np.ndarray | tuple | list):
        yield str(len(part)).encode()
        yield "\0".join(map(str, part)).encode("utf-8", "surrogateescape")
    else:
        yield str(part).encode("utf-8", "surrogateescape")


def of_pixels(*arrays: np.ndarray) -> str:
    """A quick hash of images that are stored as they are, uint8 [N,H,W,C]: three gigabytes a second."""
    return " ".join(f"{array.shape} {zlib.crc32(np.ascontiguousarray(array)):08x}" for array in arrays)
