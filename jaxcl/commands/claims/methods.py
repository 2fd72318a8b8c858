"""What `jaxcl claims` trains and asks: methods with their baselines, data settings, measures, and the papers' claims.

Nothing here is a result. `cost` and `ESTIMATE` are counts and rough times, from which the command estimates how long
it will take.
"""

import dataclasses
from collections.abc import Mapping

from jaxcl.report import names

SOURCES = ("garments", "cifar10")

# ---- data settings: how the training data of a run are labelled and correlated

FINE, COARSE, SPURIOUS = "fine", "coarse", "spurious"


@dataclasses.dataclass(frozen=True)
class Setting:
    """One kind of training data, and the evaluation of encoders trained on it."""

    title: str
    grid: tuple[str, ...]  # keys and values, as for jaxcl sweep --grid
    final: tuple[str, ...]  # eval.final
    sources: tuple[str, ...] = SOURCES


SETTINGS: Mapping[str, Setting] = {
    FINE: Setting(
        "trained on the fine classes",
        ("data.labels=fine", "data.garments.spurious=0.0"),
        ("knn", "linear", "classifier", "explanation", "fgsm", "linear_pgd", "calibration", "ood", "tint"),
    ),
    COARSE: Setting(
        "trained on the coarse classes, measured on the fine ones",
        ("data.labels=coarse", "data.garments.spurious=0.0"),
        ("transfer",),
    ),
    SPURIOUS: Setting(
        "trained on coarse classes whose background follows the fine class in 95 of 100 images",
        ("data.labels=coarse", "data.garments.spurious=0.95"),
        ("worst_group", "shape_bias"),
        ("garments",),
    ),
}

# One small network for all methods. The ladder needs its four stages.
NETWORK = (
    "model.stage_sizes=(1, 1, 1, 1)",
    "model.stage_widths=(16, 32, 64, 64)",
    "model.strides=(1, 1, 2, 1)",
    "eval.tap=stage2",
)
COMMON = (
    *NETWORK,
    "eval.every=0",
    "checkpoint.every=0",
    "collapse_every=0",
    "report=False",
    "eval.fgsm=(4,)",
    "eval.pgd=(4,)",
    "eval.pgd_steps=10",
    "eval.severities=()",
    "eval.shuffle_grids=(4,)",
)

# ---- methods


@dataclasses.dataclass(frozen=True)
class Method:
    """A config and its baseline."""

    title: str
    config: str  # FILE[:PRESET]; a data set's words are added
    baseline: str  # name of another method; "": none
    labels: bool  # whether the encoder sees them
    cost: float  # of an update, relative to SupCon's; measured for some methods, counted in passes for others
    sets: tuple[str, ...] = ()  # more config keys
    settings: tuple[str, ...] = (FINE, COARSE, SPURIOUS)

    def argument(self, source: str) -> str:
        """FILE:PRESET for `jaxcl train`."""
        path, _, preset = self.config.partition(":")
        words = [w for w in (preset, "cifar10,cpu" if source == "cifar10" else "") if w]
        return ":".join([path, ",".join(words)]) if words else path


