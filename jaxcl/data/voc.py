"""`voc:PATH`: a folder like those of PASCAL VOC, images with a class for each pixel; for the dense probe.

    PATH/JPEGImages/NAME.jpg  PATH/SegmentationClass/NAME.png  PATH/ImageSets/Segmentation/{train,val}.txt

Letters: N images, S side.
"""

import pathlib

import numpy as np
from PIL import Image

from jaxcl.data.base import Select, Source, moments
from jaxcl.data.images import check_size, decode, resize_and_crop
from jaxcl.errors import UserError

PARTS = {"train": "train", "validation": "train", "test": "val"}  # split -> list of names
VOID = 255  # a pixel that does not count, as the border of an object


def load(path: str, *, split: str, select: Select, image_size: int | None = None) -> Source:
    """Reads the set into memory; its images have no labels of their own.

    Args:
      path: of the folder that holds JPEGImages.
      split: "test" is the list val.txt, "train" and "validation" are of train.txt.
      image_size: side to which images are resized, shorter side first, and cropped, 224 if not given; of pixels'
        classes each keeps one.

    Extras: "segmentation" int32 [N,S,S], the class of each pixel as its PNG numbers it, -1 where that says 255.
    """
    folder, spec = pathlib.Path(path), f"voc:{path}"
    check_size(spec, image_size)
    image_size = image_size or 224
    names = _names(folder, PARTS[split], spec)
    rows = select(np.full(len(names), -1, np.int32))
    images, classes = _read(folder, [names[i] for i in rows], image_size, spec)
    if split == "train":
        mean, std = moments(images)
    else:
        sample = _names(folder, "train", spec)[:200]
        mean, std = moments(_read(folder, sample, image_size, spec)[0])
    return Source(
        images=images,
        labels=np.full(len(images), -1, np.int32),
        class_names=(),
        mean=mean,
        std=std,
        extras={"segmentation": classes},
        paths=tuple(str(folder / "JPEGImages" / f"{names[i]}.jpg") for i in rows),
        name=spec,
        split=split,
    )


def _names(folder: pathlib.Path, part: str, spec: str) -> list[str]:
    file = folder / "ImageSets" / "Segmentation" / f"{part}.txt"
    try:
        names = file.read_text().split()
    except OSError:
        raise UserError(f"{spec} has no list {file}; expected a folder like VOCdevkit/VOC2012") from None
    if not names:
        raise UserError(f"{spec}: the list {file} names no image")
    return names


def _read(folder: pathlib.Path, names: list[str], size: int, spec: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N,S,S,3] and classes int32 [N,S,S]."""
    images = np.empty((len(names), size, size, 3), np.uint8)
    classes = np.empty((len(names), size, size), np.int32)
    for i, name in enumerate(names):
        files = folder / "JPEGImages" / f"{name}.jpg", folder / "SegmentationClass" / f"{name}.png"
        try:
            with Image.open(files[1], formats=("PNG",)) as drawn, files[0].open("rb") as stream:
                if drawn.mode not in ("P", "L"):
                    raise ValueError(f"classes are of mode {drawn.mode}; expected a palette or greyscale")
                images[i] = decode(stream, size)
                classes[i] = resize_and_crop(drawn, size, nearest=True)
        except Exception as error:  # whatever Pillow raises
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(f"{spec}: image {name!r} cannot be read ({why}); mend it or take it off the list") from None
    return images, np.where(classes == VOID, -1, classes)
