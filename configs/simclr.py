"""SimCLR: two random views of an image identify each other among all views of the batch; no labels.

    python -m jaxcl.main --config=configs/simclr.py

Presets follow the file name after a colon: one word for each of these axes, joined by commas. The first word of an
axis is its default.

    data set    garments, fashion_mnist, cifar10, cifar100, tiny_imagenet, stl10, imagenet100, imagenet
    scale       paper: the authors' network and budget; cpu: the small network and the short run of the embedded sets.
                The embedded sets (garments, fashion_mnist) have only the latter.
    recipe      own: the settings below; resnet18: of cifar10 and cifar100, the ResNet-18 that papers compare by, as in
                supcon.py
    labels      labelled: a classifier is trained beside the encoder and does not change it; every training image needs
                a label. unlabelled: no classifier; the evaluation uses the labels that exist.
    start       finetune, a word of every config: train on from weights, --config.model.weights=FILE, see
                docs/finetune.md

    configs/simclr.py                          garments on a CPU: 3 minutes, linear probe 43.2 %
    configs/simclr.py:cifar10,cpu              CIFAR-10 on a CPU; 8 epochs on one core: 8 minutes, linear probe 52.0 %
    configs/simclr.py:cifar10                  CIFAR-10, the baseline of CLAE; not yet run
    configs/simclr.py:cifar100                 not yet run
    configs/simclr.py:tiny_imagenet            not yet run
    configs/simclr.py:stl10, :imagenet100      ResNet-50, SimCLR's own settings in 200 epochs; not yet run
    configs/simclr.py:cifar10,resnet18         1,000 epochs; published linear accuracy 90.7 %; not run here: needs a GPU
    configs/simclr.py:cifar100,resnet18        1,000 epochs; published linear accuracy 65.8 %; not run here: needs a GPU
    configs/simclr.py:imagenet                 SimCLR's own: batches of 4,096, LARS, 100 epochs; bfloat16; not yet run

To train without labels on your own images, of any size, at least 142 of them (a batch is 128, and a tenth is held out
for testing):

    python -m jaxcl.main --config=configs/simclr.py:unlabelled --config.data.source=folder:my_photos

This takes 200 steps at 64 pixels, for any number of images: 2 min 24 s for 1,000 JPEGs on two CPU cores, including the
report, which shows neighbours, a map and near-duplicates. For a longer run or larger images:
--config.duration="50 epochs", --config.data.files.image_size=128.

To read a data set that is not embedded from somewhere else: --config.data.source=cifar:PATH, npz:PATH, tfds:NAME or
folder:PATH. Everything that this file does not set is as in supcon.py.

Source: Chen et al. 2020, arXiv 2002.05709; settings of the baseline in the released code of CLAE (Ho and Vasconcelos
2020, arXiv 2010.12050), which normalises CIFAR to [-1, 1], initialises convolutions with torch's defaults and does not
blur; all but the initialisation is so here too.

stl10, imagenet100 and imagenet have SimCLR's own network: a projection head with batch norms (the last one without
bias), and residual blocks whose last norm starts at 0. LARS has a coefficient of 1e-3 on imagenet as in SimCLR's code;
the other two have fewer updates, in which matrices would hardly move, and so 0.02 and a clip, as in recipes for small
sets. What differs: crops are taken from the middle square of an image, at 256 pixels, instead of the whole image.
"""

from jaxcl import config as base

DATASETS = ("garments", "fashion_mnist", "cifar10", "cifar100", "tiny_imagenet", "stl10", "imagenet100", "imagenet")
SCALES = ("paper", "cpu")
RECIPES = ("own", "resnet18")
LABELS = ("labelled", "unlabelled")
AT_SCALE = ("cifar10", "cifar100", "tiny_imagenet")  # as in the baseline of CLAE
STANDARD = ("stl10", "imagenet100", "imagenet")  # as in SimCLR; the other data sets have only the cpu scale


