"""All five papers in one update: SupCon with masked, adversarial, spread, patched and laddered views at once.

    python -m jaxcl.main --config=configs/all_in_one.py

No single paper does this. The config places the components of all five papers around one encoder. Each component is
taken from the config file of its own paper, with the settings that it has there.

Presets follow the file name after a colon, joined by commas. There is one axis for each component, which is on unless
its "no_" word is given, and two more: a data set (garments, cifar10) and a scale (paper, cpu).

    saliency, no_saliency        excon.py: the first view is masked by its explanation; rejected masks are negatives
    adversary, no_adversary      clae.py:supcon: an adversarial third view with its own batch norms
    spread, no_spread            l_spread.py: a cross-entropy, and L_spread on the embedding
    autoencoder, no_autoencoder  l_spread.py:autoencoder: the same cross-entropy, and the reconstruction of each view
    patches, no_patches          nonsemantic.py:simclr,patch,shared: NT-Xent, with an image's own patches as negatives
    ladder, no_ladder            hierarchical.py:supcon: a loss at each stage on views with fewer types of augmentation,
                                 and heads that are conditioned on the colour jitter
    supcon, no_supcon            the base: the loss of supcon.py

A component that is switched off costs nothing and does not change the rest by a bit. With supcon and one of saliency,
adversary and ladder left on, the update equals the one of excon.py, clae.py:supcon or hierarchical.py:supcon; with
spread and autoencoder only, thanos.py:one; with patches only, nonsemantic.py:simclr,patch,shared. This holds except for
the hyper-parameters in which the files differ, which tests/configs/test_all_in_one.py lists.

    configs/all_in_one.py                                 garments on a CPU: 5 minutes, linear 65.4, kNN 58.6 %
    configs/all_in_one.py:no_adversary,no_patches         any other combination likewise; not yet run
    configs/all_in_one.py:cifar10,cpu                     the small network on CIFAR-10; not yet run
    configs/all_in_one.py:cifar10                         ResNet-50, SupCon's budget; not yet run

Weights are config keys: --config.terms.nt_xent.weight=0.5. Thanos's spread is meant for coarse labels, which hide finer
classes: --config.data.labels=coarse, and "--config.eval.final=('transfer','knn')". To read CIFAR-10 from somewhere
else: --config.data.source=cifar:PATH, npz:PATH or tfds:NAME.

Source: the files named above. The combination, and the stage losses on SupCon, are ours. There is one encoder, because
Thanos's second encoder would need explanations of both encoders (thanos.py has the second encoder).
"""

from jaxcl import config as base
from jaxcl.errors import UserError

PARTS = ("saliency", "adversary", "spread", "autoencoder", "patches", "ladder", "supcon")
DATASETS = ("garments", "cifar10")
SCALES = ("paper", "cpu")


@base.with_finetune
def get_config(preset: str = ""):
    """The config of a preset such as "no_adversary,no_patches"."""
    switches = [(part, f"no_{part}") for part in PARTS]
    *words, dataset, scale = base.choose(preset, *switches, DATASETS, SCALES)
    on = {part for part in PARTS if part in words}
    where = f"{dataset},{scale}"
    # hierarchical.py is the starting point, with the ladder on or off: the last rung holds the two views that all
    # components share.
    c = base.extend(__file__, "hierarchical.py", f"supcon,{where}" + ("" if "ladder" in on else ",two_view"))
    off = " ".join(w for w in words if w.startswith("no_"))
    c.name = base.title("all in one", (dataset, scale, off), ("", "paper", ""))
    c.eval.final = ("knn", "linear", "raw_pixels", "classifier", "explanation", "linear_fgsm", "calibration", "color")
    if dataset == "garments" or scale == "cpu":
        c.duration = "4 epochs, at least 200 steps"
        # At SupCon's own rate of 6e-3, SupCon with an adversary stays collapsed with some seeds.
        c.optimizer.lr = 3e-3

    if "patches" in on:  # first, so that patches are cut from views that are not masked yet
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
        # Backgrounds share the batch norm of view 1, which they would have been part of, as on the authors' two GPUs.
        c.passes = tuple(base.encode("view1", "background") if p.views == ("view1",) else p for p in c.passes)
        c.terms.supcon.background = of.terms.supcon.background
