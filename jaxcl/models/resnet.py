"""ResNets with CIFAR, ImageNet and patch stems, which can be split at any stage for an explainer.

N batch, H W image, C image channels, h w M height, width and channels of a feature map, D features.

Source: He et al. 2016, arXiv 1512.03385 (see `resnet_blocks`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcl.models.adapter import Adapter
from jaxcl.models.batch_norm import zero_rows
from jaxcl.models.encoder import Encoder, EncoderOptions
from jaxcl.models.heads import check_embeds
from jaxcl.models.layers import MatmulConv, conv, relu, remat_block
from jaxcl.models.norms import MOMENTUM, SET_MOMENTUM, add_norms, apply_norm, check_norm_sets
from jaxcl.models.resnet_blocks import BLOCK_OPTIONS, BLOCKS, DEPTHS
from jaxcl.models.resnet_torch import ResNetLayout
from jaxcl.runtime.options import POSITIVE, OptionError, Range

Array = jax.Array


class ResNet(Encoder):
    """Image [N,H,W,C] -> pooled features [N,D].

    A tap "stageK" is the raw output of the last convolution of the last block of stage K, the GradCAM layer of ExCon.
    """

    stage_sizes: Sequence[int]
    widths: Sequence[int]
    strides: Sequence[int]
    block: str = "basic"
    stem: str = "cifar"
    stem_padding: int = 0  # 0: the stem's own
    zero_init: bool = False
    dtype: Any = jnp.float32
    norm: str = "batch"
    momentum: float = MOMENTUM
    norm_sets: Sequence[str] = ()
    norm_set_momentum: float = SET_MOMENTUM
    convolution: Callable | None = None  # see `layers.conv`
    remat: bool = False

    @property
    def features(self) -> int:
        return self.widths[len(self.stage_sizes) - 1] * BLOCKS[self.block].expansion

    @property
    def num_stages(self) -> int:
        return len(self.stage_sizes)

    @property
    def taps(self) -> tuple[str, ...]:
        return tuple(f"stage{i + 1}" for i in range(len(self.stage_sizes)))

    @property
    def num_layers(self) -> int:
        return sum(self.stage_sizes)

    @nn.nowrap
    def layer_of(self, path: tuple[str, ...]) -> int:
        if not path[0].startswith("stages_"):
            return 0
        stage, block = map(int, path[0].split("_")[1:])  # flax's name of a list in a list: stages_STAGE_BLOCK
        return sum(self.stage_sizes[:stage]) + block + 1

    @nn.nowrap
    def layer_of_stage(self, stage: int) -> int:
        return sum(self.stage_sizes[:stage])

    @nn.nowrap
    def adapter(self, stage: int) -> Adapter:
        names = ("norm", "momentum", "norm_sets", "norm_set_momentum", "dtype")
        options = {k: getattr(self, k) for k in names}
        return Adapter(self.widths[stage - 1 :], self.strides[stage:], self.features, **options)

    @nn.nowrap
    def with_convolution(self, convolution: Callable) -> "ResNet":
        return self.clone(convolution=convolution)

    def setup(self):
        width, block = self.widths[0], BLOCKS[self.block]
        if self.stem == "cifar":
            self.stem_conv = conv(width, 3, 1, self.dtype, self.convolution, self.stem_padding)
        elif self.stem == "imagenet":
            self.stem_conv = conv(width, 7, 2, self.dtype, self.convolution, self.stem_padding)
        else:
            size = int(self.stem.removeprefix("patch"))
            self.stem_conv = MatmulConv(width, size, size, self.dtype)
        add_norms(self, "stem_bn", width)
        options = {k: getattr(self, k) for k in BLOCK_OPTIONS}
        stages, channels = [], width
        for size, planes, stride in zip(self.stage_sizes, self.widths, self.strides, strict=True):
            blocks = []
            for i in range(size):
                blocks.append(block(channels, planes, stride if i == 0 else 1, **options))
                channels = planes * block.expansion
            stages.append(blocks)
        self.stages = stages

    def _stem(self, x: Array, mode: dict) -> Array:
        # Padded rows stay zero from here on: nothing that follows has a bias but the norms, which know the rows.
        x = zero_rows(x.astype(self.dtype), mode.get("where"))
        x = relu(apply_norm(self, "stem_bn", self.stem_conv(x), mode))
        if self.stem == "imagenet":
            # Post-ReLU values are >= 0, so zero padding equals the -inf padding of the original.
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        return x

    def _mode(self, train: bool, where: Array | None, norm_set: str) -> dict:
        """The arguments of the norms in this call; a group norm has none."""
        if self.norm != "batch":
            return {}
        return dict(use_running_average=not train, where=where if train else None, norm_set=norm_set)

    @staticmethod
    def _pool(x: Array, mode: dict) -> Array:
        # Padded rows are zero already. This makes their gradient zero too, on which the norms rely.
        return zero_rows(x.astype(jnp.promote_types(x.dtype, jnp.float32)).mean((1, 2)), mode.get("where"))

    def __call__(self, x: Array, train: bool = False, where: Array | None = None, norm_set: str = "") -> Array:
        return self._pool(self.maps(x, train, where, norm_set)[-1], self._mode(train, where, norm_set))

    def maps(
        self, x: Array, train: bool = False, where: Array | None = None, norm_set: str = "", depth: int = 0
    ) -> list[Array]:
        mode, maps = self._mode(train, where, norm_set), []
        x = self._stem(x, mode)
        run = remat_block(mode) if self.remat and train else lambda block, x: block(x, mode)
        for blocks in self.stages[: depth or None]:
            for block in blocks:
                x = run(block, x)
            maps.append(x)
        return maps

    def to_tap(
        self, x: Array, tap: str, train: bool = False, where: Array | None = None, norm_set: str = ""
    ) -> tuple[Array, Array]:
        """-> (activations [N,h,w,M] at the tap, the input of the tapped block)."""
        mode, stage = self._mode(train, where, norm_set), self.tap_index(tap)
        x = self._stem(x, mode)
        for blocks in self.stages[:stage]:
            for block in blocks:
                x = block(x, mode)
        for block in self.stages[stage][:-1]:
            x = block(x, mode)
        return self.stages[stage][-1].to_tap(x, mode), x

    def from_tap(
        self, a: Array, rest: Array, tap: str, train: bool = False, where: Array | None = None, norm_set: str = ""
    ) -> Array:
        mode, stage = self._mode(train, where, norm_set), self.tap_index(tap)
        x = self.stages[stage][-1].from_tap(a, rest, mode)
        for blocks in self.stages[stage + 1 :]:
            for block in blocks:
                x = block(x, mode)
        return self._pool(x, mode)


@dataclasses.dataclass(frozen=True)
class ResNetOptions(EncoderOptions):
    """The options of a ResNet.

    Group norms (Wu and He 2018, arXiv 1803.08494; `norms.norm_groups`) keep no statistics and see each image alone.
    """

    torch_layout = ResNetLayout()

    depth: Literal[18, 34, 50, 101] = 18
    # cifar: 3x3; imagenet: 7x7 with stride 2, and max-pool; patchN: strided patches of N pixels
    stem: Literal["cifar", "imagenet", "patch2", "patch4", "patch8"] = "cifar"
    stem_padding: Annotated[int, Range(0)] = 0  # pixels around the image, in the stem; 0: cifar 1, imagenet 3
    # The last norm of each block starts with scale 0, so that a block starts as its shortcut (Goyal et al. 2017).
    zero_init_residual: bool = False
    width: Annotated[float, POSITIVE] = 1.0  # factor on all widths
    stage_sizes: Annotated[tuple[int, ...], Range(1)] = ()  # blocks in each stage, instead of the depth's
    stage_widths: Annotated[tuple[int, ...], Range(1)] = ()  # planes of each stage, instead of 64, 128, ...
    strides: Annotated[tuple[int, ...], Range(1)] = ()  # of each stage, instead of 1, 2, 2, ...
    norm: Literal["batch", "group"] = "batch"
    norm_sets: tuple[str, ...] = ()  # names of further sets of batch norms, beside the clean one that evaluates
    norm_set_momentum: Annotated[float, Range(0, below=1)] = SET_MOMENTUM  # of their running statistics
    head_embeds: tuple[str, ...] = ()  # augmentation parameters that the head is conditioned on: jitter, crop, ...
    head_embed_features: Annotated[int, Range(1)] = 512  # features that each of these becomes
    branches: tuple[int, ...] = ()  # stages with an adapter and a head, where a pass of that depth ends
    branch_embeds: tuple[int, ...] = ()  # the branches with conditioned heads; the main head always is

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stem_padding and self.stem.startswith("patch"):
            raise OptionError("stem_padding", f"is {self.stem_padding} with stem={self.stem}; expected 0 with patches")
        check_norm_sets(self.norm, self.norm_sets)
        check_embeds(self.head_embeds, self.head_features)
        sizes, widths, strides = map(len, self._stages())
        if not sizes == widths == strides:
            raise OptionError(
                "stage_sizes",
                f"has {sizes} entries, stage_widths {widths} and strides {strides}; expected one of each per stage",
            )
        for key, known in (("branches", range(1, sizes)), ("branch_embeds", self.branches)):
            if not set(getattr(self, key)) <= set(known):
                names = ", ".join(map(str, known)) or "none"
                raise OptionError(key, f"is {tuple(getattr(self, key))}; expected some of {names}")

    def _stages(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """-> (blocks, planes at width 1, stride) of each stage."""
        sizes = tuple(self.stage_sizes) or DEPTHS[self.depth][1]
        widths = tuple(self.stage_widths) or tuple(64 * 2**i for i in range(len(sizes)))
        return sizes, widths, tuple(self.strides) or (1,) + (2,) * (len(sizes) - 1)

    def make(self, dtype: Any) -> ResNet:
        sizes, widths, strides = self._stages()
        return ResNet(
            stage_sizes=sizes,
            widths=tuple(max(1, round(w * self.width)) for w in widths),
            strides=strides,
            block=DEPTHS[self.depth][0],
            stem=self.stem,
            stem_padding=self.stem_padding,
            zero_init=self.zero_init_residual,
            dtype=dtype,
            norm=self.norm,
            norm_sets=tuple(self.norm_sets),
            norm_set_momentum=self.norm_set_momentum,
            remat=self.remat,
        )
