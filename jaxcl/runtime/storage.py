"""Files of a run, on a local disk or in an object store such as gs://, which can neither append nor rename."""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import re
import tempfile
import uuid
from collections.abc import Iterator
from typing import IO, Any

from etils import epath

from jaxcl.errors import UserError
from jaxcl.runtime import messages

# Errors of a disk that refuses to write.
_REFUSED = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "the quota is used up",
    errno.EROFS: "it is read-only",
}
_ODD = re.compile(r"[\[\]*?\\\ud800-\udfff]")


def expanded(path: str | os.PathLike) -> epath.Path:
    """The path, in which a leading "~" is the home: shells leave it in --workdir=~/run. Expanding it twice is once."""
    text = os.fspath(path)
    if is_remote(text):
        return epath.Path(text)
    text = os.path.expanduser(text)
    # A folder may be called "~" itself: "./~/run" is absolute from here on, since paths drop the "./".
    return epath.Path(os.path.abspath(text) if os.path.normpath(text).startswith("~") else text)


def folder(path: str | os.PathLike) -> epath.Path:
    """The path; absolute if it is local. Unlike pathlib, this leaves "gs://bucket/run" unchanged."""
    path = expanded(path)
    return path if is_remote(path) else epath.Path(pathlib.Path(path).resolve())


def matching(root: str | os.PathLike, pattern: str) -> list[epath.Path]:
    """The files below a folder that match a pattern, sorted. Unlike epath, it takes "[" in the folder as it is."""
    found = epath.Path(root).glob(pattern) if is_remote(root) else pathlib.Path(root).glob(pattern)
    return sorted(map(epath.Path, found))


def plain_link(directory: epath.Path) -> epath.Path:
    """The folder, or a link to it that has a plain name; the folder is then made.

    Libraries take "[" and "\\" in a name for a pattern, and cannot pass on bytes that are no UTF-8. The link is in the
    folder for temporary files; it has one name on all machines and stays, since other processes may use it.

    Raises:
      UserError: the link cannot be made.
    """
    text = os.fspath(directory)
    if is_remote(directory) or not _ODD.search(text):
        return directory
    digest = hashlib.blake2b(os.fsencode(text), digest_size=8).hexdigest()
    link = pathlib.Path(tempfile.gettempdir()) / f"jaxcl-{os.getuid() if hasattr(os, 'getuid') else 0}-{digest}"
    try:
        os.makedirs(text, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.symlink(text, link, target_is_directory=True)
        if os.readlink(link) == text:
            return epath.Path(link)
        why = "something else is there"
    except OSError as error:
        why = error.strerror
    raise UserError(
        f"{text!r} has a name that needs a link to it, and {link} cannot be made ({why}); rename the folder"
    )


def is_remote(path: str | os.PathLike) -> bool:
    """Whether the path is in an object store."""
    return "://" in os.fspath(path)


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """Replace a file atomically: if the process is killed, either the old or the new file is there."""
    path = epath.Path(path)
    content = content.encode() if isinstance(content, str) else content
    if is_remote(path):  # an object appears only when it is complete
        path.write_bytes(content)
        return
    with replacing(path) as file:
        file.write(content)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """Open a local file for writing that appears at `path`, whole and on the disk, if the block ends without an error.

    Any number of writers may do this at the same moment: each has a temporary file of its own, and the last one stays.
    """
    temporary = beside(path)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, os.fspath(temporary)):  # a write names no file
            error.filename = os.fspath(path)
        raise


def beside(path: str | os.PathLike) -> pathlib.Path:
    """A name for a temporary file beside a local one, which no other process, thread or machine uses."""
    path = pathlib.Path(path)
    start = os.fsdecode(os.fsencode(path.name)[:200])  # names have at most 255 bytes
    return path.with_name(f"{start}.{uuid.uuid4().hex[:12]}.tmp")


def read_json(path: str | os.PathLike, *keys: str, advice: str = "restore a copy of it") -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Args:
      keys: that it must have.
      advice: what to do if it does not.

    Raises:
      UserError: the file was cut off, is binary or is another program's; one line that begins with its path.
    """
    try:
        content = json.loads(epath.Path(path).read_bytes().decode())
    except UnicodeDecodeError:
        why = "it is binary"
    except RecursionError:
        why = "it is nested too deeply"
    except ValueError as error:
        why = f"it is cut off or damaged, {error}"
    except OSError as error:
        why = (error.strerror or str(error)).lower()
    else:
        if not isinstance(content, dict):
            why = f"it holds a {type(content).__name__} and not an object"
        elif missing := [key for key in keys if key not in content]:
            why = f"it has no {missing[0]!r}"
        else:
            return content
    raise UserError(f"{os.fspath(path)} cannot be read: {why}; {advice}")


def files(root: epath.Path) -> Iterator[epath.Path]:
    """All files below a folder, in any order; links are followed, and a folder that is reached twice is read once."""
    if is_remote(root):
        for path in root.iterdir():
            yield from files(path) if path.is_dir() else [path]
        return
    seen: set[tuple[int, int]] = set()
    for folder, below, names in os.walk(root, followlinks=True, onerror=_raise):
        about = os.stat(folder)
        if (here := (about.st_dev, about.st_ino)) in seen:
            below.clear()
            continue
        seen.add(here)
        yield from (epath.Path(folder) / name for name in names)


def _raise(error: OSError) -> None:
    raise error


def move_folder(source: epath.Path, target: epath.Path) -> None:
    """Rename a folder and replace the target. In an object store, copy the files and then delete them."""
    target.rmtree(missing_ok=True)
    if not is_remote(source):
        source.rename(target)
        return
    for path in files(source):
        (target / path.relative_to(source)).write_bytes(path.read_bytes())
    source.rmtree()


def refusal(error: BaseException | None) -> str:
    """Why storage refused a write, in plain words; "" if neither the error nor its causes are a refusal."""
    seen: set[int] = set()
    todo: list[Any] = [error]
    while todo:
        error = todo.pop()
        if error is None or id(error) in seen:
            continue
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _REFUSED:
            return _REFUSED[error.errno]
        if match := messages.DISK_REFUSES.search(str(error)):
            return match[0].lower()
        todo += [error.__cause__, error.__context__, *getattr(error, "exceptions", ())]
    return ""


def inside(path: Any, root: str | os.PathLike) -> bool:
    """Whether a path, such as the `filename` of an OSError, is in a local folder, or a name in an open folder."""
    if path is None or isinstance(path, int) or is_remote(root):
        return False
    if os.path.basename(path) == path and not os.path.lexists(path):  # `shutil.rmtree` opens each folder
        return True
    return pathlib.Path(folder(root)) in pathlib.Path(os.path.abspath(os.fsdecode(path))).parents


def need_library(path: str | os.PathLike) -> None:
    """Raise UserError if the library for such a path is not installed."""
    if not is_remote(path):
        return
    try:
        epath.Path(path).exists()
    except ImportError:
        scheme = os.fspath(path).partition(":")[0]
        raise UserError(
            f"{os.fspath(path)} needs a library that is not installed; for gs:// pip install 'jaxcl[gcs]'"
            if scheme == "gs"
            else f"{os.fspath(path)} needs the fsspec library for {scheme}://, which is not installed"
        ) from None
