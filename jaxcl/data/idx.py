"""`idx:PATH`: a folder of idx files, as MNIST, Fashion-MNIST, KMNIST and EMNIST are published.

N images, H height, W width.

Source: the format's description by LeCun, Cortes and Burges, "The MNIST database of handwritten digits".
"""

import gzip
import math
import zlib
from typing import ClassVar

import numpy as np
from etils import epath

from jaxcl.data.npz import Npz
from jaxcl.errors import UserError

# The end of a file's name -> the array it holds; "t10k" is the test part of MNIST. Names may have more in front, as
# EMNIST's do, and end in .gz; some copies have a dot before "idx".
FILES = {
    **{f"{part}-images{dot}idx3-ubyte": "train_images" for part in ("train",) for dot in "-."},
    **{f"{part}-labels{dot}idx1-ubyte": "train_labels" for part in ("train",) for dot in "-."},
    **{f"{part}-images{dot}idx3-ubyte": "test_images" for part in ("t10k", "test") for dot in "-."},
    **{f"{part}-labels{dot}idx1-ubyte": "test_labels" for part in ("t10k", "test") for dot in "-."},
}


class Idx(Npz):
    """Reads train-images-idx3-ubyte, train-labels-idx1-ubyte and, of the test part, t10k-* or test-*, also as .gz.

    Images become uint8 [N,H,W]; labels are optional. Without a test part a tenth of every class is held out for it.

    Errors: UserError for a folder without such files, with two of one kind, or for a file that is damaged.
    """

    prefix: ClassVar[str] = "idx"

    def arrays(self, path: epath.Path) -> dict[str, np.ndarray]:
        if not path.is_dir():
            raise UserError(
                f"no folder at {path}; idx:PATH expects a folder with files such as train-images-idx3-ubyte"
            )
        found: dict[str, epath.Path] = {}
        for file in sorted(path.iterdir()):
            name = file.name.lower().removesuffix(".gz")
            for ending, array in FILES.items():
                if not name.endswith(ending):
                    continue
                if array in found and found[array].name.lower().removesuffix(".gz") != name:
                    raise UserError(f"{path} holds {found[array].name} and {file.name}; keep one of them there")
                found.setdefault(array, file)
        if not any(name.endswith("images") for name in found):
            raise UserError(f"{path} holds no idx files of images; expected names such as train-images-idx3-ubyte")
        return {name: read_idx(file) for name, file in found.items()}


def read_idx(path: epath.Path) -> np.ndarray:
    """A file of unsigned bytes in idx format, gzipped or not -> uint8 array.

    Raises:
      UserError: it is cut, damaged, or holds other numbers than unsigned bytes.
    """
    content = path.read_bytes()
    try:
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is truncated or damaged ({error}); copy it again") from error
    head = 4 + 4 * content[3] if len(content) > 3 else 4
    if len(content) < head or content[:3] != b"\0\0\x08" or not content[3]:
        raise UserError(f"{path} is no idx file of unsigned bytes")
    shape = tuple(int(n) for n in np.frombuffer(content[4:head], ">u4"))
    if len(content) - head != math.prod(shape):
        raise UserError(f"{path} holds {len(content) - head} values; its header says {shape}; copy it again")
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)
