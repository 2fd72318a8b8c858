"""MoCo-v2: a query identifies its key among a queue of keys from a moving-average encoder; no labels.

    python -m jaxcl.main --config=configs/moco.py

Presets follow the file name after a colon: one word for each of these axes, joined by commas. The first word of an
axis is its default.

    data set    garments, cifar10, cifar100, tiny_imagenet, stl10, imagenet100, imagenet
    scale       paper: the authors' settings; cpu: the small network and the short run of the embedded set. The embedded
                set has only the latter.
    setting     at paper scale. published: batches of 128, a queue of 16,384, moving average 0.999; ifm: 512, 65,536,
                0.99
    recipe      own: the settings below; resnet18: of cifar10 and cifar100, MoCo-v2+ on the ResNet-18 that papers
                compare by, as in supcon.py: queries of both views, each with a queue of its own, and a moving average
                from 0.99 to 0.999
    labels      labelled: a classifier is trained beside the encoder and does not change it; unlabelled: no classifier

    configs/moco.py                            garments, 1 minute on one core: linear 41.0 % (seed 0, held-out images)
    configs/moco.py:cifar10                    32 pixels; not yet run
    configs/moco.py:cifar100                   as cifar10; not yet run
    configs/moco.py:cifar10,resnet18           1,000 epochs; published linear accuracy 92.9 %; not run here: needs a GPU
    configs/moco.py:cifar100,resnet18          1,000 epochs; published linear accuracy 69.9 %; not run here: needs a GPU
    configs/moco.py:tiny_imagenet              64 pixels; not yet run
    configs/moco.py:stl10                      96 pixels; not yet run
    configs/moco.py:imagenet100                ResNet-50, 200 epochs, as in Ge et al. 2021; not yet run
    configs/moco.py:imagenet100,ifm            likewise; not yet run
    configs/moco.py:imagenet                   batches of 4,096 in bfloat16, LARS; for a pod; not yet run

Batch norms normalise queries and keys in four groups, and keys are assigned to the groups at random (shuffle-BN). This
does not depend on the number of devices: --config.passes[0].bn_groups and --config.passes[1].bn_groups. To read a data
set that is not embedded from somewhere else: --config.data.source=cifar:PATH, npz:PATH, folder:PATH or tfds:NAME.

Source: Chen et al. 2020, arXiv 2003.04297; settings of its use by Ge et al. 2021, arXiv 2110.14189. No paper runs
MoCo-v2 at 4,096 images. :imagenet keeps MoCo-v2's queue, head and temperature; the rest is what MoCo-v3 uses at that
size (Chen et al. 2021, arXiv 2104.02057; its repository's CONFIG.md, ResNet-50 in 100 epochs): LARS at 0.6 for 256
images, weight decay 1e-6, ten epochs of warm-up, a moving average from 0.99 to 1, one batch norm over all devices, and
residual blocks whose last norm starts at 0. What differs on imagenet and imagenet100: crops are taken from the middle
square of an image, at 256 pixels, instead of the whole image.
"""

from jaxcl import config as base

DATASETS = ("garments", "cifar10", "cifar100", "tiny_imagenet", "stl10", "imagenet100", "imagenet")
SCALES = ("paper", "cpu")
RECIPES = ("own", "resnet18")
SETTINGS = ("published", "ifm")
LABELS = ("labelled", "unlabelled")
GROUPS = 4  # the paper's number of devices is not known


