"""Textures made in advance, one for each image of a source: their files, and `Textured`, whose batches hold them.

A folder holds `textures.json` (how they were made) and shards of equal size, each of two arrays: the textures, uint8
[n,H,W,C], and the keys of the images they were made of, uint64 [n]. A texture is found by the pixels of its image.
So a hold-out, a cut-down set or another order of the same images needs no other textures, and textures of another set
are never used.

N images, n of a shard, B batch, H height, W width, C channels.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from jaxcl.data import fingerprint
from jaxcl.data.source import Batch, Source, Wrapped
from jaxcl.errors import UserError
from jaxcl.runtime import storage

ABOUT = "textures.json"
COMMAND = "python -m jaxcl textures --source=... --out=..."


def image_keys(images: np.ndarray) -> np.ndarray:
    """uint8 [N,H,W,C] -> uint64 [N], equal only for equal images (except for one pair in 2^64)."""
    return np.array([_key(image) for image in images], np.uint64)


def _key(image: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=8).digest(), "little")


def begin(folder: Path, about: dict[str, Any]) -> None:
    """Makes the folder, or checks that its textures were made with the same options. Errors: UserError."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ABOUT
    if path.exists():
        before = _about(folder)
        for name in about:
            if before.get(name) != about[name]:
                raise UserError(
                    f"{folder} holds textures made with {name} {before.get(name)!r}, not {about[name]!r}; "
                    "use another --out, or the same options to continue"
                )
    _write(path, lambda file: file.write(json.dumps(about, indent=2).encode() + b"\n"))


def is_done(folder: Path, shard: int) -> bool:
    """Whether a shard exists. One that exists is complete."""
    return _textures(folder, shard).exists()


def write_shard(folder: Path, shard: int, images: np.ndarray, textures: np.ndarray) -> None:
    """Writes the textures [n,H,W,C] of some images; a kill leaves the complete shard or none."""
    _write(_keys(folder, shard), lambda file: np.save(file, image_keys(images)))
    _write(_textures(folder, shard), lambda file: np.save(file, textures))  # last: it marks the shard complete


def _textures(folder: Path, shard: int) -> Path:
    return folder / f"part-{shard:05d}.npy"


def _keys(folder: Path, shard: int) -> Path:
    return folder / f"part-{shard:05d}.keys.npy"


def _write(path: Path, write) -> None:
    with storage.replacing(path) as file:
        write(file)


def _about(folder: Path) -> dict[str, Any]:
    if not (folder / ABOUT).exists():
        raise UserError(f"no textures at {folder}: there is no {ABOUT}; make them with {COMMAND}")
    advice = "make the textures again"
    about = storage.read_json(folder / ABOUT, "parts", "part_size", advice=advice)
    if not all(isinstance(about[key], int) and about[key] > 0 for key in ("parts", "part_size")):
        raise UserError(f"{folder / ABOUT} is not one of jaxcl; {advice}")
    return about


class TextureSet:
    """The textures of a folder, read when they are asked for. `textures[rows]` is uint8 [B,H,W,C].

    Attributes:
      shape: of a texture, (H, W, C).
      fingerprint: a hash of the images that they were made of, and how.

    Errors: UserError for a folder that is incomplete, damaged or holds no textures.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder).expanduser()
        about = _about(self.folder)
        shards = range(about["parts"])
        missing = [s for s in shards if not is_done(self.folder, s)]
        if missing:
            raise UserError(
                f"{self.folder} holds {len(shards) - len(missing)} of {len(shards)} parts; "
                f"run the command that began it again to continue: {COMMAND}"
            )
        try:
            keys = np.concatenate([np.load(_keys(self.folder, s), allow_pickle=False) for s in shards])
            self._shards = [np.load(_textures(self.folder, s), mmap_mode="r", allow_pickle=False) for s in shards]
        except (OSError, ValueError, MemoryError) as error:
            raise UserError(f"{self.folder} cannot be read ({error}); make the textures again") from error
        self.fingerprint = fingerprint.digest(about, keys)
        self._size, self.shape = about["part_size"], tuple(self._shards[0].shape[1:])
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]

    def rows_of(self, images: np.ndarray) -> np.ndarray:
        """The row of each image's texture, int [N]; -1 for none."""
        keys = image_keys(images)
        place = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[place] == keys, self._order[place], -1)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """uint8 [B,H,W,C]."""
        return np.stack([self._shards[row // self._size][row % self._size] for row in rows])


class Textured(Wrapped):
    """A source whose batches also hold "texture" [B,H,W,C], uint8. `plain` is the source without them."""

    def __init__(self, inner: Source, textures: TextureSet):
        """Errors: UserError for textures of another size, or an image in memory without one."""
        super().__init__(inner)
        self._textures = textures
        if textures.shape != tuple(inner.image_shape):
            raise UserError(
                f"{textures.folder} holds textures of {textures.shape}, the images of {inner.name} are "
                f"{tuple(inner.image_shape)}; make textures of these images"
            )
        self._rows = self._found(inner.images) if inner.in_memory else None

    @property
    def plain(self) -> Source:
        return self.inner.plain

    @property
    def fingerprint(self) -> str:
        return self.inner.fingerprint and fingerprint.digest(self.inner.fingerprint, self._textures.fingerprint)

    def take(self, rows: np.ndarray) -> "Textured":
        return Textured(self.inner.take(rows), self._textures)

    def coarse(self) -> "Textured":
        return Textured(self.inner.coarse(), self._textures)

    def batch(self, indices: np.ndarray) -> Batch:
        """As `Source.batch`, and "texture" uint8 [B,H,W,C]."""
        batch = self.inner.batch(indices)
        rows = self._found(batch["image"]) if self._rows is None else self._rows[indices]
        return batch | {"texture": self._textures[rows]}

    def _found(self, images: np.ndarray) -> np.ndarray:
        rows = self._textures.rows_of(images)
        if (rows < 0).any():
            raise UserError(
                f"{self._textures.folder} has no texture for {int((rows < 0).sum())} of {len(images)} images of "
                f"{self.inner.name} ({self.inner.split}); make them of this source, with its options: {COMMAND}"
            )
        return rows
