"""A loss of one's own. B batch (of this device), E embedding."""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from jaxcl.losses.common import total, unit
from jaxcl.method import PairTerm
from jaxcl.runtime.options import POSITIVE, Range


@dataclasses.dataclass(frozen=True)
class AlignUniform(PairTerm):
    """Alignment of the two views plus uniformity of each. Wang and Isola 2020, arXiv 2005.10242."""

    temperature: Annotated[float, POSITIVE] = 2.0  # t of the Gaussian potential
    uniformity: Annotated[float, Range(0)] = 1.0  # weight of the uniformity

    def __call__(self, e, label, *, memory=None, axis_name=None):
        a_BxE, b_BxE = (unit(z) for z in self.pair(e))
        distance, count = total((jnp.sum((a_BxE - b_BxE) ** 2), len(a_BxE)), axis_name)
        spread = sum(self._potential(z, axis_name) for z in (a_BxE, b_BxE)) / 2
        return distance / count + self.uniformity * spread

    def _potential(self, z_BxE, axis_name):
        """The log of the mean Gaussian potential over all pairs of different rows of the global batch."""
        others = z_BxE if axis_name is None else jax.lax.all_gather(z_BxE, axis_name, tiled=True)
        squared = 2 - 2 * z_BxE @ others.T
        # Each row meets itself once, at distance 0.
        potential, rows = total((jnp.sum(jnp.exp(-self.temperature * squared)) - len(z_BxE), len(z_BxE)), axis_name)
        return jnp.log(potential / (rows * (len(others) - 1)))
