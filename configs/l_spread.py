"""L_spread: supervised contrast that does not collapse, on coarse labels, tested on the fine ones it never saw.

    python -m jaxcl.main --config=configs/l_spread.py

Presets, one word an axis, joined by commas. What is learned beside a cross-entropy on the coarse labels: l_spread
(attract and class-conditional InfoNCE, the default), supcon (attract alone), clamped (attract as the released code's
options have it: a positive's logit counts 1 at most, and classes do not collapse), supcon_infonce (attract and
InfoNCE), infonce, autoencoder (the reconstruction of each view) or ce (nothing). A data set: garments (10 classes in 4
groups), cifar10 (2 groups), cifar100 (20), cifar100u (20, unbalanced), mnist (2), tiny_imagenet (67). A scale: paper,
or cpu for the small network and minutes of the embedded set, which has no other. At paper scale a network (vit, resnet)
and a schedule: cosine over the whole run, or released, the authors' cosine of 100 epochs that rises again.

    configs/l_spread.py                        garments on a CPU: 4 minutes, fine classes 69.5 % (kNN 64.7)
    configs/l_spread.py:supcon                 69.1 % (62.0)
    configs/l_spread.py:autoencoder            6 minutes, 70.2 % (64.3)
    configs/l_spread.py:clamped                likewise infonce, supcon_infonce, ce; not yet run at these settings
    configs/l_spread.py:cifar10,cpu            the small network; in two epochs: docs/results.md
    configs/l_spread.py:cifar10                a ViT on CIFAR-10 in two classes, 600 epochs; not yet run
    configs/l_spread.py:cifar10,released       with the authors' schedule; not yet run
    configs/l_spread.py:cifar10,resnet         an ImageNet-stem ResNet-18, 200 epochs; not yet run
    configs/l_spread.py:cifar100u              likewise cifar100, mnist, tiny_imagenet; not yet run

Data of a preset other than the embedded one: --config.data.source=cifar:PATH, npz:PATH or tfds:NAME. The degree of
spread is --config.terms.contrast.a_spread against a_lc. Two such runs are joined at evaluation by
`python -m jaxcl evaluate --workdir=RUN --workdir=RUN`; thanos.py trains both encoders in one update.

Source: Chen et al. 2022, arXiv 2204.07596, and "The Details Matter"; settings of the released code, but for the clamp
and the norms of its loss (`losses.attract` says how they differ) and, by default, its schedule.
"""

from jaxcl import config as base

METHODS = ("l_spread", "supcon", "clamped", "supcon_infonce", "infonce", "autoencoder", "ce")
DATASETS = ("garments", "cifar10", "cifar100", "cifar100u", "mnist", "tiny_imagenet")
SCALES = ("paper", "cpu")
NETWORKS = ("vit", "resnet")
SCHEDULES = ("cosine", "released")

SOURCES = {"mnist": "tfds:mnist"}  # where supcon.py has no data set of that name
SIDES = {"mnist": 28, "tiny_imagenet": 64}
VIEWS = ("view1", "view2")


def get_config(preset: str = ""):
    """The config of a preset such as "supcon,cifar10,resnet"."""
    method, dataset, scale, network, schedule = base.choose(preset, METHODS, DATASETS, SCALES, NETWORKS, SCHEDULES)
    c = without_terms(dataset, scale, network, schedule)
    usual = ("garments", "paper", "vit", "cosine")
    c.name = base.title(method, (dataset, scale, network, schedule), usual)
    add_terms(c, method)
    return c


def without_terms(dataset, scale, network, schedule):
    """Data, views, network and budget; the terms are to be added."""
    small = dataset == "garments" or scale == "cpu"
    name = {"cifar100u": "cifar100", "mnist": "fashion_mnist"}.get(dataset, dataset)
    c = base.extend(__file__, "supcon.py", f"{name},{scale}")
    c.data.source = SOURCES.get(dataset, c.data.source)
    c.data.labels = "coarse"
    c.data.imbalance = "cifar100u" if dataset == "cifar100u" else ""
    c.size = SIDES.get(dataset, 0)
    del c.terms.supcon
    if not small:
        _paper(c, dataset, network, schedule)
    c.model.head_features = 0  # no projection: the losses see the features themselves
    c.eval.final = ("knn", "linear", "transfer", "classifier", "collapse", "calibration")
    c.collapse_every = "25 steps" if small else "1 epoch"
    if small:
        c.duration = "8 epochs"
    return c


def add_terms(c, method, *, encoder="", prefix=""):
    """Cross-entropy and the method's own term on one encoder; names of terms and heads begin with `prefix`."""
    views = tuple(f"{encoder}/{v}" if encoder else v for v in VIEWS)
    small = c.model.kind == "resnet" and c.model.stem == "patch4"
    # At paper scale the authors'; the CPU's was chosen on validation images, where SupCon and L_spread both prefer it.
    contrast = dict(views=views, temperature=0.1 if small else 0.5)
    c.heads[f"{prefix}classifier"] = base.head("classifier", encoders=(encoder,))
    c.terms[f"{prefix}ce"] = base.term("cross_entropy", views=views, head=f"{prefix}classifier")
    if method == "l_spread":
        c.terms[f"{prefix}contrast"] = base.term("spread", a_lc=1.0, a_spread=1.0, **contrast)
    if method in ("supcon", "clamped", "supcon_infonce"):
        clip = 1.0 if method == "clamped" else 0.0
        c.terms[f"{prefix}contrast"] = base.term("attract", clip_positive=clip, **contrast)
    if method in ("infonce", "supcon_infonce"):
        c.terms[f"{prefix}infonce"] = base.term("attract", labels=False, **contrast)
    if method == "autoencoder":
        # On a CPU one as narrow and coarse as the encoder: the full one would cost many times the encoder.
        narrow = dict(widths=(128, 64, 64), blocks=1, patch=4) if small else {}
        c.heads[f"{prefix}decoder"] = base.head("decoder", encoders=(encoder,), **narrow)
        c.terms[f"{prefix}reconstruction"] = base.term("reconstruction", views=views, head=f"{prefix}decoder")


def _paper(c, dataset, network, schedule):
    """The authors' hyper-parameters: AdamW, 3e-4, decay 0.01 on every parameter, batches of 128."""
    c.batch_size = 128
    c.duration = "600 epochs" if network == "vit" else "200 epochs"
    if network == "vit":
        c.model = base.model("vit")
        c.eval.tap = "block6"
    else:
        c.model = base.model("resnet", depth=18, stem="imagenet")
        c.eval.tap = "stage2"
    # The released code's cosine has a period of 100 epochs whatever the run: it rises again, and ends at its maximum.
    adamw = dict(kind="torch_adamw", weight_decay=0.01, schedule="released")
    epochs = 100 if schedule == "released" else 0
    c.optimizer = base.options(base.OptimizerOptions, lr=3e-4, cosine_epochs=epochs, **adamw)
    c.memory.probe.optimizer = base.options(base.OptimizerOptions, lr=1e-3, **adamw)
