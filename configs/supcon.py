"""SupCon."""

from jaxcl import config as base

DATASETS = ("garments", "cifar10", "cifar100", "tiny_imagenet")


def get_config(preset: str = "garments"):
    (dataset,) = base.choose(preset, DATASETS)
    c = base.default()
    c.name = f"supcon:{dataset}"
    c.views.view1 = base.view("random")
    c.views.view2 = base.view("random")
    c.passes = (base.encode("view1", "view2"),)
    c.terms.supcon = base.term("supcon")
    c.memory.probe = base.memory("linear_probe", optimizer=dict(lr=0.1, weight_decay=0.0, schedule="cosine"))
    c.model.stem = "patch4"
    c.model.stage_sizes = (2, 2)
    c.model.stage_widths = (64, 128)
    c.optimizer.schedule = "cosine"
    c.optimizer.lr = 0.1
    c.optimizer.warmup = "5%"
    return c
