"""Negatives without meaning: each image has to be told apart from its own texture, on MoCo-v2, SimCLR or BYOL.

    python -m jaxcl.main --config=configs/nonsemantic.py:moco,patch

Presets, one word an axis, joined by commas: the method (moco, simclr, byol), the negatives (patch: the view cut into
random squares; texture: synthesised from two squares of the image, with the view's own augmentations; none: the method
itself, to compare with), for SimCLR and BYOL whether each view has its own (own) or both view 1's (shared), a data set
(garments, cifar10, tiny_imagenet, stl10, imagenet100), a scale (paper, cpu), for MoCo a setting at paper scale
(published, ifm), and what labels are for (labelled, unlabelled).

    configs/nonsemantic.py                     MoCo, patches, garments on a CPU; 8 epochs, textured fills: 2 minutes on
                                               a core, linear 44.3 +- 1.9 %, 45.3 +- 2.0 without negatives
    configs/nonsemantic.py:simclr              not yet run
    configs/nonsemantic.py:byol,texture        not yet run
    configs/nonsemantic.py:cifar10,cpu         CIFAR-10 on a CPU; 8 epochs on one core: 5 minutes, linear probe 53.7 %
    configs/nonsemantic.py:cifar10             32 pixels; not yet run
    configs/nonsemantic.py:tiny_imagenet       64 pixels; not yet run
    configs/nonsemantic.py:stl10,unlabelled    96 pixels; not yet run
    configs/nonsemantic.py:imagenet100         not yet run; the authors: 79.35 % linear, 77.88 % without
    configs/nonsemantic.py:imagenet100,ifm     not yet run; the authors: 81.18 % and 80.00 %

How strongly they repel: --config.terms.moco.alpha=3 (terms.nt_xent, terms.byol). How many an image:
--config.stages[0].count=2 (and stages[1], where each view has its own). Patches are 16 to 72 of 224 pixels, in
proportion at other sizes: --config.stages[0].min_patch, max_patch. SimCLR's negatives receive gradient unless
--config.terms.nt_xent.negatives_gradient=False. Texture is quilted in the update, or read from a set that
jaxcl textures has built: --config.data.textures=FOLDER. Of STL-10, TFDS's training part is the 5,000 labelled
images; all 105,000 fit one npz, labels -1 for the others: --config.data.source=npz:PATH and unlabelled. Everything not
said here is as in moco.py, simclr.py, byol.py.

Source: Ge et al. 2021, arXiv 2110.14189. Their code is of MoCo only: for SimCLR and BYOL the form of the loss and its
alpha are this library's reading.
"""

from jaxcl import config as base

METHODS = ("moco", "simclr", "byol")
NEGATIVES = ("patch", "texture", "none")
OF = ("own", "shared")
DATASETS = ("garments", "cifar10", "tiny_imagenet", "stl10", "imagenet100")
SCALES = ("paper", "cpu")
SETTINGS = ("published", "ifm")
LABELS = ("labelled", "unlabelled")
TERMS = {"moco": "moco", "simclr": "nt_xent", "byol": "byol"}
ALPHAS = {"moco": 2.0, "simclr": 2.0, "byol": 0.2}  # above 1, BYOL's best prediction would point away from its target


def get_config(preset: str = ""):
    """The config of a preset such as "byol,texture,cifar10"."""
    axes = (METHODS, NEGATIVES, OF, DATASETS, SCALES, SETTINGS, LABELS)
    method, negatives, of, dataset, scale, setting, labels = chosen = base.choose(preset, *axes)
    words = [dataset, scale, labels, *([setting] if method == "moco" else [])]  # a setting of MoCo's only
    c = base.extend(__file__, f"{method}.py", ",".join(words))
    usual = ("", "", "own", "", "paper", "published", "labelled")
    c.name = base.title("nonsemantic", chosen, usual)
    if method == "simclr" and dataset == "tiny_imagenet" and scale == "paper":
        c.size, c.model.stem = 64, "cifar"  # which the baseline of CLAE enlarges
    if negatives == "none":
        return c

    # What of which view: MoCo's only query is view 1.
    names = (
        {"view1": "negatives"} if method == "moco" or of == "shared" else {f"view{i}": f"negatives{i}" for i in (1, 2)}
    )
    c.stages = tuple(base.stage(f"{negatives}_negatives", of=view, into=name) for view, name in names.items())
    encoder = "" if method == "simclr" else "target"
    # A batch of their own: they enter no view's batch norm.
    groups = dict(bn_groups=c.passes[1].bn_groups, shuffle=c.passes[1].shuffle)
    c.passes += (base.encode(*names.values(), encoder=encoder, **groups),)
    embeddings = tuple(f"{encoder}/{name}" if encoder else name for name in names.values())
    term = c.terms[TERMS[method]]
    term.negatives = embeddings[0] if method == "moco" else embeddings
    term.alpha = ALPHAS[method]
    return c
