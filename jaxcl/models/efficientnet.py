"""EfficientNet-Lite: mobile inverted bottlenecks with ReLU6 and without squeeze-and-excite (see `efficientnet_blocks`).

N batch, H W image, C image channels, h w M height, width and channels of a feature map, D features, L blocks.

Source: Tan and Le 2019, arXiv 1905.11946, in the "lite" form of its authors' code.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcl.models.adapter import Adapter
from jaxcl.models.batch_norm import zero_rows
from jaxcl.models.efficientnet_blocks import NORM_FIELDS, STAGES, MBConv, StemConv, sizes_of
from jaxcl.models.efficientnet_torch import EfficientNetLayout
from jaxcl.models.encoder import Encoder, EncoderOptions
from jaxcl.models.heads import check_embeds
from jaxcl.models.layers import MatmulConv, kept_paths, relu6, remat_block
from jaxcl.models.norms import MOMENTUM, SET_MOMENTUM, add_norms, apply_norm, check_norm_sets
from jaxcl.runtime.options import POSITIVE, OptionError, Range

Array = jax.Array
PIXELS_AT_ONCE = 2 * 224**2  # measured


class EfficientNet(Encoder):
    """Image [N,H,W,C] -> pooled features [N,D].

    A tap "stageK" is the map that stage K hands on, "head" the last activations, whose mean is the features.
    """

    pixels_at_once = PIXELS_AT_ONCE

    stage_sizes: Sequence[int]
    widths: Sequence[int]
    stem_width: int = 32
    head_width: int = 1280
    padding: str = "same"
    norm_epsilon: float = 1e-3
    drop_path: float = 0.0
    dtype: Any = jnp.float32
    norm: str = "batch"
    momentum: float = MOMENTUM
    norm_sets: Sequence[str] = ()
    norm_set_momentum: float = SET_MOMENTUM
    convolution: Callable | None = None
    remat: bool = False

    @property
    def features(self) -> int:
        return self.head_width

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
        return (*(f"stage{i + 1}" for i in range(self.num_stages)), "head")

    @nn.nowrap
    def layer_of(self, path: tuple[str, ...]) -> int:
        if path[0].startswith("stem"):
            return 0
        if path[0].startswith("head"):
            return self.num_layers + 1
        stage, block = map(int, path[0].removeprefix("stages_").split("_"))
        return sum(self.stage_sizes[:stage]) + block + 1

    @nn.nowrap
    def layer_of_stage(self, stage: int) -> int:
        return sum(self.stage_sizes[:stage])

    @nn.nowrap
    def adapter(self, stage: int) -> Adapter:
        strides = [s.stride for s in STAGES[: self.num_stages]]
        options = {k: getattr(self, k) for k in NORM_FIELDS}
        return Adapter(self.widths[stage - 1 :], strides[stage:], self.features, **options)

    @nn.nowrap
    def with_convolution(self, convolution: Callable) -> "EfficientNet":
        return self.clone(convolution=convolution)

    @nn.nowrap
    def _rates(self) -> list[float]:
        """Of each block: grows with its index from 0, and would reach `drop_path` in the block after the last."""
        return [self.drop_path * i / self.num_layers for i in range(self.num_layers)]

    def setup(self):
        self.stem_conv = StemConv(self.stem_width, self.padding, self.dtype, self.convolution)
        add_norms(self, "stem_bn", self.stem_width, epsilon=self.norm_epsilon)
        options = {k: getattr(self, k) for k in (*NORM_FIELDS, "padding")} | {"epsilon": self.norm_epsilon}
        stages, channels, rates = [], self.stem_width, iter(self._rates())
        for known, size, width in zip(STAGES, self.stage_sizes, self.widths, strict=False):
            blocks = []
            for i in range(size):
                stride = 1 if i else known.stride
                shape = (channels, width, known.kernel, stride, known.expansion)
                blocks.append(MBConv(*shape, drop_path=next(rates), **options))
                channels = width
            stages.append(blocks)
        self.stages = stages
        self.head_conv = MatmulConv(self.head_width, 1, 1, self.dtype)
        add_norms(self, "head_bn", self.head_width, epsilon=self.norm_epsilon)

    def _mode(self, train: bool, where: Array | None, norm_set: str) -> dict:
        """The arguments of the norms in this call; a group norm has none."""
        if self.norm != "batch":
            return {}
        return dict(use_running_average=not train, where=where if train else None, norm_set=norm_set)

    def _stem(self, x: Array, mode: dict) -> Array:
        # Padded rows stay zero from here on: nothing that follows has a bias but the norms, which know the rows.
        x = zero_rows(x.astype(self.dtype), mode.get("where"))
        return relu6(apply_norm(self, "stem_bn", self.stem_conv(x), mode))

    def _head(self, x: Array, mode: dict) -> Array:
        return relu6(apply_norm(self, "head_bn", self.head_conv(x), mode))

    @staticmethod
    def _pool(x: Array, mode: dict) -> Array:
        # Padded rows are zero already. This makes their gradient zero too, on which the norms rely.
        return zero_rows(x.astype(jnp.promote_types(x.dtype, jnp.float32)).mean((1, 2)), mode.get("where"))

    def _run(self, x: Array, mode: dict, train: bool, begin: int, end: int, key: Array | None = None) -> list[Array]:
        """The map after each of the stages from `begin` to `end`."""
        kept, maps = kept_paths(key if train else None, self._rates(), len(x)), []
        for i in range(begin, end):
            for j, block in enumerate(self.stages[i]):
                keep = kept[sum(self.stage_sizes[:i]) + j]
                x = remat_block(mode, keep)(block, x) if self.remat and train else block(x, mode, keep)
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
        mode = self._mode(train, where, norm_set)
        x = self._run(self._stem(x, mode), mode, train, 0, self.num_stages, key)[-1]
        return self._pool(self._head(x, mode), mode)

    def maps(
        self, x: Array, train: bool = False, where: Array | None = None, norm_set: str = "", depth: int = 0
    ) -> list[Array]:
        mode = self._mode(train, where, norm_set)
        return self._run(self._stem(x, mode), mode, train, 0, depth or self.num_stages)

    def to_tap(
        self, x: Array, tap: str, train: bool = False, where: Array | None = None, norm_set: str = ""
    ) -> tuple[Array, None]:
        """-> (activations [N,h,w,M] at the tap, None)."""
        mode, end = self._mode(train, where, norm_set), 1 + self.tap_index(tap)
        x = self._run(self._stem(x, mode), mode, train, 0, min(end, self.num_stages))[-1]
        return (self._head(x, mode) if tap == "head" else x), None

    def from_tap(
        self, a: Array, rest: None, tap: str, train: bool = False, where: Array | None = None, norm_set: str = ""
    ) -> Array:
        mode, begin = self._mode(train, where, norm_set), 1 + self.tap_index(tap)
        if tap == "head":
            return self._pool(a, mode)
        x = [a, *self._run(a, mode, train, begin, self.num_stages)][-1]
        return self._pool(self._head(x, mode), mode)


@dataclasses.dataclass(frozen=True)
class EfficientNetOptions(EncoderOptions):
    """The options of an EfficientNet-Lite.

    Published weights are for image sides of 224, 240, 260, 280 and 300 pixels (lite0 to lite4).
    """

    torch_layout = EfficientNetLayout()

    variant: Literal["lite0", "lite1", "lite2", "lite3", "lite4"] = "lite0"
    stage_sizes: Annotated[tuple[int, ...], Range(1)] = ()  # blocks in each stage, instead of the variant's
    stage_widths: Annotated[tuple[int, ...], Range(1)] = ()  # channels of each stage, instead of the variant's
    stem_width: Annotated[int, Range(1)] = 32  # channels of the first convolution
    head_width: Annotated[int, Range(1)] = 1280  # channels of the last convolution: the features
    # same: as TensorFlow pads, and all weights from there (timm's tf_efficientnet_lite*); symmetric: as torch pads.
    padding: Literal["same", "symmetric"] = "same"
    norm_epsilon: Annotated[float, POSITIVE] = 1e-3  # added to variances; 1e-3 in TensorFlow, 1e-5 in torch
    drop_path: Annotated[float, Range(0, below=1)] = 0.0  # of a residual branch of an image; 0 first, then linear
    norm: Literal["batch", "group"] = "batch"
    norm_sets: tuple[str, ...] = ()  # names of further sets of batch norms, beside the clean one that evaluates
    norm_set_momentum: Annotated[float, Range(0, below=1)] = SET_MOMENTUM  # of their running statistics
    head_embeds: tuple[str, ...] = ()  # augmentation parameters that the head is conditioned on: jitter, crop, ...
    head_embed_features: Annotated[int, Range(1)] = 512  # features that each of these becomes
    branches: tuple[int, ...] = ()  # stages with an adapter and a head, where a pass of that depth ends
    branch_embeds: tuple[int, ...] = ()  # the branches with conditioned heads; the main head always is

    def __post_init__(self) -> None:
        super().__post_init__()
        check_norm_sets(self.norm, self.norm_sets)
        check_embeds(self.head_embeds, self.head_features)
        sizes, widths = self._stages()
        if not len(sizes) == len(widths) <= len(STAGES):
            raise OptionError(
                "stage_sizes",
                f"has {len(sizes)} entries and stage_widths {len(widths)}; expected as many, at most {len(STAGES)}",
            )
        for key, known in (("branches", range(1, len(sizes))), ("branch_embeds", self.branches)):
            if not set(getattr(self, key)) <= set(known):
                names = ", ".join(map(str, known)) or "none"
                raise OptionError(key, f"is {tuple(getattr(self, key))}; expected some of {names}")

    def _stages(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """-> (blocks, channels) of each stage."""
        sizes, widths = sizes_of(self.variant)
        return tuple(self.stage_sizes) or sizes, tuple(self.stage_widths) or widths

    def make(self, dtype: Any) -> EfficientNet:
        sizes, widths = self._stages()
        same = ("stem_width", "head_width", "padding", "norm_epsilon", "drop_path", "norm", "norm_set_momentum")
        return EfficientNet(
            stage_sizes=sizes,
            widths=widths,
            norm_sets=tuple(self.norm_sets),
            dtype=dtype,
            remat=self.remat,
            **{k: getattr(self, k) for k in same},
        )
