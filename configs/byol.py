"""BYOL: predict a moving-average encoder's projection of one view from the other view; no negatives.

    python -m jaxcl.main --config=configs/byol.py

Presets follow the file name after a colon: one word for each of these axes, joined by commas. The first word of an
axis is its default.

    data set    garments, cifar10, cifar100, tiny_imagenet, stl10, imagenet100
    scale       paper: the authors' settings; cpu: the small network and the short run of the embedded set. The embedded
                set has only the latter.
    recipe      own: the settings below; resnet18: of cifar10 and cifar100, the ResNet-18 that papers compare by, as in
                supcon.py
    labels      labelled: a classifier is trained beside the encoder and does not change it; unlabelled: no classifier

    configs/byol.py                            garments on a CPU: linear probe 45.5 % (seed 0, validation images)
    configs/byol.py:cifar10                    32 pixels; not yet run
    configs/byol.py:cifar100                   as cifar10; not yet run
    configs/byol.py:cifar10,resnet18           1,000 epochs; published linear accuracy 92.6 %; not run here: needs a GPU
    configs/byol.py:cifar100,resnet18          1,000 epochs; published linear accuracy 70.5 %; not run here: needs a GPU
    configs/byol.py:tiny_imagenet              64 pixels; not yet run
    configs/byol.py:stl10                      96 pixels; not yet run
    configs/byol.py:imagenet100                ResNet-50, BYOL's own settings in 200 epochs; not yet run

To read a data set that is not embedded from somewhere else: --config.data.source=cifar:PATH, npz:PATH, folder:PATH or
tfds:NAME. Everything that this file does not set is as in supcon.py.

Source: Grill et al. 2020, arXiv 2006.07733, appendix. The authors have settings for 100, 300 and 1,000 epochs, none for
200: learning rates for 256 images of 0.45, 0.3 and 0.2, weight decay 1e-6, 1e-6 and 1.5e-6, and a moving average from
0.99, 0.99 and 0.996. Here the runs of 200 epochs have those of 300, in batches of 512 instead of 4,096. The last norm
of a residual block starts at 0, as theirs. What differs: LARS has a coefficient of 0.02 and a clip, as in recipes for
small sets, since theirs of 1e-3 would hardly move matrices in so few updates; and at 32 and 64 pixels nothing is
blurred. On ImageNet's photos crops are taken from the middle square of an image, at 256 pixels.
"""

from jaxcl import config as base

DATASETS = ("garments", "cifar10", "cifar100", "tiny_imagenet", "stl10", "imagenet100")
SCALES = ("paper", "cpu")
RECIPES = ("own", "resnet18")
LABELS = ("labelled", "unlabelled")


@base.with_finetune
def get_config(preset: str = ""):
    """The config of a preset such as "cifar10,cpu"."""
    dataset, scale, recipe, labels = base.choose(preset, DATASETS, SCALES, RECIPES, LABELS)
    c = base.extend(__file__, "supcon.py", f"{dataset},{scale},{recipe}")
    c.name = base.title("byol", (dataset, scale, recipe, labels), ("", "paper", "own", "labelled"))

    # Batch norms normalise each view separately.
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
    elif recipe == "resnet18":
        _resnet18(c)
    else:
        _paper(c)
    c.heads.predictor = base.head("mlp", features=c.model.head_features, hidden=c.model.head_hidden)
    if labels == "unlabelled":
        base.without_labels(c)
    return c


def _cpu(c):
    c.model.head_hidden = 512
    c.model.head_features = 128
    c.memory.target.decay = 0.95  # a short run has few updates, so the average must follow faster
    c.optimizer.lr = 3e-3
    # SimCLR's augmentation. With SupCon's weaker one (and a decay of 0.98) the linear probe reached only 35 to 37 %.
    for name in ("view1", "view2"):
        c.views[name] = base.view("random", crop_area=(0.08, 1.0), jitter=(0.8, 0.8, 0.8, 0.2), grayscale=0.2)


def _resnet18(c):
    """solo-learn's BYOL: asymmetric views without blur, LARS that clips, with norms and biases left out."""
    c.model.head_hidden, c.model.head_features = 4096, 256
    c.memory.target.decay = 0.99
    for name, solarize in (("view1", 0.0), ("view2", 0.2)):
        view = c.views[name]
        view.jitter, view.blur, view.solarize = (0.4, 0.4, 0.2, 0.1), 0.0, solarize
    for optimizer in (c.optimizer, c.memory.probe.optimizer):
        optimizer.kind, optimizer.trust_coefficient, optimizer.clip_trust = "lars", 0.02, True
    c.optimizer.lr, c.optimizer.weight_decay = 1.0, 1e-5


def _paper(c):
    """The authors' settings for 300 epochs, in 200: ten epochs of warm-up, one cosine; asymmetric views."""
    c.duration = "200 epochs"
    c.batch_size = 512
    c.model.head_hidden = 4096
    c.model.head_features = 256
    c.model.zero_init_residual = True
    c.memory.target.decay = 0.99
    for name, blur, solarize in (("view1", 1.0, 0.0), ("view2", 0.1, 0.2)):
        c.views[name] = base.view(
            "random", crop_area=(0.08, 1.0), jitter=(0.4, 0.4, 0.2, 0.1), grayscale=0.2, solarize=solarize
        )
        if c.size > 64:  # blur would remove most of a 32-pixel image
            c.views[name].blur = blur
            c.views[name].blur_sigma = (0.1, 2.0 if c.size == 224 else 1.0)
    c.optimizer = base.options(
        base.OptimizerOptions,
        kind="lars",  # without decay and trust ratio for biases and batch norms
        lr=0.3 * 512 / 256,
        weight_decay=1e-6,
        trust_coefficient=0.02,
        clip_trust=True,
        schedule="cosine",
        warmup="10 epochs",
    )
    c.memory.probe.optimizer = base.options(
        base.OptimizerOptions, kind="sgd", lr=0.1, weight_decay=0.0, schedule="cosine"
    )
