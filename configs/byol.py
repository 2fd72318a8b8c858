"""BYOL: from one view of an image, predict what a moving average of the encoder makes of the other; no negatives.

    python -m jaxcl.main --config=configs/byol.py

Presets, one word an axis, joined by commas: a data set (garments, cifar10, tiny_imagenet, stl10, imagenet100), a scale
(paper, or cpu for the small network and minutes of the embedded set, which has no other), and what labels are for:
labelled (a classifier is trained beside the encoder, which it does not change) or unlabelled.

    configs/byol.py                            garments on a CPU: linear probe 45.5 % (seed 0, validation images)
    configs/byol.py:cifar10                    32 pixels; not yet run
    configs/byol.py:tiny_imagenet              64 pixels; not yet run
    configs/byol.py:stl10                      96 pixels; not yet run
    configs/byol.py:imagenet100                ResNet-50, BYOL's own settings in 200 epochs; not yet run

Data of a preset other than the embedded one: --config.data.source=cifar:PATH, npz:PATH, folder:PATH or tfds:NAME.
Everything not said here is as in supcon.py.

Source: Grill et al. 2020, arXiv 2006.07733, appendix.
"""

from jaxcl import config as base

DATASETS = ("garments", "cifar10", "tiny_imagenet", "stl10", "imagenet100")
SCALES = ("paper", "cpu")
LABELS = ("labelled", "unlabelled")


def get_config(preset: str = ""):
    """The config of a preset such as "cifar10,cpu"."""
    dataset, scale, labels = base.choose(preset, DATASETS, SCALES, LABELS)
    c = base.extend(__file__, "supcon.py", f"{dataset},{scale}")
    c.name = base.title("byol", (dataset, scale, labels), ("", "paper", "labelled"))

    # Each view is a batch of its own of every batch norm.
    c.passes = (
        base.encode("view1"),
        base.encode("view2"),
        base.encode("view1", encoder="target"),
        base.encode("view2", encoder="target"),
    )
    del c.terms.supcon
    c.terms.byol = base.term("byol", views=("view1", "view2"))
    c.memory.target = base.memory("ema", decay=0.996, decay_schedule="cosine", order="after")
    c.model.head_hidden_layers = 1
    c.model.head_norm = "batch"
    if dataset == "garments" or scale == "cpu":
        _cpu(c)
    else:
        _paper(c)
    c.heads.predictor = base.head("mlp", features=c.model.head_features, hidden=c.model.head_hidden)
    if labels == "unlabelled":
        base.without_labels(c)
    return c


def _cpu(c):
    c.model.head_hidden = 512
    c.model.head_features = 128
    c.memory.target.decay = 0.95  # a short run has few updates for the average to follow
    c.optimizer.lr = 3e-3
    # As strong as those of SimCLR here: with those of SupCon (and a decay of 0.98) the linear probe had 35 to 37 %.
    for name in ("view1", "view2"):
        c.views[name] = base.view("random", crop_area=(0.08, 1.0), jitter=(0.8, 0.8, 0.8, 0.2), grayscale=0.2)


def _paper(c):
    """LARS, a learning rate in proportion to the batch, ten epochs of warm-up, one cosine; unequal views."""
    c.duration = "200 epochs"
    c.batch_size = 512
    c.model.head_hidden = 4096
    c.model.head_features = 256
    for name, blur, solarize in (("view1", 1.0, 0.0), ("view2", 0.1, 0.2)):
        c.views[name] = base.view(
            "random", crop_area=(0.08, 1.0), jitter=(0.4, 0.4, 0.2, 0.1), grayscale=0.2, solarize=solarize
        )
        if c.size > 64:  # at 32 pixels it would leave little
            c.views[name].blur = blur
            c.views[name].blur_sigma = (0.1, 2.0 if c.size == 224 else 1.0)
    c.optimizer = base.options(
        base.OptimizerOptions,
        kind="lars",  # no decay and no trust ratio for biases and batch norms
        lr=0.2 * 512 / 256,
        weight_decay=1.5e-6,
        schedule="cosine",
        warmup="10 epochs",
    )
    c.memory.probe.optimizer = base.options(
        base.OptimizerOptions, kind="sgd", lr=0.1, weight_decay=0.0, schedule="cosine"
    )
