"""`Listing`: the image files of a set before any is opened, with their labels and splits. N files."""

from typing import NamedTuple

import numpy as np

from jaxcl.data.disk import COLUMNS, THREADS, WAITING_THREADS
from jaxcl.data.paths import shown
from jaxcl.runtime.storage import is_remote

SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("val", "valid", "validation"),
}
SPLIT_OF_WORD = {word: split for split, words in SPLITS.items() for word in words}


class Listing(NamedTuple):
    """The files of a set before any is opened.

    Attributes:
      spec: for messages.
      paths: local or remote.
      names: relative paths, to show to people.
      splits: "train", "test" or "validation", of each file.
      columns: int32 [3, N], `disk.COLUMNS`.
      class_names, coarse_names, group_names: of the columns' values, empty where there are none.
      notes: what was left out or how something was interpreted, one line each.
    """

    spec: str
    paths: list[str]
    names: list[str]
    splits: np.ndarray
    columns: np.ndarray
    class_names: tuple[str, ...] = ()
    coarse_names: tuple[str, ...] = ()
    group_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def threads(self) -> int:
        """How many threads read it."""
        return WAITING_THREADS if any(map(is_remote, self.paths)) else THREADS

    def take(self, rows: np.ndarray) -> "Listing":
        """The listing of these rows."""
        paths, names = ([column[i] for i in rows] for column in (self.paths, self.names))
        return self._replace(paths=paths, names=names, splits=self.splits[rows], columns=self.columns[:, rows])


def numbered(values: list[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Numbers the words of a column: codes int32 [N], -1 for empty ones, and the words in their order.

    A column of whole numbers is ordered by value, and -1 counts as empty too; 1, 01 and 1.0 are one number.
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
    try:  # 1.0: tables write whole numbers so when some are missing
        value = float(word)
    except ValueError:
        return None
    return int(value) if value.is_integer() else None


def columns(count: int, **known: np.ndarray) -> np.ndarray:
    """int32 [3, N] of `disk.COLUMNS` from the known ones; -1 in the others."""
    out = np.full((len(COLUMNS), count), -1, np.int32)
    for name, values in known.items():
        out[COLUMNS.index(name)] = values
    return out
