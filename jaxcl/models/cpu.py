"""Operations in forms for CPUs: the same functions as on other backends, written so that XLA compiles them well.

Nothing here is needed on a GPU or TPU. `jaxcl.models.layers` and `Model.for_loops` choose between these forms and the
usual ones. docs/benchmarks.md has the measured times.

    relu           XLA moves a maximum with zeros into a library kernel, and first writes the zeros to memory.
    matmul         XLA transposes the incoming gradient in memory to form the kernel's gradient.
    depthwise      XLA's grouped convolutions are slow, above all their gradients.
    depthwise_rows the same, with gradients for large maps.
    loop_conv      Inside a loop XLA has fast code for one layout only, which JAX's own gradients do not have.
    chunked_conv   To XLA the batch is the channels of the convolution that gives the kernel's gradient, which is slow
                   for large batches.

N batch, H W image, C channels in, h w image out, O channels out, k kernel.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.errors import UserError

Array = jax.Array
Pads = tuple[tuple[int, int], ...]
LAYOUT = ("NHWC", "HWIO", "NHWC")


def in_use() -> bool:
    """Whether this process computes on CPUs."""
    return jax.default_backend() == "cpu"


def choose(on_cpu: Callable, elsewhere: Callable) -> Callable:
    """A function that calls `on_cpu` on CPUs and `elsewhere` on other backends; it has the docstring of `elsewhere`."""

    @functools.wraps(elsewhere)
    def chosen(*args: Any, **kwargs: Any) -> Any:
        return on_cpu(*args, **kwargs) if in_use() else elsewhere(*args, **kwargs)

    return chosen


def relu(x: Array) -> Array:
    """max(x, 0) as a selection, which XLA fuses with the loops around it. As `jax.nn.relu` at NaN and at 0."""
    return jnp.where(x <= 0, 0, x)


@jax.custom_vjp
def matmul(x: Array, kernel: Array) -> Array:
    """x [...,D] @ kernel [D,M], with gradients that need no transposed copy. Reverse mode only."""
    return x @ kernel


def _matmul_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ kernel, (x, kernel)


def _matmul_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    rows = lax.dot_general(g, kernel, (((g.ndim - 1,), (1,)), ((), ())))
    flat = (a.reshape(-1, a.shape[-1]) for a in (x, g))
    return rows, lax.dot_general(*flat, (((0,), (0,)), ((), ())))


matmul.defvjp(_matmul_forward, _matmul_backward)


def depthwise(x: Array, kernel: Array, stride: int, padding: Pads = ((1, 1), (1, 1))) -> Array:
    """x [N,H,W,C], kernel [k,k,1,C] -> [N,h,w,C], as a sum of k x k shifted products; padding: around an image."""
    (h, w), s, k = _sides(x, kernel, stride, padding), stride, len(kernel)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    # Positions 0, s, 2s ... of the padded map, h or w of them.
    H, W = (h - 1) * s + 1, (w - 1) * s + 1
    return sum(x[:, i : i + H : s, j : j + W : s] * kernel[i, j, 0] for i in range(k) for j in range(k))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise_rows(x: Array, kernel: Array, stride: int, padding: Pads) -> Array:
    """As `depthwise`, for large maps and kernels: the gradients read the maps row by row. Reverse mode only.

    It is apart from `depthwise`, whose gradients add in another order.
    """
    return depthwise(x, kernel, stride, padding)


def _rows_forward(x: Array, kernel: Array, stride: int, padding: Pads) -> tuple[Array, tuple[Array, Array]]:
    return depthwise(x, kernel, stride, padding), (x, kernel)


def _rows_backward(stride: int, padding: Pads, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    return _depthwise_of_x(x, kernel, g, stride, padding), _depthwise_of_kernel(x, kernel, g, stride, padding)


depthwise_rows.defvjp(_rows_forward, _rows_backward)


def _sides(x: Array, kernel: Array, stride: int, padding: Pads) -> list[int]:
    """(h, w) of a convolution."""
    return [(side + sum(pad) - len(kernel)) // stride + 1 for side, pad in zip(x.shape[1:3], padding, strict=True)]


def _depthwise_of_x(x: Array, kernel: Array, g_NxhxwxC: Array, stride: int, padding: Pads) -> Array:
    """Positions of x with the same remainder by the stride meet the same places of the kernel: one sum for each."""
    (N, H, W, C), s, k = x.shape, stride, len(kernel)
    near = -(-k // s)  # places of the kernel that a remainder meets, at most
    Hs, Ws = (-(-(side + sum(pad)) // s) for side, pad in zip((H, W), padding, strict=True))
    edges = [(near - 1, max(0, side - have)) for side, have in zip((Hs, Ws), g_NxhxwxC.shape[1:3], strict=True)]
    g = jnp.pad(g_NxhxwxC, ((0, 0), *edges, (0, 0)))

    def of(row: int, column: int) -> Array:
        places = [(a, b) for a in range(near) for b in range(near) if row + s * a < k and column + s * b < k]
        if not places:  # a stride longer than the kernel
            return jnp.zeros((N, Hs, Ws, C), g.dtype)
        begins = [(near - 1 - a, near - 1 - b) for a, b in places]
        return sum(
            g[:, i : i + Hs, j : j + Ws] * kernel[row + s * a, column + s * b, 0]
            for (i, j), (a, b) in zip(begins, places, strict=True)
        )

    dx = jnp.stack([jnp.stack([of(row, column) for column in range(s)], 3) for row in range(s)], 2)
    (top, _), (left, _) = padding
    return dx.reshape(N, Hs * s, Ws * s, C)[:, top : top + H, left : left + W].astype(x.dtype)


def _depthwise_of_kernel(x: Array, kernel: Array, g_NxhxwxC: Array, stride: int, padding: Pads) -> Array:
    """The sum over the rows in a loop, which keeps a row in the cache for all places of the kernel.

    The sum over images comes last: a batch that is spread over devices is reduced once, not in each round.
    """
    (N, _, _, C), s, k = x.shape, stride, len(kernel)
    h, w = g_NxhxwxC.shape[1:3]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    x, W = jnp.pad(x, ((0, 0), *padding, (0, 0))), (w - 1) * s + 1

    def add(row: Array, total_NxkxkxC: Array) -> Array:
        x_NxkxWxC = lax.dynamic_slice_in_dim(x, row * s, k, axis=1).astype(wide)
        g_Nx1xwxC = lax.dynamic_slice_in_dim(g_NxhxwxC, row, 1, axis=1).astype(wide)
        shifted = [(x_NxkxWxC[:, :, j : j + W : s] * g_Nx1xwxC).sum(2) for j in range(k)]
        return total_NxkxkxC + jnp.stack(shifted, 2)

    total = lax.fori_loop(0, h, add, jnp.zeros((N, k, k, C), wide))
    return total.sum(0)[:, :, None].astype(kernel.dtype)


def loop_conv(x: Array, kernel: Array, strides: Sequence[int], padding: Sequence[tuple[int, int]], **options) -> Array:
    """x [N,H,W,C], kernel [k,k,C,O] -> [N,h,w,O], for `flax.linen.Conv(conv_general_dilated=...)` inside loops.

    The same values and gradients as `lax.conv_general_dilated`; the gradients are convolutions in the layout of the
    forward pass. Reverse mode only.

    Raises:
      UserError: dilation or groups are given, which it does not support.
    """
    _check("loop_conv", options)
    return _conv(x, kernel, tuple(strides), tuple(map(tuple, padding)), options.get("precision"), _in_layout)


def chunked_conv(
    x: Array, kernel: Array, strides: Sequence[int], padding: Sequence[tuple[int, int]], **options
) -> Array:
    """As `loop_conv`, for a batch on one device and outside of loops: sums the kernel's gradient over chunks of rows.

    Do not use it where a batch is split over devices: each chunk would lie on one of them.
    """
    _check("chunked_conv", options)
    return _conv(x, kernel, tuple(strides), tuple(map(tuple, padding)), options.get("precision"), _in_chunks)


def _check(name: str, options: dict) -> None:
    dilated = any(d != 1 for key in ("lhs_dilation", "rhs_dilation") for d in options.get(key) or ())
    if dilated or options.get("feature_group_count", 1) != 1:
        raise UserError(f"{name} has no dilation and no groups; use lax.conv_general_dilated")


def _plain(x: Array, kernel: Array, pads: Sequence[tuple[int, int]], precision, **options) -> Array:
    strides = options.pop("strides", (1, 1))
    return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=LAYOUT, precision=precision, **options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _conv(x: Array, kernel: Array, strides: tuple[int, ...], pads: Pads, precision, gradients: Callable) -> Array:
    return _plain(x, kernel, pads, precision, strides=strides)


def _forward(x, kernel, strides, pads, precision, gradients):
    return _conv(x, kernel, strides, pads, precision, gradients), (x, kernel)


def _backward(strides, pads, precision, gradients, saved, dy):
    return gradients(*saved, dy, strides, pads, precision)


_conv.defvjp(_forward, _backward)


def _in_layout(x_NxHxWxC: Array, kernel: Array, dy_NxhxwxO: Array, strides, pads: Pads, precision):
    dx_pads, dk_pads = [], []
    for H, k, h, stride, (low, _) in zip(
        x_NxHxWxC.shape[1:3], kernel.shape[:2], dy_NxhxwxO.shape[1:3], strides, pads, strict=True
    ):
        spread = (h - 1) * stride + 1  # rows of dy with zeros in between
        dx_pads.append((k - 1 - low, H - spread + low))
        dk_pads.append((low, k - 1 - H + spread - low))
    turned = jnp.swapaxes(kernel[::-1, ::-1], 2, 3)
    dx = _plain(dy_NxhxwxO, turned, dx_pads, precision, lhs_dilation=strides)
    # The channels of x are the batch, the batch is the channels, and dy is the kernel.
    x_CxHxWxN, dy_hxwxNxO = x_NxHxWxC.transpose(3, 1, 2, 0), dy_NxhxwxO.transpose(1, 2, 0, 3)
    dk_CxkxkxO = _plain(x_CxHxWxN, dy_hxwxNxO, dk_pads, precision, rhs_dilation=strides)
    return dx, dk_CxkxkxO.transpose(1, 2, 0, 3)


MIN_ROWS, MAX_CHUNKS = 16, 16  # each chunk is an operation to compile


def rows_of_a_chunk(batch: int) -> int:
    """A divisor of the batch size: MIN_ROWS, or more where that would make more than MAX_CHUNKS chunks."""
    least = max(MIN_ROWS, -(-batch // MAX_CHUNKS))
    return next((rows for rows in range(least, batch) if batch % rows == 0), batch)


def _in_chunks(x_NxHxWxC: Array, kernel: Array, dy_NxhxwxO: Array, strides, pads: Pads, precision):
    def conv(x: Array, kernel: Array) -> Array:
        return _plain(x, kernel, pads, precision, strides=strides)

    # The convolution is linear in each input. `jax.vjp` would put the convolution itself into the program once more.
    (dx,) = jax.linear_transpose(lambda x: conv(x, kernel), x_NxHxWxC)(dy_NxhxwxO)
    rows = rows_of_a_chunk(len(x_NxHxWxC))
    chunks = [slice(begin, begin + rows) for begin in range(0, max(1, len(x_NxHxWxC)), max(1, rows))]
    dk = [jax.linear_transpose(lambda k, c=c: conv(x_NxHxWxC[c], k), kernel)(dy_NxhxwxO[c])[0] for c in chunks]
    return dx, functools.reduce(jnp.add, dk)
