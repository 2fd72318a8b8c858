"""A decoder from features to images: a mirrored ResNet-18, or a narrower and shorter one.

N batch, D features, S C side and channels of the images, g side of the first feature map, H M side and channels of any.

Source: the autoencoder of Chen et al. 2022, "Perfectly Balanced", arXiv 2204.07596, in the form of its released code.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcl.errors import UserError
from jaxcl.models.batch_norm import BatchNorm, zero_rows
from jaxcl.models.heads import Dense, dense_init
from jaxcl.models.layers import relu
from jaxcl.models.norms import MOMENTUM

Array = jax.Array

LATENT_SIDE = 4  # side of the map that the features become, for any image size


def _grow(x: Array, factor: int) -> Array:
    """Nearest-neighbour upsampling of [N,H,W,M]."""
    return x if factor == 1 else x.repeat(factor, axis=1).repeat(factor, axis=2)


def _nearest(x: Array, side: int) -> Array:
    """[N,H,H,M] -> [N,side,side,M] by nearest neighbours; row i is row floor(i H / side), as in torch."""
    if x.shape[1] == side:
        return x
    # jax.image.resize would take the row nearest to the centre, i + 1/2.
    rows = jnp.arange(side) * x.shape[1] // side
    return x[:, rows][:, :, rows]


def _pixels(x: Array, patch: int) -> Array:
    """[N,H,H,patch patch C] -> [N,patch H,patch H,C]: each position becomes a square of pixels, row by row."""
    N, H, _, M = x.shape
    x = x.reshape(N, H, H, patch, patch, M // patch**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(N, H * patch, H * patch, -1)


class DecoderBlock(nn.Module):
    """3x3 - BN - ReLU - [upsampling] - 3x3 - BN, plus shortcut, ReLU; the shortcut upsamples and projects too."""

    planes: int
    factor: int = 1
    dtype: Any = jnp.float32
    momentum: float = MOMENTUM

    @nn.compact
    def __call__(self, x: Array, mode: dict) -> Array:
        def conv(features: int, kernel: int, name: str) -> nn.Module:
            return _conv(features, kernel, self.dtype, name)

        def norm(name: str) -> Callable[[Array], Array]:
            made = BatchNorm(momentum=self.momentum, epsilon=1e-5, dtype=self.dtype, name=name)
            return lambda y: made(y, **mode)

        y = relu(norm("bn1")(conv(x.shape[-1], 3, "conv1")(x)))
        y = norm("bn2")(conv(self.planes, 3, "conv2")(_grow(y, self.factor)))
        if self.factor != 1 or x.shape[-1] != self.planes:
            # The original upsamples first. Copies of pixels change neither a 1x1 convolution nor the mean and variance
            # of a batch, so this order gives the same at a quarter of the cost.
            x = _grow(norm("shortcut_bn")(conv(self.planes, 1, "shortcut_conv")(x)), self.factor)
        return relu(y + x)


def _conv(features: int, kernel: int, dtype: Any, name: str) -> nn.Module:
    return nn.Conv(
        features,
        (kernel, kernel),
        padding=(kernel - 1) // 2,
        use_bias=False,
        kernel_init=dense_init,
        dtype=dtype,
        name=name,
    )


class Decoder(nn.Module):
    """Features [N,D] -> images [N,S,S,C], float32 at least, of any range (there is no activation at the end).

    Each stage but the last doubles the side, from g = floor(S / growth), growth = patch * 2**(stages - 1). If S is no
    multiple of the growth, a bilinear resize enlarges the smaller result to S: for the 28 pixels of MNIST, 3 becomes 24
    in four stages. One-channel images are the mean of three channels, as in the original. With a patch above 1 the last
    map is smaller by that factor, and a linear layer turns each of its positions into a square of pixels, the inverse
    of a patch stem. That saves most of the cost, which is in the largest maps.

    Raises:
      UserError: widths, blocks or sizes are impossible; when the module is made.
    """

    size: int  # S
    channels: int = 3  # C
    widths: Sequence[int] = (512, 256, 128, 64, 64)  # channels of the first map, then after each stage
    blocks: int = 2  # residual blocks of a stage; the first one upsamples
    patch: int = 1  # side of the square of pixels that one position of the last map becomes
    dtype: Any = jnp.float32
    momentum: float = MOMENTUM

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
                f"decoder: {len(widths) - 1} stages{patches} make images of at least {self.growth} pixels, but these "
                f"have {self.size}; give fewer widths"
            )
        super().__post_init__()

    @property
    def growth(self) -> int:
        """The factor by which all stages and the patches together enlarge the first map."""
        return self.patch * 2 ** (len(tuple(self.widths)) - 2)

    @nn.compact
    def __call__(self, latent: Array, train: bool = False, where: Array | None = None) -> Array:
        """latent [N,D] -> images [N,S,S,C]. where: [N] bool, rows that count in the batch statistics."""
        where = where if train else None
        mode = dict(use_running_average=not train, where=where)
        first, *widths = self.widths
        x = zero_rows(Dense(LATENT_SIDE**2 * first, self.dtype, name="dense")(latent.astype(self.dtype)), where)
        x = _nearest(x.reshape(-1, LATENT_SIDE, LATENT_SIDE, first), self.size // self.growth)
        same = dict(dtype=self.dtype, momentum=self.momentum)
        for i, planes in enumerate(widths):
            for j in range(self.blocks):
                grows = j == 0 and i < len(widths) - 1
                x = DecoderBlock(planes, 2 if grows else 1, **same, name=f"stage{i + 1}_block{j + 1}")(x, mode)
        channels = 3 if self.channels == 1 else self.channels
        if self.patch == 1:
            x = _conv(channels, 3, self.dtype, "out_conv")(x)
        else:
            x = _pixels(Dense(self.patch**2 * channels, self.dtype, name="out_patch")(x), self.patch)
        x = x.astype(jnp.promote_types(self.dtype, jnp.float32))
        if self.channels == 1:
            x = x.mean(-1, keepdims=True)
        N, side, _, C = x.shape
        return x if side == self.size else jax.image.resize(x, (N, self.size, self.size, C), "bilinear")
