"""A decoder from features to images: a ResNet-18 mirrored, or a narrower and shorter one.

N batch, D features, S side of the images, C their channels, g side of the first feature map, H of any, M its channels.

Source: the autoencoder of Chen et al. 2022, "Perfectly Balanced", arXiv 2204.07596, in the form of its released code.
papers/thanos.md 3.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcl.errors import UserError
from jaxcl.models.activations import relu
from jaxcl.models.batch_norm import BatchNorm, zero_rows
from jaxcl.models.heads import Dense, dense_init
from jaxcl.models.norms import MOMENTUM

Array = jax.Array

LATENT_SIDE = 4  # of the map the features become, whatever the image


def _grow(x: Array, factor: int) -> Array:
    """Nearest-neighbour upsampling of [N,H,W,M]."""
    return x if factor == 1 else x.repeat(factor, axis=1).repeat(factor, axis=2)


def _nearest(x: Array, side: int) -> Array:
    """[N,H,H,M] -> [N,side,side,M]; row i is row floor(i H / side), as torch counts (jax would round i + 1/2)."""
    if x.shape[1] == side:
        return x
    rows = jnp.arange(side) * x.shape[1] // side
    return x[:, rows][:, :, rows]


def _pixels(x: Array, patch: int) -> Array:
    """[N,H,H,patch patch C] -> [N,patch H,patch H,C]: each place becomes its square of pixels, row by row."""
    N, H, _, M = x.shape
    x = x.reshape(N, H, H, patch, patch, M // patch**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(N, H * patch, H * patch, -1)


class DecoderBlock(nn.Module):
    """3x3 - BN - ReLU - [upsampling] - 3x3 - BN, plus shortcut, ReLU; the shortcut upsamples and projects likewise."""

    planes: int
    factor: int = 1
    dtype: Any = jnp.float32
    momentum: float = MOMENTUM
    convolution: Callable | None = None

    @nn.compact
    def __call__(self, x: Array, mode: dict) -> Array:
        def conv(features: int, kernel: int, name: str) -> nn.Module:
            return _conv(features, kernel, self.dtype, self.convolution, name)

        def norm(name: str) -> Callable[[Array], Array]:
            made = BatchNorm(momentum=self.momentum, epsilon=1e-5, dtype=self.dtype, name=name)
            return lambda y: made(y, **mode)

        y = relu(norm("bn1")(conv(x.shape[-1], 3, "conv1")(x)))
        y = norm("bn2")(conv(self.planes, 3, "conv2")(_grow(y, self.factor)))
        if self.factor != 1 or x.shape[-1] != self.planes:
            # The original upsamples first. A copy of a pixel changes neither a 1x1 convolution nor a batch's mean and
            # variance, so this is the same at a fourth of the cost.
            x = _grow(norm("shortcut_bn")(conv(self.planes, 1, "shortcut_conv")(x)), self.factor)
        return relu(y + x)


def _conv(features: int, kernel: int, dtype: Any, convolution: Callable | None, name: str) -> nn.Module:
    return nn.Conv(
        features,
        (kernel, kernel),
        padding=(kernel - 1) // 2,
        use_bias=False,
        kernel_init=dense_init,
        dtype=dtype,
        conv_general_dilated=convolution,
        name=name,
    )


class Decoder(nn.Module):
    """Features [N,D] -> images [N,S,S,C], float32 at least, of any range (no activation at the end).

    Each stage but the last doubles the side, from g = floor(S / growth), growth = patch * 2**(stages - 1). A side S
    that is no multiple of that is reached by a bilinear resize of what comes out below it, as for the 28 pixels of
    MNIST (3, then 24 with four stages). One-channel images are the mean of three channels, as there. With a patch above
    1 the last map is that many times smaller, and a linear layer makes a square of pixels of each of its places, as a
    patch stem reads them: most of the cost of a decoder is in its largest maps.

    Errors: UserError for widths, blocks or sizes that cannot be; when the module is made.
    """

    size: int  # S
    channels: int = 3  # C
    widths: Sequence[int] = (512, 256, 128, 64, 64)  # channels of the first map, then after each stage
    blocks: int = 2  # residual blocks of a stage; the first one upsamples
    patch: int = 1  # side of the square of pixels that one place of the last map becomes
    dtype: Any = jnp.float32
    momentum: float = MOMENTUM
    convolution: Callable | None = None  # as of a ResNet

    def __post_init__(self):
        widths = tuple(self.widths)
        if len(widths) < 2 or not all(isinstance(w, int) and w >= 1 for w in widths):
            raise UserError(f"decoder: widths is {widths}; expected the channels before, between and after the stages")
        for name in ("channels", "blocks", "patch"):
            if not getattr(self, name) >= 1:
                raise UserError(f"decoder: {name} is {getattr(self, name)}; expected at least 1")
        if self.size < self.growth:
            patches = f" of patches of {self.patch}" if self.patch > 1 else ""
            raise UserError(
                f"decoder: {len(widths) - 1} stages{patches} make images of at least {self.growth} pixels, and these "
                f"have {self.size}; give fewer widths"
            )
        super().__post_init__()

    @property
    def growth(self) -> int:
        """By how much all stages together, and the patches, enlarge the first map."""
        return self.patch * 2 ** (len(tuple(self.widths)) - 2)

    @nn.compact
    def __call__(self, latent: Array, train: bool = False, where: Array | None = None) -> Array:
        """latent [N,D]; `where` [N] bool: rows that count in the batch statistics."""
        where = where if train else None
        mode = dict(use_running_average=not train, where=where)
        first, *widths = self.widths
        x = zero_rows(Dense(LATENT_SIDE**2 * first, self.dtype, name="dense")(latent.astype(self.dtype)), where)
        x = _nearest(x.reshape(-1, LATENT_SIDE, LATENT_SIDE, first), self.size // self.growth)
        same = dict(dtype=self.dtype, momentum=self.momentum, convolution=self.convolution)
        for i, planes in enumerate(widths):
            for j in range(self.blocks):
                grows = j == 0 and i < len(widths) - 1
                x = DecoderBlock(planes, 2 if grows else 1, **same, name=f"stage{i + 1}_block{j + 1}")(x, mode)
        channels = 3 if self.channels == 1 else self.channels
        if self.patch == 1:
            x = _conv(channels, 3, self.dtype, self.convolution, "out_conv")(x)
        else:
            x = _pixels(Dense(self.patch**2 * channels, self.dtype, name="out_patch")(x), self.patch)
        x = x.astype(jnp.promote_types(self.dtype, jnp.float32))
        if self.channels == 1:
            x = x.mean(-1, keepdims=True)
        N, side, _, C = x.shape
        return x if side == self.size else jax.image.resize(x, (N, self.size, self.size, C), "bilinear")
