"""The built-in kinds of sources, each named once, here. `runtime.registry` describes how a config names your own."""

from jaxcl.runtime.registry import Registry

SOURCES = Registry(
    "kind of source",
    "jaxcl.data.kind:SourceKind",
    {
        "garments": "jaxcl.data.garments:Garments",
        "fashion_mnist": "jaxcl.data.fashion_mnist:FashionMnist",
        "npz": "jaxcl.data.npz:Npz",
        "idx": "jaxcl.data.idx:Idx",
        "cifar": "jaxcl.data.cifar:Cifar",
        "tfds": "jaxcl.data.tfds:Tfds",
        "folder": "jaxcl.data.folder:Folder",
        "csv": "jaxcl.data.csv_file:Csv",
        "waterbirds": "jaxcl.data.waterbirds:Waterbirds",
        "celeb_a": "jaxcl.data.celeb_a:CelebA",
        "voc": "jaxcl.data.voc:Voc",
    },
)