# An encoder that sees no labels does not change with the labels, so its FINE run also serves as COARSE.
SELF = dict(labels=False, settings=(FINE,))
NEGATIVES = dict(labels=False, settings=(FINE, SPURIOUS))
METHODS: Mapping[str, Method] = {
    "supcon": Method("SupCon", "configs/supcon.py", "", True, 1.0),
    "excon": Method("ExConB", "configs/excon.py", "supcon", True, 1.7, ("stages[0].tap=stage2",)),
    "simclr": Method("SimCLR", "configs/simclr.py", "", cost=1.0, **NEGATIVES),
    "simclr_clae": Method("SimCLR + CLAE", "configs/clae.py", "simclr", cost=1.6, **SELF),
    "plain": Method("Plain", "configs/plain.py", "", cost=1.0, **SELF),
    "plain_clae": Method("Plain + CLAE", "configs/clae.py:plain", "plain", cost=1.6, **SELF),
    "uel": Method("UEL", "configs/uel.py", "", cost=1.0, **SELF),
    "uel_clae": Method("UEL + CLAE", "configs/clae.py:uel", "uel", cost=1.6, **SELF),
    "ce": Method("Cross-entropy", "configs/l_spread.py:ce", "", True, 1.0, settings=(SPURIOUS,)),
    "attract": Method("SupCon of L_spread", "configs/l_spread.py:supcon", "", True, 1.0),
    "l_spread": Method("L_spread", "configs/l_spread.py", "attract", True, 1.0),
    "attract_auto": Method(
        "SupCon + autoencoder",
        "configs/thanos.py:supcon",
        "attract",
        True,
        2.9,
        tuple(f"encoders.auto.{key.removeprefix('model.')}" for key in NETWORK[:3]),
    ),
    "thanos": Method(
        "Thanos",
        "configs/thanos.py",
        "attract",
        True,
        2.9,
        tuple(f"encoders.auto.{key.removeprefix('model.')}" for key in NETWORK[:3]),
    ),
    "moco": Method("MoCo-v2", "configs/nonsemantic.py:moco,none", "", cost=0.65, **NEGATIVES),
    "moco_patches": Method("MoCo-v2 + patches", "configs/nonsemantic.py:moco,patch", "moco", cost=1.0, **NEGATIVES),
    "simclr_patches": Method(
        "SimCLR + patches", "configs/nonsemantic.py:simclr,patch", "simclr", cost=2.0, **NEGATIVES
    ),
    "byol": Method("BYOL", "configs/nonsemantic.py:byol,none", "", cost=1.0, **NEGATIVES),
    "byol_patches": Method("BYOL + patches", "configs/nonsemantic.py:byol,patch", "byol", cost=1.3, **NEGATIVES),
    "simsiam": Method("SimSiam", "configs/hierarchical.py:two_view", "", cost=1.0, **SELF),
    "simsiam_ladder": Method("SimSiam, hierarchical", "configs/hierarchical.py", "simsiam", cost=3.4, **SELF),
    "barlow": Method("Barlow Twins", "configs/hierarchical.py:barlow_twins,two_view", "", cost=1.0, **SELF),
    "barlow_ladder": Method(
        "Barlow Twins, hierarchical", "configs/hierarchical.py:barlow_twins", "barlow", cost=3.4, **SELF
    ),
    "all_in_one": Method("All in one", "configs/all_in_one.py", "supcon", True, 5.6),
}

# ---- measures


@dataclasses.dataclass(frozen=True)
class Measure:
    """A number in results.json, and the setting whose runs have it."""

    title: str
    setting: str
    path: str
    better: int  # 1: higher, -1: lower, 0: neither
    percent: bool = True
    unlabelled: tuple[str, str] = ("", "")  # (setting, path) for encoders that see no labels, if it differs


COST = "seconds_per_update"  # of metrics.jsonl: the batch over the median of its images per second
MEASURES: Mapping[str, Measure] = {
    "linear": Measure("linear probe", FINE, names.LINEAR, 1),
    "knn": Measure("kNN", FINE, names.KNN, 1),
    "coarse_to_fine": Measure("coarse to fine, probe", COARSE, names.TRANSFER, 1, unlabelled=(FINE, names.LINEAR)),
    "coarse_to_fine_knn": Measure("coarse to fine, kNN", COARSE, names.TRANSFER_KNN, 1, unlabelled=(FINE, names.KNN)),
    "worst_group": Measure("worst group, probe", SPURIOUS, names.WORST_GROUP_ERM, 1),
    "worst_group_dro": Measure("worst group, DRO on found groups", SPURIOUS, names.WORST_GROUP_DRO, 1),
    "groups": Measure("found groups, F1", SPURIOUS, names.GROUPS_F1, 1),
    "pgd": Measure("probe under PGD 4/255", FINE, names.under_attack("linear_pgd", 4), 1),
    "fgsm": Measure("classifier under FGSM 4/255", FINE, names.under_attack("fgsm", 4), 1),
    "ece": Measure("ECE, clean", FINE, names.ECE, -1),
    "ece_shifted": Measure("ECE, shifted", FINE, names.ECE_SHIFTED, -1),
    "ece_fgsm": Measure("ECE under FGSM 4/255", FINE, names.under_attack("fgsm", 4, "ece"), -1),
    "drop": Measure("average drop", FINE, names.AVERAGE_DROP, -1),
    "increase": Measure("rate of increase", FINE, names.RATE_OF_INCREASE, 1),
    "iou": Measure("explanation and true mask, IoU", FINE, names.MASK_IOU, 1),
    "shifted": Measure("probe, shifted test", FINE, names.OOD_SHIFTED, 1),
    "shape_bias": Measure("shape bias", SPURIOUS, names.SHAPE_BIAS, 1),
    "tint": Measure("tint kept", FINE, names.TINT, 1),
    "cost": Measure("s / update", FINE, COST, -1, percent=False),
}

