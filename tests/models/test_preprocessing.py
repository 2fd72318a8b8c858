"""What config.json and preprocessor_config.json of the hub tell about images, as timm and transformers write them."""

import pytest

from jaxcl.errors import UserError
from jaxcl.models import preprocessing
from jaxcl.models.preprocessing import IMAGENET, Preprocessing

MEAN, STD = list(IMAGENET.mean), list(IMAGENET.std)
HALF = (0.5, 0.5, 0.5)
# As the models named here have them on the hub, without keys that say nothing about pixels.
VIT = {"do_normalize": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 224}
RESNET = {"crop_pct": 0.875, "do_normalize": True, "image_mean": MEAN, "image_std": STD, "resample": 3, "size": 224}
DINOV2 = {
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_rescale": True,
    "image_mean": MEAN,
    "image_std": STD,
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 256},
}
CLIP = {"crop_size": 224, "do_center_crop": True, "image_mean": MEAN, "image_std": STD, "resample": 3, "size": 224}
SIGLIP = {
    "do_rescale": True,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 256, "width": 256},
}
TIMM = {
    "architecture": "resnet18",
    "pretrained_cfg": {
        "input_size": [3, 288, 288],
        "interpolation": "bicubic",
        "crop_pct": 0.95,
        "crop_mode": "center",
        "mean": MEAN,
        "std": STD,
    },
}


@pytest.mark.parametrize(
    ("config", "processor", "expected"),
    [
        ({}, VIT, Preprocessing(HALF, HALF, 224, "bilinear", "squash")),
        ({}, RESNET, Preprocessing(IMAGENET.mean, IMAGENET.std, 224, "bicubic", "crop")),
        ({}, DINOV2, Preprocessing(IMAGENET.mean, IMAGENET.std, 224, "bicubic", "crop")),
        ({}, CLIP, Preprocessing(IMAGENET.mean, IMAGENET.std, 224, "bicubic", "crop")),
        ({}, SIGLIP, Preprocessing(HALF, HALF, 256, "bicubic", "squash")),
        ({}, {"image_processor": SIGLIP}, Preprocessing(HALF, HALF, 256, "bicubic", "squash")),
        (TIMM, {}, Preprocessing(IMAGENET.mean, IMAGENET.std, 288, "bicubic", "crop")),
        ({"model_type": "resnet"}, {}, None),
    ],
    ids=["vit", "resnet", "dinov2", "clip", "siglip", "siglip2", "timm", "none"],
)
def test_what_the_hub_tells(config, processor, expected):
    found = preprocessing.of_hub("M", config, processor)
    assert (found is None) == (expected is None)
    if expected:
        assert found.mean == pytest.approx(expected.mean) and found.std == pytest.approx(expected.std)
        assert found[2:] == expected[2:]


def test_other_scales_of_pixels():
    """Networks that were trained on pixels of another range than [0, 1]: moments are in our units all the same."""
    raw = SIGLIP | {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5] * 3}
    wide = SIGLIP | {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}
    plain = SIGLIP | {"do_normalize": False}
    for processor, mean, std in ((raw, 0.5, 0.5), (wide, 0.5, 0.5), (plain, 0.0, 1.0)):
        found = preprocessing.of_hub("M", {}, processor)
        assert found.mean == pytest.approx((mean,) * 3) and found.std == pytest.approx((std,) * 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"image_mean": ["a"] * 3},
        {"image_mean": [0.5]},
        {"image_std": [0.0] * 3},
        {"image_std": None},
        {"image_mean": [float("nan")] * 3},
        {"size": {"height": "x"}},
        {"size": -1},
        {"size": {}},
        {"size": 10**9},
        {"rescale_factor": 0},
        {"rescale_factor": "x"},
        {"resample": 77},
    ],
)
def test_nonsense_ends_in_one_line(changes):
    with pytest.raises(UserError) as error:
        preprocessing.of_hub("MODEL", {}, SIGLIP | changes)
    assert str(error.value).startswith("MODEL") and "\n" not in str(error.value)
