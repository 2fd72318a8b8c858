"""One chain of random transforms in six libraries, from a batch of uint8 images in memory to a float32 batch.

The chain is a random resized crop (area 0.2 to 1), flip (p = 0.5), colour jitter (0.4, 0.4, 0.4, 0.1; p = 0.8), grey
(p = 0.2) and normalisation. Every image has its own random numbers. Letters: N images, S side in pixels.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._paired import torch_threads
from benchmarks._task import Contestant, Needs, Ready
from jaxcl import augment
from jaxcl.augment import ops

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
AREA, FLIP, JITTER, JITTER_P, GREY = (0.2, 1.0), 0.5, (0.4, 0.4, 0.4, 0.1), 0.8, 0.2

CONTESTANTS = (
    Contestant("jaxcl", "jaxcl", ours=True),
    Contestant("torchvision", "torchvision v2, tensors", package="torchvision", differs="single images, in uint8"),
    Contestant("pillow", "torchvision v2, Pillow", package="torchvision", differs="single images, in uint8"),
    Contestant(
        "kornia",
        "kornia",
        package="kornia",
        differs="batches, float32; one order of the jitter per batch; not antialiased",
    ),
    Contestant(
        "albumentations",
        "albumentations",
        package="albumentations",
        differs="single images, in uint8, by OpenCV; not antialiased",
    ),
    Contestant(
        "augmax",
        "augmax",
        package="augmax",
        differs="batches, float32; square crops, not antialiased; jitter in HSV, in one order, saturation kept",
    ),
    Contestant(
        "dm_pix",
        "dm-pix",
        package="dm-pix",
        differs="batches, float32; crop by its affine_transform in boxes drawn by jaxcl, not antialiased; one order of "
        "the jitter, brightness is added",
    ),
)


def prepare(contestant: str, *, size: int, batch: int) -> Ready:
    raw_NxSxSx3 = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
    # Reads one byte per value and writes four. No matmul is necessary.
    return Ready(MAKE[contestant](raw_NxSxSx3, size), batch, needs=Needs(0, 5 * raw_NxSxSx3.size))


# ---- JAX


def _compiled(raw: np.ndarray, view: Callable[[jax.Array, jax.Array], jax.Array]) -> Callable[[], Any]:
    """Augments the batch again and again with new random numbers. view: (keys [N], uint8 images) -> float32 images."""
    function = jax.jit(lambda key, step, x: view(jax.random.split(jax.random.fold_in(key, step), len(x)), x))
    key, step = jax.random.key(0), 0

    def run():
        nonlocal step
        step += 1
        return jax.block_until_ready(function(key, step, raw))

    return run


def of_jaxcl(raw: np.ndarray, size: int) -> Callable[[], Any]:
    view = augment.random_view(
        size, MEAN, STD, crop_area=AREA, flip=FLIP, jitter=JITTER, jitter_p=JITTER_P, grayscale=GREY
    )
    return _compiled(raw, lambda keys, x: view(keys, x)[0])


def of_augmax(raw: np.ndarray, size: int) -> Callable[[], Any]:
    import augmax

    transform = augmax.Chain(
        augmax.RandomSizedCrop(size, size, zoom_range=(1.0, AREA[0] ** -0.5)),
        augmax.HorizontalFlip(FLIP),
        augmax.ByteToFloat(),
        augmax.ColorJitter(*JITTER, p=JITTER_P),
        augmax.RandomGrayscale(GREY),
        augmax.Normalize(jnp.array(MEAN), jnp.array(STD)),
    )
    return _compiled(raw, jax.vmap(transform))


def of_dm_pix(raw: np.ndarray, size: int) -> Callable[[], Any]:
    import dm_pix as pix

    def one(key, image_SxSx3, box):
        keys = jax.random.split(key, 7)
        top, left, height, width = box
        step = jnp.array([height / size, width / size, 1.0])
        x = pix.affine_transform(
            image_SxSx3.astype(jnp.float32) / 255, step, offset=jnp.array([top, left, 0.0]) + (step - 1) / 2
        )
        x = pix.random_flip_left_right(keys[0], x, probability=FLIP)
        y = pix.random_brightness(keys[1], x, JITTER[0])
        y = pix.random_contrast(keys[2], y, 1 - JITTER[1], 1 + JITTER[1])
        y = pix.random_saturation(keys[3], y, 1 - JITTER[2], 1 + JITTER[2])
        y = pix.random_hue(keys[4], y, JITTER[3])
        x = jnp.where(jax.random.bernoulli(keys[5], JITTER_P), jnp.clip(y, 0, 1), x)
        x = jnp.where(jax.random.bernoulli(keys[6], GREY), pix.rgb_to_grayscale(x, keep_dims=True), x)
        return (x - jnp.array(MEAN)) / jnp.array(STD)

    return _compiled(raw, lambda keys, x: jax.vmap(one)(keys, x, ops.draw_resized_crop(keys, size, size, area=AREA)))


# ---- torch and OpenCV


def of_torchvision(raw: np.ndarray, size: int, *, pillow: bool = False) -> Callable[[], Any]:
    torch = torch_threads()
    from PIL import Image
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=AREA),
            v2.RandomHorizontalFlip(FLIP),
            v2.RandomApply([v2.ColorJitter(*JITTER)], p=JITTER_P),
            v2.RandomGrayscale(GREY),
            *([v2.ToImage()] if pillow else []),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    # The forms in which a loader decodes: images of Pillow, or tensors with channels innermost in memory.
    images = [Image.fromarray(x) if pillow else torch.from_numpy(x).permute(2, 0, 1) for x in raw]
    return lambda: torch.stack([transform(image) for image in images])


def of_kornia(raw: np.ndarray, size: int) -> Callable[[], Any]:
    torch = torch_threads()
    import kornia.augmentation as K

    transform = torch.nn.Sequential(
        K.RandomResizedCrop((size, size), scale=AREA),
        K.RandomHorizontalFlip(FLIP),
        K.ColorJitter(*JITTER, p=JITTER_P),
        K.RandomGrayscale(p=GREY),
        K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    )

    def run():
        with torch.inference_mode():
            return transform(torch.from_numpy(raw).permute(0, 3, 1, 2).float().div_(255))

    return run


def of_albumentations(raw: np.ndarray, size: int) -> Callable[[], Any]:
    import albumentations as A
    import cv2

    cv2.setNumThreads(0)  # single-threaded: the images are too small for two threads
    transform = A.Compose(
        [
            A.RandomResizedCrop((size, size), scale=AREA),
            A.HorizontalFlip(p=FLIP),
            A.ColorJitter(*((1 - s, 1 + s) for s in JITTER[:3]), hue=(-JITTER[3], JITTER[3]), p=JITTER_P),
            A.ToGray(p=GREY),
            A.Normalize(MEAN, STD),
        ]
    )
    return lambda: np.stack([transform(image=image)["image"] for image in raw])


MAKE: dict[str, Callable[[np.ndarray, int], Callable[[], Any]]] = {
    "jaxcl": of_jaxcl,
    "torchvision": of_torchvision,
    "pillow": lambda raw, size: of_torchvision(raw, size, pillow=True),
    "kornia": of_kornia,
    "albumentations": of_albumentations,
    "augmax": of_augmax,
    "dm_pix": of_dm_pix,
}
