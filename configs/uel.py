"""UEL (instance spreading): each view identifies its partner, and every other row of the batch is repelled; no labels.

    python -m jaxcl.main --config=configs/uel.py

Presets follow the file name after a colon: one word for each of these axes, joined by commas. The first word of an
axis is its default.

    data set    garments, fashion_mnist, cifar10, cifar100, tiny_imagenet
    scale       paper, cpu
    labels      labelled, unlabelled

The words mean the same as in simclr.py.

    configs/uel.py                             garments on a CPU: 3 minutes, linear probe 64.4 %
    configs/uel.py:cifar10                     CIFAR-10, the baseline of CLAE; not yet run
    configs/uel.py:cifar100                    not yet run
    configs/uel.py:tiny_imagenet               not yet run

To train without labels on your own images:

    python -m jaxcl.main --config=configs/uel.py:unlabelled --config.data.source=npz:images.npz

Everything except the loss is as in plain.py with the same preset. Source: Ye et al., CVPR 2019, in the batch form of Ho
and Vasconcelos 2020, arXiv 2010.12050; settings of the latter's released code.
"""

from jaxcl import config as base

DATASETS = ("garments", "fashion_mnist", "cifar10", "cifar100", "tiny_imagenet")
SCALES = ("paper", "cpu")
LABELS = ("labelled", "unlabelled")


@base.with_finetune
def get_config(preset: str = ""):
    """The config of a preset such as "cifar100,cpu"."""
    dataset, scale, labels = base.choose(preset, DATASETS, SCALES, LABELS)
    c = base.extend(__file__, "plain.py", f"{dataset},{scale},{labels}")
    c.name = base.title("uel", (dataset, scale, labels), ("garments", "paper", "labelled"))
    del c.terms.one_way_infonce
    c.terms.instance_spread = base.term("instance_spread", views=("view1", "view2"), temperature=0.1)
    return c
