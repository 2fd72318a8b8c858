"""`Source`, the contract of an image set, and `ArraySource`, a set in memory.

N images, B batch, n chosen rows, H height, W width, C channels.
"""

import abc
import dataclasses
import functools
from collections.abc import Mapping
from operator import attrgetter
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from jaxcl.data import fingerprint, hashing
from jaxcl.data.moments import Moments, moments
from jaxcl.errors import UserError
from jaxcl.runtime.registry import Contract

Batch = dict[str, np.ndarray]
SAMPLE = 2000  # images from which the mean and standard deviation of sets that are not in memory are estimated


class Source(Contract, abc.ABC):
    """An image set. A subclass defines `__len__` and `batch`; every attribute has a default that it may replace.

    Attributes:
      name, split: where the images come from, for messages and reports.
      in_memory: whether `images` holds all images, decoded. Reading a batch is then cheap.
      images: uint8 [N,H,W,C] of a set in memory, otherwise None.
      image_shape: (H, W, C).
      labels: int32 [N], -1 where an image has no label. By default they are read batch by batch.
      labelled: whether every image has a label.
      class_names: one name per class, empty for a set without labels.
      num_classes: their number.
      mean, std: per channel, in [0, 1] units, of the training images, whatever the split. By default they are
        estimated from a sample of this source.
      extras: side information, each array with N rows: "mask" bool [N,H,W], "coarse" int32 [N], "group" int32 [N]
        (-1 where unknown), ...; for image files also "name", the path below their folder in one printable line.
      coarse_names: names of the values of extras["coarse"], empty without it.
      fine_names: names of the values of extras["fine"], which exists where the labels are the coarse ones.
      group_names: names of the values of extras["group"], for worst-group accuracy.
      paths: the file of each image, local or remote; None for sets that are not made of files.
      content: what tells the images of the set apart without decoding them, such as the sizes of files or a hash of
        stored pixels; "" where nothing does.
      fingerprint: a hash of the content and of the labels, names and groups of the rows, by which a run that continues
        notices other data; "" where they would have to be read for it.
    """

    name: str = "source"
    split: str = "train"
    in_memory: bool = False
    images: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    coarse_names: tuple[str, ...] = ()
    fine_names: tuple[str, ...] = ()
    group_names: tuple[str, ...] = ()
    extras: Mapping[str, np.ndarray] = MappingProxyType({})
    paths: tuple[str, ...] | None = None
    content: str = ""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def batch(self, indices: np.ndarray) -> Batch:
        """The rows `indices` [B] as {"image" uint8 [B,H,W,C], "label" int32 [B], "index" int32 [B]}.

        "index" is the row in this source: extras[key][index] is the side information of an example. Threads may call
        it at the same time.
        """

    # A cached property gives way to an attribute, a dataclass field or a property of a subclass.
    @functools.cached_property
    def image_shape(self) -> tuple[int, int, int]:
        return self.batch(np.arange(1))["image"].shape[1:]

    @functools.cached_property
    def labels(self) -> np.ndarray:
        blocks = [np.arange(i, min(i + 1024, len(self))) for i in range(0, len(self), 1024)]
        return np.concatenate([np.empty(0, np.int32), *(self.batch(rows)["label"] for rows in blocks)])

    @functools.cached_property
    def num_classes(self) -> int:
        return len(self.class_names)

    @functools.cached_property
    def labelled(self) -> bool:
        return len(self.labels) > 0 and bool((self.labels >= 0).all())

    @functools.cached_property
    def mean(self) -> tuple[float, ...]:
        return self._moments[0]

    @functools.cached_property
    def std(self) -> tuple[float, ...]:
        return self._moments[1]

    @functools.cached_property
    def _moments(self) -> Moments:
        return moments(self.batch(np.sort(hashing.order(0, 0, len(self))[:SAMPLE]))["image"])

    @functools.cached_property
    def fingerprint(self) -> str:
        if not self.in_memory:
            return self.content and fingerprint.digest(self.content, len(self))
        columns = {key: values for key, values in self.extras.items() if values.ndim == 1}
        return fingerprint.digest(self.content, np.asarray(self.labels), columns)

    @property
    def plain(self) -> "Source":
        """The set without what is added for training only."""
        return self

    def take(self, rows: np.ndarray) -> "Source":
        """The set of these rows [n], numbered anew from 0."""
        return Subset(self, rows)

    def coarse(self) -> "Source":
        """The same set with the coarse classes as labels, and the fine ones as extras["fine"].

        Errors: UserError for a kind of source that cannot do it.
        """
        raise UserError(f"{self.name} cannot be labelled with its coarse classes; define {type(self).__name__}.coarse")


