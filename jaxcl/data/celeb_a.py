"""`celeb_a:PATH`: aligned faces with forty attributes (Liu et al., arXiv:1411.7766), one of them the class.

The folder as it is published (list_attr_celeba.txt, list_eval_partition.txt, in Anno and Eval or not), or with the
tables as csv files.
"""

import os

import numpy as np

from jaxcl.data import files
from jaxcl.data.base import Select, Source
from jaxcl.data.csv_file import read_table
from jaxcl.data.disk import DiskSource
from jaxcl.data.waterbirds import SPLITS, integers
from jaxcl.errors import UserError

OWN_VALIDATION = True
SIDE = 178  # the shorter one of 178x218: what is left is a centre crop
IMAGES = ("img_align_celeba/img_align_celeba", "img_align_celeba", "Img/img_align_celeba")
FOLDERS = ("", "Anno/", "Eval/")  # where the tables are


def load(
    path: str,
    *,
    split: str,
    part: str,
    select: Select,
    image_size: int | None = None,
    on_bad_image: str = "raise",
    target: str = "Blond_Hair",
    group: str = "Male",
) -> Source | DiskSource:
    """Two classes, without and with `target`, each in two groups, without and with `group`; extras["group"].

    The published validation part is its own. Images are the central 178x178, resized.

    Args and errors: as `files.load`; UserError for an attribute that there is not.
    """
    listing = listing_of(path, target, group)
    size = SIDE if image_size is None else image_size
    return files.load(listing, split=split, part=part, select=select, image_size=size, on_bad_image=on_bad_image)


def listing_of(path: str, target: str, group: str) -> files.Listing:
    """The images of the table of attributes, in its order. Errors: UserError."""
    spec, root = f"celeb_a:{path}", path if files.is_remote(path) else os.path.expanduser(path)
    names, attributes = _table(spec, root, "list_attr_celeba", (target, group))
    parted, (part,) = _table(spec, root, "list_eval_partition", ("partition",))
    part_of = dict(zip(parted, integers(spec, "partition", part, len(SPLITS)), strict=True))
    if missing := [name for name in names if name not in part_of]:
        raise UserError(f"{spec}: list_eval_partition lacks {files.shown(missing[0])}, which list_attr_celeba names")
    # 1 and -1 as published; some copies have 1 and 0.
    words = [["0" if word.strip() == "-1" else word for word in column] for column in attributes]
    label, value = (integers(spec, key, column, 2) for key, column in zip((target, group), words, strict=True))
    folder = files.first(spec, root, IMAGES)
    if folder is None:
        raise UserError(f"{spec} lacks the folder img_align_celeba; unpack img_align_celeba.zip there")
    return files.Listing(
        spec=spec,
        paths=[files.join(root, f"{folder}/{name}") for name in names],
        names=[files.shown(name) for name in names],
        parts=np.array(SPLITS, "U10")[[part_of[name] for name in names]],
        columns=files.columns(len(names), label=label, group=2 * label + value),
        class_names=(f"not {target}", target),
        group_names=tuple(f"{t}, {g}" for t in (f"not {target}", target) for g in (f"not {group}", group)),
    )


def _table(spec: str, root: str, name: str, wanted: tuple[str, ...]) -> tuple[list[str], list[list[str]]]:
    """The names of the images in one of the tables, and some of its columns."""
    places = [f"{folder}{name}.{ending}" for ending in ("csv", "txt") for folder in FOLDERS]
    place = files.first(spec, root, places)
    if place is None:
        raise UserError(f"{spec} lacks {name}.txt (or .csv); expected the published folder")
    file = files.join(root, place)
    if place.endswith(".csv"):
        table, others = read_table(spec, file, required=("image_id",), optional=tuple(w.lower() for w in wanted))
        header = [*table, *others]
        columns = {w: table.get(w.lower()) for w in wanted}
    else:
        rows = [line.split() for line in files.read_text(spec, file).splitlines() if line.strip()]
        # Of attributes the first line is the number of images and the second the names of the columns.
        header = list(wanted) if name == "list_eval_partition" else (rows[1] if len(rows) > 1 else [])
        rows = rows if name == "list_eval_partition" else rows[2:]
        for i, row in enumerate(rows):
            if len(row) != len(header) + 1:
                raise UserError(f"{spec}: image {i + 1} in {place} has {len(row) - 1} columns; expected {len(header)}")
        table = {"image_id": [row[0] for row in rows]}
        columns = {w: [row[1 + header.index(w)] for row in rows] if w in header else None for w in wanted}
    for word, column in columns.items():
        if column is None:
            raise UserError(f"{spec}: {place} has no column {word!r}; it has {', '.join(header)[:600]}")
    return [word.strip() for word in table["image_id"]], list(columns.values())
