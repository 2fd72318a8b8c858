"""`waterbirds:PATH`: birds pasted on backgrounds that go with their kind in training (Sagawa et al., arXiv:1911.08731).

The folder as it is published: metadata.csv and the images it names.
"""

import os

import numpy as np

from jaxcl.data import files
from jaxcl.data.base import Select, Source
from jaxcl.data.csv_file import read_table
from jaxcl.data.disk import DiskSource
from jaxcl.errors import UserError

OWN_VALIDATION = True
BIRDS, PLACES = ("landbird", "waterbird"), ("land", "water")
SPLITS = ("train", "validation", "test")


def load(
    path: str,
    *,
    split: str,
    part: str,
    select: Select,
    image_size: int | None = None,
    on_bad_image: str = "raise",
) -> Source | DiskSource:
    """Two classes in four groups, 2 * bird + place; extras["group"]. The published validation part is its own.

    Args and errors: as `files.load`.
    """
    listing = listing_of(path)
    return files.load(listing, split=split, part=part, select=select, image_size=image_size, on_bad_image=on_bad_image)


def listing_of(path: str) -> files.Listing:
    """The images of metadata.csv, in its order. Errors: UserError."""
    spec, root = f"waterbirds:{path}", path if files.is_remote(path) else os.path.expanduser(path)
    table, _ = read_table(spec, files.join(root, "metadata.csv"), required=("img_filename", "y", "split", "place"))
    bird, place = (integers(spec, key, table[key], 2) for key in ("y", "place"))
    split = integers(spec, "split", table["split"], len(SPLITS))
    return files.Listing(
        spec=spec,
        paths=[files.join(root, name.strip()) for name in table["img_filename"]],
        names=[files.shown(name.strip()) for name in table["img_filename"]],
        parts=np.array(SPLITS, "U10")[split],
        columns=files.columns(len(bird), label=bird, group=2 * bird + place),
        class_names=BIRDS,
        group_names=tuple(f"{b} on {p}" for b in BIRDS for p in PLACES),
    )


def integers(spec: str, column: str, words: list[str], count: int) -> np.ndarray:
    """A column of whole numbers from 0 to count - 1, int32 [N]. Errors: UserError."""
    known = {str(i): i for i in range(count)}
    for i, word in enumerate(words):
        if word.strip() not in known:
            raise UserError(
                f"{spec}: {column} of image {i + 1} is {files.shown(word)!r}; expected {' or '.join(known)}"
            )
    return np.array([known[word.strip()] for word in words], np.int32)
