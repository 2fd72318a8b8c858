"""ConvNeXt and ConvNeXt V2: 7x7 depthwise convolutions and pointwise MLPs, with layer norms.

N batch, H W image, C channels, h w M height, width and channels of a feature map, D features.

Source: Liu et al. 2022, arXiv 2201.03545; V2: Woo et al. 2023, arXiv 2301.00808.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcl.models.adapter import Adapter
from jaxcl.models.convnext_torch import SIZES, ConvNeXtLayout
from jaxcl.models.encoder import Encoder, EncoderOptions
from jaxcl.models.heads import check_embeds
from jaxcl.models.layers import MatmulConv, WideDepthwiseConv, drop_path, kept_paths, remat_block
from jaxcl.runtime.options import POSITIVE, OptionError, Range

Array = jax.Array

WIDER = 4  # hidden channels of a block over its channels
init = nn.initializers.truncated_normal(0.02)


def layer_norm(epsilon: float, dtype: Any) -> nn.Module:
    """Over the channels of each pixel."""
    return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, dtype=dtype)


class ResponseNorm(nn.Module):
    """x + x * scale * (its length over the map / the mean of the lengths of all channels) + bias (V2's GRN)."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_NxhxwxC: Array) -> Array:
        C = x_NxhxwxC.shape[-1]
        scale, bias = (self.param(name, nn.initializers.zeros, (C,), jnp.float32) for name in ("scale", "bias"))
        wide = x_NxhxwxC.astype(jnp.promote_types(x_NxhxwxC.dtype, jnp.float32))
        total_Nx1x1xC = jnp.square(wide).sum((1, 2), keepdims=True)
        some = total_Nx1x1xC > 0  # the square root has no gradient at 0
        length = jnp.where(some, jnp.sqrt(jnp.where(some, total_Nx1x1xC, 1)), 0)
        relative = length / (length.mean(-1, keepdims=True) + 1e-6)
        return (wide * (1 + scale * relative) + bias).astype(self.dtype)


class ConvNeXtBlock(nn.Module):
    """x + depthwise - LayerNorm - 1x1 (four times as wide) - GELU - [response norm] - 1x1 - [LayerScale]."""

    features: int
    kernel: int = 7
    layer_scale: float = 1e-6
    response_norm: bool = False
    epsilon: float = 1e-6
    drop_path: float = 0.0
    dtype: Any = jnp.float32

    def setup(self):
        C, options = self.features, dict(dtype=self.dtype, use_bias=True, init=init)
        self.depthwise_conv = WideDepthwiseConv(self.kernel, **options)
        self.norm = layer_norm(self.epsilon, self.dtype)
        self.expand = MatmulConv(WIDER * C, 1, 1, **options)
        if self.response_norm:
            self.response = ResponseNorm(self.dtype)
        self.project = MatmulConv(C, 1, 1, **options)
        if self.layer_scale:
            self.scale = self.param("scale", nn.initializers.constant(self.layer_scale), (C,), jnp.float32)

    def __call__(self, x: Array, keep: Array | None = None) -> Array:
        """keep: [N] bool, the images that keep this branch; None: all."""
        y = nn.gelu(self.expand(self.norm(self.depthwise_conv(x))), approximate=False)
        y = self.project(self.response(y) if self.response_norm else y)
        if self.layer_scale:
            y = y * self.scale.astype(self.dtype)
        return x + drop_path(y, self.drop_path, keep)


class Downsample(nn.Module):
    """LayerNorm - 2x2 convolution with stride 2; an odd last row or column is left out."""

    features: int
    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    def setup(self):
        self.norm = layer_norm(self.epsilon, self.dtype)
        self.conv = MatmulConv(self.features, 2, 2, self.dtype, use_bias=True, init=init)

    def __call__(self, x: Array) -> Array:
        return self.conv(self.norm(x))


class ConvNeXt(Encoder):
    """Image [N,H,W,C] -> pooled and normalised features [N,D].

    A tap "stageK" is the map that stage K hands on. Each image is seen alone: there is no batch norm.
    """

    norm = "layer"
    layer_decay = 0.8
    pixels_at_once = 2 * 224**2

    stage_sizes: Sequence[int]
    widths: Sequence[int]
    patch: int = 4
    kernel: int = 7
    layer_scale: float = 1e-6
    response_norm: bool = False
    norm_epsilon: float = 1e-6
    final_norm_epsilon: float = 1e-6
    drop_path: float = 0.0
    dtype: Any = jnp.float32
    remat: bool = False

    @property
    def features(self) -> int:
        return self.widths[-1]

    @property
    def takes_key(self) -> bool:
        return self.drop_path > 0

    @property
    def num_stages(self) -> int:
        return len(self.stage_sizes)

    @property
    def num_layers(self) -> int:
        return sum(self.stage_sizes)

    @property
    def taps(self) -> tuple[str, ...]:
        return tuple(f"stage{i + 1}" for i in range(self.num_stages))

    @nn.nowrap
    def layer_of(self, path: tuple[str, ...]) -> int:
        name, *numbers = path[0].split("_")
        if name == "stem":
            return 0
        if name == "final":
            return self.num_layers + 1
        # What reduces the map belongs to the first block after it.
        stage, block = map(int, numbers if name == "stages" else (*numbers, 0))
        return sum(self.stage_sizes[:stage]) + block + 1

    @nn.nowrap
    def layer_of_stage(self, stage: int) -> int:
        return sum(self.stage_sizes[:stage])

    @nn.nowrap
    def adapter(self, stage: int) -> Adapter:
        later = self.num_stages - stage
        # A group norm keeps the adapter a function of one image too.
        return Adapter(self.widths[stage - 1 :], (2,) * later, self.features, norm="group", dtype=self.dtype)

    @nn.nowrap
    def _rates(self) -> list[float]:
        """Of each block: from 0 in the first to `drop_path` in the last."""
        return [self.drop_path * i / max(1, self.num_layers - 1) for i in range(self.num_layers)]

    def setup(self):
        self.stem_conv = MatmulConv(self.widths[0], self.patch, self.patch, self.dtype, use_bias=True, init=init)
        self.stem_norm = layer_norm(self.norm_epsilon, self.dtype)
        same = {k: getattr(self, k) for k in ("kernel", "layer_scale", "response_norm", "dtype")}
        stages, rates = [], iter(self._rates())
        for i, (size, width) in enumerate(zip(self.stage_sizes, self.widths, strict=True)):
            if i:
                setattr(self, f"downsample_{i}", Downsample(width, self.norm_epsilon, self.dtype))
            block = dict(features=width, epsilon=self.norm_epsilon, **same)
            stages.append([ConvNeXtBlock(drop_path=next(rates), **block) for _ in range(size)])
        self.stages = stages
        self.final_norm = layer_norm(self.final_norm_epsilon, jnp.promote_types(self.dtype, jnp.float32))

    def _stem(self, x: Array) -> Array:
        return self.stem_norm(self.stem_conv(x.astype(self.dtype)))

    def _pool(self, x: Array) -> Array:
        return self.final_norm(x.astype(jnp.promote_types(x.dtype, jnp.float32)).mean((1, 2)))

    def _run(self, x: Array, train: bool, begin: int, end: int, key: Array | None = None) -> list[Array]:
        """The map after each of the stages from `begin` to `end`."""
        kept, maps = kept_paths(key if train else None, self._rates(), len(x)), []
        for i in range(begin, end):
            x = getattr(self, f"downsample_{i}")(x) if i else x
            for j, block in enumerate(self.stages[i]):
                keep = kept[sum(self.stage_sizes[:i]) + j]
                x = remat_block(keep)(block, x) if self.remat and train else block(x, keep)
            maps.append(x)
        return maps

    def __call__(
        self,
        x: Array,
        train: bool = False,
        where: Array | None = None,
        norm_set: str = "",
        key: Array | None = None,
    ) -> Array:
        return self._pool(self._run(self._stem(x), train, 0, self.num_stages, key)[-1])

    def maps(
        self, x: Array, train: bool = False, where: Array | None = None, norm_set: str = "", depth: int = 0
    ) -> list[Array]:
        return self._run(self._stem(x), train, 0, depth or self.num_stages)

    def to_tap(
        self, x: Array, tap: str, train: bool = False, where: Array | None = None, norm_set: str = ""
    ) -> tuple[Array, None]:
        """-> (activations [N,h,w,M] at the tap, None)."""
        return self._run(self._stem(x), train, 0, 1 + self.tap_index(tap))[-1], None

    def from_tap(
        self, a: Array, rest: None, tap: str, train: bool = False, where: Array | None = None, norm_set: str = ""
    ) -> Array:
        return self._pool([a, *self._run(a, train, 1 + self.tap_index(tap), self.num_stages)][-1])


@dataclasses.dataclass(frozen=True)
class ConvNeXtOptions(EncoderOptions):
    """The options of a ConvNeXt. V2 has response_norm and no layer_scale."""

    torch_layout = ConvNeXtLayout()

    variant: Literal[
        "atto", "femto", "pico", "nano", "tiny", "small", "base", "large", "xlarge", "huge", "xxlarge"
    ] = "tiny"  # fmt: skip
    stage_sizes: Annotated[tuple[int, ...], Range(1)] = ()  # blocks in each stage, instead of the variant's
    stage_widths: Annotated[tuple[int, ...], Range(1)] = ()  # channels of each stage, instead of the variant's
    patch: Annotated[int, Range(1)] = 4  # side and stride of the first convolution in pixels
    kernel: Annotated[int, Range(1)] = 7  # side of the depthwise convolutions in pixels, odd
    layer_scale: Annotated[float, Range(0)] = 1e-6  # first factor on each residual branch; 0: no such factor
    response_norm: bool = False  # global response normalization in the MLPs
    norm_epsilon: Annotated[float, POSITIVE] = 1e-6  # added to variances
    final_norm_epsilon: Annotated[float, POSITIVE] = 1e-6  # the same in the norm of the features
    drop_path: Annotated[float, Range(0, below=1)] = 0.0  # of a residual branch of an image; 0 first, then linear
    head_embeds: tuple[str, ...] = ()  # augmentation parameters that the head is conditioned on: jitter, crop, ...
    head_embed_features: Annotated[int, Range(1)] = 512  # features that each of these becomes
    branches: tuple[int, ...] = ()  # stages with an adapter and a head, where a pass of that depth ends
    branch_embeds: tuple[int, ...] = ()  # the branches with conditioned heads; the main head always is

    def __post_init__(self) -> None:
        super().__post_init__()
        check_embeds(self.head_embeds, self.head_features)
        if self.kernel % 2 == 0:
            raise OptionError("kernel", f"is {self.kernel}; expected an odd number")
        sizes, widths = self._stages()
        if len(sizes) != len(widths):
            raise OptionError(
                "stage_sizes", f"has {len(sizes)} entries and stage_widths {len(widths)}; expected as many"
            )
        for key, known in (("branches", range(1, len(sizes))), ("branch_embeds", self.branches)):
            if not set(getattr(self, key)) <= set(known):
                names = ", ".join(map(str, known)) or "none"
                raise OptionError(key, f"is {tuple(getattr(self, key))}; expected some of {names}")

    def _stages(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """-> (blocks, channels) of each stage."""
        sizes, widths = SIZES[self.variant]
        return tuple(self.stage_sizes) or sizes, tuple(self.stage_widths) or widths

    def make(self, dtype: Any) -> ConvNeXt:
        sizes, widths = self._stages()
        same = ("patch", "kernel", "layer_scale", "response_norm", "norm_epsilon", "final_norm_epsilon", "drop_path")
        return ConvNeXt(sizes, widths, dtype=dtype, remat=self.remat, **{k: getattr(self, k) for k in same})
