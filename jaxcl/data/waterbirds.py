"""`waterbirds:PATH`: birds on backgrounds that match their kind in training (Sagawa et al. 2020, arXiv 1911.08731).

PATH is the published folder: metadata.csv and the images that it names.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from jaxcl.data.csv_file import integers, read_table
from jaxcl.data.files import ImageFiles
from jaxcl.data.images import Fit
from jaxcl.data.listing import Listing, columns
from jaxcl.data.paths import join, root_of, shown

BIRDS, PLACES = ("landbird", "waterbird"), ("land", "water")
SPLITS = ("train", "validation", "test")  # in the order of their published numbers


@dataclasses.dataclass(frozen=True)
class Waterbirds(ImageFiles):
    """Two classes in four groups: extras["group"] is 2 * bird + place. It has the published validation split.

    Options and errors: as of `ImageFiles`; fit "" is crop, as in the published protocol.
    """

    default_fit: ClassVar[Fit] = "crop"

    def listing(self, path: str) -> Listing:
        return listing_of(path)


def listing_of(path: str) -> Listing:
    """The images of metadata.csv, in its order. Errors: UserError."""
    spec, root = f"waterbirds:{path}", root_of(path)
    table, _ = read_table(spec, join(root, "metadata.csv"), required=("img_filename", "y", "split", "place"))
    bird, place = (integers(spec, key, table[key], 2) for key in ("y", "place"))
    split = integers(spec, "split", table["split"], len(SPLITS))
    return Listing(
        spec=spec,
        paths=[join(root, name.strip()) for name in table["img_filename"]],
        names=[shown(name.strip()) for name in table["img_filename"]],
        splits=np.array(SPLITS, "U10")[split],
        columns=columns(len(bird), label=bird, group=2 * bird + place),
        class_names=BIRDS,
        group_names=tuple(f"{b} on {p}" for b in BIRDS for p in PLACES),
    )
