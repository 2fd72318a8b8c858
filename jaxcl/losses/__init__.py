"""Contrastive losses: pure functions of arrays. Imports jax, numpy and `jaxcl.errors` only.

Belongs here: equations that map arrays to a scalar, and the engine that computes row reductions at any batch size. Does
not: encoders, views, weights of terms, training (`jaxcl.models`, `jaxcl.augment`, `jaxcl.method`).

    from jaxcl import losses
    loss = losses.supcon(features, labels)                     # [N, V, D], [N]; any batch size
    with losses.limits(dense_logits=0, tile=1024): ...         # changes when "auto" is tiled, and the size of a tile

Layouts of the inputs (B or N samples, V views, D features, K queued keys, M negatives for each row):

    supcon                                      features [N, V, D], labels [N] or mask [N, N]
    attract, class_conditional_infonce, spread  views [V, B, D], labels [B]
    nt_xent                                     z1 [B, D], z2 [B, D]; negatives [B, M, D] or a pair of them
    one_way_infonce                             anchors [B, D], keys [B, D]
    instance_spread                             features [2B, D], first views, then second views
    moco                                        q [N, D], k [N, D], queue [D, K]; negatives [N, M, D]
    byol, simsiam                               p1, p2, z1, z2, each [N, D]
    barlow_twins                                z1 [N, D], z2 [N, D]
    reconstruction                              x_hat [N, ...], x [N, ...]
    cross_entropy                               logits [..., C], labels [...] or [..., C]

Samples first or views first: `jnp.moveaxis(features, 1, 0)` turns [N, V, D] into [V, N, D]. Every loss returns a
scalar, except `spread`, which returns (scalar, {"attract": ..., "repel": ...}).
"""

from jaxcl.losses.barlow_twins import barlow_twins
from jaxcl.losses.classification import cross_entropy
from jaxcl.losses.instance_spread import instance_spread
from jaxcl.losses.momentum import byol, moco, simsiam
from jaxcl.losses.nt_xent import nt_xent, one_way_infonce
from jaxcl.losses.plan import limits
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
