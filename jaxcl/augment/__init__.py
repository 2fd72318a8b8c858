"""Jitted, batched image augmentation that also returns the parameters it drew."""

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
    "random_view",
    "standard_view",
]
