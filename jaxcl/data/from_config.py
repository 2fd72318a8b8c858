"""The image set that a config names, and the order of its training batches."""

from collections.abc import Mapping

from ml_collections import ConfigDict

from jaxcl.data.kind import SourceKind
from jaxcl.data.per_class import PerClass
from jaxcl.data.source import Source
from jaxcl.data.sources import load, parse
from jaxcl.data.texture_set import Textured, TextureSet
from jaxcl.runtime.options import construct


def source_of(config: ConfigDict, split: str) -> Source:
    """A split of `config.data`. Training batches also hold textures, where data.textures names a folder of them.

    Errors: UserError.
    """
    data = config.data
    kind, argument = parse(data.source, "data.source")
    source = load(
        _made(kind, data),
        argument,
        data.source,
        split=split,
        seed=config.seed,
        validation=data.validation,
        limit=(data.limit if split == "train" else 0) or None,
        labels=data.labels,
        validation_split=data.validation_split,
        imbalance=data.imbalance,
    )
    return Textured(source, TextureSet(data.textures)) if data.textures and split == "train" else source


def _made(kind: type[SourceKind], data: ConfigDict) -> SourceKind:
    """The kind with its options from the config; options of other kinds are ignored."""
    options = {}
    for key in kind.config_keys:
        prefix, values = ("data", {key: data[key]})
        if isinstance(data[key], (Mapping, ConfigDict)):
            prefix, values = f"data.{key}", dict(data[key])
        construct(prefix, kind, values)  # checked key by key, so that an error names the key of the config
        options |= values
    return construct("data", kind, options)


def order_of(config: ConfigDict, source: Source) -> PerClass | None:
    """The order of training batches, or None for the loader's own. Errors: UserError."""
    per_class = config.data.per_class
    if not per_class:
        return None
    return PerClass(source.labels, batch_size=config.batch_size, per_class=per_class, seed=config.seed)
