"""The embedded, class-balanced subset of Fashion-MNIST (Xiao, Rasul and Vollgraf 2017), MIT: see NOTICE."""

import functools
from importlib import resources

import numpy as np

from jaxcl.data.base import Select, Source, as_rgb, moments
from jaxcl.data.label_levels import LEVELS

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
            f"{part}_{name}": arrays[f"{part}_{name}"].astype(dtype)
            for part in ("train", "test")
            for name, dtype in (("images", np.uint8), ("labels", np.int32))
        }


def load(*, split: str, select: Select) -> Source:
    """Padded to 32x32 and repeated to three channels, so that any encoder takes it."""

    def padded(images: np.ndarray) -> np.ndarray:
        return as_rgb(np.pad(images, ((0, 0), (2, 2), (2, 2))))

    data = photos()
    part = "test" if split == "test" else "train"
    labels = data[f"{part}_labels"]
    rows = select(labels)
    mean, std = moments(padded(data["train_images"])[..., :1])  # the three channels are one
    return Source(
        images=padded(data[f"{part}_images"][rows]),
        labels=labels[rows],
        class_names=CLASSES,
        mean=mean * 3,
        std=std * 3,
        extras={"coarse": COARSE_OF_CLASS[labels[rows]]},
        coarse_names=COARSE,
        name="fashion_mnist",
        split=split,
    )