class Wrapped(Source):
    """A source that has the attributes of another one, except those that a subclass replaces."""

    def __init__(self, inner: Source):
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def batch(self, indices: np.ndarray) -> Batch:
        return self.inner.batch(indices)

    name = property(attrgetter("inner.name"))
    split = property(attrgetter("inner.split"))
    in_memory = property(attrgetter("inner.in_memory"))
    images = property(attrgetter("inner.images"))
    image_shape = property(attrgetter("inner.image_shape"))
    labels = property(attrgetter("inner.labels"))
    labelled = property(attrgetter("inner.labelled"))
    class_names = property(attrgetter("inner.class_names"))
    num_classes = property(attrgetter("inner.num_classes"))
    mean = property(attrgetter("inner.mean"))
    std = property(attrgetter("inner.std"))
    extras = property(attrgetter("inner.extras"))
    coarse_names = property(attrgetter("inner.coarse_names"))
    fine_names = property(attrgetter("inner.fine_names"))
    group_names = property(attrgetter("inner.group_names"))
    paths = property(attrgetter("inner.paths"))
    content = property(attrgetter("inner.content"))
    fingerprint = property(attrgetter("inner.fingerprint"))


class Subset(Wrapped):
    """Some rows of a source, numbered anew from 0."""

    in_memory = False
    images = None

    def __init__(self, inner: Source, rows: np.ndarray):
        super().__init__(inner)
        self._rows = np.asarray(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: np.ndarray) -> Batch:
        indices = np.asarray(indices)
        return self.inner.batch(self._rows[indices]) | {"index": indices.astype(np.int32)}

    @functools.cached_property
    def labels(self) -> np.ndarray:
        return self.inner.labels[self._rows]

    @functools.cached_property
    def labelled(self) -> bool:
        return len(self) > 0 and bool((self.labels >= 0).all())

    @functools.cached_property
    def extras(self) -> Mapping[str, np.ndarray]:
        return {key: values[self._rows] for key, values in self.inner.extras.items()}

    @functools.cached_property
    def paths(self) -> tuple[str, ...] | None:
        return None if self.inner.paths is None else tuple(self.inner.paths[i] for i in self._rows)

    @functools.cached_property
    def fingerprint(self) -> str:
        return self.inner.fingerprint and fingerprint.digest(self.inner.fingerprint, self._rows)

    def take(self, rows: np.ndarray) -> "Subset":
        return Subset(self.inner, self._rows[rows])

    def coarse(self) -> Source:
        return Subset(self.inner.coarse(), self._rows)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ArraySource(Source):
    """An image set held in memory, made of arrays.

    Args:
      images: uint8 [N,H,W,C].
      labels: int32 [N], -1 where unlabelled.
      class_names: one name per class.
      mean, std: per channel, in [0, 1] units, of the training images.
      extras, coarse_names, fine_names, group_names, paths, content, name, split: as of `Source`.

    Raises:
      ValueError: images of another type or shape, or arrays of another number of rows.
    """

    # Each has an explicit `field`, since dataclasses would take the defaults of the contract for defaults of the field.
    images: np.ndarray = dataclasses.field()
    labels: np.ndarray = dataclasses.field()
    class_names: tuple[str, ...] = dataclasses.field()
    mean: tuple[float, ...] = dataclasses.field()
    std: tuple[float, ...] = dataclasses.field()
    extras: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    coarse_names: tuple[str, ...] = ()
    fine_names: tuple[str, ...] = ()
    group_names: tuple[str, ...] = ()
    paths: tuple[str, ...] | None = None
    content: str = ""
    name: str = "arrays"
    split: str = "train"
    in_memory: ClassVar[bool] = True

    def __post_init__(self) -> None:
        n = len(self.images)
        if self.images.dtype != np.uint8 or self.images.ndim != 4:
            raise ValueError(f"images must be uint8 [N,H,W,C], got {self.images.dtype} {self.images.shape}")
        for key, array in {"labels": self.labels, **self.extras}.items():
            if len(array) != n:
                raise ValueError(f"{key} has {len(array)} rows, images have {n}")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.images.shape[1:]

    def batch(self, indices: np.ndarray) -> Batch:
        indices = np.asarray(indices)
        return {
            "image": self.images[indices],
            "label": self.labels[indices],
            "index": indices.astype(np.int32),
        }

    def take(self, rows: np.ndarray) -> "ArraySource":
        if len(rows) == len(self) and (rows == np.arange(len(self))).all():
            return self
        extras = {k: v[rows] for k, v in self.extras.items()}
        paths = None if self.paths is None else tuple(self.paths[i] for i in rows)
        return dataclasses.replace(self, images=self.images[rows], labels=self.labels[rows], extras=extras, paths=paths)

    def coarse(self) -> "ArraySource":
        return dataclasses.replace(
            self,
            labels=self.extras["coarse"],
            class_names=self.coarse_names,
            extras={**self.extras, "fine": self.labels},
            fine_names=self.class_names,
        )
