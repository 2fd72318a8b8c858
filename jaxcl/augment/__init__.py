"""Jitted, batched image augmentation that also returns the parameters it drew."""

from jaxcl.augment.patches import patch_negatives, tile_patches
from jaxcl.augment.pipeline import (
    IDENTITY,
    ColorJitter,
    GaussianBlur,
    Normalize,
    Pipeline,
    RandomFlip,
    RandomGrayscale,
    RandomResizedCrop,
    RandomRotation,
    RandomSolarize,
    RandomTilt,
    Resize,
    classifier_view,
    random_view,
    standard_view,
)
from jaxcl.augment.quilting import quilt_texture
from jaxcl.augment.sampling import sample_texture

__all__ = [
    "IDENTITY",
    "ColorJitter",
    "GaussianBlur",
    "Normalize",
    "Pipeline",
    "RandomFlip",
    "RandomGrayscale",
    "RandomResizedCrop",
    "RandomRotation",
    "RandomSolarize",
    "RandomTilt",
    "Resize",
    "classifier_view",
    "patch_negatives",
    "quilt_texture",
    "random_view",
    "sample_texture",
    "standard_view",
    "tile_patches",
]
