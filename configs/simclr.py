"""SimCLR: two random views of an image find each other among all views of the batch; no labels.

    python -m jaxcl.main --config=configs/simclr.py

Presets, one word an axis, joined by commas: a data set (garments, fashion_mnist, cifar10, cifar100, tiny_imagenet,
stl10, imagenet100, imagenet), a scale (paper: the authors' network and budget; cpu: the small network and minutes of
the embedded sets, which have no other), and what labels are for: labelled (a classifier is trained beside the encoder,
which it does not change, and needs a label on every training image) or unlabelled (no classifier; the evaluation uses
what labels there are).

    configs/simclr.py                          garments on a CPU: 3 minutes, linear probe 43.2 %
    configs/simclr.py:cifar10,cpu              CIFAR-10 on a CPU; 8 epochs on one core: 8 minutes, linear probe 52.0 %
    configs/simclr.py:cifar10                  CIFAR-10, the baseline of CLAE; not yet run
    configs/simclr.py:cifar100                 not yet run
    configs/simclr.py:tiny_imagenet            not yet run
    configs/simclr.py:stl10, :imagenet100      ResNet-50, SimCLR's own settings in 200 epochs; not yet run
    configs/simclr.py:imagenet                 SimCLR's own: batches of 4,096, LARS, 100 epochs; bfloat16; not yet run

Without labels, on your own images, at least 142 of them (a batch is 128, and a tenth is the test part), of any size:

    python -m jaxcl.main --config=configs/simclr.py:unlabelled --config.data.source=folder:my_photos

200 steps of 64 pixels, however many images there are: 2 min 24 s for 1,000 JPEGs on two cores of a CPU, the report
included, which shows neighbours, a map and near-duplicates. More of either is better: --config.duration="50 epochs",
--config.data.files.image_size=128.

Data of a preset other than the embedded ones: --config.data.source=cifar:PATH, npz:PATH, tfds:NAME or
folder:PATH. Everything not said here is as in supcon.py.

Source: Chen et al. 2020, arXiv 2002.05709; settings of the baseline in the released code of CLAE (Ho and Vasconcelos
2020, arXiv 2010.12050), which normalises CIFAR to [-1, 1], draws convolutions from torch's defaults and has no blur.
"""

from jaxcl import config as base

DATASETS = ("garments", "fashion_mnist", "cifar10", "cifar100", "tiny_imagenet", "stl10", "imagenet100", "imagenet")
SCALES = ("paper", "cpu")
LABELS = ("labelled", "unlabelled")
AT_SCALE = ("cifar10", "cifar100", "tiny_imagenet")  # as the baseline of CLAE
STANDARD = ("stl10", "imagenet100", "imagenet")  # as SimCLR itself; the others have the CPU's scale only


def get_config(preset: str = ""):
    """The config of a preset such as "cifar100,cpu"."""
    dataset, scale, labels = base.choose(preset, DATASETS, SCALES, LABELS)
    c = base.extend(__file__, "supcon.py", f"{dataset},{scale}")
    c.name = base.title("simclr", (dataset, scale, labels), ("garments", "paper", "labelled"))

    for name in ("view1", "view2"):
        c.views[name] = base.view("random", crop_area=(0.08, 1.0), jitter=(0.8, 0.8, 0.8, 0.2), grayscale=0.2)
    c.passes = (base.encode("view1"), base.encode("view2"))  # each normalised by itself
    del c.terms.supcon
    c.terms.nt_xent = base.term("nt_xent", views=("view1", "view2"), temperature=0.5)
    c.eval.final = ("knn", "linear", "raw_pixels", "classifier", "linear_fgsm", "linear_pgd", "calibration")
    c.eval.pgd = (4,)  # each strength costs as much as a third of the training
    if dataset in AT_SCALE and scale == "paper":
        _paper(c, dataset)
    if dataset in STANDARD and scale == "paper":
        _standard(c)
    if dataset == "imagenet" and scale == "paper":
        _imagenet(c)
    if labels == "unlabelled":
        base.without_labels(c)
        if c.data.source in ("garments", "fashion_mnist"):  # or what the user puts in their place
            c.duration = "200 steps"
    return c


def _paper(c, dataset):
    """The authors' hyper-parameters (Adam, 3e-4 throughout)."""
    c.duration = "100 epochs"
    c.batch_size = 256
    c.model.depth = 18
    c.model.head_hidden_layers = 1
    c.model.head_features = 64
    if dataset == "tiny_imagenet":
        c.size = 224  # 64 pixels, enlarged
        c.batch_size = 128
        c.model.stem = "imagenet"
    c.optimizer = base.options(base.OptimizerOptions, kind="adam", lr=3e-4, weight_decay=0.0, schedule="constant")
    c.memory.probe.optimizer = base.options(
        base.OptimizerOptions, kind="adam", lr=3e-4, weight_decay=0.0, schedule="constant"
    )
    c.eval.final += ("logistic",)  # the authors' protocol; linear is the same model at its optimum
    c.eval.knn_temperature = 0.5
    c.eval.knn_features = "z"  # its linear evaluation reads h


def _standard(c):
    """SimCLR's own: LARS, a learning rate in proportion to the batch, ten epochs of warm-up, one cosine, blur."""
    c.duration = "200 epochs"
    c.batch_size = 512
    c.model.depth = 50
    c.model.head_hidden_layers = 1  # as wide as the features
    c.model.head_features = 128
    c.terms.nt_xent.temperature = 0.1
    for view in (c.views.view1, c.views.view2):
        view.blur = 0.5
        view.blur_sigma = (0.1, 2.0 if c.size == 224 else 1.0)
    c.optimizer = base.options(
        base.OptimizerOptions, kind="lars", lr=0.3 * 512 / 256, weight_decay=1e-6, schedule="cosine", warmup="10 epochs"
    )
    c.memory.probe.optimizer = base.options(
        base.OptimizerOptions, kind="sgd", lr=0.1, weight_decay=0.0, schedule="cosine"
    )


def _imagenet(c):
    """Section 2 of the paper and its appendix: 4,096 images, both views in one batch of the batch norm."""
    c.duration = "100 epochs"
    c.batch_size = 4096
    c.optimizer.lr = 0.3 * 4096 / 256
    c.passes = (base.encode("view1", "view2"),)
    c.eval.final = ("knn", "linear", "classifier")
