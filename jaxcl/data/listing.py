"""`Listing`: the image files of a set before any is opened, with their labels and splits. N files."""

import re
from typing import NamedTuple

import numpy as np

from jaxcl.data.disk import COLUMNS, waiting_threads
from jaxcl.data.paths import shown
from jaxcl.errors import UserError
from jaxcl.runtime.storage import is_remote

MANY_CLASSES = 25_000  # above those of ImageNet-21k; a table of classes by classes still fits into memory

SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("val", "valid", "validation", "eval", "evaluation", "dev"),
}
_WHOLE = re.compile("0|-?[1-9][0-9]{,3999}")  # Python's int takes more: underscores, leading zeros, other digits
_WHOLE_WITH_ZERO = re.compile(rf"({_WHOLE.pattern})\.0")
SPLIT_OF_WORD = {word: split for split, words in SPLITS.items() for word in words}
CERTAIN = frozenset(SPLIT_OF_WORD) - {"eval", "evaluation", "dev"}  # a folder of this name alone is a part of a set
_FILLERS = frozenset("set sets split part data dataset image images img imgs photo photos pics seg".split())


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
        """How many threads read it; 0: one for each core."""
        return waiting_threads() if any(map(is_remote, self.paths)) else 0

    def take(self, rows: np.ndarray) -> "Listing":
        """The listing of these rows."""
        paths, names = ([column[i] for i in rows] for column in (self.paths, self.names))
        return self._replace(paths=paths, names=names, splits=self.splits[rows], columns=self.columns[:, rows])


def numbered(values: list[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Numbers the words of a column: codes int32 [N], -1 for empty ones, and the words in their order.

    A word is its text: "1_12", "01", "+1" and "1.0" are other classes than 112 and 1. Only a column that is whole
    numbers throughout, 1 or (as tables write them when some are missing) 1.0, is ordered by value, and -1 is empty too.
    """
    words = [value.strip() for value in values]
    given = set(words) - {""}
    for form in (_WHOLE, _WHOLE_WITH_ZERO):
        if given and all(map(form.fullmatch, given)):
            words = [word.removesuffix(".0") for word in words]
            words = ["" if word == "-1" else word for word in words]
            names = sorted(set(words) - {""}, key=int)
            break
    else:
        names = sorted(given)
    code = {name: i for i, name in enumerate(names)} | {"": -1}
    return np.array([code[word] for word in words], np.int32), tuple(shown(name) for name in names)


def split_of(name: str) -> str:
    """The split that a folder's name means ("Train", "val2017", "test_images", "trainset"); "" for none."""
    words = [word for word in re.split("[^a-z]+", name.lower()) if word]
    words = [word.removesuffix("set") if word.removesuffix("set") in SPLIT_OF_WORD else word for word in words]
    meant = [word for word in words if word not in _FILLERS]
    return SPLIT_OF_WORD.get(meant[0], "") if len(meant) == 1 else ""


def untrained(splits: np.ndarray, labels: np.ndarray, names: tuple[str, ...]) -> list[str]:
    """A line for each split with classes of which there is no training image: they cannot be learned."""
    trained = set(labels[splits == "train"].tolist()) - {-1}
    lines = []
    for split in ("validation", "test"):
        odd = sorted(set(labels[splits == split].tolist()) - trained - {-1})
        if odd and trained:
            some = ", ".join(names[i] for i in odd[:5]) + (f" and {len(odd) - 5:,} more" if len(odd) > 5 else "")
            lines.append(f"the {split} images have classes without a training image: {some}")
    return lines


def check_classes(where: str, count: int, images: int) -> None:
    """Raise UserError if the labels ask for so many classes that they must be a mistake; before anything of that size.

    Args:
      where: the labels, for the message.
      count: number of classes: the largest label plus 1.
      images: number of labelled images.
    """
    most = max(MANY_CLASSES, 10 * images)
    if count > most:
        raise UserError(
            f"{where} ask for {count:,} classes for {images:,} images, and at most {most:,} are taken; number the "
            "classes from 0 without gaps, and mark images without a label by -1"
        )


def columns(count: int, **known: np.ndarray) -> np.ndarray:
    """int32 [3, N] of `disk.COLUMNS` from the known ones; -1 in the others."""
    out = np.full((len(COLUMNS), count), -1, np.int32)
    for name, values in known.items():
        out[COLUMNS.index(name)] = values
    return out
