"""Hierarchical augmentation invariance: earlier stages of the network are made invariant to less, and heads are told.

    python -m jaxcl.main --config=configs/hierarchical.py

A ladder of views, one rung a stage, each of two views of its own that go no further than that stage: the first stage
sees crops and jitter, each later one a type of augmentation more. The losses of the stages, of the same kind each, add
up. Heads are also given what colour jitter was drawn for the view, so that the encoder need not forget colour.

Presets, one word an axis, joined by commas. The method: simsiam, byol, barlow_twins, supcon (ours). A data set:
garments, cifar10, imagenet100, imagenet. The ladder: addone, or its controls uniform (every rung has all types),
strength (all types, weaker below) and two_view (the last stage alone: the plain method). A scale (paper, cpu) and
labelled or unlabelled as in simsiam.py. Options follow in the same way, as name=value:

    told=color|color_crop|everything|nothing   what heads are told of a view: jitter; the crop too; blur, grayscale and
                                               flip too (ours). If not given, color for addone, nothing for the controls
    order=flip-blur-grayscale-jitter           in which types are added; the paper's: jitter-grayscale-blur-flip
    rotation=0.5                               probability of a turn by 0, 90, 180 or 270 degrees on the last rung
    blur=rule|always|never                     rule: images of 32 pixels and less are not blurred, as in the released
                                               code. On garments always, or the third rung would equal the second

    configs/hierarchical.py                    garments, 11 minutes on one busy core; linear 36.9 +- 5.5 %, tint 68.2 %
    configs/hierarchical.py:two_view           3 minutes; linear 44.7 +- 7.1 %, tint 75.3 %
    configs/hierarchical.py:uniform            11 minutes; 42.9 +- 3.3 %; strength 40.7; told=nothing 42.3
    configs/hierarchical.py:byol               likewise barlow_twins, supcon; not yet run
    configs/hierarchical.py:cifar10            not yet run
    configs/hierarchical.py:imagenet100        ResNet-50, 200 epochs; not yet run
    configs/hierarchical.py:imagenet           ResNet-50, 200 epochs; not yet run

The main head of any config can be told so, which is ours: --config.model.head_embeds="('jitter',)" with simclr.py,
moco.py or supcon.py. Data of a preset other than the embedded one: --config.data.source=cifar:PATH, npz:PATH or
tfds:NAME. Networks without stages (vit) have no ladder.

Source: Zhang and Ma 2022, arXiv 2206.00227; SimSiam's settings from the released code, which differ from simsiam.py's
in a last batch norm with scale and bias. The paper does not say how BYOL and Barlow Twins were trained; here: as
SimSiam, and as barlow_twins.py; SupCon is ours. Biases before batch norms, which the released heads have, do nothing
and are left out.
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
VIEWS = ("view1", "view2")  # of the last rung


def get_config(preset: str = ""):
    """The config of a preset such as "byol,imagenet100,uniform" or "uniform,told=color"."""
    words = [w.strip() for w in (preset or "").split(",")]
    chosen = base.choose(",".join(w for w in words if "=" not in w), METHODS, DATASETS, MODES, SCALES, LABELS)
    method, dataset, mode, scale, labels = chosen
    given = [w for w in words if "=" in w]
    small = dataset == "garments" or scale == "cpu"
    options = _options(given, told="color" if mode == "addone" else "nothing", order="-".join(TYPES), rotation="0",
                       blur="always" if dataset == "garments" else "rule")  # fmt: skip
    # byol.py and supcon.py have no such data set; what differs is set below.
    known = "imagenet100" if method in ("byol", "supcon") and dataset == "imagenet" else dataset
    c = base.extend(__file__, f"{method}.py", f"{known},{scale}" + ("" if method == "supcon" else f",{labels}"))
    if method == "supcon":
        if labels == "unlabelled":
            raise UserError("the ladder on supcon needs labels; choose another method, or leave out unlabelled")
        c.passes = (base.encode("view1"), base.encode("view2"))  # each normalised by itself, as on every rung
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
        # The first stage's head is not told, as in the released code.
        c.model.branch_embeds = tuple(range(2, stages)) if embeds else ()
    if "target" in c.memory:
        c.memory.target.average_embeds = False
    return c


def _options(given, **options):
    """The options named in a preset, over those that hold otherwise."""
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
    if "probe" not in c.memory:
        base.without_labels(c)


def _paper(c, method, dataset, labels):
    """SimSiam's settings for BYOL too, whose decay is all that the authors state; the others as in their own files."""
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
