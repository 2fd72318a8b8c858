"""jaxcl: contrastive learning in JAX, from one CPU to a TPU pod.

Each subpackage is imported on its own, such as `from jaxcl import losses`; see "How it is built" in the README. Only
`load_backbone`, which most users of a trained encoder need, has a name here.
"""

__version__ = "0.1.0"

__all__ = ["load_backbone"]


def __getattr__(name: str):
    # Imported on first use: `from jaxcl import losses` needs no models.
    if name == "load_backbone":
        from jaxcl.models.backbone import load_backbone

        return load_backbone
    raise AttributeError(f"module 'jaxcl' has no attribute {name!r}")
