"""The built-in parts of a method, each named once, here. `runtime.registry` says how a config names anybody's.

Encoders are in jaxcl/models/registry.py, sources in jaxcl/data/registry.py, evaluators in jaxcl/evaluate/registry.py.
"""

from jaxcl.runtime.registry import Registry

VIEWS = Registry(
    "view",
    "jaxcl.augment.pipeline:Pipeline",
    {
        "random": "jaxcl.augment.pipeline:random_view",
        "standard": "jaxcl.augment.pipeline:standard_view",
        "classifier": "jaxcl.augment.pipeline:classifier_view",
    },
)
STAGES = Registry(
    "stage",
    "jaxcl.method.stages.base:Stage",
    {
        "saliency": "jaxcl.method.stages.saliency:SaliencyMask",
        "adversary": "jaxcl.method.stages.adversary:Adversary",
        "patch_negatives": "jaxcl.method.stages.negatives:PatchNegatives",
        "texture_negatives": "jaxcl.method.stages.negatives:TextureNegatives",
    },
)
TERMS = Registry(
    "term",
    "jaxcl.method.terms.base:Term",
    {
        "supcon": "jaxcl.method.terms.supcon:SupCon",
        "nt_xent": "jaxcl.method.terms.pairs:NTXent",
        "one_way_infonce": "jaxcl.method.terms.pairs:OneWayInfoNCE",
        "instance_spread": "jaxcl.method.terms.pairs:InstanceSpread",
        "barlow_twins": "jaxcl.method.terms.pairs:BarlowTwins",
        "spread": "jaxcl.method.terms.spread:Spread",
        "attract": "jaxcl.method.terms.spread:Attract",
        "class_conditional_infonce": "jaxcl.method.terms.spread:ClassConditionalInfoNCE",
        "cross_entropy": "jaxcl.method.terms.heads:CrossEntropy",
        "reconstruction": "jaxcl.method.terms.heads:Reconstruction",
        "moco": "jaxcl.method.terms.momentum:MoCo",
        "byol": "jaxcl.method.terms.momentum:BYOL",
        "simsiam": "jaxcl.method.terms.momentum:SimSiam",
    },
)
MEMORY = Registry(
    "memory part",
    "jaxcl.method.memory:MemoryPart",
    {
        "linear_probe": "jaxcl.method.memory:LinearProbe",
        "ema": "jaxcl.method.memory:EMA",
        "queue": "jaxcl.method.memory:Queue",
    },
)
HEADS = Registry(
    "head",
    "jaxcl.method.heads:Head",
    {
        "classifier": "jaxcl.method.heads:Classifier",
        "decoder": "jaxcl.method.heads:Decoder",
        "mlp": "jaxcl.method.heads:MLP",
    },
)
