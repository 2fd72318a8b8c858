"""Sets of image files: which can be read, of what size they become, and the rows of each part.

`folder`, `csv_file`, `waterbirds` and `celeb_a` say which files there are (a `Listing`); everything else is here.
N files of a listing.
"""

import hashlib
import io
import logging
import os
import stat
from collections.abc import Callable, Iterable
from typing import IO, NamedTuple

import numpy as np
from etils import epath
from PIL import UnidentifiedImageError

from jaxcl.data import hashing, images
from jaxcl.data.base import TEST_PART, Select, Source, channel_sums, hold_out, moments_of_sums
from jaxcl.data.disk import (
    COLUMNS,
    THREADS,
    WAITING_THREADS,
    DiskSource,
    Reader,
    Row,
    fits_in_memory,
    in_threads,
    source_in_memory,
)
from jaxcl.errors import UserError
from jaxcl.runtime.storage import is_remote

logger = logging.getLogger("jaxcl")

PARTS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("val", "valid", "validation"),
}
PART_OF_WORD = {word: part for part, words in PARTS.items() for word in words}
DEFAULT_SIZE = 64  # of images that differ in size, or are larger than LARGEST
LARGEST = 256
NAMED = 50  # bad files that get a line of their own


class Listing(NamedTuple):
    """The files of a set before any is opened.

    Attributes:
      spec: for messages.
      paths: local or remote.
      names: the same for people, relative.
      parts: "train", "test" or "validation", each.
      columns: int32 [3, N], `disk.COLUMNS`.
      class_names, coarse_names, group_names: of the columns' values, empty where there are none.
      notes: what was left out or taken for something, one line each.
    """

    spec: str
    paths: list[str]
    names: list[str]
    parts: np.ndarray
    columns: np.ndarray
    class_names: tuple[str, ...] = ()
    coarse_names: tuple[str, ...] = ()
    group_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def threads(self) -> int:
        """How many read it at once."""
        return WAITING_THREADS if any(map(is_remote, self.paths)) else THREADS

    def take(self, rows: np.ndarray) -> "Listing":
        paths, names = ([column[i] for i in rows] for column in (self.paths, self.names))
        return self._replace(paths=paths, names=names, parts=self.parts[rows], columns=self.columns[:, rows])


def load(
    listing: Listing, *, split: str, part: str, select: Select, image_size: int | None, on_bad_image: str
) -> Source | DiskSource:
    """The rows of a split, in memory if the whole set fits into 1 GiB decoded, or these rows do; otherwise on disk.

    Every file is looked at before the first is used, so that a row means the same file throughout. Of a set that fits
    into memory, and of any with on_bad_image="skip", every image is decoded once; otherwise its header is read, and
    damage behind it ends the run when the image's turn comes.

    Args:
      listing: the files.
      part: which `split` is taken from. A set without a test part is tested on its validation part, one with neither
        on a fixed tenth of every class.
      image_size: side to which images are resized (shorter side, then the centre). None: they stay as they are if
        they are all alike and no larger than 256 pixels, otherwise 64.
      on_bad_image: what happens to files that cannot be read: "raise" ends with their names, "skip" leaves them out
        and says so.

    Raises:
      UserError: no image, bad ones, or a part that there is not.
    """
    images.check_size(listing.spec, image_size)
    if on_bad_image not in ("raise", "skip"):
        raise UserError(f"on_bad_image={on_bad_image!r} must be 'raise' or 'skip'")
    files = _looked_at(listing, image_size, skip=on_bad_image == "skip")
    rows = files.part(part)
    rows = rows[select(files.columns(rows)[0])]
    mean, std = files.moments_of_training()
    about = dict(mean=mean, std=std, name=listing.spec, split=split)
    if files.images is None and not files.fits(len(rows)):
        return DiskSource(reader=files, rows=rows, **about)
    return source_in_memory(
        files, *files.read_all(rows), names_of_rows=files.names(rows), paths=files.paths(rows), **about
    )


