"""CLAE: a contrastive method plus a third, adversarial view that increases the loss of the whole batch.

    python -m jaxcl.main --config=configs/clae.py

Presets follow the file name after a colon: one word for each of these axes, joined by commas. The first word of an
axis is its default.

    method      simclr, plain, uel, supcon
    data set    garments, fashion_mnist, cifar10, cifar100, tiny_imagenet
    scale       paper, cpu: as in the method's own file
    control     adversarial: CLAE; clean_pair: a third random view with the same weight in place of the adversarial one,
                which shows what the third view and the larger loss do without an attack
    labels      labelled, unlabelled: as in the method's own file

    configs/clae.py                            SimCLR and CLAE on garments on a CPU: 5 minutes, linear probe 41.9 %
    configs/clae.py:clean_pair                 its control: 4 minutes, linear probe 51.3 %
    configs/clae.py:plain                      linear probe 62.9 %; uel 63.1 %, supcon 49.9 % (one seed of three fails)
    configs/clae.py:cifar10,cpu                CIFAR-10 on a CPU; 8 epochs on one core: 10 minutes, linear probe 53.4 %
    configs/clae.py:cifar10                    SimCLR and CLAE at the authors' scale; not yet run
    configs/clae.py:plain,cifar10              uel likewise; not yet run
    configs/clae.py:tiny_imagenet              not yet run

To train without labels on your own images (not with supcon, whose loss needs labels):

    python -m jaxcl.main --config=configs/clae.py:unlabelled --config.data.source=npz:images.npz

--config.terms.adversarial.weight is the weight of the third view. Both terms should use one temperature, so set
--config.terms.clean.temperature and --config.terms.adversarial.temperature together. "--config.stages[0].num_steps=3"
gives a PGD attack of three steps. Everything else is as in the method's own file with the same preset, except for the
passes: here supcon also normalises each view separately.

Source: Ho and Vasconcelos 2020, arXiv 2010.12050; settings of the released code. CLAE on supcon is ours.
"""

from jaxcl import config as base

METHODS = ("simclr", "plain", "uel", "supcon")
DATASETS = ("garments", "fashion_mnist", "cifar10", "cifar100", "tiny_imagenet")
SCALES = ("paper", "cpu")
CONTROLS = ("adversarial", "clean_pair")
LABELS = ("labelled", "unlabelled")
AT_SCALE = ("cifar10", "cifar100", "tiny_imagenet")  # the other data sets have only the cpu scale

EPSILON = 0.03  # the authors' value, in units of their normalised images
# The standard deviations that the authors divide by, as the presets do: EPSILON times these is the change of a pixel in
# [0, 1].
CIFAR_STD = (0.2023, 0.1994, 0.2010)  # also for CIFAR-100
SIMCLR_CIFAR_STD = (0.5, 0.5, 0.5)
IMAGENET_STD = (0.229, 0.224, 0.225)


@base.with_finetune
def get_config(preset: str = ""):
    """The config of a preset such as "plain,cifar100,clean_pair"."""
    method, dataset, scale, control, labels = base.choose(preset, METHODS, DATASETS, SCALES, CONTROLS, LABELS)
    shared = f"{dataset},{scale}" + ("" if method == "supcon" else f",{labels}")
    c = base.extend(__file__, f"{method}.py", shared)
    usual = ("simclr", "garments", "paper", "adversarial", "labelled")
    c.name = base.title("clae", (method, dataset, scale, control, labels), usual)

    c.eval.final += ("linear_fgsm", "linear_pgd")
    c.eval.pgd = (4,)  # each strength takes as long as a third of the training
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
        # Adversarial images have another distribution. They get their own batch norms, so that the statistics which
        # evaluation uses come from clean images only.
        c.model.norm_sets = ("adv",)
        c.passes += (base.encode("adversarial", norm_set="adv"),)
        c.stages = (base.stage("adversary", **_attack(method, dataset, scale)),)
        c.eval.final += ("adversary",)
    if labels == "unlabelled":  # here, because supcon.py does not have this preset word
        base.without_labels(c)
    return c


def _attack(method, dataset, scale):
    """Options of the attack. At the authors' scale pixels may leave [0, 1], as in their code."""
    if dataset not in AT_SCALE or scale == "cpu":
        return dict(epsilon=(0.015,), clip=True)
    std = SIMCLR_CIFAR_STD if method == "simclr" else CIFAR_STD
    if dataset == "tiny_imagenet":
        std = IMAGENET_STD
    return dict(epsilon=tuple(EPSILON * s for s in std), clip=False)
