"""The table of near-duplicates that an owner of photos decides by: one row for each file."""

from collections.abc import Callable
from typing import NamedTuple

from jaxcl.data.originals import Originals
from jaxcl.evaluate.duplicates import Found, Pair

CROPPED = 0.97  # share of the sides below which a pair is called a crop


class Row(NamedTuple):
    """One file.

    Attributes:
      group: number of its group, from 1; 0 for a pair of two images of which at most one is in a group.
      keep: "yes" for the file of a group with the most pixels, of equal ones that with the most bytes, then the first.
      file: its name.
      width, height: in pixels.
      bytes: of the file; 0 where it is not known.
      score: of the file and `like`, in [0,1].
      like: the file that it is compared with: of a group, the one to keep.
      how: "mirrored", "crop or border", both, or "".
    """

    group: int
    keep: str
    file: str
    width: int
    height: int
    bytes: int
    score: float
    like: str
    how: str


def table(found: Found, name: Callable[[int], str], files: Originals) -> list[Row]:
    """Every group, file by file, the one to keep first; then every pair whose images are not in one group.

    name: the row of an image -> its name.
    """
    pairs = {(p.first, p.second): p for p in found.pairs}
    group_of = {i: number for number, group in enumerate(found.groups, 1) for i in group}
    rows = []

    def add(number: int, i: int, other: int, pair: Pair | None) -> None:
        how = [] if pair is None else ["mirrored"] * pair.mirrored + ["crop or border"] * (pair.part < CROPPED)
        rows.append(
            Row(
                *(number, "yes" if number and i == other else "", name(i)),
                *(int(column[i]) for column in files),
                *(1.0 if pair is None else round(pair.score, 4), name(other), ", ".join(how)),
            )
        )

    for number, group in enumerate(found.groups, 1):
        kept = max(group, key=lambda i: (files.width[i] * files.height[i], files.size[i], -i))
        for i in (kept, *(i for i in group if i != kept)):
            add(
                number, i, kept, pairs.get((min(found.twin[i], found.twin[kept]), max(found.twin[i], found.twin[kept])))
            )
    for p in found.pairs:
        if group_of.get(p.first, -1) != group_of.get(p.second, -2):
            add(0, p.second, p.first, p)
    return rows
