"""All five papers in one update: SupCon with masked, adversarial, spread, patched and laddered views at once.

    python -m jaxcl.main --config=configs/all_in_one.py

What none of the papers has: their parts around one encoder. Each part comes from its own file's config, with the
settings it has there, and a word of the preset switches it off:

    saliency, no_saliency        excon.py: a first view masked by its explanation, failed masks as further negatives
    adversary, no_adversary      clae.py:supcon: an adversarial third view, with batch norms of its own
    spread, no_spread            l_spread.py: a cross-entropy, and L_spread on the embedding
    autoencoder, no_autoencoder  l_spread.py:autoencoder: the same cross-entropy, and the reconstruction of each view
    patches, no_patches          nonsemantic.py:simclr,patch,shared: NT-Xent, and an image's own patches as negatives
    ladder, no_ladder            hierarchical.py:supcon: a loss at each stage on views of fewer types, heads that are
                                 told of the jitter
    supcon, no_supcon            the ground: supcon.py's own loss

A part that is off costs nothing and changes no bit of the rest: what is left of a single part is its own file's update
(tests/test_all_in_one.py says which keys are the hyper-parameters in which the files differ). spread and autoencoder
without the others, the ground included, are thanos.py:one; patches so are nonsemantic.py.

    configs/all_in_one.py                                 garments on a CPU: 5 minutes, linear 65.4, kNN 58.6 %
    configs/all_in_one.py:no_adversary,no_patches         likewise any others; not yet run
    configs/all_in_one.py:cifar10,cpu                     the small network on CIFAR-10; not yet run
    configs/all_in_one.py:cifar10                         ResNet-50, SupCon's budget; not yet run

Weights are keys: --config.terms.nt_xent.weight=0.5. Thanos's spread is meant for coarse labels, which hide finer
classes: --config.data.labels=coarse, and "--config.eval.final=('transfer','knn')". Data of a preset other than the
embedded one: --config.data.source=cifar:PATH, npz:PATH or tfds:NAME.

Source: the files named above. That they are combined, and the stage losses on SupCon, is ours. One encoder: Thanos's
second one would need explanations of both (thanos.py has it).
"""

from jaxcl import config as base
from jaxcl.errors import UserError

PARTS = ("saliency", "adversary", "spread", "autoencoder", "patches", "ladder", "supcon")
DATASETS = ("garments", "cifar10")
SCALES = ("paper", "cpu")


def get_config(preset: str = ""):
    """The config of a preset such as "no_adversary,no_patches"."""
    switches = [(part, f"no_{part}") for part in PARTS]
    *words, dataset, scale = base.choose(preset, *switches, DATASETS, SCALES)
    on = {part for part in PARTS if part in words}
    where = f"{dataset},{scale}"
    # The ladder's file is the frame: its last rung is the two views that all parts share, whether it is on or off.
    c = base.extend(__file__, "hierarchical.py", f"supcon,{where}" + ("" if "ladder" in on else ",two_view"))
    off = " ".join(w for w in words if w.startswith("no_"))
    c.name = base.title("all in one", (dataset, scale, off), ("", "paper", ""))
    c.eval.final = ("knn", "linear", "raw_pixels", "classifier", "explanation", "linear_fgsm", "calibration", "color")
    if dataset == "garments" or scale == "cpu":
        c.duration = "4 epochs"
        # At SupCon's 6e-3 SupCon with an adversary does not get away from its start with every seed.
        c.optimizer.lr = 3e-3

    if "patches" in on:  # first: of views that are not masked yet
        of = base.extend(__file__, "nonsemantic.py", f"simclr,patch,shared,{where}")
        c.stages += of.stages
        c.passes += of.passes[2:]
        c.terms.nt_xent = of.terms.nt_xent
    if "saliency" in on:
        _add_saliency(c, where, background="supcon" in on)
    if "adversary" in on:
        of = base.extend(__file__, "clae.py", f"supcon,{where}")
        c.model.norm_sets = of.model.norm_sets
        c.stages += of.stages
        c.passes += of.passes[2:]
        c.terms.adversarial = of.terms.adversarial
        c.eval.final += ("adversary",)
    if on & {"spread", "autoencoder"}:
        of = base.extend(__file__, "thanos.py", f"one,{where},resnet")
        c.heads.classifier, c.terms.ce = of.heads.classifier, of.terms.ce
        if "spread" in on:
            c.terms.contrast = of.terms.contrast
        if "autoencoder" in on:
            c.heads.decoder, c.terms.reconstruction = of.heads.decoder, of.terms.reconstruction
    if "supcon" not in on:
        del c.terms.supcon
    if not c.terms:
        raise UserError(f"preset {preset!r} leaves nothing to learn; leave one of {', '.join(PARTS)} on")
    return c


def _add_saliency(c, where, background):
    of = base.extend(__file__, "excon.py", where if background else f"excon,{where}")
    c.views.standard = of.views.standard
    c.stages += of.stages
    c.stages[-1].tap = c.eval.tap
    if background:
        # Normalised with the view that they might have been, as the authors' two GPUs did.
        c.passes = tuple(base.encode("view1", "background") if p.views == ("view1",) else p for p in c.passes)
        c.terms.supcon.background = of.terms.supcon.background
