"""jaxcl: contrastive learning in JAX, from one CPU to a TPU pod."""

__version__ = "0.1.0"

__all__ = ["load_backbone"]


def __getattr__(name: str):
    # When it is asked for: `from jaxcl import losses` needs no models.
    if name == "load_backbone":
        from jaxcl.models.backbone import load_backbone

        return load_backbone
    raise AttributeError(f"module 'jaxcl' has no attribute {name!r}")
