"""Hierarchical augmentation invariance: earlier stages of the network are made invariant to less, and heads are told.

    python -m jaxcl.main --config=configs/hierarchical.py

A ladder of views, one rung a stage, each of two views of its own that go no further than that stage: the first stage
sees crops and jitter, each later one a type of augmentation more. The losses of the stages, of the same kind each, add
up. Heads are also given what colour jitter was drawn for the view, so that the encoder need not forget colour.

Presets, one word an axis, joined by commas. The method: simsiam, byol, barlow_twins. A data set: garments, cifar10,
imagenet100, imagenet. The ladder: addone, or its controls uniform (every rung has all types), strength (all types,
weaker below) and two_view (the last stage alone: the plain method). What heads are told: told_as_usual (color for
addone, else untold), untold, color, color_crop or everything (blur, grayscale and flip too; ours). upright or rotation
(on the last rung). The order in which types are added, such as flip-blur-grayscale-jitter. Blur of small views:
blur_as_usual (none at 32 pixels and less, as the authors', but on garments, where the third rung would equal the
second), blurred, sharp. A scale (paper, cpu) and labelled or unlabelled as in simsiam.py.

    configs/hierarchical.py                    garments on a CPU; not yet run
    configs/hierarchical.py:two_view           likewise uniform, strength, untold; not yet run
    configs/hierarchical.py:byol               likewise barlow_twins; not yet run
    configs/hierarchical.py:cifar10            not yet run
    configs/hierarchical.py:imagenet100        ResNet-50, 200 epochs; not yet run
    configs/hierarchical.py:imagenet           ResNet-50, 200 epochs; not yet run

The main head of any config can be told so, which is ours: --config.model.head_embeds="('jitter',)" with simclr.py,
moco.py or supcon.py. Data of a preset other than the embedded one: --config.data.source=cifar:PATH, npz:PATH or
tfds:NAME. Networks without stages (vit) have no ladder.

Source: Zhang and Ma 2022, arXiv 2206.00227; SimSiam's settings from the released code, which differ from simsiam.py's
in a last batch norm with scale and bias. The paper does not say how BYOL and Barlow Twins were trained; here: as
SimSiam, and as barlow_twins.py. Biases before batch norms, which the released heads have, do nothing and are left out.
"""

import itertools

from jaxcl import config as base
from jaxcl.views.ladder import MODES, TYPES, rungs

METHODS = ("simsiam", "byol", "barlow_twins")
DATASETS = ("garments", "cifar10", "imagenet100", "imagenet")
TOLD = ("told_as_usual", "untold", "color", "color_crop", "everything")
ROTATIONS = ("upright", "rotation")
ORDERS = tuple("-".join(order) for order in itertools.permutations(TYPES))
BLURS = ("blur_as_usual", "blurred", "sharp")
SCALES = ("paper", "cpu")
LABELS = ("labelled", "unlabelled")
AXES = (METHODS, DATASETS, MODES, TOLD, ROTATIONS, ORDERS, BLURS, SCALES, LABELS)

EMBEDS = {
    "untold": (),
    "color": ("jitter",),
    "color_crop": ("jitter", "crop"),
    "everything": ("jitter", "crop", "blur_sigma", "grayscale", "flip"),
}
VIEWS = ("view1", "view2")  # of the last rung


def get_config(preset: str = ""):
    """The config of a preset such as "byol,imagenet100,uniform"."""
    chosen = base.choose(preset, *AXES)
    method, dataset, mode, told, rotation, order, blur, scale, labels = chosen
    small = dataset == "garments" or scale == "cpu"
    # byol.py has no such data set; what differs is set below.
    known = "imagenet100" if (method, dataset) == ("byol", "imagenet") else dataset
    c = base.extend(__file__, f"{method}.py", f"{known},{scale},{labels}")
    usual = (*(axis[0] for axis in AXES[2:7]), "paper", "labelled")
    c.name = base.title(f"hierarchical {method}", chosen[1:], ("", *usual))
    if small:
        _cpu(c)
    else:
        _paper(c, method, dataset, labels)

    embeds = EMBEDS[{"told_as_usual": "color" if mode == "addone" else "untold"}.get(told, told)]
    stages = len(c.model.stage_sizes) or 4
    top = dict(crop_area=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, grayscale=0.2, flip=0.5)
    always = blur == "blurred" or (blur == "blur_as_usual" and dataset == "garments")
    top |= dict(blur=0.0 if blur == "sharp" else 0.5, blur_above=0 if always else 32)
    if small:
        top |= dict(blur_sigma=(0.1, 1.0))  # the kernel has three taps
    if rotation == "rotation":
        top |= dict(rotation=0.5)
    *below, last = rungs(top, mode=mode, count=stages, order=tuple(order.split("-")))
    for name in VIEWS:
        c.views[name] = base.view("random", **last)
    _add_stages(c, below)
    c.model.head_embeds = embeds
    if mode != "two_view":
        c.model.branches = tuple(range(1, stages))
        # The first stage's head is not told, as in the released code.
        c.model.branch_embeds = tuple(range(2, stages)) if embeds else ()
    if "target" in c.memory:
        c.memory.target.average_embeds = False
    return c


def _add_stages(c, below):
    """For each rung below the last: two views, passes that end at its stage, and the method's loss and predictor."""
    (kind,), whole, passes = tuple(c.terms), c.passes, ()
    options = {k: v for k, v in c.terms[kind].items() if k not in ("kind", "views", "head")}
    for stage, rung in enumerate(below, start=1):
        if rung is None:
            continue
        of = {name: f"stage{stage}_{name}" for name in VIEWS}
        for name in of.values():
            c.views[name] = base.view("random", **rung)
        for p in whole:
            more = {k: v for k, v in p.items() if k not in ("views", "depth")}
            passes += (base.encode(*(of[v] for v in p.views), **more, depth=stage),)
        if "predictor" in c.heads:
            head = f"predictor{stage}"
            options["head"] = head
            c.heads[head] = base.head("mlp", **{k: v for k, v in c.heads.predictor.items() if k != "kind"})
        c.terms[f"stage{stage}"] = base.term(kind, views=tuple(of.values()), **options)
    c.passes = passes + whole  # running statistics end with the last rung's
    if c.optimizer.constant_lr:
        c.optimizer.constant_lr = tuple(f"heads/{name}" for name in c.heads)


def _cpu(c):
    """The small network in four stages."""
    c.model.stage_sizes = (1, 1, 1, 1)
    c.model.stage_widths = (16, 32, 64, 64)  # times four channels out
    c.model.strides = (1, 1, 2, 1)  # 8, 8, 4 and 4 pixels
    c.eval.tap = "stage2"
    c.eval.final = ("knn", "linear", "raw_pixels", "classifier", "color", "invariance", "dense", "collapse")


def _paper(c, method, dataset, labels):
    """SimSiam's settings for BYOL too, whose decay is all that the authors state; Barlow Twins as in its own file."""
    c.duration = "800 epochs" if dataset == "cifar10" else "200 epochs"
    if method == "barlow_twins":
        return
    if method == "byol":
        other = base.extend(__file__, "simsiam.py", f"{dataset},{labels}")
        for key in ("optimizer", "batch_size", "data", "size", "model"):
            c[key] = other[key]
        c.optimizer.constant_lr = ("heads/predictor",)
        c.memory.target.decay, c.memory.target.decay_schedule = 0.99, "constant"
        if "probe" in c.memory:
            c.memory.probe = other.memory.probe
    c.model.head_norm = c.model.head_out_norm = "batch"
    c.heads.predictor.features, c.heads.predictor.hidden = 2048, 512
