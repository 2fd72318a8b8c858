"""The parts of vision transformers: tokens, positions, blocks, attention pooling.

N batch, H W image, C image channels, p patch, h w grid of patches, P = h w patches, K further tokens before them (class
token, registers), T = K + P tokens, D features, A attention heads, d features of a head, F hidden features.

Sources: Dosovitskiy et al. 2021, arXiv 2010.11929 (the network); Touvron et al. 2021, arXiv 2103.17239 (LayerScale);
Darcet et al. 2024, arXiv 2309.16588 (registers); Siméoni et al. 2025, arXiv 2508.10104 (rotary positions of DINOv3);
Shazeer 2020, arXiv 2002.05202 (gated MLP); Zhai et al. 2022, arXiv 2106.04560 (attention pooling).
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.errors import UserError

Array = jax.Array
Rotation = tuple[Array, Array] | None  # (cosines, sines), each [P,d]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "silu": nn.silu,
}

small_init = nn.initializers.truncated_normal(0.02)


def _dense(features: int, dtype: Any, bias: bool = True) -> nn.Dense:
    return nn.Dense(features, use_bias=bias, kernel_init=small_init, dtype=dtype)


def layer_norm(epsilon: float, dtype: Any, name: str | None = None) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


# ---- positions


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' kernel, which is 0 beyond 2."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def resize_matrix(old: int, new: int, antialias: bool) -> np.ndarray:
    """The matrix [new,old] of a bicubic resize of one axis, with the weights of torch's `interpolate`.

    Args:
      old, new: number of samples.
      antialias: widen the kernel (a = -0.5) where the axis shrinks, and leave out samples beyond the border; otherwise
        take four samples (a = -0.75), and repeat those at the border.
    """
    centres = (np.arange(new) + 0.5) * old / new
    if antialias:
        stretch = max(old / new, 1)
        weights = _cubic((np.arange(old) + 0.5 - centres[:, None]) / stretch, -0.5)
        return weights / weights.sum(1, keepdims=True)
    first = np.floor(centres - 0.5).astype(int)
    weights = np.zeros((new, old))
    for step in range(-1, 3):
        at = first + step
        np.add.at(weights, (np.arange(new), np.clip(at, 0, old - 1)), _cubic(at + 0.5 - centres, -0.75))
    return weights


def resize_positions(positions_PxD: Array, old: tuple[int, int], new: tuple[int, int], antialias: bool) -> Array:
    """Positions of a grid `old` (rows, columns) -> those of a grid `new`; the same array where the grids agree."""
    if old == new:
        return positions_PxD
    rows, columns = (resize_matrix(a, b, antialias) for a, b in zip(old, new, strict=True))
    x = positions_PxD.reshape(*old, -1)
    precise = dict(precision=jax.lax.Precision.HIGHEST)  # a TPU would round the weights to bfloat16
    x = jnp.einsum("yh,hwD->ywD", jnp.asarray(rows, x.dtype), x, **precise)
    x = jnp.einsum("xw,ywD->yxD", jnp.asarray(columns, x.dtype), x, **precise)
    return x.reshape(new[0] * new[1], -1)


def rotation(grid: tuple[int, int], head_features: int, theta: float, dtype: Any) -> Rotation:
    """The rotary positions of DINOv3 -> (cosines, sines), each [P,d], for `rotate`.

    A quarter of a head's features turns with the row, another with the column, and the second half repeats the first.
    Rows and columns run from -1 to 1 whatever their number, so other grids need no resize.
    """
    rows, columns = ((np.arange(n) + 0.5) / n * 2 - 1 for n in grid)
    at_Px2 = np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)
    periods = theta ** np.arange(0, 1, 4 / head_features)
    angles = (2 * math.pi * at_Px2[:, :, None] / periods).reshape(len(at_Px2), -1)
    angles = np.concatenate([angles, angles], 1)
    return jnp.asarray(np.cos(angles), dtype), jnp.asarray(np.sin(angles), dtype)


def rotate(x_NxTxAxd: Array, turn: Rotation) -> Array:
    """Turn queries or keys by the positions of their patches; tokens before the patches stay as they are."""
    if turn is None:
        return x_NxTxAxd
    cos_Px1xd, sin_Px1xd = (v[:, None].astype(x_NxTxAxd.dtype) for v in turn)
    K = x_NxTxAxd.shape[1] - len(cos_Px1xd)
    x = x_NxTxAxd[:, K:]
    first, second = jnp.split(x, 2, axis=-1)
    turned = x * cos_Px1xd + jnp.concatenate([-second, first], -1) * sin_Px1xd
    return jnp.concatenate([x_NxTxAxd[:, :K], turned], 1)


# ---- tokens


class Patches(nn.Module):
    """Image [N,H,W,C] -> patches [N,h,w,D]: a convolution whose windows do not overlap, as one product.

    Rows and columns at the end that do not fill a patch are left out, as a strided convolution does.
    """

    patch: int
    width: int
    bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Array) -> Array:
        (N, H, W, C), p = images.shape, self.patch
        h, w = H // p, W // p
        if not h or not w:
            raise UserError(f"model.patch is {p}, but images have {H}x{W} pixels; expected at least one patch")
        kernel = self.param("kernel", small_init, (p, p, C, self.width)).astype(self.dtype)
        x = images[:, : h * p, : w * p].astype(self.dtype).reshape(N, h, p, w, p, C)
        x_NxhxwxD = x.transpose(0, 1, 3, 2, 4, 5).reshape(N, h, w, p * p * C) @ kernel.reshape(-1, self.width)
        if self.bias:
            x_NxhxwxD += self.param("bias", nn.initializers.zeros, (self.width,)).astype(self.dtype)
        return x_NxhxwxD


class Tokens(nn.Module):
    """Image [N,H,W,C] -> (tokens [N,T,D], their grid (h, w)): class token, registers, patches with positions.

    Originals may give the class token a position as well. Here it is part of the token, which is the same sum.
    """

    patch: int
    width: int
    class_token: bool
    registers: int
    positions: bool
    grid: tuple[int, int]  # of the positions; (0, 0): that of the images
    antialias: bool
    patch_bias: bool
    pre_norm: bool
    norm_epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Array) -> tuple[Array, tuple[int, int]]:
        D = self.width
        x_NxhxwxD = Patches(self.patch, D, self.patch_bias, self.dtype, name="patch")(images)
        N, h, w, _ = x_NxhxwxD.shape
        x_NxTxD = x_NxhxwxD.reshape(N, h * w, D)
        if self.positions:
            grid = self._grid(h, w)
            positions_PxD = self.param("positions", small_init, (grid[0] * grid[1], D))
            x_NxTxD += resize_positions(positions_PxD, grid, (h, w), self.antialias).astype(self.dtype)
        first = []
        if self.class_token:
            first.append(self.param("class_token", small_init, (D,))[None])
        if self.registers:
            first.append(self.param("registers", small_init, (self.registers, D)))
        if first:
            first_KxD = jnp.concatenate(first).astype(self.dtype)
            x_NxTxD = jnp.concatenate([jnp.broadcast_to(first_KxD, (N, *first_KxD.shape)), x_NxTxD], 1)
        if self.pre_norm:
            x_NxTxD = layer_norm(self.norm_epsilon, self.dtype, "pre_norm")(x_NxTxD)
        return x_NxTxD, (h, w)

    def _grid(self, h: int, w: int) -> tuple[int, int]:
        """The grid of the positions: as the option says; of the images for new ones; otherwise a square."""
        if all(self.grid):
            return tuple(self.grid)
        if not self.has_variable("params", "positions"):
            return h, w
        rows = len(self.get_variable("params", "positions"))
        side = math.isqrt(rows)
        if rows != h * w and side**2 != rows:
            raise UserError(
                f"model.position_grid is not given, and the model has {rows} positions, which is no square; give the "
                "rows and columns of patches that the model was made for"
            )
        return (h, w) if rows == h * w else (side, side)


# ---- blocks


class Attention(nn.Module):
    """Queries [N,Q,D], keys and values [N,T,D] -> [N,Q,D] by several heads."""

    width: int
    heads: int
    query_bias: bool = True  # the values' bias is as the queries'
    key_bias: bool = True
    dtype: Any = jnp.float32

    def setup(self):
        self.query = _dense(self.width, self.dtype, self.query_bias)
        self.key = _dense(self.width, self.dtype, self.key_bias)
        self.value = _dense(self.width, self.dtype, self.query_bias)
        self.out = _dense(self.width, self.dtype)

    def __call__(self, queries_NxQxD: Array, x_NxTxD: Array, turn: Rotation = None) -> Array:
        def heads(x: Array) -> Array:
            return x.reshape(*x.shape[:2], self.heads, -1)

        q, k = rotate(heads(self.query(queries_NxQxD)), turn), rotate(heads(self.key(x_NxTxD)), turn)
        # The logits and the softmax are float32 at least, whatever the inputs.
        y_NxQxAxd = jax.nn.dot_product_attention(q, k, heads(self.value(x_NxTxD)))
        return self.out(y_NxQxAxd.reshape(queries_NxQxD.shape))


class MLP(nn.Module):
    """[...,D] -> [...,D] through F hidden features; gated: activation(gate(x)) * hidden(x)."""

    width: int
    hidden_features: int
    activation: str
    gated: bool = False
    dtype: Any = jnp.float32

    def setup(self):
        self.hidden = _dense(self.hidden_features, self.dtype)
        if self.gated:
            self.gate = _dense(self.hidden_features, self.dtype)
        self.out = _dense(self.width, self.dtype)

    def __call__(self, x: Array) -> Array:
        act = ACTIVATIONS[self.activation]
        return self.out(act(self.gate(x)) * self.hidden(x) if self.gated else act(self.hidden(x)))


class TransformerBlock(nn.Module):
    """x + scale * attention(norm(x)), then x + scale * mlp(norm(x)), on tokens [N,T,D]."""

    width: int
    heads: int
    mlp_width: int
    activation: str
    gated: bool
    query_bias: bool
    key_bias: bool
    layer_scale: float  # its first value; 0: none
    norm_epsilon: float
    drop_path: float = 0.0
    dtype: Any = jnp.float32

    def setup(self):
        D = self.width
        self.attention_norm = layer_norm(self.norm_epsilon, self.dtype)
        self.attention = Attention(D, self.heads, self.query_bias, self.key_bias, self.dtype)
        self.mlp_norm = layer_norm(self.norm_epsilon, self.dtype)
        self.mlp = MLP(D, self.mlp_width, self.activation, self.gated, self.dtype)
        if self.layer_scale:
            first = nn.initializers.constant(self.layer_scale)
            self.attention_scale = self.param("attention_scale", first, (D,))
            self.mlp_scale = self.param("mlp_scale", first, (D,))

    def __call__(self, x_NxTxD: Array, keep_Nx2: Array | None = None, turn: Rotation = None) -> Array:
        """keep_Nx2: bool, which branches to keep; None: all, as they are."""
        x = self.attention_norm(x_NxTxD)
        x = self.attention(x, x, turn)
        x_NxTxD += self._branch(x, self.attention_scale if self.layer_scale else None, keep_Nx2, 0)
        x = self.mlp(self.mlp_norm(x_NxTxD))
        return x_NxTxD + self._branch(x, self.mlp_scale if self.layer_scale else None, keep_Nx2, 1)

    def _branch(self, x: Array, scale: Array | None, keep_Nx2: Array | None, which: int) -> Array:
        x = x if scale is None else x * scale.astype(self.dtype)
        if keep_Nx2 is None or not self.drop_path:
            return x
        return jnp.where(keep_Nx2[:, which, None, None], x / (1 - self.drop_path), 0)


class AttentionPool(nn.Module):
    """Patches [N,P,D] -> [N,D]: a learned query attends to them; then x + mlp(norm(x))."""

    width: int
    heads: int
    mlp_width: int
    activation: str
    norm_epsilon: float
    dtype: Any = jnp.float32

    def setup(self):
        D = self.width
        self.probe = self.param("probe", small_init, (D,))
        self.attention = Attention(D, self.heads, dtype=self.dtype)
        self.norm = layer_norm(self.norm_epsilon, self.dtype)
        self.mlp = MLP(D, self.mlp_width, self.activation, dtype=self.dtype)

    def __call__(self, x_NxPxD: Array) -> Array:
        N, _, D = x_NxPxD.shape
        probe_Nx1xD = jnp.broadcast_to(self.probe.astype(self.dtype), (N, 1, D))
        x_NxD = self.attention(probe_Nx1xD, x_NxPxD)[:, 0]
        return x_NxD + self.mlp(self.norm(x_NxD))
