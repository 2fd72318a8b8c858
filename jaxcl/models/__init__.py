"""Encoders behind one interface, the heads trained on them, and their weights as files.

Belongs here: networks and their parameters. Does not: losses, the update, configs' recipes.
"""

from jaxcl.models.heads import ProjectionHead
from jaxcl.models.model import BRANCHES, DTYPES, HEAD, Model, ModelOptions, make_model
from jaxcl.models.resnet import ResNet, resnet, tap_stage
from jaxcl.models.vit import ViT, ViTOptions, vit

__all__ = [
    "BRANCHES",
    "DTYPES",
    "HEAD",
    "Model",
    "ModelOptions",
    "ProjectionHead",
    "ResNet",
    "ViT",
    "ViTOptions",
    "make_model",
    "resnet",
    "tap_stage",
    "vit",
]
