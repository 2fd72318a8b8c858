"""Operations and layers that several networks share, each in the form that suits the backend (`jaxcl.models.cpu`)."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.models import cpu

Array = jax.Array

# Kaiming normal, fan-out, gain for ReLU.
conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def _depthwise(x: Array, kernel: Array, stride: int) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


relu = cpu.choose(cpu.relu, elsewhere=jax.nn.relu)
matmul = cpu.choose(cpu.matmul, elsewhere=jnp.matmul)
depthwise = cpu.choose(cpu.depthwise, elsewhere=_depthwise)


def conv(
    features: int, kernel: int, stride: int, dtype: Any, convolution: Callable | None = None, padding: int = 0
) -> nn.Module:
    """A convolution without bias, with symmetric padding (not "SAME", which differs at stride 2).

    Args:
      features: channels of the output.
      kernel: side of the window in pixels.
      stride: in pixels.
      dtype: of the computation; the kernel is float32.
      convolution: replaces `lax.conv_general_dilated`; None: that one.
      padding: pixels on each side; 0: half the window, which keeps the side at stride 1. Not of 1x1.
    """
    if kernel == 1:
        return MatmulConv(features, 1, stride, dtype)
    return nn.Conv(
        features,
        (kernel, kernel),
        (stride, stride),
        padding=padding or (kernel - 1) // 2,
        use_bias=False,
        kernel_init=conv_init,
        dtype=dtype,
        conv_general_dilated=convolution,
    )


class MatmulConv(nn.Module):
    """A convolution whose windows do not overlap, as one matrix product: 1x1 (any stride) and strided patches.

    The same function and the same kernel [kh,kw,in,out] as `nn.Conv` without padding. XLA does this to a 1x1
    convolution by itself on TPU and GPU; on CPU the product is faster than its convolution.
    """

    features: int
    kernel: int
    stride: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        N, H, W, C = x.shape
        k = self.kernel
        kernel = self.param("kernel", conv_init, (k, k, C, self.features), jnp.float32).astype(self.dtype)
        if k == 1:
            return matmul(x[:, :: self.stride, :: self.stride].astype(self.dtype), kernel[0, 0])
        h, w = H // k, W // k
        x = x[:, : h * k, : w * k].astype(self.dtype).reshape(N, h, k, w, k, C)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(N, h, w, k * k * C)
        return matmul(x, kernel.reshape(k * k * C, self.features))


class DepthwiseConv(nn.Module):
    """A 3x3 convolution of each channel by itself, padding 1, without bias.

    The same function and kernel [3,3,1,C] as `nn.Conv` with feature_group_count=C.
    """

    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", conv_init, (3, 3, 1, x.shape[-1]), jnp.float32).astype(self.dtype)
        return depthwise(x.astype(self.dtype), kernel, self.stride)


def remat_block(*args: Any) -> Callable[[nn.Module, Array], Array]:
    """(block, x) -> block(x, *args); the backward pass keeps only x and args, and computes the block again."""
    return nn.remat(lambda block, x: block(x, *args))
