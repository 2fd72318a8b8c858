"""Sets that are read row by row: `Reader`, and `DiskSource`, which decodes each batch when it is read.

N rows of a set, n chosen rows, B batch, H height, W width, C channels.
"""

import dataclasses
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import numpy as np

from jaxcl.data import fingerprint, hashing
from jaxcl.data.moments import Moments, moments
from jaxcl.data.source import SAMPLE, ArraySource, Batch, Source
from jaxcl.runtime.cores import usable_cores

IN_MEMORY_BYTES = 2**30  # sets that fit are decoded once
COLUMNS = ("label", "coarse", "group")  # labels of an image, -1 where unknown

Row = tuple[np.ndarray, tuple[int, int, int]]  # image uint8 [H,W,3], its columns


class Reader:
    """The rows of a set, 0 to N - 1. A subclass defines the attributes, `__len__`, `__call__` and `columns`."""

    image_shape: tuple[int, int, int]
    threads: int = 0  # that read it; 0: one for each core
    content: str = ""  # as of `Source`, of the whole set
    knows_labels: bool = True  # whether `columns` is cheap
    class_names: tuple[str, ...] = ()
    coarse_names: tuple[str, ...] = ()
    group_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        raise NotImplementedError

    def __call__(self, row: int) -> Row:
        """Errors: UserError that names the row."""
        raise NotImplementedError

    def columns(self, rows: np.ndarray) -> np.ndarray:
        """`COLUMNS` of these rows, int32 [3, n], without decoding images."""
        raise NotImplementedError

    def block(self, rows: np.ndarray) -> Sequence[Row]:
        """Several rows, for readers that read them faster together than one by one."""
        return [self(row) for row in rows]

    def read_all(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Decodes `rows` in threads: images uint8 [n,H,W,3], columns int32 [3, n]."""
        images = np.empty((len(rows), *self.image_shape), np.uint8)
        columns = np.empty((len(COLUMNS), len(rows)), np.int32)

        def read(begin: int, end: int) -> None:
            for i, (image, known) in enumerate(self.block(rows[begin:end]), begin):
                images[i], columns[:, i] = image, known

        in_threads(read, len(rows), self.threads)
        return images, columns

    def paths(self, rows: np.ndarray) -> tuple[str, ...] | None:
        """The files of these rows; None where rows are no files."""
        return None

    def names(self, rows: np.ndarray) -> np.ndarray | None:
        """Names of these rows for people, text [n], such as the names of their files; None where they have none."""
        return None

    def labelled(self, rows: np.ndarray) -> bool:
        """Whether each of these rows has a label."""
        return bool(self.class_names)

    def fits(self, count: int) -> bool:
        """Whether `count` decoded rows may be held in memory."""
        return fits_in_memory(count, self.image_shape)

    def moments(self, rows: np.ndarray) -> Moments:
        """Mean and standard deviation per channel, in [0, 1] units, of a sample of `rows`."""
        return moments(self.read_all(np.sort(rows[hashing.order(0, 0, len(rows))[:SAMPLE]]))[0])


def fits_in_memory(count: int, image_shape: tuple[int, int, int]) -> bool:
    """Whether `count` decoded images may be held in memory."""
    return count * int(np.prod(image_shape)) <= IN_MEMORY_BYTES


def waiting_threads() -> int:
    """Threads that read remote files: they mostly wait, so there are more of them than cores."""
    return min(64, max(8, usable_cores()))


def in_threads(work, count: int, threads: int = 0) -> None:
    """work(begin, end) over 0 to count, in blocks. Errors: the first that a block raises.

    threads: 0: one for each usable core. Pillow decodes outside the interpreter lock; more threads would cost memory,
    and processor time for handing over the lock.
    """
    threads = threads or usable_cores()
    size = max(1, min(256, -(-count // (4 * threads))))
    with ThreadPoolExecutor(threads) as pool:
        jobs = [pool.submit(work, begin, min(begin + size, count)) for begin in range(0, count, size)]
        try:
            for job in jobs:
                job.result()
        finally:  # after an error the other blocks are not needed
            pool.shutdown(cancel_futures=True)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class DiskSource(Source):
    """A set that stays on disk: every batch is read and decoded when it is asked for.

    Labels that a reader does not know in advance (TFDS) are read when `labels` or `extras` are first used.

    Attributes:
      reader: of the whole set.
      rows: int [n], the rows of the reader that belong to this source.
      level: the column that labels the images, "label" or "coarse".
      mean, std, name, split: as of `Source`.
    """

    reader: Reader
    rows: np.ndarray
    # With an explicit `field`: dataclasses would take the defaults of the contract for defaults of the field.
    mean: tuple[float, ...] = dataclasses.field()
    std: tuple[float, ...] = dataclasses.field()
    name: str = dataclasses.field()
    split: str = dataclasses.field()
    level: str = "label"
    in_memory: ClassVar[bool] = False

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.reader.image_shape

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.reader.class_names if self.level == "label" else self.reader.coarse_names

    @property
    def coarse_names(self) -> tuple[str, ...]:
        return self.reader.coarse_names

    @property
    def fine_names(self) -> tuple[str, ...]:
        return () if self.level == "label" else self.reader.class_names

    @property
    def group_names(self) -> tuple[str, ...]:
        return self.reader.group_names

    @functools.cached_property
    def paths(self) -> tuple[str, ...] | None:
        return self.reader.paths(self.rows)

    @property
    def content(self) -> str:
        return self.reader.content

    @functools.cached_property
    def fingerprint(self) -> str:
        if not self.reader.knows_labels:
            return self.content and fingerprint.digest(self.content, np.asarray(self.rows), self.level)
        return fingerprint.digest(self.content, self.labels, self.extras)

    @functools.cached_property
    def labelled(self) -> bool:
        return self.reader.labelled(self.rows)

    @functools.cached_property
    def _columns(self) -> dict[str, np.ndarray]:
        return dict(zip(COLUMNS, self.reader.columns(self.rows), strict=True))

    @property
    def labels(self) -> np.ndarray:
        return self._columns[self.level]

    @property
    def extras(self) -> dict[str, np.ndarray]:
        """ "coarse", "fine", "group" and "name", where the set has them."""
        columns = {"coarse": "coarse", "fine": "label", "group": "group"}
        names = {"coarse": self.coarse_names, "fine": self.fine_names, "group": self.group_names}
        extras = {key: self._columns[column] for key, column in columns.items() if names[key]}
        return extras | _named(self.reader.names(self.rows))

    def coarse(self) -> "DiskSource":
        return dataclasses.replace(self, level="coarse")

    def take(self, rows: np.ndarray) -> "DiskSource":
        return dataclasses.replace(self, rows=self.rows[rows])

    def batch(self, indices: np.ndarray) -> Batch:
        indices = np.asarray(indices)
        images, columns = self.reader.read_all(self.rows[indices])
        return {"image": images, "label": columns[COLUMNS.index(self.level)], "index": indices.astype(np.int32)}


def source_in_memory(
    reader: Reader, images: np.ndarray, columns: np.ndarray, *, names_of_rows: np.ndarray | None = None, **about
) -> ArraySource:
    """Rows of a reader, as `read_all` returns them, as a source. about: mean, std, paths, name and split."""
    names = {"coarse": reader.coarse_names, "group": reader.group_names}
    columns = dict(zip(COLUMNS, columns, strict=True))
    return ArraySource(
        images=images,
        labels=columns["label"],
        class_names=reader.class_names,
        extras={key: columns[key] for key, value in names.items() if value} | _named(names_of_rows),
        coarse_names=reader.coarse_names,
        group_names=reader.group_names,
        content=reader.content,
        **about,
    )


def _named(names: np.ndarray | None) -> dict[str, np.ndarray]:
    return {} if names is None else {"name": names}