@base.with_finetune
def get_config(preset: str = ""):
    """The config of a preset such as "imagenet100,ifm"."""
    dataset, scale, setting, recipe, labels = base.choose(preset, DATASETS, SCALES, SETTINGS, RECIPES, LABELS)
    small = dataset == "garments" or scale == "cpu"
    c = base.extend(__file__, "supcon.py", f"{dataset},{scale},{recipe}")
    usual = ("", "paper", "published", "own", "labelled")
    c.name = base.title("moco", (dataset, scale, setting, recipe, labels), usual)

    c.passes = (
        base.encode("view1", bn_groups=GROUPS),
        base.encode("view2", encoder="target", bn_groups=GROUPS, shuffle=True),
    )
    del c.terms.supcon
    c.terms.moco = base.term("moco", query="view1", key="target/view2", temperature=0.2)
    # A short run has few updates, so the average must follow faster.
    c.memory.target = base.memory("ema", decay=0.99 if small or setting == "ifm" else 0.999)
    c.memory.queue = base.memory("queue", length=4096 if small else 16384 if setting == "published" else 65536)
    c.memory.probe.views = ("view1",)  # the queries; the keys come from the target encoder
    if small:
        c.optimizer.lr = 3e-3  # the best of 1, 3 and 6e-3 on held-out training images of seed 0, 4 epochs
    elif recipe == "resnet18":
        _resnet18(c)
    else:
        _paper(c, setting)
    if dataset == "imagenet" and scale == "paper":
        _imagenet(c)
    if labels == "unlabelled":
        base.without_labels(c)
    return c


def _paper(c, setting):
    """The authors' hyper-parameters: SGD, decay 1e-4 on every parameter, one cosine by epoch, no warm-up."""
    c.duration = "200 epochs"
    c.batch_size = 128 if setting == "published" else 512
    c.model = base.model("resnet", depth=50, stem=c.model.stem)
    c.model.head_hidden_layers = 1  # as wide as the encoder's features
    c.model.head_features = 128
    for view in c.views.values():
        view.blur = 0.5 if c.size > 64 else 0.0  # blur would remove most of a 32-pixel image
        view.blur_sigma = (0.1, 2.0 if c.size == 224 else 1.0)
    # The schedule "released" is the cosine that changes by epoch and ends at 0.
    sgd = dict(kind="sgd", momentum=0.9, schedule="released")
    c.optimizer = base.options(
        base.OptimizerOptions, lr=0.03 if setting == "published" else 0.8, weight_decay=1e-4, **sgd
    )
    c.memory.probe.optimizer = base.options(base.OptimizerOptions, lr=0.1, weight_decay=0.0, **sgd)
    # The linear protocol of Ge et al., lr 10 in batches of 128 for 60 epochs.
    c.eval.final += ("linear_sgd",)
    c.eval.sgd_protocol = "nonsemantic"


def _resnet18(c):
    """solo-learn's MoCo-v2+: both directions, weaker views, SGD; one device, so that no group is shuffled."""
    c.passes = tuple(base.encode(v, encoder=e) for e in ("", "target") for v in ("view1", "view2"))
    c.terms.moco.weight = 0.5
    c.terms.moco2 = base.term(
        "moco", query="view2", key="target/view1", queue="queue1", temperature=c.terms.moco.temperature, weight=0.5
    )
    c.memory.queue = base.memory("queue", of="target/view2", length=32768)
    c.memory.queue1 = base.memory("queue", of="target/view1", length=32768)
    c.memory.target = base.memory("ema", decay=0.99, decay_schedule="cosine", decay_end=0.999, order="after")
    c.memory.probe.views = ("view1", "view2")
    for view in c.views.values():
        view.jitter = (0.4, 0.4, 0.4, 0.1)
    c.optimizer.lr, c.optimizer.weight_decay = 0.3, 1e-4
    c.memory.probe.optimizer.lr = 0.3


def _imagenet(c):
    """4,096 images a batch: MoCo-v3's settings, except for MoCo-v2's queue, head and temperature."""
    c.duration = "100 epochs"
    c.batch_size = 4096
    c.model.dtype = "bfloat16"
    c.model.zero_init_residual = True
    c.passes = (base.encode("view1"), base.encode("view2", encoder="target"))  # no shuffling
    c.memory.target = base.memory("ema", decay=0.99, decay_schedule="cosine")
    c.memory.queue.length = 65536
    c.eval.sgd_protocol = "moco"
    for view in (c.views.view1, c.views.view2):
        view.crop_area = (0.2, 1.0)
        view.jitter = (0.4, 0.4, 0.4, 0.1)
    lars = dict(kind="lars", schedule="cosine", warmup="10 epochs")
    c.optimizer = base.options(base.OptimizerOptions, lr=0.6 * 4096 / 256, weight_decay=1e-6, **lars)
