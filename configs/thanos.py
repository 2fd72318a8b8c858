"""Thanos: one encoder that spreads each class and one that reconstructs images, trained together on coarse labels.

    python -m jaxcl.main --config=configs/thanos.py

One update trains both encoders, each with a cross-entropy on the coarse labels: the main one with L_spread, "auto" as
an autoencoder. The evaluation concatenates their features and also measures the fine labels.

Presets follow the file name after a colon: one word for each of these axes, joined by commas. The first word of an
axis is its default.

    method      the loss of the main encoder: l_spread, or supcon for "SupCon + autoencoder"
    encoders    two; one: a single encoder with all terms; joint: two encoders, with one classifier on both
    data set, scale, network, schedule          as in l_spread.py

    configs/thanos.py                          garments on a CPU: 4 min 7 s, fine classes 72.2 % (kNN 67.4), seed 0
    configs/thanos.py:supcon                   SupCon and autoencoder; not yet run
    configs/thanos.py:one                      joint likewise; not yet run
    configs/thanos.py:cifar10                  two ViTs, 600 epochs; not yet run

The authors train two runs and join them at evaluation. This gives the same numbers, up to the choice of checkpoints:

    python -m jaxcl.main --config=configs/l_spread.py --workdir=runs/s
    python -m jaxcl.main --config=configs/l_spread.py:autoencoder --workdir=runs/a
    python -m jaxcl evaluate --workdir=runs/s --workdir=runs/a

Source: Chen et al. 2022, arXiv 2204.07596, and its released code; see l_spread.py.
"""

from jaxcl import config as base

METHODS = ("l_spread", "supcon")
ENCODERS = ("two", "one", "joint")
DATASETS = ("garments", "cifar10", "cifar100", "cifar100u", "mnist", "tiny_imagenet")
SCALES = ("paper", "cpu")
NETWORKS = ("vit", "resnet")
SCHEDULES = ("cosine", "released")


@base.with_finetune
def get_config(preset: str = ""):
    """The config of a preset such as "supcon,cifar10"."""
    axes = base.choose(preset, METHODS, ENCODERS, DATASETS, SCALES, NETWORKS, SCHEDULES)
    method, encoders, *rest = axes
    # The config of the main encoder's single run. The second encoder's terms, below, come from its single run.
    c = base.extend(__file__, "l_spread.py", ",".join((method, *rest)))
    c.name = base.title(
        "thanos", (rest[0], method, encoders, *rest[1:]), ("", "l_spread", "two", "paper", "vit", "cosine")
    )
    auto = base.extend(__file__, "l_spread.py", ",".join(("autoencoder", *rest)))
    second = "" if encoders == "one" else "auto"
    views = tuple(f"{second}/{v}" if second else v for v in ("view1", "view2"))

    c.heads.decoder = auto.heads.decoder
    c.heads.decoder.encoders = (second,)
    c.terms.reconstruction = auto.terms.reconstruction
    c.terms.reconstruction.views = views
    if second:
        c.encoders.auto = auto.model
        c.passes += (base.encode("view1", "view2", encoder="auto"),)
        c.representation = ("", "auto")
    if encoders == "two":
        c.heads.auto_classifier = base.head("classifier", encoders=("auto",))
        c.terms.auto_ce = base.term("cross_entropy", views=views, head="auto_classifier")
    if encoders == "joint":
        c.heads.classifier.encoders = ("", "auto")
    return c
