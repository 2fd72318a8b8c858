"""Hierarchical augmentation invariance: earlier stages of the network become invariant to fewer types of augmentation.

    python -m jaxcl.main --config=configs/hierarchical.py

The ladder of views has one rung for each stage of the network. A rung has two views, which the network encodes up to
that stage only. The views of the first stage are cropped and jittered; each later rung adds one type of augmentation.
Every stage has a loss of the same kind, and the losses are added. Heads are also conditioned on augmentation
parameters (the colour jitter that was drawn for the view), so that the encoder need not forget colour.

Presets follow the file name after a colon: one word for each of these axes, joined by commas. The first word of an
axis is its default.

    method      simsiam, byol, barlow_twins, supcon (ours)
    data set    garments, cifar10, imagenet100, imagenet
    ladder      addone; its controls are uniform (every rung has all types), strength (all types, weaker on lower rungs)
                and two_view (only the last stage: the plain method)
    scale       paper, cpu: as in simsiam.py
    labels      labelled, unlabelled: as in simsiam.py

Options follow in the same way, as name=value:

    told=color|color_crop|everything|nothing   the augmentation parameters that heads are conditioned on. color: the
                                               jitter; color_crop: the crop too; everything: blur, grayscale and flip
                                               too (ours). Default: color for addone, nothing for the controls
    order=flip-blur-grayscale-jitter           the order in which types are added; default, as in the paper:
                                               jitter-grayscale-blur-flip
    rotation=0.5                               probability of a turn by 0, 90, 180 or 270 degrees on the last rung
    blur=rule|always|never                     rule: images of 32 pixels and less are not blurred, as in the released
                                               code. Default: rule, but always on garments, where the third rung would
                                               otherwise equal the second

    configs/hierarchical.py                    garments, 11 minutes on one busy core; linear 36.9 +- 5.5 %, tint 68.2 %
    configs/hierarchical.py:two_view           3 minutes; linear 44.7 +- 7.1 %, tint 75.3 %
    configs/hierarchical.py:uniform            11 minutes; 42.9 +- 3.3 %; strength 40.7; told=nothing 42.3
    configs/hierarchical.py:byol               barlow_twins and supcon likewise; not yet run
    configs/hierarchical.py:cifar10            not yet run
    configs/hierarchical.py:imagenet100        ResNet-50, 200 epochs; not yet run
    configs/hierarchical.py:imagenet           ResNet-50, 200 epochs; not yet run

The main head of simclr.py, moco.py or supcon.py can be conditioned on the jitter too (ours):
--config.model.head_embeds="('jitter',)". To read a data set that is not embedded from somewhere else:
--config.data.source=cifar:PATH, npz:PATH or tfds:NAME. Networks without stages (vit) cannot have a ladder.

Source: Zhang and Ma 2022, arXiv 2206.00227. SimSiam's settings are from the released code; they differ from simsiam.py
in a last batch norm with scale and bias. The last norm of a residual block starts at 0, as there. The paper does not
say how BYOL and Barlow Twins were trained; here BYOL is trained as SimSiam, and Barlow Twins as in barlow_twins.py.
SupCon is ours. The released heads have biases before batch norms, which have no effect and are left out. At paper scale
the authors' linear protocol is run too (linear_sgd). What differs: crops of ImageNet's photos are taken from the middle
square of an image, at 256 pixels.
"""

from jaxcl import config as base
from jaxcl.augment.ladder import MODES, TYPES, rungs
from jaxcl.errors import UserError

METHODS = ("simsiam", "byol", "barlow_twins", "supcon")
DATASETS = ("garments", "cifar10", "imagenet100", "imagenet")
SCALES = ("paper", "cpu")
LABELS = ("labelled", "unlabelled")

TOLD = {
    "nothing": (),
    "color": ("jitter",),
    "color_crop": ("jitter", "crop"),
    "everything": ("jitter", "crop", "blur_sigma", "grayscale", "flip"),
}
BLURS = ("rule", "always", "never")
VIEWS = ("view1", "view2")  # the views of the last rung


