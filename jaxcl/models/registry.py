"""The built-in encoders, each named once, here: kind -> its options."""

from jaxcl.runtime.registry import Registry

MODELS = Registry(
    "model",
    "jaxcl.models.encoder:EncoderOptions",
    {
        "resnet": "jaxcl.models.model:ModelOptions",
        "vit": "jaxcl.models.vit:ViTOptions",
    },
)
