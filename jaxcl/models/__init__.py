"""Networks and their parameters: encoders behind one contract, projection heads, a decoder, weights in files.

Belongs here: flax modules, their options, and functions from parameters to features. Does not belong here: losses,
updates and anything else that knows of a method or a config. A new encoder is one file and a line in `registry`.
"""

from jaxcl.models.encoder import Encoder, EncoderOptions
from jaxcl.models.heads import ProjectionHead
from jaxcl.models.model import Model, make_model
from jaxcl.models.resnet import ResNet, ResNetOptions
from jaxcl.models.vit import ViT, ViTOptions

__all__ = [
    "Encoder",
    "EncoderOptions",
    "Model",
    "ProjectionHead",
    "ResNet",
    "ResNetOptions",
    "ViT",
    "ViTOptions",
    "make_model",
]
