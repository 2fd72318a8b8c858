"""SupCon: each image attracts the images of its class, in two random views.

    python -m jaxcl.main --config=configs/supcon.py

Presets follow the file name after a colon: one word for each of these axes, joined by commas. The first word of an
axis is its default.

    data set    garments, fashion_mnist, cifar10, cifar100, tiny_imagenet, stl10, imagenet100, imagenet
    schedule    of the classifier: online, alternating, sequential
    scale       paper: the authors' network and budget; cpu: the small network and the short run of the embedded sets.
                The embedded sets (garments, fashion_mnist) have only the latter.
    recipe      own: the method's own settings; resnet18: of cifar10 and cifar100, the ResNet-18 that papers compare by
    start       finetune, a word of every config: train on from weights, --config.model.weights=FILE, see
                docs/finetune.md

    configs/supcon.py                          garments on a CPU: 3 minutes, linear probe 64.2 %
    configs/supcon.py:cifar10,cpu              CIFAR-10 on a CPU; 8 epochs on one core: 8 minutes, linear probe 62.8 %
    configs/supcon.py:cifar10                  CIFAR-10, the SupCon repository's hyper-parameters; not yet run
    configs/supcon.py:cifar100,alternating     the baseline of the ExCon paper; not yet run
    configs/supcon.py:cifar100,sequential      the original SupCon, the classifier is trained afterwards; not yet run
    configs/supcon.py:cifar10,sequential       likewise, with the SupCon repository's classifier; not yet run
    configs/supcon.py:tiny_imagenet            not yet run
    configs/supcon.py:stl10, :imagenet100      no paper's settings; other configs start from these; not yet run
    configs/supcon.py:imagenet                 batches of 4,096 in bfloat16, LARS; for a pod; not yet run
    configs/supcon.py:cifar10,resnet18         1,000 epochs; published linear accuracy 93.8 %; not run here: needs a GPU
    configs/supcon.py:cifar100,resnet18        1,000 epochs; published linear accuracy 70.4 %; not run here: needs a GPU

To read a data set that is not embedded from somewhere else: --config.data.source=cifar:PATH, npz:PATH or tfds:NAME.

Source: Khosla et al. 2020, arXiv 2004.11362; settings of the papers as in the released ExCon code. ImageNet's settings
are from the authors' own script for ResNet-50 (google-research/supcon, supcon_imagenet_resnet50.sh: LARS at 0.4 for 256
images, weight decay 1e-3, 12 epochs of warm-up, 350 epochs, temperature 0.1): the loss is multiplied by the
temperature, the head is one dense layer on features of unit length, nothing is blurred, and the last norm of a block
starts at 0. What differs: batches of 4,096 instead of 6,144; SimCLR's colour jitter instead of AutoAugment, which jaxcl
does not have; the head has a bias, and biases and norms are not decayed; the classifier learns beside the encoder by
SGD on the features themselves (theirs afterwards, by RMSProp, at unit length); and crops are taken from the middle
square of an image, at 256 pixels, instead of the whole image.

The recipe resnet18 is solo-learn's (da Costa et al. 2022, arXiv 2108.01775): batches of 256 for 1,000 epochs, a stem
that pads by 2, bicubic crops, the data's own moments, a warm-up of ten epochs from 3e-5 and one cosine to 0; what it
adds for each method is in that method's file. A classifier learns beside the encoder, on both views. Two things differ:
their SupCon has the positives' sum inside the logarithm (L_in), here it is L_out; and they train in half precision.
"""

from jaxcl import config as base
from jaxcl.errors import UserError

