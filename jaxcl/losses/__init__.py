"""Contrastive losses: pure functions of arrays that import jax and nothing else of the library."""

from jaxcl.losses.classification import cross_entropy
from jaxcl.losses.supcon import supcon

__all__ = ["cross_entropy", "supcon"]
