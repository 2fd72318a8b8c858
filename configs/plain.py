"""Plain: each first view identifies its second view among the second views of the batch; no labels.

    python -m jaxcl.main --config=configs/plain.py

Presets follow the file name after a colon: one word for each of these axes, joined by commas. The first word of an
axis is its default.

    data set    garments, fashion_mnist, cifar10, cifar100, tiny_imagenet
    scale       paper, cpu
    labels      labelled, unlabelled

The words mean the same as in simclr.py.

    configs/plain.py                           garments on a CPU: 3 minutes, linear probe 63.3 %
    configs/plain.py:cifar10                   CIFAR-10, the baseline of CLAE; not yet run
    configs/plain.py:cifar100                  not yet run
    configs/plain.py:tiny_imagenet             not yet run

To train without labels on your own images:

    python -m jaxcl.main --config=configs/plain.py:unlabelled --config.data.source=npz:images.npz

Everything that this file does not set is as in supcon.py. Source: the baseline of that name in Ho and Vasconcelos 2020,
arXiv 2010.12050; settings of the released code, its classifier's batches and epochs (logistic) and the constants it
normalises by included. What differs: that code initialises convolutions with torch's defaults, and has no batch norm in
the stem at 224 pixels.
"""

from jaxcl import config as base

DATASETS = ("garments", "fashion_mnist", "cifar10", "cifar100", "tiny_imagenet")
SCALES = ("paper", "cpu")
LABELS = ("labelled", "unlabelled")
AT_SCALE = ("cifar10", "cifar100", "tiny_imagenet")  # the other data sets have only the cpu scale


@base.with_finetune
def get_config(preset: str = ""):
    """The config of a preset such as "cifar100,cpu"."""
    dataset, scale, labels = base.choose(preset, DATASETS, SCALES, LABELS)
    c = base.extend(__file__, "supcon.py", f"{dataset},{scale}")
    c.name = base.title("plain", (dataset, scale, labels), ("garments", "paper", "labelled"))

    for name in ("view1", "view2"):
        c.views[name] = base.view(
            "random", crop_area=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.4), jitter_p=1.0, grayscale=0.2
        )
    c.passes = (base.encode("view1"), base.encode("view2"))  # each view normalised separately
    del c.terms.supcon
    c.terms.one_way_infonce = base.term("one_way_infonce", views=("view1", "view2"), temperature=0.1)
    c.model.head_hidden_layers = 0
    if dataset in AT_SCALE and scale == "paper":
        _paper(c, dataset)
    if labels == "unlabelled":
        base.without_labels(c)
    return c


def _paper(c, dataset):
    """The authors' hyper-parameters (SGD, lr 0.03 in four steps)."""
    c.duration = "301 epochs"
    c.batch_size = 128
    c.model.depth = 18
    c.eval.final += ("logistic",)  # the authors' protocol; "linear" fits the same model to its optimum
    c.eval.logistic_batch_size = 128
    c.data.mean, c.data.std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # also for CIFAR-100
    c.eval.features = "z"  # as the authors do; the default elsewhere is h, the pooled features
    if dataset == "tiny_imagenet":
        c.duration = "100 epochs"  # ends before the first decay step, as the authors' run does
        c.eval.logistic_epochs = 200
        c.data.mean, c.data.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        c.size = 224  # the images have 64 pixels and are enlarged
        c.model.stem = "imagenet"
    c.optimizer = base.options(
        base.OptimizerOptions,
        kind="sgd",
        lr=0.03,
        momentum=0.9,
        weight_decay=5e-4,
        schedule="epoch_factors",
        decay_epochs=(120, 160, 200),
        decay_factors=(0.1, 0.05, 0.01),
    )
    c.memory.probe.optimizer = base.options(
        base.OptimizerOptions, kind="adam", lr=3e-4, weight_decay=0.0, schedule="constant"
    )
