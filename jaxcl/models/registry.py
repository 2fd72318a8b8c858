"""The built-in encoders: kind -> its options, named once, here. A config can also name one as "package.module:Name"."""

from jaxcl.runtime.registry import Registry

MODELS = Registry(
    "model",
    "jaxcl.models.encoder:EncoderOptions",
    {
        "resnet": "jaxcl.models.resnet:ResNetOptions",
        "efficientnet": "jaxcl.models.efficientnet:EfficientNetOptions",
        "convnext": "jaxcl.models.convnext:ConvNeXtOptions",
        "vision_transformer": "jaxcl.models.vision_transformer:VisionTransformerOptions",
        "vit": "jaxcl.models.vit:ViTOptions",
    },
)