@base.with_finetune
def get_config(preset: str = ""):
    """The config of a preset such as "cifar100,cpu"."""
    dataset, scale, recipe, labels = base.choose(preset, DATASETS, SCALES, RECIPES, LABELS)
    c = base.extend(__file__, "supcon.py", f"{dataset},{scale},{recipe}")
    c.name = base.title("simclr", (dataset, scale, recipe, labels), ("garments", "paper", "own", "labelled"))

    for view in c.views.values():
        view.crop_area, view.jitter = (0.08, 1.0), (0.8, 0.8, 0.8, 0.2)
    c.passes = (base.encode("view1"), base.encode("view2"))  # each view normalised separately
    del c.terms.supcon
    c.terms.nt_xent = base.term("nt_xent", views=("view1", "view2"), temperature=0.5)
    if recipe == "resnet18":
        _resnet18(c)
    elif dataset in AT_SCALE and scale == "paper":
        _paper(c, dataset)
    if dataset in STANDARD and scale == "paper":
        _standard(c)
    if dataset == "imagenet" and scale == "paper":
        _imagenet(c)
    if labels == "unlabelled":
        base.without_labels(c)
        if c.data.source in ("garments", "fashion_mnist"):  # also if --config.data.source replaces them
            c.duration = "200 steps"
    return c


def _paper(c, dataset):
    """The authors' hyper-parameters (Adam, constant 3e-4)."""
    c.duration = "100 epochs"
    c.batch_size = 256
    c.model.depth = 18
    c.model.head_hidden_layers = 1
    c.model.head_features = 64
    c.data.mean, c.data.std = (0.5,) * 3, (0.5,) * 3
    if dataset == "tiny_imagenet":
        c.data.mean, c.data.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        c.size = 224  # the images have 64 pixels and are enlarged
        c.batch_size = 128
        c.model.stem = "imagenet"
    c.optimizer = base.options(base.OptimizerOptions, kind="adam", lr=3e-4, weight_decay=0.0, schedule="constant")
    c.memory.probe.optimizer = base.options(
        base.OptimizerOptions, kind="adam", lr=3e-4, weight_decay=0.0, schedule="constant"
    )
    c.eval.final += ("logistic",)  # the authors' protocol; "linear" fits the same model to its optimum
    c.eval.knn_temperature = 0.5
    c.eval.knn_features = "z"  # linear evaluation uses h


def _resnet18(c):
    """solo-learn's SimCLR: LARS that clips, with norms and biases left out; the rest is as in supcon.py."""
    c.terms.nt_xent.temperature = 0.2
    for optimizer in (c.optimizer, c.memory.probe.optimizer):
        optimizer.kind, optimizer.trust_coefficient, optimizer.clip_trust = "lars", 0.02, True
    c.optimizer.lr, c.optimizer.weight_decay = 0.4, 1e-4


def _standard(c):
    """SimCLR's own settings: LARS, lr in proportion to the batch size, ten epochs of warm-up, one cosine, blur."""
    c.duration = "200 epochs"
    c.batch_size = 512
    c.model.depth = 50
    c.model.head_hidden_layers = 1  # as wide as the encoder's features
    c.model.head_features = 128
    c.model.head_norm, c.model.head_out_norm, c.model.head_unit_input = "batch", "scale", False
    c.model.zero_init_residual = True
    c.terms.nt_xent.temperature = 0.1
    for view in (c.views.view1, c.views.view2):
        view.blur = 0.5
        view.blur_sigma = (0.1, 2.0 if c.size == 224 else 1.0)
    lars = dict(kind="lars", trust_coefficient=0.02, clip_trust=True, schedule="cosine", warmup="10 epochs")
    c.optimizer = base.options(base.OptimizerOptions, lr=0.3 * 512 / 256, weight_decay=1e-6, **lars)
    c.memory.probe.optimizer = base.options(
        base.OptimizerOptions, kind="sgd", lr=0.1, weight_decay=0.0, schedule="cosine"
    )


def _imagenet(c):
    """Section 2 and the appendix of the paper: 4,096 images, both views normalised together."""
    c.duration = "100 epochs"
    c.batch_size = 4096
    c.optimizer.lr = 0.3 * 4096 / 256
    c.optimizer.trust_coefficient, c.optimizer.clip_trust = 1e-3, False
    c.passes = (base.encode("view1", "view2"),)
    c.eval.final = ("knn", "linear", "classifier")
