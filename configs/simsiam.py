"""SimSiam: each view's prediction matches the other view's projection, under stop-gradient; no negatives.

    python -m jaxcl.main --config=configs/simsiam.py

Presets follow the file name after a colon: one word for each of these axes, joined by commas. The first word of an
axis is its default.

    data set    garments, cifar10, cifar100, imagenet100, imagenet
    scale       paper: the authors' network and budget; cpu: the small network and the short run of the embedded set.
                The embedded set has only the latter.
    recipe      own: the settings below; resnet18: of cifar10 and cifar100, the ResNet-18 that papers compare by, as in
                supcon.py
    labels      labelled: a classifier is trained beside the encoder and does not change it; unlabelled: no classifier

    configs/simsiam.py                         garments on a CPU; not yet run
    configs/simsiam.py:cifar10                 ResNet-18, 800 epochs; not yet run
    configs/simsiam.py:cifar100                as cifar10; not yet run
    configs/simsiam.py:cifar10,resnet18        1,000 epochs; published linear accuracy 90.5 %; not run here: needs a GPU
    configs/simsiam.py:cifar100,resnet18       1,000 epochs; published linear accuracy 66.0 %; not run here: needs a GPU
    configs/simsiam.py:imagenet100             ResNet-50, 200 epochs; not yet run
    configs/simsiam.py:imagenet                ResNet-50, 100 epochs; not yet run

SimSiam uses no labels. The predictor has a constant learning rate: --config.optimizer.constant_lr. Views of 32 pixels
and less are not blurred: --config.views.view1.blur_above and --config.views.view2.blur_above. To read a data set that
is not embedded from somewhere else: --config.data.source=cifar:PATH, folder:PATH, npz:PATH or tfds:NAME.

Source: Chen and He 2020, arXiv 2011.10566; the last norm of a residual block starts at 0, as in the authors' code. What
differs: crops of ImageNet's photos are taken from the middle square of an image, at 256 pixels.
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
    c = without_term(dataset, scale, labels, recipe)
    c.name = base.title("simsiam", (dataset, scale, recipe, labels), ("", "paper", "own", "labelled"))
    c.terms.simsiam = base.term("simsiam", views=("view1", "view2"))
    c.heads.predictor = base.head("mlp", features=c.model.head_features, hidden=64 if small else 512)
    c.optimizer.constant_lr = ("heads/predictor",)
    return c


def without_term(dataset, scale, labels, recipe="own"):
    """Data, views, network, budget and projector; the caller adds the loss and its predictor."""
    small = dataset == "garments" or scale == "cpu"
    name = "imagenet100" if dataset == "imagenet" else dataset
    c = base.extend(__file__, "supcon.py", f"{name},{scale},{recipe}")
    if dataset == "imagenet":
        c.data.source = "tfds:imagenet2012"
        c.data.tfds.image_size = 256  # of an image's middle square, which views are cropped from
    for view in c.views.values():
        view.blur, view.blur_above = 0.5, 32 if recipe == "own" else 0
    c.passes = (base.encode("view1"), base.encode("view2"))  # each view normalised separately
    del c.terms.supcon
    c.memory.probe.views = ("view1",)
    c.model.head_norm, c.model.head_out_norm = "batch", "plain"
    c.model.head_hidden_layers = 2
    c.eval.final = ("knn", "linear", "raw_pixels", "classifier", "collapse", "calibration")
    if small:
        c.model.head_features = c.model.head_hidden = 256
        c.optimizer = base.options(
            base.OptimizerOptions, kind="sgd", lr=0.2, weight_decay=1e-4, schedule="cosine", warmup="10%"
        )
        c.duration = "8 epochs, at least 200 steps"
    elif recipe == "resnet18":
        _resnet18(c)
    else:
        _paper(c, dataset)
    if labels == "unlabelled":
        base.without_labels(c)
    return c


def _resnet18(c):
    """solo-learn's SimSiam: weaker views, a projector of three layers, SGD."""
    c.model.head_features = c.model.head_hidden = 2048
    c.model.zero_init_residual = True
    c.memory.probe.views = ("view1", "view2")
    for view in c.views.values():
        view.jitter = (0.4, 0.4, 0.4, 0.1)
    c.optimizer.lr, c.optimizer.weight_decay = 0.5, 1e-5


def _paper(c, dataset):
    """The authors' hyper-parameters: SGD, lr in proportion to the batch size, decay on every parameter, one cosine."""
    c.model.head_features = c.model.head_hidden = 2048
    c.model.zero_init_residual = True
    if dataset in ("cifar10", "cifar100"):
        c.duration, c.batch_size = "800 epochs", 512
        c.model.depth = 18
        c.model.head_hidden_layers = 1
        lr, decay = 0.03 * 512 / 256, 5e-4
    else:
        c.duration, c.batch_size = "100 epochs" if dataset == "imagenet" else "200 epochs", 256
        c.model.depth, c.model.stem = 50, "imagenet"
        lr, decay = 0.05, 1e-4
    # The schedule "released" is the cosine that changes by epoch and ends at 0.
    sgd = dict(kind="sgd", momentum=0.9, schedule="released")
    c.optimizer = base.options(base.OptimizerOptions, lr=lr, weight_decay=decay, **sgd)
    c.memory.probe.optimizer = base.options(base.OptimizerOptions, lr=0.1, weight_decay=0.0, **sgd)
