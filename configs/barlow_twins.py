"""Barlow Twins: each feature agrees between two views and is decorrelated from the others; no negatives, no labels.

    python -m jaxcl.main --config=configs/barlow_twins.py

Presets follow the file name after a colon: one word for each of these axes, joined by commas. The first word of an
axis is its default.

    data set    garments, cifar10, cifar100, imagenet100, imagenet
    scale       paper, cpu
    recipe      own, resnet18
    labels      labelled, unlabelled

The words mean the same as in simsiam.py.

    configs/barlow_twins.py                    garments on a CPU; not yet run
    configs/barlow_twins.py:cifar10            ResNet-18, our choice of settings; not yet run
    configs/barlow_twins.py:cifar100           as cifar10; not yet run
    configs/barlow_twins.py:cifar10,resnet18   1,000 epochs; published linear accuracy 92.1 %; not run here: needs a GPU
    configs/barlow_twins.py:cifar100,resnet18  1,000 epochs; published linear accuracy 70.9 %; not run here: needs a GPU
    configs/barlow_twins.py:imagenet100        ResNet-50, 300 epochs; not yet run
    configs/barlow_twins.py:imagenet           ResNet-50, 300 epochs; not yet run

The projector of 8,192 features is the authors'. --config.model.head_features=2048 and --config.model.head_hidden=2048
need less memory. To read a data set that is not embedded from somewhere else: --config.data.source=cifar:PATH,
folder:PATH, npz:PATH or tfds:NAME.

Source: Zbontar et al. 2021, arXiv 2103.03230. The constants of the loss and the budget are from the first public code,
batches of 4,096 on imagenet too (the paper trains for 1,000 epochs in batches of 2,048), and the last norm of a
residual block starts at 0. What differs: the authors have no run on CIFAR and on imagenet100, where batches are of 256
and 2,048 images and LARS has a coefficient of 0.02 and a clip, as in recipes for small sets; LARS updates norms and
biases by plain SGD at the same rate; and crops of ImageNet's photos are taken from the middle square of an image, at
256 pixels.
"""

from jaxcl import config as base

DATASETS = ("garments", "cifar10", "cifar100", "imagenet100", "imagenet")
SCALES = ("paper", "cpu")
RECIPES = ("own", "resnet18")
LABELS = ("labelled", "unlabelled")


@base.with_finetune
def get_config(preset: str = ""):
    """The config of a preset such as "imagenet100,unlabelled"."""
    dataset, scale, recipe, labels = base.choose(preset, DATASETS, SCALES, RECIPES, LABELS)
    small = dataset == "garments" or scale == "cpu"
    c = base.extend(__file__, "simsiam.py", f"{dataset},{scale},{recipe},{labels}")
    c.name = base.title("barlow_twins", (dataset, scale, recipe, labels), ("", "paper", "own", "labelled"))
    del c.terms.simsiam
    del c.heads.predictor
    c.terms.barlow_twins = base.term("barlow_twins", views=("view1", "view2"), off_diagonal_weight=3.9e-3, scale=1 / 32)
    c.model.head_out_norm = "none"
    c.optimizer.constant_lr = ()
    if small:
        c.optimizer.lr = 0.1
        return c
    if recipe == "resnet18":
        _resnet18(c)
        return c
    cifar = dataset in ("cifar10", "cifar100")
    c.model.head_hidden_layers = 2
    c.model.head_features = c.model.head_hidden = 2048 if cifar else 8192
    for name, blur, solarize in (("view1", 1.0, 0.0), ("view2", 0.1, 0.2)):
        view = c.views[name]
        view.crop_area, view.jitter = (0.08, 1.0), (0.4, 0.4, 0.2, 0.1)
        view.blur, view.solarize = blur, solarize
    c.batch_size = 256 if cifar else 2048 if dataset == "imagenet100" else 4096
    c.duration = "800 epochs" if cifar else "300 epochs"
    # 0.2 for each 256 images. optax's LARS updates norms and biases by plain SGD at the same rate.
    rate = dict(kind="lars", lr=0.2 * c.batch_size / 256, weight_decay=1e-6, schedule="cosine", warmup="10 epochs")
    if dataset != "imagenet":
        rate |= dict(trust_coefficient=0.02, clip_trust=True)
    c.optimizer = base.options(base.OptimizerOptions, **rate)
    return c


def _resnet18(c):
    """solo-learn's Barlow Twins: asymmetric views without blur, LARS that clips, with norms and biases left out."""
    c.model.zero_init_residual = False
    c.terms.barlow_twins.off_diagonal_weight, c.terms.barlow_twins.scale = 0.0051, 0.1
    for name, solarize in (("view1", 0.0), ("view2", 0.2)):
        view = c.views[name]
        view.jitter, view.blur, view.solarize = (0.4, 0.4, 0.2, 0.1), 0.0, solarize
    probe = [c.memory.probe.optimizer] if "probe" in c.memory else []
    for optimizer in (c.optimizer, *probe):
        optimizer.kind, optimizer.trust_coefficient, optimizer.clip_trust = "lars", 0.02, True
    c.optimizer.lr, c.optimizer.weight_decay = 0.3, 1e-4
