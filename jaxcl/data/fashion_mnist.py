"""The embedded, class-balanced subset of Fashion-MNIST (Xiao, Rasul and Vollgraf 2017), MIT: see NOTICE."""

import dataclasses
import functools
from importlib import resources
from typing import ClassVar

import numpy as np

from jaxcl.data.kind import SourceKind
from jaxcl.data.label_levels import LEVELS
from jaxcl.data.moments import as_rgb, moments
from jaxcl.data.selection import Select
from jaxcl.data.source import ArraySource

CLASSES = (
    "T-shirt",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
COARSE, COARSE_OF_CLASS = LEVELS["fashion_mnist"]


@functools.cache
def photos() -> dict[str, np.ndarray]:
    """{train,test}_images uint8 [N,28,28] and {train,test}_labels int32 [N]; 10,000 and 2,000 of them."""
    file = resources.files("jaxcl.data") / "embedded" / "fashion_mnist_12k.npz"
    with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
        return {
            f"{split}_{name}": arrays[f"{split}_{name}"].astype(dtype)
            for split in ("train", "test")
            for name, dtype in (("images", np.uint8), ("labels", np.int32))
        }


@dataclasses.dataclass(frozen=True)
class FashionMnist(SourceKind):
    """The photos, padded to 32x32 and repeated to three channels, so that any encoder takes them."""

    config_keys: ClassVar[tuple[str, ...]] = ()

    def load(self, argument: str, *, split: str, base_split: str, select: Select) -> ArraySource:
        data = photos()
        labels = data[f"{base_split}_labels"]
        rows = select(labels)
        mean, std = moments(_padded(data["train_images"])[..., :1])  # the three channels are equal
        return ArraySource(
            images=_padded(data[f"{base_split}_images"][rows]),
            labels=labels[rows],
            class_names=CLASSES,
            mean=mean * 3,
            std=std * 3,
            extras={"coarse": COARSE_OF_CLASS[labels[rows]]},
            coarse_names=COARSE,
            name="fashion_mnist",
            split=split,
        )


def _padded(images: np.ndarray) -> np.ndarray:
    return as_rgb(np.pad(images, ((0, 0), (2, 2), (2, 2))))
