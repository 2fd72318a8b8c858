"""Vision transformers as timm and the hub store them: plain, DeiT, MAE, DINOv2, DINOv3, SigLIP, CLIP.

One network with options. The layout of weights (`jaxcl.models.vision_transformer_torch`) finds the options of a
published checkpoint. `jaxcl.models.vit` is another network, the small one of "Perfectly Balanced".

N batch, H W image, C image channels, h w grid of patches, K tokens before the patches (class token, registers), T = K +
h w tokens, D features, L blocks.
"""

import dataclasses
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.models.encoder import Encoder, EncoderOptions
from jaxcl.models.layers import remat_block
from jaxcl.models.vision_transformer_parts import (
    AttentionPool,
    Rotation,
    Tokens,
    TransformerBlock,
    layer_norm,
    rotation,
    small_init,
)
from jaxcl.models.vision_transformer_torch import VisionTransformerLayout
from jaxcl.runtime.options import OptionError, Range

Array = jax.Array

STEM, BLOCK = "tokens", "blocks_"  # names in the parameter tree
# What a checkpoint may hold although the options do not ask for it.
SPARE = ("params.pool.", "params.project.")


class VisionTransformer(Encoder):
    """Image [N,H,W,C] -> features [N,D]; the fields are the options.

    A tap "blockK" is the patch tokens [N,h,w,D] that block K hands on. With pooling "cls" the last block has none: its
    output enters the features through the class token alone, so the patch tokens would get no gradient.
    """

    norm = "layer"
    takes_key = True
    layer_decay = 0.7
    lora_modules = {  # noqa: RUF012
        "qkv": ("attention/query", "attention/key", "attention/value"),
        "proj": ("attention/out",),
        "mlp": ("mlp/hidden", "mlp/gate", "mlp/out"),
    }

    patch: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 0
    activation: str = "gelu"
    gated: bool = False
    qkv_bias: str = "all"
    norm_epsilon: float = 1e-6
    class_token: bool = True
    registers: int = 0
    position: str = "learned"
    position_grid: tuple[int, int] = (0, 0)
    position_resize: str = "bicubic_antialias"
    rope_theta: float = 100.0
    patch_bias: bool = True
    pre_norm: bool = False
    layer_scale: float = 0.0
    pooling: str = "cls"
    final_norm: str = "before"
    projection: int = 0
    drop_path: float = 0.0
    dtype: Any = jnp.float32
    remat: bool = False

    @property
    def features(self) -> int:
        return self.projection or (2 if self.pooling == "cls_mean" else 1) * self.width

    @property
    def taps(self) -> tuple[str, ...]:
        return tuple(f"block{i}" for i in range(1, self.depth + (self.pooling != "cls")))

    @property
    def num_layers(self) -> int:
        return self.depth

    @nn.nowrap
    def layer_of(self, path: tuple[str, ...]) -> int:
        """The layer of a parameter: 0 tokens and positions, 1 .. depth the blocks, depth + 1 what follows them."""
        if path[0] == STEM:
            return 0
        return 1 + int(path[0].removeprefix(BLOCK)) if path[0].startswith(BLOCK) else 1 + self.depth

    @nn.nowrap
    def may_lack(self, name: str) -> bool:
        return name.startswith(SPARE)

    def setup(self):
        hidden = self.mlp_width or 4 * self.width
        self.tokens = Tokens(
            self.patch,
            self.width,
            self.class_token,
            self.registers,
            self.position == "learned",
            tuple(self.position_grid),
            self.position_resize == "bicubic_antialias",
            self.patch_bias,
            self.pre_norm,
            self.norm_epsilon,
            self.dtype,
        )
        self.blocks = [
            TransformerBlock(
                self.width,
                self.heads,
                hidden,
                self.activation,
                self.gated,
                self.qkv_bias != "none",
                self.qkv_bias == "all",
                self.layer_scale,
                self.norm_epsilon,
                float(rate),
                self.dtype,
            )
            for rate in self._rates
        ]
        if self.final_norm == "before":
            self.last_norm = layer_norm(self.norm_epsilon, self.dtype)
        elif self.final_norm == "after":
            self.pooled_norm = layer_norm(self.norm_epsilon, self.dtype)
        if self.pooling == "attention":
            same = (self.width, self.heads, hidden, self.activation, self.norm_epsilon, self.dtype)
            self.pool = AttentionPool(*same)
        if self.projection:
            self.project = nn.Dense(self.projection, use_bias=False, kernel_init=small_init, dtype=self.dtype)

    @property
    def _rates(self) -> np.ndarray:
        return np.linspace(0, self.drop_path, self.depth)

    def _turn(self, grid: tuple[int, int]) -> Rotation:
        if self.position != "rope":
            return None
        return rotation(grid, self.width // self.heads, self.rope_theta, jnp.promote_types(self.dtype, jnp.float32))

    def _run(self, x_NxTxD: Array, grid: tuple[int, int], begin: int, end: int, key: Array | None = None) -> Array:
        keep_LxNx2 = None
        if key is not None and self.drop_path:
            # One draw for all blocks: XLA compiles one generator.
            draws_NxLx2 = jax.random.uniform(key, (len(x_NxTxD), self.depth, 2))
            keep_LxNx2 = jnp.moveaxis(draws_NxLx2 >= jnp.asarray(self._rates, jnp.float32)[:, None], 1, 0)
        turn = self._turn(grid)
        for i in range(begin, end):
            keep = None if keep_LxNx2 is None else keep_LxNx2[i]
            run = remat_block(keep, turn) if self.remat else lambda block, x, keep=keep: block(x, keep, turn)
            x_NxTxD = run(self.blocks[i], x_NxTxD)
        return x_NxTxD

    @property
    def _before(self) -> int:
        """K"""
        return self.class_token + self.registers

    def _pool(self, x_NxTxD: Array) -> Array:
        # A norm sees each token by itself, so it need not see those that nobody reads.
        x = x_NxTxD[:, 0] if self.pooling == "cls" else x_NxTxD[:, self._before :]
        if self.pooling == "cls_mean":
            x = jnp.concatenate([x_NxTxD[:, :1], x], 1)
        if self.final_norm == "before":
            x = self.last_norm(x)
        if self.pooling == "mean":
            x = x.mean(1)
        elif self.pooling == "cls_mean":
            x = jnp.concatenate([x[:, 0], x[:, 1:].mean(1)], -1)
        elif self.pooling == "attention":
            x = self.pool(x)
        if self.final_norm == "after":
            x = self.pooled_norm(x)
        if self.projection:
            x = self.project(x)
        return x.astype(jnp.promote_types(self.dtype, jnp.float32))

    def __call__(
        self,
        x: Array,
        train: bool = False,
        where: Array | None = None,
        norm_set: str = "",
        key: Array | None = None,
    ) -> Array:
        x_NxTxD, grid = self.tokens(x)
        return self._pool(self._run(x_NxTxD, grid, 0, self.depth, key if train else None))

    def to_tap(
        self, x: Array, tap: str, train: bool = False, where: Array | None = None, norm_set: str = ""
    ) -> tuple[Array, Array]:
        """-> (patch tokens [N,h,w,D] at the tap, the tokens before them [N,K,D] there)."""
        x_NxTxD, grid = self.tokens(x)
        x_NxTxD = self._run(x_NxTxD, grid, 0, 1 + self.tap_index(tap))
        K = self._before
        return x_NxTxD[:, K:].reshape(len(x), *grid, self.width), x_NxTxD[:, :K]

    def from_tap(
        self, a: Array, rest: Array, tap: str, train: bool = False, where: Array | None = None, norm_set: str = ""
    ) -> Array:
        x_NxTxD = jnp.concatenate([rest, a.reshape(len(a), -1, self.width)], axis=1)
        return self._pool(self._run(x_NxTxD, a.shape[1:3], 1 + self.tap_index(tap), self.depth))


@dataclasses.dataclass(frozen=True)
class VisionTransformerOptions(EncoderOptions):
    """The options of a vision transformer. The defaults are those of ViT-B/16."""

    torch_layout = VisionTransformerLayout()

    patch: Annotated[int, Range(1)] = 16  # side of a patch in pixels; what does not fill one at the end is left out
    width: Annotated[int, Range(1)] = 768  # features of a token
    depth: Annotated[int, Range(1)] = 12  # blocks
    heads: Annotated[int, Range(1)] = 12  # attention heads; they divide the width
    mlp_width: Annotated[int, Range(0)] = 0  # hidden features of the MLP in each block; 0: four times the width
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "silu"] = "gelu"  # of the MLPs
    gated: bool = False  # activation(gate(x)) * hidden(x) in the blocks' MLPs; SwiGLU with activation silu
    qkv_bias: Literal["all", "none", "query_value"] = "all"  # which of queries, keys and values have a bias
    norm_epsilon: Annotated[float, Range(above=0)] = 1e-6  # of the layer norms
    class_token: bool = True
    registers: Annotated[int, Range(0)] = 0  # further tokens before the patches: registers, a distillation token
    position: Literal["learned", "none", "rope"] = "learned"  # rope: rotary, in each block, as in DINOv3
    # Rows and columns of patches that the learned positions are for; they are resized for images of another size. 0 0:
    # those of the first images; positions that are read must then form a square or the images' grid.
    position_grid: Annotated[tuple[int, int], Range(0)] = (0, 0)
    position_resize: Literal["bicubic_antialias", "bicubic"] = "bicubic_antialias"  # of timm; of most of transformers
    rope_theta: Annotated[float, Range(above=0)] = 100.0  # the longest period of rotary positions, relative
    patch_bias: bool = True  # of the patch embedding; CLIP has none
    pre_norm: bool = False  # a norm before the first block, as in CLIP
    layer_scale: Annotated[float, Range(0)] = 0.0  # first value of a learned scale of each branch; 0: none
    # The class token; the mean of the patches; both, one after the other, so 2 D features; a learned query.
    pooling: Literal["cls", "mean", "cls_mean", "attention"] = "cls"
    final_norm: Literal["before", "after", "none"] = "before"  # where the last norm is: before or after the pooling
    projection: Annotated[int, Range(0)] = 0  # size of a last linear layer without bias, as in CLIP; 0: none
    drop_path: Annotated[float, Range(0, below=1)] = 0.0  # of a branch of an image, in the last block; linear from 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise OptionError("width", f"is {self.width}; expected a multiple of heads, {self.heads}")
        if self.position == "rope" and self.width // self.heads % 4:
            size = self.width // self.heads
            raise OptionError("heads", f"is {self.heads}, so a head has {size} features; expected a multiple of 4")
        if self.pooling in ("cls", "cls_mean") and not self.class_token:
            raise OptionError("pooling", f"is {self.pooling} without a class token; expected mean or attention")
        if self.pooling == "cls_mean" and self.final_norm == "after":
            raise OptionError("final_norm", "is after with pooling cls_mean; expected before or none")
        if bool(self.position_grid[0]) != bool(self.position_grid[1]):
            raise OptionError("position_grid", f"is {tuple(self.position_grid)}; expected rows and columns, or 0 0")

    def make(self, dtype: Any) -> VisionTransformer:
        own = [f.name for f in dataclasses.fields(VisionTransformerOptions) if f.name not in _SHARED]
        return VisionTransformer(**{k: getattr(self, k) for k in own}, remat=self.remat, dtype=dtype)


_SHARED = {field.name for field in dataclasses.fields(EncoderOptions)}
