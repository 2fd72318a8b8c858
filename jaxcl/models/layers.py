"""Operations and layers that several networks share, each in the form that suits the backend (`jaxcl.models.cpu`)."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.models import cpu

Array = jax.Array

# Kaiming normal, fan-out, gain for ReLU.
conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def _depthwise(x: Array, kernel: Array, stride: int, padding: cpu.Pads = ((1, 1), (1, 1))) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


relu = cpu.choose(cpu.relu, elsewhere=jax.nn.relu)
matmul = cpu.choose(cpu.matmul, elsewhere=jnp.matmul)
depthwise = cpu.choose(cpu.depthwise, elsewhere=_depthwise)
depthwise_rows = cpu.choose(cpu.depthwise_rows, elsewhere=_depthwise)


def relu6(x: Array) -> Array:
    """x between 0 and 6, without gradient at either end, as in torch; two selections, which XLA fuses on a CPU too."""
    return jnp.where(x <= 0, 0, jnp.where(x >= 6, 6, x))


def pads(shape: tuple[int, ...], kernel: int, stride: int, padding: str) -> cpu.Pads:
    """Pixels around images [N,H,W,...]: ((top, bottom), (left, right)).

    Args:
      shape: of the images.
      kernel: side of the window in pixels.
      stride: in pixels.
      padding: "symmetric", half the window on each side, as in torch; or "same", as in TensorFlow, the fewest with
        which the output has a stride-th of the pixels, an odd one at the end.
    """
    if padding == "symmetric":
        return (((kernel - 1) // 2,) * 2,) * 2
    totals = [max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in shape[1:3]]
    return tuple((total // 2, total - total // 2) for total in totals)


def kept_paths(key: Array | None, rates: Sequence[float], N: int) -> list[Array | None]:
    """Draws which images keep each of several branches: [N] bool for each rate, or None where nothing is dropped.

    key: None: nothing is dropped. There is one draw of the global shape, so it does not depend on the devices.
    """
    if key is None or not any(rates):
        return [None] * len(rates)
    kept = jax.random.uniform(key, (N, len(rates))) >= jnp.asarray(rates)
    return [kept[:, i] if rate else None for i, rate in enumerate(rates)]


def drop_path(x: Array, rate: float, keep: Array | None) -> Array:
    """x [N,...] with zeros for the images that are not kept, the others divided by 1 - rate (arXiv 1603.09382)."""
    return x if keep is None else jnp.where(keep.reshape(-1, *(1,) * (x.ndim - 1)), x / (1 - rate), 0)


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
    use_bias: bool = False
    init: Callable = conv_init

    @nn.compact
    def __call__(self, x: Array) -> Array:
        N, H, W, C = x.shape
        k = self.kernel
        kernel = self.param("kernel", self.init, (k, k, C, self.features), jnp.float32).astype(self.dtype)
        if k == 1:
            y = matmul(x[:, :: self.stride, :: self.stride].astype(self.dtype), kernel[0, 0])
        else:
            h, w = H // k, W // k
            x = x[:, : h * k, : w * k].astype(self.dtype).reshape(N, h, k, w, k, C)
            x = x.transpose(0, 1, 3, 2, 4, 5).reshape(N, h, w, k * k * C)
            y = matmul(x, kernel.reshape(k * k * C, self.features))
        if not self.use_bias:
            return y
        return y + self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32).astype(self.dtype)


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


class WideDepthwiseConv(nn.Module):
    """A convolution of each channel by itself, of any kernel [k,k,1,C] and padding; for large maps."""

    kernel: int
    stride: int = 1
    padding: str = "symmetric"  # see `pads`
    use_bias: bool = False
    dtype: Any = jnp.float32
    init: Callable = conv_init

    @nn.compact
    def __call__(self, x: Array) -> Array:
        k, C = self.kernel, x.shape[-1]
        kernel = self.param("kernel", self.init, (k, k, 1, C), jnp.float32).astype(self.dtype)
        y = depthwise_rows(x.astype(self.dtype), kernel, self.stride, pads(x.shape, k, self.stride, self.padding))
        if not self.use_bias:
            return y
        return y + self.param("bias", nn.initializers.zeros, (C,), jnp.float32).astype(self.dtype)


def remat_block(*args: Any) -> Callable[[nn.Module, Array], Array]:
    """(block, x) -> block(x, *args); the backward pass keeps only x and args, and computes the block again."""
    return nn.remat(lambda block, x: block(x, *args))
