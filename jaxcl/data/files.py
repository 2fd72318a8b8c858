"""Sets of image files: which files can be read, the size of their images, and the rows of each split.

`folder`, `csv_file`, `waterbirds` and `celeb_a` list the files (`Listing`); this module reads them. N files.
"""

import dataclasses
import functools
import hashlib
import io
import logging
import os
import stat
import zlib
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from jaxcl.data import fingerprint, hashing, images
from jaxcl.data.disk import DiskSource, Reader, Row, fits_in_memory, in_threads, source_in_memory
from jaxcl.data.kind import Pixels, Size, SourceKind
from jaxcl.data.listing import SPLITS, Listing
from jaxcl.data.moments import Moments, channel_sums, moments_of_sums
from jaxcl.data.paths import open_file, reason
from jaxcl.data.selection import TEST_SPLIT, Select, hold_out
from jaxcl.data.source import Source
from jaxcl.errors import UserError
from jaxcl.runtime.storage import is_remote

logger = logging.getLogger("jaxcl")

DEFAULT_SIZE = 64  # of images that differ in size, or are larger than LARGEST
LARGEST = 256
TAIL = 4096  # bytes at the end of a file that tell it apart
NAMED = 50  # bad files that get a log line each


@dataclasses.dataclass(frozen=True)
class ImageFiles(SourceKind):
    """A kind of source made of image files. A subclass defines `listing`.

    Options:
      image_size: side to which images are resized. 0: they keep their size if they all have the same size of at most
        256 pixels, otherwise 64.
      fit: how a resized image becomes a square: "crop" (the middle of it), "squash" or "letterbox" (all of it), as of
        `images.fitted`. "": squash, or what the kind of source says.
      max_pixels: of an image; files with more count as bad.
      on_bad_image: what happens to files that cannot be read: "raise" ends with their names, "skip" leaves them out
        and logs their names.
    """

    argument: ClassVar[str] = "PATH"
    own_validation: ClassVar[bool] = True
    config_keys: ClassVar[tuple[str, ...]] = ("files", "on_bad_image")
    keeps_size: ClassVar[bool] = True
    default_size: ClassVar[int] = 0  # the meaning of image_size 0, where it is not the one below
    default_fit: ClassVar[images.Fit] = "squash"

    image_size: Size = 0
    fit: Literal["", "crop", "squash", "letterbox"] = ""
    max_pixels: Pixels = images.MAX_PIXELS
    on_bad_image: Literal["raise", "skip"] = "raise"

    def listing(self, path: str) -> Listing:
        """The files of the set. Errors: UserError."""
        raise NotImplementedError(f"{type(self).__name__} must define `listing`")

    def load(self, argument: str, *, split: str, base_split: str, select: Select) -> Source:
        """The rows of a split, in memory if the whole set fits into 1 GiB decoded, or these rows do; otherwise on disk.

        Every file is checked before the first is used, so that a row means the same file throughout. If the set fits
        into memory, and always with on_bad_image="skip", every image is decoded once. Otherwise only headers are read,
        and damage behind a header ends the run when that image is read.

        A set without test images is tested on its validation images, and one with neither on a fixed tenth of every
        class.

        Raises:
          UserError: no image, bad ones, or a split that the set does not have.
        """
        listing = self.listing(argument)
        size, skip = self.image_size or self.default_size, self.on_bad_image == "skip"
        files = _checked(listing, Form(size, self.fit or self.default_fit, self.max_pixels), skip=skip)
        rows = files.rows_of(base_split)
        rows = rows[select(files.columns(rows)[0])]
        mean, std = files.moments_of_training()
        about = dict(mean=mean, std=std, name=listing.spec, split=split)
        if files.images is None and not files.fits(len(rows)):
            return DiskSource(reader=files, rows=rows, **about)
        return source_in_memory(
            files, *files.read_all(rows), names_of_rows=files.names(rows), paths=files.paths(rows), **about
        )


class Form(NamedTuple):
    """How files are decoded: the side of the square (0: none), how they become square, how large they may be."""

    size: int
    fit: images.Fit
    max_pixels: int


