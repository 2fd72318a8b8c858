"""The blocks of EfficientNet-Lites, and how many of which width each variant has.

N batch, H W image, C image channels.

Source: Tan and Le 2019, arXiv 1905.11946, in the "lite" form of its authors' code, where stem and head keep their width
and the first and last stage their number of blocks. Inverted bottlenecks: Sandler et al. 2018, arXiv 1801.04381.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.models.layers import MatmulConv, WideDepthwiseConv, conv_init, drop_path, pads, relu6
from jaxcl.models.norms import MOMENTUM, SET_MOMENTUM, add_norms, apply_norm

Array = jax.Array


class Stage(NamedTuple):
    """A stage of the smallest network."""

    blocks: int
    width: int
    kernel: int
    stride: int
    expansion: int


STAGES = (
    Stage(1, 16, 3, 1, 1),
    Stage(2, 24, 3, 2, 6),
    Stage(2, 40, 5, 2, 6),
    Stage(3, 80, 3, 2, 6),
    Stage(3, 112, 5, 1, 6),
    Stage(4, 192, 5, 2, 6),
    Stage(1, 320, 3, 1, 6),
)
FACTORS = {  # of each variant: on widths, and on numbers of blocks
    "lite0": (1.0, 1.0),
    "lite1": (1.0, 1.1),
    "lite2": (1.1, 1.2),
    "lite3": (1.2, 1.4),
    "lite4": (1.4, 1.8),
}


def sizes_of(variant: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """-> (blocks, width) of each stage. Widths are multiples of 8, at least 0.9 of what the factor says."""
    wider, deeper = FACTORS[variant]

    def width(given: int) -> int:
        near = max(8, int(wider * given + 4) // 8 * 8)
        return near + 8 if near < 0.9 * wider * given else near

    last = len(STAGES) - 1
    blocks = (s.blocks if i in (0, last) else math.ceil(deeper * s.blocks) for i, s in enumerate(STAGES))
    return tuple(blocks), tuple(width(s.width) for s in STAGES)


NORM_FIELDS = ("dtype", "norm", "momentum", "norm_sets", "norm_set_momentum")


class MBConv(nn.Module):
    """1x1 (wider) - BN - ReLU6 - depthwise (stride) - BN - ReLU6 - 1x1 - BN, plus x where the shapes are those of x."""

    in_features: int
    features: int
    kernel: int
    stride: int
    expansion: int
    padding: str = "same"
    epsilon: float = 1e-3
    drop_path: float = 0.0
    dtype: Any = jnp.float32
    norm: str = "batch"
    momentum: float = MOMENTUM
    norm_sets: Sequence[str] = ()
    norm_set_momentum: float = SET_MOMENTUM

    def setup(self):
        wide = self.in_features * self.expansion
        if self.expansion != 1:
            self.expand_conv = MatmulConv(wide, 1, 1, self.dtype)
            add_norms(self, "expand_bn", wide, epsilon=self.epsilon)
        self.depthwise_conv = WideDepthwiseConv(self.kernel, self.stride, self.padding, dtype=self.dtype)
        add_norms(self, "depthwise_bn", wide, epsilon=self.epsilon)
        self.project_conv = MatmulConv(self.features, 1, 1, self.dtype)
        add_norms(self, "project_bn", self.features, epsilon=self.epsilon)

    def __call__(self, x: Array, mode: dict, keep: Array | None = None) -> Array:
        """keep: [N] bool, the images that keep this branch; None: all."""
        y = x
        if self.expansion != 1:
            y = relu6(apply_norm(self, "expand_bn", self.expand_conv(y), mode))
        y = relu6(apply_norm(self, "depthwise_bn", self.depthwise_conv(y), mode))
        y = apply_norm(self, "project_bn", self.project_conv(y), mode)
        return x + drop_path(y, self.drop_path, keep) if y.shape == x.shape else y


class StemConv(nn.Module):
    """A 3x3 convolution with stride 2, without bias."""

    features: int
    padding: str
    dtype: Any = jnp.float32
    convolution: Callable | None = None  # see `Encoder.with_convolution`

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", conv_init, (3, 3, x.shape[-1], self.features), jnp.float32)
        return (self.convolution or lax.conv_general_dilated)(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            (2, 2),
            pads(x.shape, 3, 2, self.padding),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
