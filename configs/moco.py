"""MoCo-v2: a query finds its key among a queue of keys that a moving average of the encoder made; no labels.

    python -m jaxcl.main --config=configs/moco.py

Presets, one word an axis, joined by commas: a data set (garments, cifar10, tiny_imagenet, stl10, imagenet100,
imagenet), a scale (paper, or cpu for the small network and minutes of the embedded set, which has no other), a setting
at paper scale: published (batches of 128, a queue of 16,384, moving average 0.999) or ifm (512, 65,536, 0.99), and what
labels are for: labelled (a classifier is trained beside the encoder, which it does not change) or unlabelled.

    configs/moco.py                            garments, 1 minute on one core: linear 41.0 % (seed 0, held-out images)
    configs/moco.py:cifar10                    32 pixels; not yet run
    configs/moco.py:tiny_imagenet              64 pixels; not yet run
    configs/moco.py:stl10                      96 pixels; not yet run
    configs/moco.py:imagenet100                ResNet-50, 200 epochs, as in Ge et al. 2021; not yet run
    configs/moco.py:imagenet100,ifm            likewise; not yet run
    configs/moco.py:imagenet                   batches of 4,096 in bfloat16, LARS; for a pod; not yet run

Keys are encoded in four groups with batch norms of their own, to which the batch is dealt at random, whatever the
number of devices (shuffle-BN): --config.passes[0].bn_groups and passes[1].bn_groups. Data of a preset other than the
embedded one: --config.data.source=cifar:PATH, npz:PATH, folder:PATH or tfds:NAME.

Source: Chen et al. 2020, arXiv 2003.04297; settings of its use by Ge et al. 2021, arXiv 2110.14189. No paper runs
MoCo-v2 at 4,096 images; :imagenet has its queue, head and temperature, and for the rest what MoCo-v3 (Chen et al. 2021,
arXiv 2104.02057; its repository's CONFIG.md, ResNet-50 in 100 epochs) trains with at that size: LARS at 0.6 for 256
images, weight decay 1e-6, ten epochs of warm-up, a moving average from 0.99 to 1, and one batch norm over all devices.
"""

from jaxcl import config as base

DATASETS = ("garments", "cifar10", "tiny_imagenet", "stl10", "imagenet100", "imagenet")
SCALES = ("paper", "cpu")
SETTINGS = ("published", "ifm")
LABELS = ("labelled", "unlabelled")
GROUPS = 4  # the paper's number of devices is not known


def get_config(preset: str = ""):
    """The config of a preset such as "imagenet100,ifm"."""
    dataset, scale, setting, labels = base.choose(preset, DATASETS, SCALES, SETTINGS, LABELS)
    small = dataset == "garments" or scale == "cpu"
    c = base.extend(__file__, "supcon.py", f"{dataset},{scale}")
    c.name = base.title("moco", (dataset, scale, setting, labels), ("", "paper", "published", "labelled"))

    c.passes = (
        base.encode("view1", bn_groups=GROUPS),
        base.encode("view2", encoder="target", bn_groups=GROUPS, shuffle=True),
    )
    del c.terms.supcon
    c.terms.moco = base.term("moco", query="view1", key="target/view2", temperature=0.2)
    # A short run has few updates for the average to follow: it forgets faster.
    c.memory.target = base.memory("ema", decay=0.99 if small or setting == "ifm" else 0.999)
    c.memory.queue = base.memory("queue", length=4096 if small else 16384 if setting == "published" else 65536)
    c.memory.probe.views = ("view1",)  # the queries: the others are the target's
    if small:
        c.optimizer.lr = 3e-3  # the best of 1, 3 and 6e-3 on held-out training images of seed 0, 4 epochs
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
    c.model.head_hidden_layers = 1  # as wide as the features
    c.model.head_features = 128
    for view in c.views.values():
        view.blur = 0.5 if c.size > 64 else 0.0  # at 32 pixels it would leave little
        view.blur_sigma = (0.1, 2.0 if c.size == 224 else 1.0)
    # "released" is the cosine by epoch that ends at 0.
    sgd = dict(kind="sgd", momentum=0.9, schedule="released")
    c.optimizer = base.options(
        base.OptimizerOptions, lr=0.03 if setting == "published" else 0.8, weight_decay=1e-4, **sgd
    )
    c.memory.probe.optimizer = base.options(base.OptimizerOptions, lr=0.1, weight_decay=0.0, **sgd)


def _imagenet(c):
    """MoCo-v3's settings at 4,096 images, where they are not MoCo-v2's own."""
    c.duration = "100 epochs"
    c.batch_size = 4096
    c.model.dtype = "bfloat16"
    c.passes = (base.encode("view1"), base.encode("view2", encoder="target"))  # no images change places
    c.memory.target = base.memory("ema", decay=0.99, decay_schedule="cosine")
    c.memory.queue.length = 65536
    for view in (c.views.view1, c.views.view2):
        view.crop_area = (0.2, 1.0)
        view.jitter = (0.4, 0.4, 0.4, 0.1)
    lars = dict(kind="lars", schedule="cosine", warmup="10 epochs")
    c.optimizer = base.options(base.OptimizerOptions, lr=0.6 * 4096 / 256, weight_decay=1e-6, **lars)