class Files(Reader):
    """The good files of a listing.

    Attributes:
      listing: of the good ones.
      image_shape: of every image.
      images: uint8 [N,H,W,C], where the set fits into memory.
      sums: `moments.channel_sums` of each image, int64 [N,2,3], where the set fits into memory.
      sizes: bytes of each file, int64 [N], 0 for remote ones.
    """

    def __init__(
        self, listing: Listing, sizes: np.ndarray, image_shape: tuple[int, int, int], form: Form, *, skip: bool
    ):
        self.listing, self.image_shape, self.form, self.threads = listing, image_shape, form, listing.threads
        self._skip = skip
        self.class_names, self.coarse_names = listing.class_names, listing.coarse_names
        self.group_names = listing.group_names
        self.sizes = sizes
        self.images: np.ndarray | None = None
        self.sums: np.ndarray | None = None
        self._moments = None

    def __len__(self) -> int:
        return len(self.listing.paths)

    def __call__(self, row: int) -> Row:
        try:
            return self.decode(row), tuple(self.listing.columns[:, row])
        except Exception as error:
            # With 'skip' every image was decoded when the set was read, so this one could be read then.
            advice = (
                "it could be read when this command began: restore it, then run the same command again"
                if self._skip
                else "mend or remove it, or set data.on_bad_image to 'skip' and start again"
            )
            raise UserError(
                f"{self.listing.spec}: {self.listing.names[row]} cannot be read ({reason(error)}); {advice}"
            ) from error

    def decode(self, row: int) -> np.ndarray:
        """The image of a row, uint8 [H,W,3]. Errors: any."""
        path = self.listing.paths[row]
        with open_file(path) as stream:
            # One request per remote file. A local file is not read as a whole: if it is no image, it may be larger than
            # the memory.
            stream = io.BytesIO(stream.read()) if is_remote(path) else stream
            image = images.decode(stream, self.form.size, self.form.max_pixels, self.form.fit)
        if image.shape != self.image_shape:
            raise ValueError(f"image is {image.shape}, the set's are {self.image_shape}: set image_size")
        return image

    @functools.cached_property
    def content(self) -> str:
        """A hash of the names, sizes, splits and labels of all files: rows of a split are drawn from all of them.

        Of sets in memory the ends of the files count, too: files of one format and size may be equally long.
        """
        found, ends = self.listing, np.zeros(len(self), np.uint32)

        def read(begin: int, end: int) -> None:
            for i in range(begin, end):
                if self.sizes[i]:
                    with open(found.paths[i], "rb") as file:
                        file.seek(max(0, self.sizes[i] - TAIL))
                        ends[i] = zlib.crc32(file.read(TAIL))

        if self.images is not None:
            in_threads(read, len(ends), self.threads)
        return fingerprint.digest(found.names, self.sizes, ends, found.splits, found.columns)

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
        if len(rows) and np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):  # a view, which is not copied
            return self.images[rows[0] : rows[0] + len(rows)], self.columns(rows)
        return self.images[rows], self.columns(rows)

    def keep(self, rows: np.ndarray) -> None:
        """Leave out all but these rows."""
        if len(rows) < len(self):
            self.listing, self.sizes = self.listing.take(rows), self.sizes[rows]
            if self.images is not None:
                self.images, self.sums = self.images[rows], self.sums[rows]

    def rows_of(self, split: str) -> np.ndarray:
        """The rows of a split, ascending. Errors: UserError where there are none."""
        spec, labels = self.listing.spec, self.listing.columns[0]
        rows = {s: np.flatnonzero(self.listing.splits == s) for s in SPLITS}
        known = {s: bool((labels[r] >= 0).any()) for s, r in rows.items()}
        train = rows["train"]
        if split == "train" and not len(train):
            raise UserError(f"{spec} has no training images; it has {len(self)} of other splits")
        # A test split without labels (ImageNet's) measures nothing, so labelled validation images replace it.
        test = "test" if len(rows["test"]) and (known["test"] or not known["validation"]) else "validation"
        own = rows["validation"] if test == "test" else ()
        if split == "validation":
            if not len(own):
                raise UserError(f"{spec} has no validation split besides its test split; set validation, such as 0.2")
            return own
        if len(rows[test]) or (split == "train" and len(train) == 1):
            return train if split == "train" else rows[test]
        if len(train) < 2:
            raise UserError(f"{spec} has one image, which leaves nothing to test on; add images, or a test split")
        held = hold_out(labels[train], 0.1, seed=0, stream=TEST_SPLIT)
        if not held.any():  # classes of four images and fewer: a tenth of all images
            held[hashing.order(0, TEST_SPLIT, len(train))[: max(1, round(len(train) / 10))]] = True
        return train[held if split == "test" else ~held]

    def moments_of_training(self) -> Moments:
        """`moments` of the training images, or of all without any: exact in memory, otherwise of a sample."""
        if self._moments is None:
            rows = self.rows_of("train") if (self.listing.splits == "train").any() else np.arange(len(self))
            if self.images is None:
                self._moments = self.moments(rows)
            else:
                H, W, _ = self.image_shape
                self._moments = moments_of_sums(len(rows) * H * W, self.sums[rows].sum(0))
        return self._moments


