"""Terms: losses on the named embeddings of one update. The equations are in jaxcl.losses; here they meet their inputs.

A term is called as `term(embeddings, label, axis_name=...)` and returns a scalar. With an axis name it runs on every
device of that mesh axis inside `jax.shard_map`: embeddings and labels are then the device's own rows of the global
batch, and the scalar is the loss of the global batch, the same everywhere. An `arange` that tells rows apart therefore
starts at the device's first row, and every sum over rows goes over the devices too.

A term is a frozen dataclass of its options, among them `views` and `weight` (its factor in the total). It says what
it `reads` (embeddings it cannot do without), what is `optional` (taken along once a stage makes it) and whether it
`needs_labels`, and `per_image` where it takes each image by itself, as no loss with negatives in the batch does. If it
reads the output of heads, views themselves or parts of memory, `heads`, `images` and `memories`
say so, and it is called with memory={name: what that part carries}. One that has negatives of an image's own says what
it compares by `similarities`, whose means and histograms are logged.
"""

from jaxcl.terms.base import Embedding
from jaxcl.terms.heads import CrossEntropy, Reconstruction
from jaxcl.terms.momentum import BYOL, MoCo, SimSiam
from jaxcl.terms.pairs import BarlowTwins, InstanceSpread, NTXent, OneWayInfoNCE
from jaxcl.terms.spread import Attract, ClassConditionalInfoNCE, Spread
from jaxcl.terms.supcon import SupCon

__all__ = [
    "BYOL",
    "Attract",
    "BarlowTwins",
    "ClassConditionalInfoNCE",
    "CrossEntropy",
    "Embedding",
    "InstanceSpread",
    "MoCo",
    "NTXent",
    "OneWayInfoNCE",
    "Reconstruction",
    "SimSiam",
    "Spread",
    "SupCon",
]
