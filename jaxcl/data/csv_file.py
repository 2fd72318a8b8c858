"""`csv:PATH`: image files named in a table, with the labels and splits of each."""

import csv
import dataclasses
import io
import os

import numpy as np

from jaxcl.data.files import ImageFiles
from jaxcl.data.listing import SPLIT_OF_WORD, Listing, columns, numbered, untrained
from jaxcl.data.paths import join, read_text, root_of, shown
from jaxcl.errors import UserError

COLUMNS = ("path", "label", "coarse", "group", "split")


@dataclasses.dataclass(frozen=True)
class Csv(ImageFiles):
    """Reads a table with the header path,label[,coarse][,group][,split], in any order; other columns are ignored.

    path is absolute, or relative to the table. label, coarse and group are names, in the order of their texts, or whole
    numbers throughout, in the order of their values; an empty one, or a number of -1, is unknown. split is train, test
    or val; an empty one is train.

    Options and errors: as of `ImageFiles`; UserError for a table that cannot be read, with the number of the line.
    """

    def listing(self, path: str) -> Listing:
        return listing_of(path)


def listing_of(path: str) -> Listing:
    """The images of a table, in its order. Errors: UserError."""
    spec, file = f"csv:{path}", root_of(path)
    table, others = read_table(spec, file, required=("path",), optional=COLUMNS[1:])
    places = [place.strip() for place in table["path"]]
    known, names = {}, {}
    for column in ("label", "coarse", "group"):
        known[column], names[column] = numbered(table.get(column, [""] * len(places)))
    splits = []
    for i, word in enumerate(table.get("split", [""] * len(places))):
        word = word.strip().lower() or "train"
        if word not in SPLIT_OF_WORD:
            raise UserError(f"{spec}: image {i + 1} is of split {shown(word)!r}; expected train, test or val")
        splits.append(SPLIT_OF_WORD[word])
    for i, place in enumerate(places):
        if not place:
            raise UserError(f"{spec}: image {i + 1} has no path")
    notes = [f"ignored columns: {', '.join(map(shown, others))}"] if others else []
    notes += untrained(np.array(splits, "U10"), known["label"], names["label"])
    return Listing(
        spec=spec,
        paths=[join(os.path.dirname(file) or ".", place) for place in places],
        names=[shown(place) for place in places],
        splits=np.array(splits, "U10"),
        columns=columns(len(places), **known),
        class_names=names["label"],
        coarse_names=names["coarse"],
        group_names=names["group"],
        notes=tuple(notes),
    )


def read_table(
    spec: str, file: str, *, required: tuple[str, ...], optional: tuple[str, ...] = ()
) -> tuple[dict[str, list[str]], list[str]]:
    """Columns of a csv file by the names in its header, and the names of the other columns.

    Errors: UserError for a required column that is missing, or a line with another number of columns.
    """
    lines = csv.reader(io.StringIO(read_text(spec, file), newline=""))
    name = shown(file)
    try:
        header = [word.strip().lower() for word in next(lines, [])]
        missing = [column for column in required if column not in header]
        if missing:
            found = shown(",".join(header))[:200]
            raise UserError(f"{spec}: the header of {name} is {found!r}; expected {','.join((*required, *optional))}")
        twice = [word for word in {*required, *optional} if header.count(word) > 1]
        if twice:
            raise UserError(f"{spec}: the header of {name} names {twice[0]} twice")
        rows = []
        for row in lines:
            if not any(word.strip() for word in row):
                continue
            if len(row) != len(header):
                raise UserError(
                    f"{spec}: line {lines.line_num} of {name} has {len(row)} columns, the header {len(header)};"
                    ' put "..." around values that contain a comma'
                )
            rows.append(row)
    except csv.Error as error:
        raise UserError(f"{spec}: line {lines.line_num} of {name} is no csv ({error})") from error
    found = {c: [row[header.index(c)] for row in rows] for c in (*required, *optional) if c in header}
    return found, [word for word in header if word not in found]


def integers(spec: str, column: str, words: list[str], count: int) -> np.ndarray:
    """A column of whole numbers from 0 to count - 1, int32 [N]. Errors: UserError."""
    known = {str(i): i for i in range(count)}
    for i, word in enumerate(words):
        if word.strip() not in known:
            raise UserError(f"{spec}: {column} of image {i + 1} is {shown(word)!r}; expected {' or '.join(known)}")
    return np.array([known[word.strip()] for word in words], np.int32)
