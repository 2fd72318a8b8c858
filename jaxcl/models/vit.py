"""A small vision transformer, which can be split after any block for an explainer.

N batch, H W image, C image channels, p patch, h w grid of patches, P = h w patches, T = 1 + P tokens, D features,
A attention heads, d features of a head, F hidden features, L blocks. Q and K are T, of queries and of keys.

Source: the encoder of Chen et al. 2022, "Perfectly Balanced", arXiv 2204.07596, in the form of its released code:
pre-norm blocks, attention without output projection, a norm after the patch embedding.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.errors import UserError
from jaxcl.models.encoder import Encoder, EncoderOptions
from jaxcl.models.heads import Dense, dense_init
from jaxcl.models.layers import remat_block
from jaxcl.runtime.options import OptionError, Range

Array = jax.Array

RATES = ("dropout", "block_dropout", "attention_dropout", "query_dropout", "drop_path")
SPARE_POSITIONS = 2  # unused rows of the released table; kept so that the parameter counts agree
NORM = dict(epsilon=1e-5, use_fast_variance=False)


def _kept(key: Array | None, N: int, rates: dict[str, tuple[float, tuple[int, ...]]]) -> dict[str, Array]:
    """Draws what to keep: {name: (rate of dropping, shape S for each image)} -> {name: bool [N, *S], True: keep}.

    The result lacks names with rate 0, and is empty without a key. There is one draw of the global shape: under jit it
    does not depend on how the batch is spread over devices, and XLA compiles one generator instead of one for each
    name, which would be most of the compile time of the network on a CPU.
    """
    rates = {name: given for name, given in rates.items() if given[0]} if key is not None else {}
    if not rates:
        return {}
    ends = np.cumsum([math.prod(shape) for _, shape in rates.values()])
    bits = jnp.split(jax.random.bits(key, (N, int(ends[-1])), jnp.uint32), ends[:-1], axis=1)
    return {
        name: (own < np.uint32(min(round((1 - rate) * 2**32), 2**32 - 1))).reshape(N, *shape)
        for own, (name, (rate, shape)) in zip(bits, rates.items(), strict=True)
    }


def _drop(x: Array, rate: float, keep: Array | None) -> Array:
    return x if keep is None else jnp.where(keep, x / (1 - rate), 0)


def _init_token(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    return 0.1 * jnp.clip(jax.random.normal(key, shape, dtype), -1, 1)


class Embedding(nn.Module):
    """Image [N,H,W,C] -> tokens [N,T,D]: the class token and the patches, with learned positions."""

    patch: int
    width: int
    rate: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Array, key: Array | None) -> Array:
        (N, H, W, C), p, D = images.shape, self.patch, self.width
        if H % p or W % p or not H or not W:
            raise UserError(f"model.patch is {p}, but images have {H}x{W} pixels; expected a divisor of both sides")
        h, w = H // p, W // p
        x_NxPxppC = images.astype(self.dtype).reshape(N, h, p, w, p, C).transpose(0, 1, 3, 2, 4, 5)
        x_NxPxppC = x_NxPxppC.reshape(N, h * w, p * p * C)  # in the order row, column, channel
        x_NxPxD = Dense(D, self.dtype, name="patch")(x_NxPxppC)
        x_NxPxD = nn.LayerNorm(name="norm", dtype=self.dtype, **NORM)(x_NxPxD)
        kept = _kept(key, N, {"patches": (self.rate, x_NxPxD.shape[1:])})
        x_NxPxD = _drop(x_NxPxD, self.rate, kept.get("patches"))
        rows = 1 + h * w + SPARE_POSITIONS
        if self.has_variable("params", "positions"):
            known = len(self.get_variable("params", "positions"))
            if known != rows:
                raise UserError(
                    f"the model has positions for {known - 1 - SPARE_POSITIONS} patches, but images of {H}x{W} pixels "
                    f"have {h * w}; give images of the size that the model was made for"
                )
        positions_TxD = self.param("positions", _init_token, (rows, D))[: 1 + h * w].astype(self.dtype)
        token_D = self.param("class_token", _init_token, (D,)).astype(self.dtype)
        x_NxTxD = jnp.concatenate([jnp.broadcast_to(token_D, (N, 1, D)), x_NxPxD], axis=1)
        return x_NxTxD + positions_TxD


class Block(nn.Module):
    """x + drop_path(attention(norm(x))), then x + drop_path(mlp(norm(x))), on tokens [N,T,D]."""

    width: int
    heads: int
    mlp_width: int
    block_dropout: float = 0.0
    attention_dropout: float = 0.0
    query_dropout: float = 0.0
    drop_path: float = 0.0
    dtype: Any = jnp.float32

    def setup(self):
        self.attention_norm = nn.LayerNorm(dtype=self.dtype, **NORM)
        self.qkv = nn.Dense(3 * self.width, use_bias=False, kernel_init=dense_init, dtype=self.dtype)
        self.mlp_norm = nn.LayerNorm(dtype=self.dtype, **NORM)
        self.mlp_hidden = Dense(self.mlp_width, self.dtype)
        self.mlp_out = Dense(self.width, self.dtype)

    def __call__(self, x_NxTxD: Array, key: Array | None) -> Array:
        """key: for the random choice of what is dropped; None: nothing is."""
        N, T, D = x_NxTxD.shape
        path, block = self.drop_path, self.block_dropout
        rates = {
            "query": (self.query_dropout, (1, T, 1)),
            "attention": (self.attention_dropout, (self.heads, T, T)),
            "attended": (block, (T, D)),
            "attention_path": (path, (1, 1)),
            "hidden": (block, (T, self.mlp_width)),
            "out": (block, (T, D)),
            "mlp_path": (path, (1, 1)),
        }
        keep = _kept(key, N, rates).get
        y_NxTxD = _drop(self._attention(self.attention_norm(x_NxTxD), keep), block, keep("attended"))
        x_NxTxD = x_NxTxD + _drop(y_NxTxD, path, keep("attention_path"))
        y_NxTxF = nn.gelu(self.mlp_hidden(self.mlp_norm(x_NxTxD)), approximate=False)
        y_NxTxD = _drop(self.mlp_out(_drop(y_NxTxF, block, keep("hidden"))), block, keep("out"))
        return x_NxTxD + _drop(y_NxTxD, path, keep("mlp_path"))

    def _attention(self, x_NxTxD: Array, keep: Callable[[str], Array | None]) -> Array:
        N, T, D = x_NxTxD.shape
        d = D // self.heads
        q, k, v = jnp.moveaxis(self.qkv(x_NxTxD).reshape(N, T, 3, self.heads, d), 2, 0)  # [N,T,A,d]
        s_NxAxQxK = jnp.einsum("NQAd,NKAd->NAQK", q * d**-0.5, k)
        s_NxAxQxK = s_NxAxQxK.astype(jnp.promote_types(self.dtype, jnp.float32))
        # On the logits: a dropped query has logit 0 for all keys, so its output is the plain mean of the values.
        s_NxAxQxK = _drop(s_NxAxQxK, self.query_dropout, keep("query"))
        p_NxAxQxK = _drop(jax.nn.softmax(s_NxAxQxK), self.attention_dropout, keep("attention"))
        return jnp.einsum("NAQK,NKAd->NQAd", p_NxAxQxK.astype(self.dtype), v).reshape(N, T, D)


class ViT(Encoder):
    """Image [N,H,W,C] -> normalised class token [N,D].

    A tap "blockK" is the patch tokens [N,h,w,D] that block K hands to block K+1. The last block has no tap: its output
    enters the features through the class token alone, so the patch tokens would get no gradient.
    """

    norm = "layer"
    takes_key = True
    layer_decay = 0.7
    lora_modules = {"qkv": ("qkv",), "mlp": ("mlp_hidden", "mlp_out")}  # noqa: RUF012

    patch: int = 4
    width: int = 256
    depth: int = 7
    heads: int = 8
    mlp_width: int = 512
    dropout: float = 0.0
    block_dropout: float = 0.0
    attention_dropout: float = 0.0
    query_dropout: float = 0.0
    drop_path: float = 0.0
    dtype: Any = jnp.float32
    remat: bool = False

    @property
    def features(self) -> int:
        return self.width

    @property
    def taps(self) -> tuple[str, ...]:
        return tuple(f"block{i}" for i in range(1, self.depth))

    @property
    def num_layers(self) -> int:
        return self.depth

    @nn.nowrap
    def layer_of(self, path: tuple[str, ...]) -> int:
        name, _, number = path[0].partition("_")
        if name == "blocks":
            return int(number) + 1
        return 0 if name == "embedding" else self.depth + 1

    def setup(self):
        self.embedding = Embedding(self.patch, self.width, self.dropout, self.dtype)
        same = {k: getattr(self, k) for k in ("width", "heads", "mlp_width", "dtype", *RATES[1:4])}
        paths = np.linspace(0, self.drop_path, self.depth)
        self.blocks = [Block(**same, drop_path=float(rate)) for rate in paths]
        self.final_norm = nn.LayerNorm(dtype=self.dtype, **NORM)

    def _run(self, x_NxTxD: Array, begin: int, end: int, keys: Array | None = None) -> Array:
        for i in range(begin, end):
            key = None if keys is None else keys[1 + i]
            run = remat_block(key) if self.remat else lambda block, x, key=key: block(x, key)
            x_NxTxD = run(self.blocks[i], x_NxTxD)
        return x_NxTxD

    def _pool(self, x_NxTxD: Array) -> Array:
        # The norm sees each token by itself, so it need not see the patches.
        return self.final_norm(x_NxTxD[:, 0]).astype(jnp.promote_types(self.dtype, jnp.float32))

    def __call__(
        self,
        x: Array,
        train: bool = False,
        where: Array | None = None,
        norm_set: str = "",
        key: Array | None = None,
    ) -> Array:
        keys = None if key is None or not train else jax.random.split(key, 1 + self.depth)
        x_NxTxD = self.embedding(x, None if keys is None else keys[0])
        return self._pool(self._run(x_NxTxD, 0, self.depth, keys))

    def to_tap(
        self, x: Array, tap: str, train: bool = False, where: Array | None = None, norm_set: str = ""
    ) -> tuple[Array, Array]:
        """-> (patch tokens [N,h,w,D] at the tap, the class token [N,D] there)."""
        x_NxTxD = self._run(self.embedding(x, None), 0, 1 + self.tap_index(tap))
        N, H, W, _ = x.shape
        return x_NxTxD[:, 1:].reshape(N, H // self.patch, W // self.patch, self.width), x_NxTxD[:, 0]

    def from_tap(
        self, a: Array, rest: Array, tap: str, train: bool = False, where: Array | None = None, norm_set: str = ""
    ) -> Array:
        a_NxPxD = a.reshape(len(a), -1, self.width)
        x_NxTxD = jnp.concatenate([rest[:, None], a_NxPxD], axis=1)
        return self._pool(self._run(x_NxTxD, 1 + self.tap_index(tap), self.depth))


Rate = Annotated[float, Range(0, below=1)]


@dataclasses.dataclass(frozen=True)
class ViTOptions(EncoderOptions):
    """The options of a vision transformer. The rates are probabilities, and act in training only."""

    patch: Annotated[int, Range(1)] = 4  # side of a patch in pixels; it must divide the side of the images
    width: Annotated[int, Range(1)] = 256  # features of a token
    depth: Annotated[int, Range(1)] = 7  # blocks
    heads: Annotated[int, Range(1)] = 8  # attention heads; they divide the width
    mlp_width: Annotated[int, Range(1)] = 512  # hidden features of the MLP in each block
    dropout: Rate = 0.1  # of the patch embedding
    block_dropout: Rate = 0.05  # of the attention's output, and of both layers of the MLP
    attention_dropout: Rate = 0.05  # of attention probabilities
    query_dropout: Rate = 0.1  # of whole queries in all heads: they attend to all tokens alike
    drop_path: Rate = 0.05  # of a residual branch of an image, in the last block; 0 in the first, linear in between

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise OptionError("width", f"is {self.width}; expected a multiple of heads, {self.heads}")

    def make(self, dtype: Any) -> ViT:
        names = ("patch", "width", "depth", "heads", "mlp_width", *RATES, "remat")
        return ViT(**{k: getattr(self, k) for k in names}, dtype=dtype)