@base.with_finetune
def get_config(preset: str = ""):
    """The config of a preset such as "byol,imagenet100,uniform" or "uniform,told=color"."""
    words = [w.strip() for w in (preset or "").split(",")]
    chosen = base.choose(",".join(w for w in words if "=" not in w), METHODS, DATASETS, MODES, SCALES, LABELS)
    method, dataset, mode, scale, labels = chosen
    given = [w for w in words if "=" in w]
    small = dataset == "garments" or scale == "cpu"
    options = _options(given, told="color" if mode == "addone" else "nothing", order="-".join(TYPES), rotation="0",
                       blur="always" if dataset == "garments" else "rule")  # fmt: skip
    # byol.py and supcon.py start from imagenet100; _paper sets what differs on imagenet.
    known = "imagenet100" if method in ("byol", "supcon") and dataset == "imagenet" else dataset
    c = base.extend(__file__, f"{method}.py", f"{known},{scale}" + ("" if method == "supcon" else f",{labels}"))
    if method == "supcon":
        if labels == "unlabelled":
            raise UserError("the ladder on supcon needs labels; choose another method, or leave out unlabelled")
        c.passes = (base.encode("view1"), base.encode("view2"))  # each view normalised separately, as on every rung
    c.name = base.title(f"hierarchical {method}", chosen[1:], ("", "addone", "paper", "labelled"))
    c.name = " ".join([c.name, *given])
    if small:
        _cpu(c)
    else:
        _paper(c, method, dataset, labels)

    embeds = TOLD[options["told"]]
    stages = len(c.model.stage_sizes) or 4
    top = dict(crop_area=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, grayscale=0.2, flip=0.5)
    top |= dict(blur=0.0 if options["blur"] == "never" else 0.5, blur_above=32 if options["blur"] == "rule" else 0)
    if small:
        top |= dict(blur_sigma=(0.1, 1.0))  # the kernel has three taps
    if options["rotation"]:
        top |= dict(rotation=options["rotation"])
    *below, last = rungs(top, mode=mode, count=stages, order=tuple(options["order"].split("-")))
    for name in VIEWS:
        c.views[name] = base.view("random", **last)
    _add_stages(c, below)
    c.model.head_embeds = embeds
    if mode != "two_view":
        c.model.branches = tuple(range(1, stages))
        # The first stage's head is not conditioned, as in the released code.
        c.model.branch_embeds = tuple(range(2, stages)) if embeds else ()
    if "target" in c.memory:
        c.memory.target.average_embeds = False
    return c


def _options(given, **options):
    """The defaults, updated by the name=value words of a preset."""
    for word in given:
        name, _, value = word.partition("=")
        if name not in options:
            raise UserError(f"unknown option {word!r}; expected one of {', '.join(options)}")
        known = {"told": tuple(TOLD), "blur": BLURS}.get(name)
        if known and value not in known:
            raise UserError(f"option {word!r}: expected one of {', '.join(known)}")
        options[name] = value
    try:
        options["rotation"] = float(options["rotation"])
    except ValueError:
        raise UserError(f"option rotation={options['rotation']}: expected a probability, such as 0.5") from None
    return options


def _add_stages(c, below):
    """Add two views, passes up to its stage, the method's loss and a predictor for each rung below the last."""
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
    c.passes = passes + whole  # the last rung last: running statistics are updated in the order of the passes
    if c.optimizer.constant_lr:
        c.optimizer.constant_lr = tuple(f"heads/{name}" for name in c.heads)


def _cpu(c):
    """The small network, with four stages."""
    c.model.stage_sizes = (1, 1, 1, 1)
    c.model.stage_widths = (16, 32, 64, 64)  # the output has four times these channels
    c.model.strides = (1, 1, 2, 1)  # 8, 8, 4 and 4 pixels
    c.eval.tap = "stage2"
    c.eval.final = ("knn", "linear", "raw_pixels", "classifier", "color", "invariance", "dense", "collapse")
    if "probe" not in c.memory:
        base.without_labels(c)


def _paper(c, method, dataset, labels):
    """The authors' SimSiam settings, also for BYOL (they state only its decay). Other methods keep their own file's."""
    c.model.zero_init_residual = True
    c.eval.final += ("linear_sgd",)  # the authors' linear protocol; "linear" fits the same model to its optimum
    if method == "supcon":
        if dataset == "imagenet":
            c.data = base.extend(__file__, "simsiam.py", dataset).data
        return
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
