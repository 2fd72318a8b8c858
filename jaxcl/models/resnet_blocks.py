"""The residual blocks of a ResNet, and the published sizes and stems.

N batch, h w M height, width and channels of a feature map.

Source: He et al. 2016, arXiv 1512.03385, in the form of the SupCon and ExCon code: symmetric padding 1 for 3x3 and 0
for 1x1 convolutions, the stride on the first 3x3 of a basic block and on the 3x3 of a bottleneck.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcl.models.layers import conv, relu
from jaxcl.models.norms import MOMENTUM, SET_MOMENTUM, add_norms, apply_norm

Array = jax.Array

DEPTHS = {  # depth -> block, blocks in each stage
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
}
STEMS = ("cifar", "imagenet", "patch2", "patch4", "patch8")


class BasicBlock(nn.Module):
    """3x3 - BN - ReLU - 3x3 - BN, plus shortcut, ReLU."""

    in_features: int
    planes: int
    stride: int = 1
    dtype: Any = jnp.float32
    norm: str = "batch"
    momentum: float = MOMENTUM  # of the running statistics of the clean set
    norm_sets: Sequence[str] = ()  # names of further sets of batch norms
    norm_set_momentum: float = SET_MOMENTUM  # of their running statistics
    convolution: Callable | None = None  # see `layers.conv`
    zero_init: bool = False  # the scale of the last norm starts at 0, so that the block starts as its shortcut
    expansion = 1

    def setup(self):
        make = partial(conv, dtype=self.dtype, convolution=self.convolution)
        self.conv1 = make(self.planes, 3, self.stride)
        add_norms(self, "bn1", self.planes)
        self.conv2 = make(self.planes, 3, 1)
        add_norms(self, "bn2", self.planes, self.zero_init)
        self.projects = self.stride != 1 or self.in_features != self.planes
        if self.projects:
            self.shortcut_conv = make(self.planes, 1, self.stride)
            add_norms(self, "shortcut_bn", self.planes)

    def to_tap(self, x: Array, mode: dict) -> Array:
        """The raw output of the last convolution: before its batch norm, the residual sum and the ReLU."""
        return self.conv2(relu(apply_norm(self, "bn1", self.conv1(x), mode)))

    def from_tap(self, a: Array, x: Array, mode: dict) -> Array:
        y = apply_norm(self, "bn2", a, mode)
        shortcut = apply_norm(self, "shortcut_bn", self.shortcut_conv(x), mode) if self.projects else x
        return relu(y + shortcut)

    def __call__(self, x: Array, mode: dict) -> Array:
        return self.from_tap(self.to_tap(x, mode), x, mode)


class Bottleneck(nn.Module):
    """1x1 - BN - ReLU - 3x3(stride) - BN - ReLU - 1x1 (four times the planes) - BN, plus shortcut, ReLU."""

    in_features: int
    planes: int
    stride: int = 1
    dtype: Any = jnp.float32
    norm: str = "batch"
    momentum: float = MOMENTUM  # of the running statistics of the clean set
    norm_sets: Sequence[str] = ()  # names of further sets of batch norms
    norm_set_momentum: float = SET_MOMENTUM  # of their running statistics
    convolution: Callable | None = None  # see `layers.conv`
    zero_init: bool = False  # the scale of the last norm starts at 0, so that the block starts as its shortcut
    expansion = 4

    def setup(self):
        make = partial(conv, dtype=self.dtype, convolution=self.convolution)
        self.conv1 = make(self.planes, 1, 1)
        add_norms(self, "bn1", self.planes)
        self.conv2 = make(self.planes, 3, self.stride)
        add_norms(self, "bn2", self.planes)
        self.conv3 = make(4 * self.planes, 1, 1)
        add_norms(self, "bn3", 4 * self.planes, self.zero_init)
        self.projects = self.stride != 1 or self.in_features != 4 * self.planes
        if self.projects:
            self.shortcut_conv = make(4 * self.planes, 1, self.stride)
            add_norms(self, "shortcut_bn", 4 * self.planes)

    def to_tap(self, x: Array, mode: dict) -> Array:
        """The raw output of the third convolution, before its batch norm."""
        y = relu(apply_norm(self, "bn1", self.conv1(x), mode))
        return self.conv3(relu(apply_norm(self, "bn2", self.conv2(y), mode)))

    def from_tap(self, a: Array, x: Array, mode: dict) -> Array:
        y = apply_norm(self, "bn3", a, mode)
        shortcut = apply_norm(self, "shortcut_bn", self.shortcut_conv(x), mode) if self.projects else x
        return relu(y + shortcut)

    def __call__(self, x: Array, mode: dict) -> Array:
        return self.from_tap(self.to_tap(x, mode), x, mode)


BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}
BLOCK_OPTIONS = ("dtype", "norm", "momentum", "norm_sets", "norm_set_momentum", "convolution", "zero_init")