# The last set that was checked: every split of a set asks for the same one.
_latest: tuple[bytes, Files] | None = None


def _checked(listing: Listing, form: Form, *, skip: bool) -> Files:
    """The good files of a listing. Errors: UserError for bad ones without `skip`, or if none is good."""
    global _latest
    if not listing.paths:
        raise UserError(f"{listing.spec} holds no images{''.join(f'; {note}' for note in listing.notes)}")
    bad: dict[int, str] = {}
    key = hashlib.blake2b(repr((listing.spec, form, skip, listing.names)).encode("utf-8", "surrogateescape"))
    stamps = _stamps(listing.paths, bad)
    for column in (listing.columns, listing.splits, stamps):
        key.update(column.tobytes())
    if _latest is None or _latest[0] != key.digest():
        _latest = None  # frees its images before the next ones are decoded
        _latest = key.digest(), _check(listing, stamps[:, 0], form, skip, bad)
    return _latest[1]


def _stamps(paths: list[str], bad: dict[int, str]) -> np.ndarray:
    """Size and time of change of each file, int64 [N, 2], 0 for remote ones. What is no file is added to `bad`."""
    stamps = np.zeros((len(paths), 2), np.int64)

    def look(i: int) -> None:
        if is_remote(paths[i]):
            return
        about = os.stat(paths[i])
        if not stat.S_ISREG(about.st_mode):  # reading a pipe would never end
            raise ValueError("no regular file")
        if not about.st_size:
            raise ValueError("empty file")
        stamps[i] = about.st_size, about.st_mtime_ns

    _each(look, range(len(paths)), bad, 0)
    return stamps


def _check(listing: Listing, sizes: np.ndarray, form: Form, skip: bool, bad: dict[int, str]) -> Files:
    spec, count = listing.spec, len(listing.paths)
    shapes = np.zeros((count, 2), np.int64)

    def header(i: int) -> None:
        with open_file(listing.paths[i]) as stream:
            shapes[i] = images.shape(stream, form.max_pixels)

    # Headers are not needed where the size is given and every image is decoded anyway.
    if not form.size or not (skip or fits_in_memory(count, (form.size, form.size, 3))):
        _each(header, _good(count, bad), bad, listing.threads)
    good = _good(count, bad)
    if not good:
        _refuse(listing, bad)
    seen = np.unique(shapes[good], axis=0)
    size, why = form.size, ""
    if not size and (len(seen) > 1 or seen.max() > LARGEST):
        size = DEFAULT_SIZE
        seen = f"{seen[:, 1].min()}x{seen[:, 0].min()} to {seen[:, 1].max()}x{seen[:, 0].max()}"
        why = f" (of {seen} by {form.fit}; data.files.image_size and data.files.fit set others)"
    shape = (size, size, 3) if size else (int(seen[0, 0]), int(seen[0, 1]), 3)

    files = Files(listing, sizes, shape, form._replace(size=size), skip=skip)
    if fits := files.fits(len(good)):
        files.images, files.sums = np.zeros((count, *shape), np.uint8), np.zeros((count, 2, 3), np.int64)

    def decode(i: int) -> None:
        image = files.decode(i)
        if fits:
            files.images[i], files.sums[i] = image, channel_sums(image)  # summed while it is in the cache

    if skip and not fits:
        logger.info("%s: decoding %s images once to find the bad ones", spec, f"{len(good):,}")
    if fits or skip:
        _each(decode, good, bad, listing.threads)
    if not skip or len(bad) == count:
        _refuse(listing, bad)
    files.keep(np.array(_good(count, bad)))

    for i, why_bad in sorted(bad.items())[:NAMED]:
        logger.warning("%s: %s left out: %s", spec, listing.names[i], why_bad)
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
    """look(row) in threads; rows that raise are added to `bad` with the reason."""

    def work(begin: int, end: int) -> None:
        for i in rows[begin:end]:
            try:
                look(i)
            except Exception as error:  # a damaged file may raise anything
                bad[i] = reason(error)

    in_threads(work, len(rows), threads)


def _refuse(listing: Listing, bad: dict[int, str]) -> None:
    """Errors: UserError if any file is bad."""
    if not bad:
        return
    named = ", ".join(f"{listing.names[i]} ({bad[i]})" for i in sorted(bad)[:5])
    more = f" and {len(bad) - 5:,} more" if len(bad) > 5 else ""
    allowed = ", or set data.on_bad_image to 'skip'" if len(bad) < len(listing.paths) else ""
    raise UserError(
        f"{listing.spec}: {len(bad):,} of {len(listing.paths):,} images cannot be read: {named}{more};"
        f" mend or remove them{allowed}"
    )
