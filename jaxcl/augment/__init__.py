"""Jitted, batched image augmentation that also returns the parameters it drew."""

from jaxcl.augment.pipeline import (
    ColorJitter,
    GaussianBlur,
    Normalize,
    Pipeline,
    RandomFlip,
    RandomGrayscale,
    RandomResizedCrop,
    RandomSolarize,
    Resize,
    classifier_view,
    random_view,
    standard_view,
)

__all__ = [
    "ColorJitter",
    "GaussianBlur",
    "Normalize",
    "Pipeline",
    "RandomFlip",
    "RandomGrayscale",
    "RandomResizedCrop",
    "RandomSolarize",
    "Resize",
    "classifier_view",
    "random_view",
    "standard_view",
]
