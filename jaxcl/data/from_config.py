"""The image set that a config names."""

from ml_collections import ConfigDict

from jaxcl.data.base import Source
from jaxcl.data.per_class import PerClass
from jaxcl.data.sources import make_source
from jaxcl.data.texture_set import Textured, TextureSet

FILES = ("folder", "csv", "waterbirds", "celeb_a")  # kinds that read image files


def source_of(config: ConfigDict, split: str) -> Source:
    """A split of `config.data`; training batches have textures too, where the config names some. Errors: UserError."""
    data = config.data
    # The options of the kind of source in use; those of the others lie idle in the config.
    kind = data.source.partition(":")[0]
    options = dict(data[kind]) if kind in ("garments", "tfds", "celeb_a") else {}
    if kind in (*FILES, "voc"):
        options |= data.files
    if kind != "garments":
        options = {k: v or None for k, v in options.items()}  # empty: the kind's own default
    if kind in FILES:
        options["on_bad_image"] = data.on_bad_image
    source = make_source(
        data.source,
        split=split,
        seed=config.seed,
        validation=data.validation,
        limit=(data.limit if split == "train" else 0) or None,
        labels=data.labels,
        validation_split=data.validation_split,
        imbalance=data.imbalance,
        **options,
    )
    return Textured(source, TextureSet(data.textures)) if data.textures and split == "train" else source


def order_of(config: ConfigDict, source: Source) -> PerClass | None:
    """The order of training batches, where it is not the loader's own. Errors: UserError."""
    per_class = config.data.per_class
    if not per_class:
        return None
    return PerClass(source.labels, batch_size=config.batch_size, per_class=per_class, seed=config.seed)
