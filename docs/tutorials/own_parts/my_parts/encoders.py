"""An encoder of one's own. N batch, H W image, C channels, D features."""

import dataclasses
from typing import Annotated, Any

import flax.linen as nn
import jax.numpy as jnp

from jaxcl.models import Encoder, EncoderOptions
from jaxcl.runtime.options import Range


class Plain(Encoder):
    """Strided 3x3 convolutions with ReLU, then global average pooling."""

    features: int = 32
    layers: int = 3
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train=False, where=None, norm_set=""):
        for _ in range(self.layers):
            x = nn.relu(nn.Conv(self.features, (3, 3), strides=2, dtype=self.dtype)(x))
        return x.mean((1, 2)).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class PlainOptions(EncoderOptions):
    """What a config says of it; head_features, dtype and others come with EncoderOptions."""

    width: Annotated[int, Range(1)] = 32
    layers: Annotated[int, Range(1)] = 3

    def make(self, dtype):
        return Plain(features=self.width, layers=self.layers, dtype=dtype)