# ---- claims


@dataclasses.dataclass(frozen=True)
class Claim:
    """A sentence of a paper, as a difference that can be measured."""

    text: str
    method: str
    baseline: str
    measure: str
    direction: int  # of the claimed difference
    paper: str  # of AUTHORS
    section: str  # place in the paper
    note: str = ""  # how the measure differs from the paper's own

    @property
    def line(self) -> str:
        """One line of the list in the docstring of `jaxcl claims`."""
        sign = ">" if self.direction > 0 else "<"
        return f"{self.method} {sign} {self.baseline}: {self.measure} ({self.paper}, {self.section})"


# How the authors' setting differs from a run here: data, network and budget.
AUTHORS: Mapping[str, str] = {
    "ExCon": "The authors train a ResNet-50 for 200 epochs on CIFAR-100 (batches of 256, explanations from epoch 50) "
    "and on Tiny ImageNet (batches of 128, from the start), SGD at 0.5, a classifier trained in separate epochs "
    "between the epochs of the encoder, and report the best epoch on the test set.",
    "CLAE": "The authors train a ResNet-18 on CIFAR-10, CIFAR-100 and tinyImageNet: Plain and UEL for 301 epochs of "
    "SGD (100 on tinyImageNet), SimCLR for 100 epochs of Adam with batches of 256; the attack may leave [0, 1]; the "
    "best epoch on the test set is reported.",
    "Thanos": "The authors train a vision transformer of 3.25 million parameters for 600 epochs (AdamW, T = 0.5) on "
    "the coarse classes of CIFAR-10 (2), CIFAR-100 (20), MNIST (2) and Tiny ImageNet (67), each encoder in a run of "
    "its own; the probe trains on augmented images. Worst groups are those of Waterbirds, ISIC and CelebA; how they "
    "were found is not in the released code, and the protocol here is this library's.",
    "NS": "The authors train a ResNet-50 for 200 epochs on ImageNet-100 at 224 pixels, batches of 128 and a queue of "
    "16,384, and measure out of domain on ImageNet-C, ImageNet-Sketch, Stylized-ImageNet and ImageNet-R. Their "
    "patches have 16 to 72 of 224 pixels, which at 32 pixels are 2 to 10. Settings of BYOL are not published.",
    "Hierarchical": "The authors train a ResNet-50 for 200 epochs on ImageNet at 224 pixels, batches of 256 and a "
    "projector of 2,048, and find larger gains on fine-grained sets (birds, flowers) than on ImageNet itself. Blur, "
    "the third rung, does little at 32 pixels.",
}
_EXCON = dict(method="excon", baseline="supcon", paper="ExCon", section="abstract")
_NS = dict(paper="NS", section="README, main table")
CLAIMS: tuple[Claim, ...] = (
    Claim("Masked views classify better than SupCon's", measure="linear", direction=1, **_EXCON),
    Claim("Explanations are better: confidence drops less on what is kept", measure="drop", direction=-1, **_EXCON),
    Claim("Explanations are better: they raise confidence more often", measure="increase", direction=1, **_EXCON),
    Claim(
        "Explanations are better: they agree with the object",
        measure="iou",
        direction=1,
        note="The true mask is this library's measure; the authors had none.",
        **_EXCON,
    ),
    Claim("The classifier is more robust to attack", measure="fgsm", direction=1, **_EXCON),
    Claim(
        "It is better calibrated under distributional shift",
        measure="ece_shifted",
        direction=-1,
        note="The shift is this library's: unseen textures and tints, noise and blur.",
        **_EXCON,
    ),
    Claim(
        "It is better calibrated under attack",
        measure="ece_fgsm",
        direction=-1,
        note="The only shift in the released code is FGSM; that it is the one meant is inferred.",
        **_EXCON,
    ),
    *(
        Claim(f"Adversarial views improve {title}, {words}", f"{base}_clae", base, measure, 1, "CLAE", "abstract")
        for base, title in (("simclr", "SimCLR"), ("plain", "Plain"), ("uel", "UEL"))
        for measure, words in (("linear", "linear evaluation"), ("knn", "nearest neighbours"))
    ),
    Claim("Spread keeps more than SupCon", "l_spread", "attract", "coarse_to_fine", 1, "Thanos", "README"),
    Claim("An autoencoder keeps more than SupCon", "attract_auto", "attract", "coarse_to_fine", 1, "Thanos", "README"),
    Claim("Thanos keeps more than SupCon", "thanos", "attract", "coarse_to_fine", 1, "Thanos", "abstract"),
    Claim("Thanos keeps more than spread alone", "thanos", "l_spread", "coarse_to_fine", 1, "Thanos", "README"),
    Claim(
        "Thanos keeps more than SupCon + autoencoder", "thanos", "attract_auto", "coarse_to_fine", 1, "Thanos", "README"
    ),
    Claim(
        "Spread improves the worst group",
        "l_spread",
        "attract",
        "worst_group_dro",
        1,
        "Thanos",
        "The Details Matter, abstract",
    ),
    Claim("Thanos improves the worst group", "thanos", "attract", "worst_group_dro", 1, "Thanos", "abstract"),
    Claim(
        "Thanos finds hidden groups better than clustering a plain encoder's features",
        "thanos",
        "ce",
        "groups",
        1,
        "Thanos",
        "a summary page",
        note="Both are clustered in the same way, with principal components in place of the UMAP of GEORGE.",
    ),
    *(
        Claim(f"Patch negatives improve {title}{words}", f"{base}_patches", base, measure, 1, note=note, **_NS)
        for base, title, own in (
            ("moco", "MoCo-v2", ""),
            ("simclr", "SimCLR", "SimCLR with patches is this library's reading. "),
            ("byol", "BYOL", "How BYOL uses them is this library's reading. "),
        )
        for measure, words, note in (
            ("linear", " in domain", own.strip()),
            ("shifted", " out of domain", f"{own}Out of domain is the data's own shifted test split."),
            (
                "shape_bias",
                "'s shape bias",
                f"{own}The stimuli are garments filled with another class's texture, in place of the paper's sets.",
            ),
        )
    ),
    *(
        Claim(f"The ladder {words} {title}", f"{base}_ladder", base, measure, 1, "Hierarchical", section, note)
        for base, title in (("simsiam", "SimSiam"), ("barlow", "Barlow Twins"))
        for measure, words, section, note in (
            ("linear", "improves", "abstract", ""),
            (
                "tint",
                "keeps more colour than",
                "section 5.2",
                "The authors predict jitter; here it is the object's tint.",
            ),
        )
    ),
)

# ---- how long it takes

# CPU seconds of one core, on the machine of docs/results.md: a start with compilation (more for a ladder and for all in
# one, less if an earlier seed has compiled the program), an update of SupCon with a batch of 128, and the evaluators of
# a setting.
ESTIMATE = dict(start=35.0, update=0.21, evaluate={FINE: 45.0, COARSE: 10.0, SPURIOUS: 20.0})
EXAMPLES = {"garments": 10_000, "cifar10": 50_000}
BATCH = 128
