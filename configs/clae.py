"""CLAE: a contrastive method plus a third, adversarial view that the loss of the whole batch finds hard.

    python -m jaxcl.main --config=configs/clae.py

Presets, one word an axis, joined by commas: the method (simclr, plain, uel, supcon), a data set, a scale (paper, cpu)
and labelled or unlabelled as in the method's own file, and a control: adversarial (CLAE) or clean_pair (a third random
view instead of the adversarial one, with the same weight: what the larger loss and the third view give by themselves).

    configs/clae.py                            SimCLR and CLAE on garments on a CPU: 5 minutes, linear probe 41.9 %
    configs/clae.py:clean_pair                 its control: 4 minutes, linear probe 51.3 %
    configs/clae.py:plain                      linear probe 62.9 %; uel 63.1 %, supcon 49.9 % (one seed of three fails)
    configs/clae.py:cifar10,cpu                CIFAR-10 on a CPU; 8 epochs on one core: 10 minutes, linear probe 53.4 %
    configs/clae.py:cifar10                    SimCLR and CLAE at the authors' scale; not yet run
    configs/clae.py:plain,cifar10              likewise uel; not yet run
    configs/clae.py:tiny_imagenet              not yet run

Without labels, on your own images (not with supcon, whose loss needs them):

    python -m jaxcl.main --config=configs/clae.py:unlabelled --config.data.source=npz:images.npz

The weight of the third view is --config.terms.adversarial.weight; a temperature is that of both terms, so give
--config.terms.clean.temperature and --config.terms.adversarial.temperature. A PGD attack of three steps:
"--config.stages[0].num_steps=3". Everything else is the method's own file of the same preset, but for the passes: here
each view of supcon is normalised by itself too.

Source: Ho and Vasconcelos 2020, arXiv 2010.12050; the released code's settings. CLAE on supcon is ours.
"""

from jaxcl import config as base

METHODS = ("simclr", "plain", "uel", "supcon")
DATASETS = ("garments", "fashion_mnist", "cifar10", "cifar100", "tiny_imagenet")
SCALES = ("paper", "cpu")
CONTROLS = ("adversarial", "clean_pair")
LABELS = ("labelled", "unlabelled")
AT_SCALE = ("cifar10", "cifar100", "tiny_imagenet")  # the others have the CPU's scale only

EPSILON = 0.03  # of the authors, in units of their normalised images
# What they divide by, which makes it a change in [0, 1]. (Where mean and deviation of our source differ from theirs,
# the images are scaled otherwise, but attacked as far.)
CIFAR_STD = (0.2023, 0.1994, 0.2010)  # of CIFAR-100 too
SIMCLR_CIFAR_STD = (0.5, 0.5, 0.5)
IMAGENET_STD = (0.229, 0.224, 0.225)


def get_config(preset: str = ""):
    """The config of a preset such as "plain,cifar100,clean_pair"."""
    method, dataset, scale, control, labels = base.choose(preset, METHODS, DATASETS, SCALES, CONTROLS, LABELS)
    shared = f"{dataset},{scale}" + ("" if method == "supcon" else f",{labels}")
    c = base.extend(__file__, f"{method}.py", shared)
    usual = ("simclr", "garments", "paper", "adversarial", "labelled")
    c.name = base.title("clae", (method, dataset, scale, control, labels), usual)

    (kind,) = c.terms
    options = {k: v for k, v in c.terms[kind].items() if k not in ("kind", "views", "weight")}
    del c.terms[kind]
    third = "adversarial" if control == "adversarial" else "view3"
    c.terms.clean = base.term(kind, views=("view1", "view2"), **options)
    c.terms[control] = base.term(kind, views=("view1", third), weight=1.0, **options)

    c.passes = (base.encode("view1"), base.encode("view2"))
    if control == "clean_pair":
        c.views.view3 = base.view("random", **{k: v for k, v in c.views.view2.items() if k != "kind"})
        c.passes += (base.encode("view3"),)
    else:
        # Adversarial images have another distribution: they are normalised apart, so that the clean statistics, which
        # evaluation uses, stay clean.
        c.model.norm_sets = ("adv",)
        c.passes += (base.encode("adversarial", norm_set="adv"),)
        c.stages = (base.stage("adversary", **_attack(method, dataset, scale)),)
        c.eval.final += ("adversary",)
    if labels == "unlabelled":  # supcon.py has no such word
        base.without_labels(c)
    return c


def _attack(method, dataset, scale):
    """How far pixels may move. At the authors' scale that may be out of [0, 1], as in their code."""
    if dataset not in AT_SCALE or scale == "cpu":
        return dict(epsilon=(0.015,), clip=True)
    std = SIMCLR_CIFAR_STD if method == "simclr" else CIFAR_STD
    if dataset == "tiny_imagenet":
        std = IMAGENET_STD
    return dict(epsilon=tuple(EPSILON * s for s in std), clip=False)
