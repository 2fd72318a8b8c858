"""Convolutions whose gradients a CPU computes fast: inside a loop, and of large batches.

XLA on CPU puts convolutions into the one layout it has fast code for (NHWC images, HWIO kernel) only outside of loops.
Inside one the gradients, which JAX writes in other layouts, take a slow path: 18 to 70 times slower for the kernel's, 2
to 30 times for the image's, measured with jax 0.10.2 on 3x3 kernels. In `loop_conv` they are in that layout from the
start.

The kernel's gradient is to XLA a convolution with the batch as its channels, and the more rows the slower for each: in
parts of 16 rows (`parted_conv`) it takes 0.5 to 0.9 of the time (3x3 kernels, 32 to 256 channels, 4 to 32 pixels, 128
and 384 rows, two cores, jax 0.10.2).

On other accelerators use `lax.conv_general_dilated`, whose form of the gradients they recognise; and where a batch is
split over devices, for each part would lie on one of them.

N batch, H W image, C channels in, h w image out, O channels out, k kernel.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.errors import UserError

Array = jax.Array
Pads = tuple[tuple[int, int], ...]
LAYOUT = ("NHWC", "HWIO", "NHWC")


def loop_conv(x: Array, kernel: Array, strides: Sequence[int], padding: Sequence[tuple[int, int]], **options) -> Array:
    """x [N,H,W,C], kernel [k,k,C,O] -> [N,h,w,O]; to be given to `flax.linen.Conv` as `conv_general_dilated`.

    The same values and gradients as `lax.conv_general_dilated`; reverse mode only. Errors: UserError for dilation and
    groups, which it does not know.
    """
    _check("loop_conv", options)
    return _conv(x, kernel, tuple(strides), tuple(map(tuple, padding)), options.get("precision"), _in_layout)


def parted_conv(
    x: Array, kernel: Array, strides: Sequence[int], padding: Sequence[tuple[int, int]], **options
) -> Array:
    """As `loop_conv`, for a batch on one CPU and outside of loops."""
    _check("parted_conv", options)
    return _conv(x, kernel, tuple(strides), tuple(map(tuple, padding)), options.get("precision"), _in_parts)


def _check(name: str, options: dict) -> None:
    dilated = any(d != 1 for key in ("lhs_dilation", "rhs_dilation") for d in options.get(key) or ())
    if dilated or options.get("feature_group_count", 1) != 1:
        raise UserError(f"{name}: dilation or groups given, expected a plain convolution; use lax's own")


def _plain(x: Array, kernel: Array, pads: Sequence[tuple[int, int]], precision, **options) -> Array:
    strides = options.pop("strides", (1, 1))
    return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=LAYOUT, precision=precision, **options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _conv(x: Array, kernel: Array, strides: tuple[int, ...], pads: Pads, precision, gradients: Callable) -> Array:
    return _plain(x, kernel, pads, precision, strides=strides)


def _forward(x, kernel, strides, pads, precision, gradients):
    return _conv(x, kernel, strides, pads, precision, gradients), (x, kernel)


def _backward(strides, pads, precision, gradients, kept, dy):
    return gradients(*kept, dy, strides, pads, precision)


_conv.defvjp(_forward, _backward)


def _in_layout(x_NxHxWxC: Array, kernel: Array, dy_NxhxwxO: Array, strides, pads: Pads, precision):
    dx_pads, dk_pads = [], []
    for H, k, h, stride, (low, _) in zip(
        x_NxHxWxC.shape[1:3], kernel.shape[:2], dy_NxhxwxO.shape[1:3], strides, pads, strict=True
    ):
        spread = (h - 1) * stride + 1  # rows of dy with its zeros in between
        dx_pads.append((k - 1 - low, H - spread + low))
        dk_pads.append((low, k - 1 - H + spread - low))
    turned = jnp.swapaxes(kernel[::-1, ::-1], 2, 3)
    dx = _plain(dy_NxhxwxO, turned, dx_pads, precision, lhs_dilation=strides)
    # The channels of x as a batch, the batch as channels, dy as the kernel.
    x_CxHxWxN, dy_hxwxNxO = x_NxHxWxC.transpose(3, 1, 2, 0), dy_NxhxwxO.transpose(1, 2, 0, 3)
    dk_CxkxkxO = _plain(x_CxHxWxN, dy_hxwxNxO, dk_pads, precision, rhs_dilation=strides)
    return dx, dk_CxkxkxO.transpose(1, 2, 0, 3)


ROWS, MOST = 16, 16  # of a part; parts, for each is an operation to compile


def rows_of_a_part(batch: int) -> int:
    """How many rows of a batch go into a sum by themselves: a divisor of it, ROWS unless that were too many parts."""
    least = max(ROWS, -(-batch // MOST))
    return next((rows for rows in range(least, batch) if batch % rows == 0), batch)


def _in_parts(x_NxHxWxC: Array, kernel: Array, dy_NxhxwxO: Array, strides, pads: Pads, precision):
    def conv(x: Array, kernel: Array) -> Array:
        return _plain(x, kernel, pads, precision, strides=strides)

    # Linear in each: transposed alone, where `jax.vjp` would have the convolution itself in the program once more.
    (dx,) = jax.linear_transpose(lambda x: conv(x, kernel), x_NxHxWxC)(dy_NxhxwxO)
    rows = rows_of_a_part(len(x_NxHxWxC))
    parts = [slice(begin, begin + rows) for begin in range(0, max(1, len(x_NxHxWxC)), max(1, rows))]
    dk = [jax.linear_transpose(lambda k, p=p: conv(x_NxHxWxC[p], k), kernel)(dy_NxhxwxO[p])[0] for p in parts]
    return dx, functools.reduce(jnp.add, dk)
