"""Folders like PASCAL VOC's: reading, resizing of images and pixel classes, and errors."""

import numpy as np
import pytest
from PIL import Image

from jaxcl.data import make_source
from jaxcl.errors import UserError


@pytest.fixture
def folder(tmp_path):
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / part).mkdir(parents=True)
    for name, (height, width) in {"a": (20, 30), "b": (24, 12), "c": (16, 16)}.items():
        classes = np.zeros((height, width), np.uint8)
        classes[: height // 2] = 15  # the upper half
        classes[height // 2] = 255
        image = np.where(classes[..., None] == 15, 250, 10).astype(np.uint8).repeat(3, -1)
        Image.fromarray(image).save(tmp_path / "JPEGImages" / f"{name}.jpg", quality=95)
        png = Image.fromarray(classes, "P")
        png.putpalette([0, 0, 0] * 256)
        png.save(tmp_path / "SegmentationClass" / f"{name}.png")
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("a\nb\n")
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("c\n")
    return tmp_path


def test_images_and_classes_lie_on_each_other(folder):
    train = make_source(f"voc:{folder}", image_size=16)
    assert train.images.shape == (2, 16, 16, 3) and train.extras["segmentation"].shape == (2, 16, 16)
    assert (train.labels == -1).all() and train.num_classes == 0
    for image, classes in zip(train.images, train.extras["segmentation"], strict=True):
        assert set(np.unique(classes)) <= {-1, 0, 15} and (classes == 15).sum() > 90 and (classes == 0).sum() > 90
        assert (image[classes == 15].mean(-1) > 128).mean() > 0.95 and (image[classes == 0].mean(-1) < 128).mean() > 0.9
    test = make_source(f"voc:{folder}", split="test", image_size=16)
    assert len(test) == 1 and (test.extras["segmentation"][0, 8] == -1).all()
    assert test.mean == pytest.approx(train.mean)


def test_mistakes(folder):
    for change, text in (
        (lambda: None, "image_size is -1"),
        (lambda: (folder / "SegmentationClass" / "a.png").write_bytes(b"no"), "image 'a' cannot be read"),
        (lambda: (folder / "ImageSets/Segmentation/train.txt").write_text(""), "names no image"),
        (lambda: (folder / "ImageSets/Segmentation/train.txt").unlink(), "has no list"),
    ):
        change()
        with pytest.raises(UserError) as error:
            make_source(f"voc:{folder}", image_size=-1 if "image_size" in text else 16)
        assert text in str(error.value) and "\n" not in str(error.value)