class Files(Reader):
    """The good files of a listing.

    Attributes:
      listing: of the good ones.
      image_shape: of every image.
      images: uint8 [N,H,W,3], where the set fits into memory.
      sums: of each image, `base.channel_sums`, int64 [N,2,3], likewise.
    """

    def __init__(self, listing: Listing, image_shape: tuple[int, int, int], size: int | None):
        self.listing, self.image_shape, self._size, self.threads = listing, image_shape, size, listing.threads
        self.class_names, self.coarse_names = listing.class_names, listing.coarse_names
        self.group_names = listing.group_names
        self.images: np.ndarray | None = None
        self.sums: np.ndarray | None = None
        self._moments = None

    def __len__(self) -> int:
        return len(self.listing.paths)

    def __call__(self, row: int) -> Row:
        try:
            return self.decode(row), tuple(self.listing.columns[:, row])
        except Exception as error:
            raise UserError(
                f"{self.listing.spec}: {self.listing.names[row]} cannot be read ({_reason(error)}); mend or remove it,"
                " or set data.on_bad_image to 'skip' and start anew"
            ) from error

    def decode(self, row: int) -> np.ndarray:
        """Errors: any."""
        path = self.listing.paths[row]
        with open_file(path) as stream:
            # A bucket is asked once for the whole; a local file that is no image may be larger than the memory.
            image = images.decode(io.BytesIO(stream.read()) if is_remote(path) else stream, self._size)
        if image.shape != self.image_shape:
            raise ValueError(f"image is {image.shape}, the set's are {self.image_shape}: set image_size")
        return image

    def columns(self, rows: np.ndarray) -> np.ndarray:
        return self.listing.columns[:, rows]

    def paths(self, rows: np.ndarray) -> tuple[str, ...]:
        return tuple(self.listing.paths[i] for i in rows)

    def names(self, rows: np.ndarray) -> np.ndarray:
        return np.array([self.listing.names[i] for i in rows], object)

    def labelled(self, rows: np.ndarray) -> bool:
        return bool((self.listing.columns[0, rows] >= 0).all())

    def read_all(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.images is None:
            return super().read_all(rows)
        if len(rows) and np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):  # a view: copying costs a tenth
            return self.images[rows[0] : rows[0] + len(rows)], self.columns(rows)
        return self.images[rows], self.columns(rows)

    def keep(self, rows: np.ndarray) -> None:
        """Leave out all but these rows."""
        if len(rows) < len(self):
            self.listing = self.listing.take(rows)
            if self.images is not None:
                self.images, self.sums = self.images[rows], self.sums[rows]

    def part(self, part: str) -> np.ndarray:
        """Ascending rows. Errors: UserError where there are none."""
        spec, labels = self.listing.spec, self.listing.columns[0]
        rows = {p: np.flatnonzero(self.listing.parts == p) for p in PARTS}
        known = {p: bool((labels[r] >= 0).any()) for p, r in rows.items()}
        train = rows["train"]
        if not len(train):
            raise UserError(f"{spec} has no training images; it has {len(self)} of other parts")
        # Nothing can be measured on a test part without labels (ImageNet's) where another part has them.
        test = "test" if len(rows["test"]) and (known["test"] or not known["validation"]) else "validation"
        own = rows["validation"] if test == "test" else ()
        if part == "validation":
            if not len(own):
                raise UserError(f"{spec} has no validation part besides its test part; set validation, for example 0.2")
            return own
        if len(rows[test]):
            return train if part == "train" else rows[test]
        held = hold_out(labels[train], 0.1, seed=0, stream=TEST_PART)
        if not held.any():  # classes of four images and fewer: a tenth of all
            held[hashing.order(0, TEST_PART, len(train))[: max(1, round(len(train) / 10))]] = True
        if held.all():
            raise UserError(f"{spec} has one image, which leaves nothing to test on; add images, or a test part")
        return train[held if part == "test" else ~held]

    def moments_of_training(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Exact if the set is in memory, otherwise of a sample."""
        if self._moments is None:
            rows = self.part("train")
            if self.images is None:
                self._moments = self.moments(rows)
            else:
                H, W, _ = self.image_shape
                self._moments = moments_of_sums(len(rows) * H * W, self.sums[rows].sum(0))
        return self._moments


# The set looked at last, as every split of it asks for the same.
_latest: tuple[bytes, Files] | None = None


def _looked_at(listing: Listing, image_size: int | None, *, skip: bool) -> Files:
    global _latest
    if not listing.paths:
        raise UserError(f"{listing.spec} holds no images{''.join(f'; {note}' for note in listing.notes)}")
    bad: dict[int, str] = {}
    key = hashlib.blake2b(repr((listing.spec, image_size, skip, listing.names)).encode("utf-8", "surrogateescape"))
    for column in (listing.columns, listing.parts, _stamps(listing.paths, bad)):
        key.update(column.tobytes())
    if _latest is None or _latest[0] != key.digest():
        _latest = None  # frees what it holds
        _latest = key.digest(), _look(listing, image_size, skip, bad)
    return _latest[1]


def _stamps(paths: list[str], bad: dict[int, str]) -> np.ndarray:
    """Size and time of change of each file, int64 [N, 2], 0 for remote ones; what is no file becomes bad."""
    stamps = np.zeros((len(paths), 2), np.int64)

    def look(i: int) -> None:
        if is_remote(paths[i]):
            return
        about = os.stat(paths[i])
        if not stat.S_ISREG(about.st_mode):  # a pipe would wait for ever
            raise ValueError("no regular file")
        if not about.st_size:
            raise ValueError("empty file")
        stamps[i] = about.st_size, about.st_mtime_ns

    _each(look, range(len(paths)), bad, THREADS)
    return stamps


def _look(listing: Listing, image_size: int | None, skip: bool, bad: dict[int, str]) -> Files:
    spec, count = listing.spec, len(listing.paths)
    shapes = np.zeros((count, 2), np.int64)

    def header(i: int) -> None:
        with open_file(listing.paths[i]) as stream:
            shapes[i] = images.shape(stream)

    if not image_size or not (skip or fits_in_memory(count, (image_size, image_size, 3))):
        _each(header, _good(count, bad), bad, listing.threads)  # otherwise decoding says all that there is to know
    good = _good(count, bad)
    if not good:
        _refuse(listing, bad)
    seen = np.unique(shapes[good], axis=0)
    size, why = image_size, ""
    if not size and (len(seen) > 1 or seen.max() > LARGEST):
        size = DEFAULT_SIZE
        sizes = f"{seen[:, 1].min()}x{seen[:, 0].min()} to {seen[:, 1].max()}x{seen[:, 0].max()}"
        why = f" (of {sizes}; data.files.image_size sets another)"
    shape = (size, size, 3) if size else (int(seen[0, 0]), int(seen[0, 1]), 3)

    files = Files(listing, shape, size)
    if fits := files.fits(len(good)):
        files.images, files.sums = np.zeros((count, *shape), np.uint8), np.zeros((count, 2, 3), np.int64)

    def decode(i: int) -> None:
        image = files.decode(i)
        if fits:
            files.images[i], files.sums[i] = image, channel_sums(image)  # summed while it is in the cache

    if skip and not fits:
        logger.info("%s: every one of %s images is decoded once to find the bad ones", spec, f"{len(good):,}")
    if fits or skip:
        _each(decode, good, bad, listing.threads)
    if not skip or len(bad) == count:
        _refuse(listing, bad)
    files.keep(np.array(_good(count, bad)))

    for i, reason in sorted(bad.items())[:NAMED]:
        logger.warning("%s: %s left out: %s", spec, listing.names[i], reason)
    left_out = f", {len(bad):,} left out that cannot be read" if bad else ""
    notes = "".join(f"; {note}" for note in listing.notes)
    kinds = f"{len(files.class_names)} classes" if files.class_names else "no labels"
    logger.info(
        "%s: %s images, %s, each %dx%d%s%s%s", spec, f"{len(files):,}", kinds, shape[1], shape[0], why, left_out, notes
    )
    return files


def _good(count: int, bad: dict[int, str]) -> list[int]:
    return [i for i in range(count) if i not in bad]


def _each(look: Callable[[int], None], rows, bad: dict[int, str], threads: int) -> None:
    """look(row) in threads; the reasons of those that raise come into `bad`."""

    def work(begin: int, end: int) -> None:
        for i in rows[begin:end]:
            try:
                look(i)
            except Exception as error:  # a damaged file may raise anything
                bad[i] = _reason(error)

    in_threads(work, len(rows), threads)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no image of a known format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return " ".join(str(error).split())[:200] or type(error).__name__


def _refuse(listing: Listing, bad: dict[int, str]) -> None:
    if not bad:
        return
    named = ", ".join(f"{listing.names[i]} ({bad[i]})" for i in sorted(bad)[:5])
    more = f" and {len(bad) - 5:,} more" if len(bad) > 5 else ""
    allowed = ", or set data.on_bad_image to 'skip'" if len(bad) < len(listing.paths) else ""
    raise UserError(
        f"{listing.spec}: {len(bad):,} of {len(listing.paths):,} images cannot be read: {named}{more};"
        f" mend or remove them{allowed}"
    )


# ---- paths


def join(folder: str, name: str) -> str:
    """`name` in `folder`, or itself where it is absolute."""
    return name if is_remote(name) or os.path.isabs(name) else f"{folder.rstrip('/')}/{name}"


def open_file(path: str) -> IO[bytes]:
    return epath.Path(path).open("rb") if is_remote(path) else open(path, "rb")


def first(spec: str, root: str, places: Iterable[str]) -> str | None:
    """The first of some places below the root where there is something."""
    try:
        return next((place for place in places if epath.Path(join(root, place)).exists()), None)
    except Exception as error:  # of a bucket, whatever its library raises
        raise UserError(f"{spec} cannot be read ({_reason(error)})") from error


def read_text(spec: str, path: str) -> str:
    """A text file. Errors: UserError for one that is missing or no UTF-8."""
    try:
        with open_file(path) as stream:
            return stream.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{spec}: {shown(path)} is no text in UTF-8 ({error.reason}); save it as UTF-8") from error
    except Exception as error:  # OSError; of a bucket, whatever its library raises
        raise UserError(f"{spec}: {shown(path)} cannot be read ({_reason(error)})") from error


def shown(name: str) -> str:
    """A file's name as one printable line, whatever bytes it is made of."""
    name = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def numbered(values: list[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Codes int32 [N] of words, -1 of empty ones, and the words in order; of numbers in theirs, where -1 is empty too.

    1, 01 and 1.0 are one number.
    """
    words = [value.strip() for value in values]
    numbers = [_number(word) for word in words]
    if all(number is not None for number, word in zip(numbers, words, strict=True) if word):
        words = ["" if number is None or number == -1 else str(number) for number in numbers]
        names = sorted(set(words) - {""}, key=int)
    else:
        names = sorted(set(words) - {""})
    code = {name: i for i, name in enumerate(names)} | {"": -1}
    return np.array([code[word] for word in words], np.int32), tuple(shown(name) for name in names)


def _number(word: str) -> int | None:
    try:
        return int(word)
    except ValueError:
        pass
    try:  # 1.0, as tables write whole numbers when some are missing
        value = float(word)
    except ValueError:
        return None
    return int(value) if value.is_integer() else None


def columns(count: int, **known: np.ndarray) -> np.ndarray:
    """int32 [3, N] from the columns there are."""
    out = np.full((len(COLUMNS), count), -1, np.int32)
    for name, values in known.items():
        out[COLUMNS.index(name)] = values
    return out
