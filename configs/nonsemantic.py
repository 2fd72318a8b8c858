"""Non-semantic negatives: each image is contrasted with its own patches or texture, on MoCo-v2, SimCLR or BYOL.

    python -m jaxcl.main --config=configs/nonsemantic.py:moco,patch

Presets follow the file name after a colon: one word for each of these axes, joined by commas. The first word of an
axis is its default.

    method      moco, simclr, byol
    negatives   patch: the view cut into random squares; texture: synthesised from two squares of the image, with the
                view's own augmentations; none: the method alone, as the baseline
    views       for SimCLR and BYOL. own: each view has its own negatives; shared: both views use those of view 1
    data set    garments, cifar10, tiny_imagenet, stl10, imagenet100
    scale       paper, cpu: as in the method's own file
    setting     published, ifm: for MoCo at paper scale, as in moco.py
    labels      labelled, unlabelled: as in the method's own file

    configs/nonsemantic.py                     MoCo, patches, garments on a CPU; 8 epochs, textured fills: 2 minutes on
                                               a core, linear 44.3 +- 1.9 %, 45.3 +- 2.0 without negatives
    configs/nonsemantic.py:simclr              not yet run
    configs/nonsemantic.py:byol,texture        not yet run
    configs/nonsemantic.py:cifar10,cpu         CIFAR-10 on a CPU; 8 epochs on one core: 5 minutes, linear probe 53.7 %
    configs/nonsemantic.py:cifar10             32 pixels; not yet run
    configs/nonsemantic.py:tiny_imagenet       64 pixels; not yet run
    configs/nonsemantic.py:stl10,unlabelled    96 pixels; not yet run
    configs/nonsemantic.py:imagenet100         not yet run; the authors: 79.35 % linear, 77.88 % without negatives
    configs/nonsemantic.py:imagenet100,ifm     not yet run; the authors: 81.49 % with a queue of 16,384, as here (81.18
                                               with 65,536); 80.00 % without negatives, with 65,536

Options:

    --config.terms.moco.alpha=3                        how strongly negatives repel (also terms.nt_xent, terms.byol)
    --config.stages[0].count=2                         negatives an image (also stages[1], if views have their own)
    --config.stages[0].min_patch, max_patch            size of patches: 16 to 72 of 224 pixels, in proportion elsewhere
    --config.terms.nt_xent.negatives_gradient=False    SimCLR's negatives receive no gradient (by default they do)
    --config.data.textures=FOLDER                      read textures that `python -m jaxcl textures` has built; by
                                                       default the update quilts them

TFDS's training split of STL-10 holds only the 5,000 labelled images. All 105,000 fit into one npz file, with label -1
for the unlabelled ones: --config.data.source=npz:PATH and the preset unlabelled. Everything that this file does not set
is as in moco.py, simclr.py and byol.py.

Source: Ge et al. 2021, arXiv 2110.14189. At paper scale their linear protocol is run too (linear_sgd: lr 10 in batches
of 128 for 60 epochs, a tenth after 30, 40 and 50). Their code covers MoCo only. For SimCLR and BYOL the form of the
loss and its alpha are our interpretation of the paper.
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
ALPHAS = {"moco": 2.0, "simclr": 2.0, "byol": 0.2}  # BYOL: above 1 the best prediction would point away from the target


@base.with_finetune
def get_config(preset: str = ""):
    """The config of a preset such as "byol,texture,cifar10"."""
    axes = (METHODS, NEGATIVES, OF, DATASETS, SCALES, SETTINGS, LABELS)
    method, negatives, of, dataset, scale, setting, labels = chosen = base.choose(preset, *axes)
    words = [dataset, scale, labels, *([setting] if method == "moco" else [])]  # only moco.py has a setting
    c = base.extend(__file__, f"{method}.py", ",".join(words))
    usual = ("", "", "own", "", "paper", "published", "labelled")
    c.name = base.title("nonsemantic", chosen, usual)
    if method == "simclr" and dataset == "tiny_imagenet" and scale == "paper":
        c.size, c.model.stem = 64, "cifar"  # simclr.py enlarges these images, as the baseline of CLAE does
    if dataset != "garments" and scale == "paper" and "linear_sgd" not in c.eval.final:
        c.eval.final += ("linear_sgd",)
        c.eval.sgd_protocol = "nonsemantic"
    if negatives == "none":
        return c

    # Source view -> name of its negatives. MoCo has only view 1 as a query.
    names = (
        {"view1": "negatives"} if method == "moco" or of == "shared" else {f"view{i}": f"negatives{i}" for i in (1, 2)}
    )
    c.stages = tuple(base.stage(f"{negatives}_negatives", of=view, into=name) for view, name in names.items())
    encoder = "" if method == "simclr" else "target"
    # Negatives are a separate pass, so that they do not enter the batch norm of a view.
    groups = dict(bn_groups=c.passes[1].bn_groups, shuffle=c.passes[1].shuffle)
    c.passes += (base.encode(*names.values(), encoder=encoder, **groups),)
    embeddings = tuple(f"{encoder}/{name}" if encoder else name for name in names.values())
    if method == "moco" and setting == "ifm" and scale == "paper" and dataset != "garments":
        c.memory.queue.length = 16384  # the best row of the authors' table
    term = c.terms[TERMS[method]]
    term.negatives = embeddings[0] if method == "moco" else embeddings
    term.alpha = ALPHAS[method]
    return c
