"""`celeb_a:PATH`: aligned faces with forty attributes (Liu et al. 2015, arXiv 1411.7766), one of which is the class.

PATH is the published folder (list_attr_celeba.txt, list_eval_partition.txt, also inside Anno and Eval), or a copy with
the tables as csv files.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from jaxcl.data.csv_file import integers, read_table
from jaxcl.data.files import ImageFiles
from jaxcl.data.images import Fit
from jaxcl.data.listing import Listing, columns
from jaxcl.data.paths import first, join, read_text, root_of, shown
from jaxcl.data.waterbirds import SPLITS
from jaxcl.errors import UserError

SIDE = 178  # the shorter side of 178x218: the images are the centre crop
IMAGES = ("img_align_celeba/img_align_celeba", "img_align_celeba", "Img/img_align_celeba")
FOLDERS = ("", "Anno/", "Eval/")  # of the tables


@dataclasses.dataclass(frozen=True)
class CelebA(ImageFiles):
    """Two classes, without and with `target`, each in two groups, without and with `group`; extras["group"].

    It has the published validation split. Images are the central 178x178, resized.

    Options:
      target: the attribute that is the class.
      group: the attribute that divides each class into groups.
      image_size, fit, on_bad_image: as of `ImageFiles`; image_size 0 is 178, and fit "" is crop.

    Errors: as of `ImageFiles`; UserError for an unknown attribute.
    """

    config_keys: ClassVar[tuple[str, ...]] = ("celeb_a", "files", "on_bad_image")
    default_size: ClassVar[int] = SIDE
    default_fit: ClassVar[Fit] = "crop"

    target: str = "Blond_Hair"
    group: str = "Male"

    def listing(self, path: str) -> Listing:
        return listing_of(path, self.target, self.group)


def listing_of(path: str, target: str, group: str) -> Listing:
    """The images of the table of attributes, in its order. Errors: UserError."""
    spec, root = f"celeb_a:{path}", root_of(path)
    names, attributes = _table(spec, root, "list_attr_celeba", (target, group))
    divided, (split,) = _table(spec, root, "list_eval_partition", ("partition",))
    split_of = dict(zip(divided, integers(spec, "partition", split, len(SPLITS)), strict=True))
    if missing := [name for name in names if name not in split_of]:
        raise UserError(f"{spec}: list_eval_partition lacks {shown(missing[0])}, which list_attr_celeba names")
    # The published values are 1 and -1; some copies have 1 and 0.
    words = [["0" if word.strip() == "-1" else word for word in column] for column in attributes]
    label, value = (integers(spec, key, column, 2) for key, column in zip((target, group), words, strict=True))
    folder = first(spec, root, IMAGES)
    if folder is None:
        raise UserError(f"{spec} lacks the folder img_align_celeba; unpack img_align_celeba.zip there")
    return Listing(
        spec=spec,
        paths=[join(root, f"{folder}/{name}") for name in names],
        names=[shown(name) for name in names],
        splits=np.array(SPLITS, "U10")[[split_of[name] for name in names]],
        columns=columns(len(names), label=label, group=2 * label + value),
        class_names=(f"not {target}", target),
        group_names=tuple(f"{t}, {g}" for t in (f"not {target}", target) for g in (f"not {group}", group)),
    )


def _table(spec: str, root: str, name: str, wanted: tuple[str, ...]) -> tuple[list[str], list[list[str]]]:
    """The names of the images in one of the tables, and the wanted columns of it."""
    places = [f"{folder}{name}.{ending}" for ending in ("csv", "txt") for folder in FOLDERS]
    place = first(spec, root, places)
    if place is None:
        raise UserError(f"{spec} lacks {name}.txt (or .csv); expected the published folder")
    file = join(root, place)
    if place.endswith(".csv"):
        table, others = read_table(spec, file, required=("image_id",), optional=tuple(w.lower() for w in wanted))
        header = [*table, *others]
        found = {w: table.get(w.lower()) for w in wanted}
    else:
        rows = [line.split() for line in read_text(spec, file).splitlines() if line.strip()]
        # The table of attributes begins with the number of images and a line of column names; the other has no header.
        header = list(wanted) if name == "list_eval_partition" else (rows[1] if len(rows) > 1 else [])
        rows = rows if name == "list_eval_partition" else rows[2:]
        for i, row in enumerate(rows):
            if len(row) != len(header) + 1:
                raise UserError(f"{spec}: image {i + 1} in {place} has {len(row) - 1} columns; expected {len(header)}")
        table = {"image_id": [row[0] for row in rows]}
        found = {w: [row[1 + header.index(w)] for row in rows] if w in header else None for w in wanted}
    for word, column in found.items():
        if column is None:
            raise UserError(f"{spec}: {place} has no column {word!r}; it has {', '.join(header)[:600]}")
    return [word.strip() for word in table["image_id"]], list(found.values())
