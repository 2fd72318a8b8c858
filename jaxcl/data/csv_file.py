"""`csv:PATH`: image files named in a table, with what is known of each."""

import csv
import io
import os

import numpy as np

from jaxcl.data import files
from jaxcl.data.base import Select, Source
from jaxcl.data.disk import DiskSource
from jaxcl.errors import UserError

OWN_VALIDATION = True
COLUMNS = ("path", "label", "coarse", "group", "split")


def load(
    path: str,
    *,
    split: str,
    part: str,
    select: Select,
    image_size: int | None = None,
    on_bad_image: str = "raise",
) -> Source | DiskSource:
    """Reads a table with the header path,label[,coarse][,group][,split], in any order; other columns are left alone.

    path: absolute, or relative to the table. label, coarse and group: names, or numbers, in whose order they are
    numbered; empty: not known. split: train, test or val; empty: train.

    Args and errors: as `files.load`; UserError for a table that cannot be read, with the number of the line.
    """
    listing = listing_of(path)
    return files.load(listing, split=split, part=part, select=select, image_size=image_size, on_bad_image=on_bad_image)


def listing_of(path: str) -> files.Listing:
    """The images of a table, in its order. Errors: UserError."""
    spec, file = f"csv:{path}", path if files.is_remote(path) else os.path.expanduser(path)
    table, others = read_table(spec, file, required=("path",), optional=COLUMNS[1:])
    places = [place.strip() for place in table["path"]]
    known, names = {}, {}
    for column in ("label", "coarse", "group"):
        known[column], names[column] = files.numbered(table.get(column, [""] * len(places)))
    parts = []
    for i, word in enumerate(table.get("split", [""] * len(places))):
        word = word.strip().lower() or "train"
        if word not in files.PART_OF_WORD:
            raise UserError(f"{spec}: image {i + 1} is of split {files.shown(word)!r}; expected train, test or val")
        parts.append(files.PART_OF_WORD[word])
    for i, place in enumerate(places):
        if not place:
            raise UserError(f"{spec}: image {i + 1} has no path")
    notes = (f"columns left alone: {', '.join(map(files.shown, others))}",) if others else ()
    return files.Listing(
        spec=spec,
        paths=[files.join(os.path.dirname(file) or ".", place) for place in places],
        names=[files.shown(place) for place in places],
        parts=np.array(parts, "U10"),
        columns=files.columns(len(places), **known),
        class_names=names["label"],
        coarse_names=names["coarse"],
        group_names=names["group"],
        notes=notes,
    )


def read_table(
    spec: str, file: str, *, required: tuple[str, ...], optional: tuple[str, ...] = ()
) -> tuple[dict[str, list[str]], list[str]]:
    """Columns of a csv file by the names in its header, and the names of the others.

    Errors: UserError for a required column that is missing, or a line of another length.
    """
    lines = csv.reader(io.StringIO(files.read_text(spec, file), newline=""))
    name = files.shown(file)
    try:
        header = [word.strip().lower() for word in next(lines, [])]
        missing = [column for column in required if column not in header]
        if missing:
            found = files.shown(",".join(header))[:200]
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
                    ' put "..." around what holds a comma'
                )
            rows.append(row)
    except csv.Error as error:
        raise UserError(f"{spec}: line {lines.line_num} of {name} is no csv ({error})") from error
    columns = {c: [row[header.index(c)] for row in rows] for c in (*required, *optional) if c in header}
    return columns, [word for word in header if word not in columns]
