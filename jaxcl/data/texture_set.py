"""A set of textures made beforehand, one for each image of a source: how it lies on disk, and how batches get theirs.

A folder holds `textures.json` (how they were made) and parts of equal size, each of two arrays: the textures, uint8
[n,H,W,C], and the keys of the images they were made of, uint64 [n]. A texture is found by the pixels of its image, so
a hold-out, a cut-down set or another order of the same images needs no other textures, and those of another set are
never taken for one's own.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from jaxcl.data.base import Source
from jaxcl.errors import UserError

ABOUT = "textures.json"
COMMAND = "python -m jaxcl textures --source=... --out=..."


def image_keys(images: np.ndarray) -> np.ndarray:
    """uint8 [N,H,W,C] -> uint64 [N], equal for equal images only (but for one pair in 2^64)."""
    return np.array([_key(image) for image in images], np.uint64)


def _key(image: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=8).digest(), "little")


def begin(folder: Path, about: dict[str, Any]) -> None:
    """Makes the folder, or checks that its textures were made in the same way. Errors: UserError."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ABOUT
    if path.exists():
        before = _about(folder)
        for name in about:
            if before.get(name) != about[name]:
                raise UserError(
                    f"{folder} holds textures made otherwise, {name} {before.get(name)!r} and not {about[name]!r}; "
                    "use another --out, or the same options to go on"
                )
    _write(path, lambda file: file.write(json.dumps(about, indent=2).encode() + b"\n"))


def is_done(folder: Path, part: int) -> bool:
    """Whether a part is there; what is there is whole."""
    return _textures(folder, part).exists()


def write_part(folder: Path, part: int, images: np.ndarray, textures: np.ndarray) -> None:
    """Writes the textures [n,H,W,C] of some images; a kill leaves the whole part or none."""
    _write(_keys(folder, part), lambda file: np.save(file, image_keys(images)))
    _write(_textures(folder, part), lambda file: np.save(file, textures))  # last: its presence means it is finished


def _textures(folder: Path, part: int) -> Path:
    return folder / f"part-{part:05d}.npy"


def _keys(folder: Path, part: int) -> Path:
    return folder / f"part-{part:05d}.keys.npy"


def _write(path: Path, write) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _about(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / ABOUT).read_text())
    except FileNotFoundError:
        raise UserError(f"no textures at {folder}: there is no {ABOUT}; make them with {COMMAND}") from None
    except ValueError as error:
        raise UserError(f"{folder / ABOUT} is damaged ({error}); make the textures again") from error


class TextureSet:
    """The textures of a folder, read where they are asked for."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder).expanduser()
        about = _about(self.folder)
        parts = range(about["parts"])
        missing = [p for p in parts if not is_done(self.folder, p)]
        if missing:
            raise UserError(
                f"{self.folder} holds {len(parts) - len(missing)} of {len(parts)} parts; "
                f"the command that began it goes on: {COMMAND}"
            )
        try:
            keys = np.concatenate([np.load(_keys(self.folder, p), allow_pickle=False) for p in parts])
            self._parts = [np.load(_textures(self.folder, p), mmap_mode="r", allow_pickle=False) for p in parts]
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder} cannot be read ({error}); make the textures again") from error
        self._size, self.shape = about["part_size"], tuple(self._parts[0].shape[1:])
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]

    def rows_of(self, images: np.ndarray) -> np.ndarray:
        """Which texture is each image's, int [N]; -1 for none."""
        keys = image_keys(images)
        place = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[place] == keys, self._order[place], -1)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """uint8 [B,H,W,C]."""
        return np.stack([self._parts[row // self._size][row % self._size] for row in rows])


class Textured:
    """A source whose batches have "texture" [B,H,W,C], uint8, too; in all else the source itself, `plain`."""

    def __init__(self, plain: Source, textures: TextureSet):
        self.plain, self._textures = plain, textures
        if textures.shape != tuple(plain.image_shape):
            raise UserError(
                f"{textures.folder} holds textures of {textures.shape}, the images of {plain.name} are "
                f"{tuple(plain.image_shape)}; make textures of these images"
            )
        self._rows = self._found(plain.images) if plain.in_memory else None

    def __getattr__(self, name: str) -> Any:
        if name == "plain":  # not there yet, as in a copy
            raise AttributeError(name)
        return getattr(self.plain, name)

    def __len__(self) -> int:
        return len(self.plain)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """As `Source.batch`, and "texture" uint8 [B,H,W,C]."""
        batch = self.plain.batch(indices)
        rows = self._found(batch["image"]) if self._rows is None else self._rows[indices]
        return batch | {"texture": self._textures[rows]}

    def _found(self, images: np.ndarray) -> np.ndarray:
        rows = self._textures.rows_of(images)
        if (rows < 0).any():
            raise UserError(
                f"{self._textures.folder} has no texture for {int((rows < 0).sum())} of {len(images)} images of "
                f"{self.plain.name} ({self.plain.split}); make them of this source, with its options: {COMMAND}"
            )
        return rows
