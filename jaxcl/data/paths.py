"""Paths of data, local or in a bucket ("gs://..."), and how names and errors are shown to people."""

import os
from collections.abc import Iterable
from typing import IO

from etils import epath
from PIL import UnidentifiedImageError

from jaxcl.errors import UserError
from jaxcl.runtime.storage import is_remote


def root_of(path: str) -> str:
    """The path as it is opened: "~" is expanded in a local one."""
    return path if is_remote(path) else os.path.expanduser(path)


def join(folder: str, name: str) -> str:
    """`name` in `folder`, or `name` itself where it is absolute."""
    return name if is_remote(name) or os.path.isabs(name) else f"{folder.rstrip('/')}/{name}"


def open_file(path: str) -> IO[bytes]:
    """A file to read, local or remote. Errors: whatever the library of a bucket raises."""
    return epath.Path(path).open("rb") if is_remote(path) else open(path, "rb")


def first(spec: str, root: str, places: Iterable[str]) -> str | None:
    """The first of some paths below the root that exists. Errors: UserError."""
    try:
        return next((place for place in places if epath.Path(join(root, place)).exists()), None)
    except Exception as error:  # the library of a bucket may raise anything
        raise UserError(f"{spec} cannot be read ({reason(error)})") from error


def read_text(spec: str, path: str) -> str:
    """A text file. Errors: UserError for one that is missing or not UTF-8."""
    try:
        with open_file(path) as stream:
            return stream.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{spec}: {shown(path)} is no text in UTF-8 ({error.reason}); save it as UTF-8") from error
    except Exception as error:  # OSError; the library of a bucket may raise anything
        raise UserError(f"{spec}: {shown(path)} cannot be read ({reason(error)})") from error


def shown(name: str) -> str:
    """A file's name as one printable line, whatever its bytes are."""
    name = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def reason(error: Exception) -> str:
    """Why a file cannot be read, in one short line."""
    if isinstance(error, UnidentifiedImageError):
        return "no image of a known format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return " ".join(str(error).split())[:200] or type(error).__name__


def is_idx(name: str) -> bool:
    """Whether a file is named like the idx files of MNIST, such as train-images-idx3-ubyte.gz."""
    return name.lower().removesuffix(".gz").endswith("-ubyte")
