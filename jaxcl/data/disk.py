"""Sets that are read row by row: `Reader`, and `DiskSource`, which decodes a batch when it is asked for.

N rows of a set, n of them chosen.
"""

import dataclasses
import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import numpy as np

from jaxcl.data import hashing
from jaxcl.data.base import Source, moments

IN_MEMORY_BYTES = 2**30  # sets that fit are decoded once
SAMPLE = 2000  # training images from which mean and standard deviation of other sets are estimated
# Pillow decodes outside the interpreter lock, so a thread a core: on two cores eight cost a seventh more processor
# time an image (handing over the lock, memory of their own). What comes through a network waits: more wait at once.
THREADS = os.cpu_count() or 1
WAITING_THREADS = min(64, max(8, THREADS))
COLUMNS = ("label", "coarse", "group")  # what is known of an image, -1 where it is not

Row = tuple[np.ndarray, tuple[int, int, int]]  # image uint8 [H,W,3], its columns


class Reader:
    """The rows of a set, 0 to N - 1. A kind of set gives the attributes, `__len__`, `__call__` and `columns`."""

    image_shape: tuple[int, int, int]
    threads: int = THREADS
    class_names: tuple[str, ...] = ()
    coarse_names: tuple[str, ...] = ()
    group_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        raise NotImplementedError

    def __call__(self, row: int) -> Row:
        """Errors: UserError that names the row."""
        raise NotImplementedError

    def columns(self, rows: np.ndarray) -> np.ndarray:
        """int32 [3, n], without decoding images."""
        raise NotImplementedError

    def block(self, rows: np.ndarray) -> Sequence[Row]:
        """Some rows, where reading them at once is faster than one by one."""
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
        """What people call these rows, text [n], such as the names of their files; None: nothing."""
        return None

    def labelled(self, rows: np.ndarray) -> bool:
        """Whether each of these rows has a label."""
        return bool(self.class_names)

    def fits(self, count: int) -> bool:
        """Whether so many rows may be held in memory, decoded."""
        return fits_in_memory(count, self.image_shape)

    def moments(self, rows: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel, in [0, 1] units, of a sample of `rows`."""
        return moments(self.read_all(np.sort(rows[hashing.order(0, 0, len(rows))[:SAMPLE]]))[0])


def fits_in_memory(count: int, image_shape: tuple[int, int, int]) -> bool:
    """Whether so many decoded images may be held."""
    return count * int(np.prod(image_shape)) <= IN_MEMORY_BYTES


def in_threads(work, count: int, threads: int = THREADS) -> None:
    """work(begin, end) over 0 to count, in blocks. Errors: the first that a block raises."""
    size = max(1, min(256, -(-count // (4 * threads))))
    with ThreadPoolExecutor(threads) as pool:
        jobs = [pool.submit(work, begin, min(begin + size, count)) for begin in range(0, count, size)]
        try:
            for job in jobs:
                job.result()
        finally:  # after an error the rest is not worth waiting for
            pool.shutdown(cancel_futures=True)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class DiskSource:
    """A set that stays on disk: every batch is read and decoded when it is asked for.

    It has the attributes of `Source` except `images`. What a reader does not know beforehand of its labels (TFDS) is
    read when `labels` or `extras` are first asked for.

    Attributes:
      reader: of the whole set.
      rows: int [n], those of the reader that are this source's.
      level: the column that labels the images, "label" or "coarse".
    """

    reader: Reader
    rows: np.ndarray
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str
    split: str
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
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def coarse_names(self) -> tuple[str, ...]:
        return self.reader.coarse_names

    @property
    def fine_names(self) -> tuple[str, ...]:
        return () if self.level == "label" else self.reader.class_names

    @property
    def group_names(self) -> tuple[str, ...]:
        return self.reader.group_names

    @property
    def paths(self) -> tuple[str, ...] | None:
        """As of `Source`."""
        return self.reader.paths(self.rows)

    @property
    def labelled(self) -> bool:
        return self.reader.labelled(self.rows)

    @functools.cached_property
    def _columns(self) -> dict[str, np.ndarray]:
        return dict(zip(COLUMNS, self.reader.columns(self.rows), strict=True))

    @property
    def labels(self) -> np.ndarray:
        """int32 [n]"""
        return self._columns[self.level]

    @property
    def extras(self) -> dict[str, np.ndarray]:
        """As of `Source`: "coarse", "fine", "group" and "name", where the set has them."""
        columns = {"coarse": "coarse", "fine": "label", "group": "group"}
        names = {"coarse": self.coarse_names, "fine": self.fine_names, "group": self.group_names}
        extras = {key: self._columns[column] for key, column in columns.items() if names[key]}
        return extras | _named(self.reader.names(self.rows))

    def coarse(self) -> "DiskSource":
        """The same set labelled with its coarse classes."""
        return dataclasses.replace(self, level="coarse")

    def take(self, rows: np.ndarray) -> "DiskSource":
        """The set of these rows, numbered anew from 0."""
        return dataclasses.replace(self, rows=self.rows[rows])

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The rows `indices` [B] as {"image" uint8 [B,H,W,C], "label" int32 [B], "index" int32 [B]}."""
        indices = np.asarray(indices)
        images, columns = self.reader.read_all(self.rows[indices])
        return {"image": images, "label": columns[COLUMNS.index(self.level)], "index": indices.astype(np.int32)}


def source_in_memory(
    reader: Reader, images: np.ndarray, columns: np.ndarray, *, names_of_rows: np.ndarray | None = None, **about
) -> Source:
    """Rows of a reader, as `read_all` gives them, as a source; about: mean, std, paths, name and split."""
    names = {"coarse": reader.coarse_names, "group": reader.group_names}
    columns = dict(zip(COLUMNS, columns, strict=True))
    return Source(
        images=images,
        labels=columns["label"],
        class_names=reader.class_names,
        extras={key: columns[key] for key, value in names.items() if value} | _named(names_of_rows),
        coarse_names=reader.coarse_names,
        group_names=reader.group_names,
        **about,
    )


def _named(names: np.ndarray | None) -> dict[str, np.ndarray]:
    return {} if names is None else {"name": names}
