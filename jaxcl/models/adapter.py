"""Stage adapters: bring the map of an earlier stage of a network to the size and width of its last one.

N batch, h w height and width of a map, M channels of a stage's output, c its planes, D features of the network.

Source: Zhang and Ma 2022, arXiv 2206.00227, from its description: an attention gate, and separable convolutions that
reduce the map as the network itself would.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcl.models.batch_norm import zero_rows
from jaxcl.models.layers import DepthwiseConv, MatmulConv, relu
from jaxcl.models.norms import MOMENTUM, SET_MOMENTUM, add_norms, apply_norm

Array = jax.Array


class SepConv(nn.Module):
    """Depthwise 3x3 (stride) - 1x1 - BN - ReLU - depthwise 3x3 - 1x1 to `features` - BN - ReLU."""

    in_features: int
    features: int
    stride: int
    norm: str = "batch"
    dtype: Any = jnp.float32
    momentum: float = MOMENTUM
    norm_sets: Sequence[str] = ()
    norm_set_momentum: float = SET_MOMENTUM

    def setup(self):
        self.depthwise1 = DepthwiseConv(self.stride, self.dtype)
        self.pointwise1 = MatmulConv(self.in_features, 1, 1, self.dtype)
        add_norms(self, "bn1", self.in_features)
        self.depthwise2 = DepthwiseConv(1, self.dtype)
        self.pointwise2 = MatmulConv(self.features, 1, 1, self.dtype)
        add_norms(self, "bn2", self.features)

    def __call__(self, x: Array, mode: dict) -> Array:
        x = relu(apply_norm(self, "bn1", self.pointwise1(self.depthwise1(x)), mode))
        return relu(apply_norm(self, "bn2", self.pointwise2(self.depthwise2(x)), mode))


class Adapter(nn.Module):
    """A stage's map [N,h,w,M] -> features [N,D]: squeeze, gate, reduce to the last stage's planes, expand, pool."""

    planes: Sequence[int]  # c of this stage and of the later ones
    strides: Sequence[int]  # of the later stages
    features: int  # D
    norm: str = "batch"
    dtype: Any = jnp.float32
    momentum: float = MOMENTUM
    norm_sets: Sequence[str] = ()
    norm_set_momentum: float = SET_MOMENTUM

    def setup(self):
        own = ("norm", "dtype", "momentum", "norm_sets", "norm_set_momentum")
        block = partial(SepConv, **{k: getattr(self, k) for k in own})
        c = self.planes[0]
        self.squeeze = MatmulConv(c, 1, 1, self.dtype)
        add_norms(self, "squeeze_bn", c)
        self.gate = block(c, c, 2)
        add_norms(self, "gate_bn", c)
        self.down = [
            block(a, b, stride) for a, b, stride in zip(self.planes[:-1], self.planes[1:], self.strides, strict=True)
        ]
        self.expand = MatmulConv(self.features, 1, 1, self.dtype)
        add_norms(self, "expand_bn", self.features)

    def __call__(self, x: Array, train: bool = False, where: Array | None = None, norm_set: str = "") -> Array:
        """where: [N] bool, rows that count in the batch statistics; norm_set: the set of batch norms to use."""
        mode = {}
        if self.norm == "batch":
            mode = dict(use_running_average=not train, where=where if train else None, norm_set=norm_set)
        x = zero_rows(x, mode.get("where"))
        x = relu(apply_norm(self, "squeeze_bn", self.squeeze(x), mode))
        # To the size of the map. The authors double the mask, which does not fit a map with an odd side.
        mask = self.gate(x, mode)
        mask = jax.image.resize(mask, x.shape, "bilinear")
        x = nn.sigmoid(apply_norm(self, "gate_bn", mask, mode)) * x
        for block in self.down:
            x = block(x, mode)
        x = relu(apply_norm(self, "expand_bn", self.expand(x), mode))
        return x.astype(jnp.promote_types(x.dtype, jnp.float32)).mean((1, 2))
