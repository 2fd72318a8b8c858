"""What the files of a source are like before they are decoded for it. N images."""

import os
from typing import NamedTuple

import numpy as np

from jaxcl.data import images
from jaxcl.data.disk import in_threads
from jaxcl.data.paths import open_file
from jaxcl.data.source import Source
from jaxcl.runtime.storage import is_remote


class Originals(NamedTuple):
    """Width and height in pixels, upright, and size in bytes (0 where it is not known), int64 [N] each."""

    width: np.ndarray
    height: np.ndarray
    size: np.ndarray


def originals(source: Source) -> Originals:
    """The sizes of the files of a source, from their headers; of what is no local file, those of the source."""
    count, (height, width, _) = len(source), source.image_shape
    found = Originals(np.full(count, width), np.full(count, height), np.zeros(count, np.int64))
    paths = source.paths or ()

    def look(begin: int, end: int) -> None:
        for i in range(begin, end):
            try:
                if not is_remote(paths[i]):
                    with open_file(paths[i]) as stream:
                        found.size[i] = os.fstat(stream.fileno()).st_size
                        found.height[i], found.width[i] = images.shape(stream, 2**62)
            except Exception:  # a file that has gone, or changed, since it was decoded
                continue

    in_threads(look, len(paths))
    return found