DATASETS = ("garments", "fashion_mnist", "cifar10", "cifar100", "tiny_imagenet", "stl10", "imagenet100", "imagenet")
SCHEDULES = ("online", "alternating", "sequential")
SCALES = ("paper", "cpu")
RECIPES = ("own", "resnet18")
SOURCES = {
    "cifar10": "tfds:cifar10",
    "cifar100": "tfds:cifar100",
    "tiny_imagenet": "npz:tiny_imagenet.npz",
    "stl10": "tfds:stl10",
    "imagenet100": "folder:imagenet100",
    "imagenet": "tfds:imagenet2012",
}
SIDES = {
    "tiny_imagenet": 64,
    "stl10": 96,
    "imagenet100": 224,
    "imagenet": 224,
}  # side of the views in pixels; views of other data sets are as large as the images
# Mean and standard deviation by which the released code normalises; those of CIFAR's sources are the code's already.
NORMALISED_BY = {
    "tiny_imagenet": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    "imagenet100": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
# Mean and standard deviation over all pixels, by which the recipe resnet18 normalises.
MOMENTS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


@base.with_finetune
def get_config(preset: str = ""):
    """The config of a preset such as "cifar100,alternating"."""
    dataset, schedule, scale, recipe = base.choose(preset, DATASETS, SCHEDULES, SCALES, RECIPES)
    if recipe == "resnet18" and (dataset not in MOMENTS or scale == "cpu" or schedule != "online"):
        raise UserError(
            f"preset {preset!r}: resnet18 is a recipe of {' and '.join(MOMENTS)} at the authors' scale, with a "
            "classifier that is trained online; name one of these data sets, and leave out the other words"
        )
    c = base.default()
    c.name = base.title("supcon", (dataset, schedule, scale, recipe), ("garments", "online", "paper", "own"))

    c.views.view1 = base.view("random", crop_area=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), grayscale=0.2)
    c.views.view2 = base.view("random", crop_area=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), grayscale=0.2)
    c.passes = (base.encode("view1", "view2"),)
    c.terms.supcon = base.term("supcon", views=("view1", "view2"), temperature=0.1)
    c.memory.probe = base.memory("linear_probe", views=("view2",))

    c.collapse_every = "10%"
    c.data.source = SOURCES.get(dataset, dataset)
    c.size = SIDES.get(dataset, 0)
    if dataset == "imagenet100":
        # Size of the decoded photos, of their middle squares; views of 224 are cropped from them.
        c.data.files.image_size, c.data.files.fit = 256, "crop"
    c.data.tfds.image_size = 256 if dataset == "imagenet" else 0
    if dataset in SOURCES and scale == "paper":
        _paper(c, dataset)
        if dataset == "imagenet":
            _imagenet(c)
    else:
        _cpu(c)
    if recipe == "resnet18":
        _resnet18(c, dataset)
    if schedule != "online":
        # The view "classifier" is crop and flip without colour jitter. On Tiny ImageNet the released code trains the
        # classifier on images without augmentation.
        c.views.classifier = base.view("standard" if dataset == "tiny_imagenet" else "classifier")
        c.memory.probe.schedule = schedule
    if (dataset, schedule, scale) == ("cifar10", "sequential", "paper"):
        _own_classifier(c)
    return c


def _cpu(c):
    """A run of minutes on two cores: most of this encoder is matrix products, which XLA computes fast on a CPU."""
    c.duration = "4 epochs, at least 200 steps"  # a small set of your own has few steps in an epoch
    c.batch_size = 128

    c.model.depth = 50  # bottleneck blocks
    c.model.stem = "patch4"  # 32 -> 8 pixels in one matrix product
    c.model.stage_sizes = (2, 2)
    c.model.stage_widths = (32, 64)  # 128 and 256 output channels
    c.model.strides = (1, 2)
    c.eval.tap = "stage1"  # 8 x 8

    c.terms.supcon.temperature = 0.2
    c.optimizer.kind = "adamw"
    c.optimizer.lr = 6e-3
    c.optimizer.weight_decay = 1e-4
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup = "10%"
    c.memory.probe.optimizer = base.options(base.OptimizerOptions, kind="adamw", lr=1e-2, schedule="cosine")


