"""Jitted, batched image operations that return the parameters they drew; pipelines, patches and textures made of them.

Here belong functions of keys and arrays, and the dataclasses of their options. What a training update does with the
images belongs in jaxcl/method; reading and decoding files belongs in jaxcl/data.

To add an operation, subclass `Op` in transforms.py (or in a package of your own) and put it into a `Pipeline`.
"""

from jaxcl.augment.base import Op
from jaxcl.augment.patches import patch_negatives, tile_patches
from jaxcl.augment.pipeline import Pipeline, classifier_view, random_view, standard_view
from jaxcl.augment.pixels import denormalize, normalize, to_float
from jaxcl.augment.quilting import quilt_texture
from jaxcl.augment.sampling import sample_texture
from jaxcl.augment.transforms import (
    IDENTITY,
    ColorJitter,
    GaussianBlur,
    Normalize,
    RandomFlip,
    RandomGrayscale,
    RandomResizedCrop,
    RandomRotation,
    RandomSolarize,
    RandomTilt,
    Resize,
)

__all__ = [
    "IDENTITY",
    "ColorJitter",
    "GaussianBlur",
    "Normalize",
    "Op",
    "Pipeline",
    "RandomFlip",
    "RandomGrayscale",
    "RandomResizedCrop",
    "RandomRotation",
    "RandomSolarize",
    "RandomTilt",
    "Resize",
    "classifier_view",
    "denormalize",
    "normalize",
    "patch_negatives",
    "quilt_texture",
    "random_view",
    "sample_texture",
    "standard_view",
    "tile_patches",
    "to_float",
]
