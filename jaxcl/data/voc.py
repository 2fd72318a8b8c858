"""`voc:PATH`: a folder like those of PASCAL VOC, images with a class for each pixel; for the dense probe.

    PATH/JPEGImages/NAME.jpg  PATH/SegmentationClass/NAME.png  PATH/ImageSets/Segmentation/{train,val}.txt

N images, S side.
"""

import dataclasses
import pathlib
from typing import ClassVar, Literal

import numpy as np

from jaxcl.data import fingerprint
from jaxcl.data.images import MAX_PIXELS, decode, open_image, resize_and_crop
from jaxcl.data.kind import Pixels, Size, SourceKind
from jaxcl.data.moments import moments
from jaxcl.data.selection import Select
from jaxcl.data.source import ArraySource
from jaxcl.errors import UserError

LISTS_IN = "ImageSets/Segmentation"
LISTS = {"train": "train", "test": "val"}  # split -> list of names
DEFAULT_SIZE = 224
VOID = 255  # a pixel that does not count, such as the border of an object


@dataclasses.dataclass(frozen=True)
class Voc(SourceKind):
    """Reads the set into memory. PATH is the folder that holds JPEGImages. The images themselves have no labels.

    "test" is the list val.txt; "train", and a validation split held out of it, are train.txt.

    Options:
      image_size: side to which images are resized, shorter side first, and cropped; 0: 224. Each pixel keeps one class.
      fit: "crop"; "" is the same.
      max_pixels: of an image.

    Extras: "segmentation" int32 [N,S,S], the class of each pixel as its PNG numbers it, -1 where the PNG has 255.
    """

    argument: ClassVar[str] = "PATH"
    config_keys: ClassVar[tuple[str, ...]] = ("files",)

    image_size: Size = 0
    fit: Literal["", "crop"] = ""
    max_pixels: Pixels = MAX_PIXELS

    def load(self, argument: str, *, split: str, base_split: str, select: Select) -> ArraySource:
        folder, spec, size = pathlib.Path(argument).expanduser(), f"voc:{argument}", self.image_size or DEFAULT_SIZE
        names = _names(folder, LISTS[base_split], spec)
        rows = select(np.full(len(names), -1, np.int32))
        images, classes = _read(folder, [names[i] for i in rows], size, self.max_pixels, spec)
        if split == "train":
            mean, std = moments(images)
        else:
            # A set may have one part only.
            train = (folder / LISTS_IN / f"{LISTS['train']}.txt").is_file()
            sample = _names(folder, LISTS["train" if train else base_split], spec)[:200]
            mean, std = moments(_read(folder, sample, size, self.max_pixels, spec)[0])
        return ArraySource(
            images=images,
            labels=np.full(len(images), -1, np.int32),
            class_names=(),
            mean=mean,
            std=std,
            extras={"segmentation": classes},
            paths=tuple(str(folder / "JPEGImages" / f"{names[i]}.jpg") for i in rows),
            content=fingerprint.digest([names[i] for i in rows], fingerprint.of_pixels(classes)),
            name=spec,
            split=split,
        )


def _names(folder: pathlib.Path, name: str, spec: str) -> list[str]:
    file = folder / LISTS_IN / f"{name}.txt"
    try:
        names = file.read_text().split()
    except OSError:
        raise UserError(f"{spec} has no list {file}; expected a folder like VOCdevkit/VOC2012") from None
    if not names:
        raise UserError(f"{spec}: the list {file} names no image")
    return names


def _read(
    folder: pathlib.Path, names: list[str], size: int, max_pixels: int, spec: str
) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N,S,S,3] and classes int32 [N,S,S]."""
    images = np.empty((len(names), size, size, 3), np.uint8)
    classes = np.empty((len(names), size, size), np.int32)
    for i, name in enumerate(names):
        files = folder / "JPEGImages" / f"{name}.jpg", folder / "SegmentationClass" / f"{name}.png"
        try:
            with open_image(files[1], formats=("PNG",)) as drawn, files[0].open("rb") as stream:
                if drawn.mode not in ("P", "L"):
                    raise ValueError(f"classes are of mode {drawn.mode}; expected a palette or greyscale")
                images[i] = decode(stream, size, max_pixels)
                classes[i] = resize_and_crop(drawn, size, nearest=True)
        except Exception as error:  # Pillow may raise anything
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(f"{spec}: image {name!r} cannot be read ({why}); mend or remove it from the list") from None
    return images, np.where(classes == VOID, -1, classes)