def _paper(c, dataset):
    """The authors' hyper-parameters, from the papers' tables (SGD, lr 0.5, cosine by epoch to lr/1000)."""
    c.duration = "200 epochs"
    c.batch_size = 128 if dataset == "tiny_imagenet" else 256
    if dataset == "cifar10":  # the SupCon repository's settings; the ExCon paper has no run on CIFAR-10
        c.duration = "1000 epochs"
        c.batch_size = 1024
        c.optimizer.warmup = "10 epochs"
        c.optimizer.warmup_from = 0.01
    c.model.depth = 50
    c.model.stem = "imagenet" if SIDES.get(dataset, 0) > 64 else "cifar"
    # The authors explain stage 2 on CIFAR, where stage 4 has only 4 x 4 pixels, and stage 4 at 64 pixels.
    c.eval.tap = "stage4" if dataset in SIDES else "stage2"
    if dataset in NORMALISED_BY:
        c.data.mean, c.data.std = NORMALISED_BY[dataset]
    c.terms.supcon.temperature = 0.1
    c.terms.supcon.base_temperature = 0.07  # scales the loss by 1.43, as the released code does
    c.optimizer.kind = "sgd"
    c.optimizer.lr = 0.5
    c.optimizer.momentum = 0.9
    c.optimizer.weight_decay = 1e-4
    c.optimizer.schedule = "epoch_cosine"
    c.memory.probe.optimizer = base.options(
        base.OptimizerOptions, kind="sgd", lr=0.5, momentum=0.9, weight_decay=1e-4, schedule="epoch_cosine"
    )
    c.log_every = "50 steps"
    c.eval.every = "10 epochs"
    c.checkpoint.every = "5 epochs"


def _own_classifier(c):
    """The SupCon repository's classifier: batches of 512, lr 5 for 100 epochs, a fifth after 60, 75 and 90."""
    c.memory.probe.duration, c.memory.probe.batch_size = "100 epochs", 512
    steps = dict(schedule="epoch_steps", decay_rate=0.2, decay_epochs=(60, 75, 90))
    c.memory.probe.optimizer = base.options(
        base.OptimizerOptions, kind="sgd", lr=5.0, momentum=0.9, weight_decay=0.0, **steps
    )


def _resnet18(c, dataset):
    """solo-learn's settings on CIFAR that all methods share, and those of its SupCon."""
    c.duration, c.batch_size = "1000 epochs", 256
    c.data.mean, c.data.std = MOMENTS[dataset]
    c.model.depth, c.model.stem_padding = 18, 2
    c.model.head_hidden_layers, c.model.head_hidden, c.model.head_features = 1, 2048, 256
    c.passes = (base.encode("view1"), base.encode("view2"))  # each view normalised separately
    for name in ("view1", "view2"):
        c.views[name] = base.view(
            "random",
            crop_area=(0.08, 1.0),
            interpolation="bicubic",
            jitter=(0.8, 0.8, 0.8, 0.2),
            grayscale=0.2,
            blur=0.5,
            blur_taps=13,  # the whole of the widest blur, three deviations a side
        )
    c.terms.supcon.temperature, c.terms.supcon.base_temperature = 0.2, 0.0
    c.memory.probe.views = ("view1", "view2")
    # The rates are for batches of 256. SGD decays every parameter.
    sgd = dict(kind="sgd", momentum=0.9, schedule="cosine", warmup="10 epochs", warmup_from=3e-5)
    c.optimizer = base.options(base.OptimizerOptions, lr=0.4, weight_decay=1e-5, **sgd)
    c.memory.probe.optimizer = base.options(base.OptimizerOptions, lr=0.1, weight_decay=0.0, **sgd)


def _imagenet(c):
    """The settings of the authors' ImageNet script, with batches of 4,096 images."""
    c.duration = "350 epochs"
    c.batch_size = 4096
    c.model.dtype = "bfloat16"
    c.terms.supcon.base_temperature = 1.0  # the loss is multiplied by the temperature, 0.1
    c.model.head_hidden_layers, c.model.head_unit_input = 0, True
    c.model.zero_init_residual = True
    for view in (c.views.view1, c.views.view2):
        view.crop_area = (0.08, 1.0)
        view.jitter = (0.8, 0.8, 0.8, 0.2)
    lars = dict(kind="lars", momentum=0.9, schedule="cosine")
    c.optimizer = base.options(
        base.OptimizerOptions, lr=0.4 * 4096 / 256, weight_decay=1e-3, warmup="12 epochs", **lars
    )
    c.memory.probe.optimizer = base.options(
        base.OptimizerOptions, kind="sgd", lr=0.1, weight_decay=0.0, schedule="cosine"
    )
    c.eval.quick = ("classifier",)
    c.eval.final = ("knn", "linear", "classifier")
    c.checkpoint.every = "1 epoch"
