"""Contrastive losses: pure functions of arrays that import jax and nothing else of the library.

from jaxcl import losses
loss = losses.supcon(features, labels)                     # [N, V, D], [N]; any size of batch
with losses.limits(dense_logits=0, tile=1024): ...         # other sizes than "auto" would choose
"""

from jaxcl.losses.barlow_twins import barlow_twins
from jaxcl.losses.classification import cross_entropy
from jaxcl.losses.engine import limits
from jaxcl.losses.instance_spread import instance_spread
from jaxcl.losses.momentum import byol, moco, simsiam
from jaxcl.losses.nt_xent import nt_xent, one_way_infonce
from jaxcl.losses.reconstruction import reconstruction
from jaxcl.losses.spread import attract, class_conditional_infonce, spread
from jaxcl.losses.supcon import supcon

__all__ = [
    "attract",
    "barlow_twins",
    "byol",
    "class_conditional_infonce",
    "cross_entropy",
    "instance_spread",
    "limits",
    "moco",
    "nt_xent",
    "one_way_infonce",
    "reconstruction",
    "simsiam",
    "spread",
    "supcon",
]
