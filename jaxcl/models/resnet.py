"""ResNets with CIFAR, ImageNet and patch stems, cut open at any stage so that an explainer can stand in the middle.

N batch, H W image, C image channels, h w M height, width and channels of a feature map, D features.

Source: He et al. 2016, in the form of the SupCon and ExCon code: symmetric padding 1 for 3x3 and 0 for 1x1 convolutions
(not "SAME", which differs at stride 2), stride on the first 3x3 of a basic block and on the 3x3 of a bottleneck.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcl.errors import UserError
from jaxcl.models.activations import relu
from jaxcl.models.batch_norm import zero_rows
from jaxcl.models.norms import MOMENTUM, NORMS, SET_MOMENTUM, add_norms, apply_norm, check_norm_sets

Array = jax.Array

DEPTHS = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
}
STEMS = ("cifar", "imagenet", "patch2", "patch4", "patch8")

# Kaiming normal, fan-out, gain for ReLU.
conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


@jax.custom_vjp
def matmul(x: Array, kernel: Array) -> Array:
    """x [...,D] @ kernel [D,M], whose gradients are the same numbers in a form that XLA need not transpose for.

    By JAX's own rule the kernel's gradient is a transposed product, for which XLA on CPU writes the incoming gradient
    a second time the other way round: a quarter of the time of a forward and backward pass of 1x1 convolutions, their
    norms and ReLUs (measured with jax 0.10.2). On TPU and GPU it makes no difference. No forward-mode derivatives.
    """
    return x @ kernel


def _matmul_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ kernel, (x, kernel)


def _matmul_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    rows = jax.lax.dot_general(g, kernel, (((g.ndim - 1,), (1,)), ((), ())))
    flat = (a.reshape(-1, a.shape[-1]) for a in (x, g))
    return rows, jax.lax.dot_general(*flat, (((0,), (0,)), ((), ())))


matmul.defvjp(_matmul_forward, _matmul_backward)


class MatmulConv(nn.Module):
    """A convolution whose windows do not overlap, as one matrix product: 1x1 (any stride) and strided patches.

    The same function and the same kernel [kh,kw,in,out] as `nn.Conv` without padding. XLA makes this of a 1x1
    convolution by itself on TPU and GPU; on CPU the product runs two to three times faster than its convolution.
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


def _conv(features: int, kernel: int, stride: int, dtype: Any, convolution: Callable | None = None) -> nn.Module:
    if kernel == 1:
        return MatmulConv(features, 1, stride, dtype)
    return nn.Conv(
        features,
        (kernel, kernel),
        (stride, stride),
        padding=(kernel - 1) // 2,
        use_bias=False,
        kernel_init=conv_init,
        dtype=dtype,
        conv_general_dilated=convolution,
    )


class BasicBlock(nn.Module):
    """3x3 - BN - ReLU - 3x3 - BN, plus shortcut, ReLU."""

    in_features: int
    planes: int
    stride: int = 1
    dtype: Any = jnp.float32
    norm: str = "batch"
    momentum: float = MOMENTUM  # of the running statistics of the clean set
    norm_sets: Sequence[str] = ()  # names of further sets of batch norms
    norm_set_momentum: float = SET_MOMENTUM  # of theirs
    convolution: Callable | None = None  # None: lax's
    expansion = 1

    def setup(self):
        conv = partial(_conv, dtype=self.dtype, convolution=self.convolution)
        self.conv1 = conv(self.planes, 3, self.stride)
        add_norms(self, "bn1", self.planes)
        self.conv2 = conv(self.planes, 3, 1)
        add_norms(self, "bn2", self.planes)
        self.projects = self.stride != 1 or self.in_features != self.planes
        if self.projects:
            self.shortcut_conv = conv(self.planes, 1, self.stride)
            add_norms(self, "shortcut_bn", self.planes)

    def to_tap(self, x: Array, mode: dict) -> Array:
        """The raw output of the last convolution: before its batch norm, the residual sum and the ReLU."""
        return self.conv2(relu(apply_norm(self, "bn1", self.conv1(x), mode)))

    def from_tap(self, a: Array, x: Array, mode: dict) -> Array:
        y = apply_norm(self, "bn2", a, mode)
        shortcut = apply_norm(self, "shortcut_bn", self.shortcut_conv(x), mode) if self.projects else x
        return relu(y + shortcut)

    def __call__(self, x: Array, mode: dict) -> Array:
        return self.from_tap(self.to_tap(x, mode), x, mode)


class Bottleneck(nn.Module):
    """1x1 - BN - ReLU - 3x3(stride) - BN - ReLU - 1x1 (four times the planes) - BN, plus shortcut, ReLU."""

    in_features: int
    planes: int
    stride: int = 1
    dtype: Any = jnp.float32
    norm: str = "batch"
    momentum: float = MOMENTUM  # of the running statistics of the clean set
    norm_sets: Sequence[str] = ()  # names of further sets of batch norms
    norm_set_momentum: float = SET_MOMENTUM  # of theirs
    convolution: Callable | None = None  # None: lax's
    expansion = 4

    def setup(self):
        conv = partial(_conv, dtype=self.dtype, convolution=self.convolution)
        self.conv1 = conv(self.planes, 1, 1)
        add_norms(self, "bn1", self.planes)
        self.conv2 = conv(self.planes, 3, self.stride)
        add_norms(self, "bn2", self.planes)
        self.conv3 = conv(4 * self.planes, 1, 1)
        add_norms(self, "bn3", 4 * self.planes)
        self.projects = self.stride != 1 or self.in_features != 4 * self.planes
        if self.projects:
            self.shortcut_conv = conv(4 * self.planes, 1, self.stride)
            add_norms(self, "shortcut_bn", 4 * self.planes)

    def to_tap(self, x: Array, mode: dict) -> Array:
        """The raw output of the third convolution, before its batch norm."""
        y = relu(apply_norm(self, "bn1", self.conv1(x), mode))
        return self.conv3(relu(apply_norm(self, "bn2", self.conv2(y), mode)))

    def from_tap(self, a: Array, x: Array, mode: dict) -> Array:
        y = apply_norm(self, "bn3", a, mode)
        shortcut = apply_norm(self, "shortcut_bn", self.shortcut_conv(x), mode) if self.projects else x
        return relu(y + shortcut)

    def __call__(self, x: Array, mode: dict) -> Array:
        return self.from_tap(self.to_tap(x, mode), x, mode)


BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}
BLOCK_OPTIONS = ("dtype", "norm", "momentum", "norm_sets", "norm_set_momentum", "convolution")


class ResNet(nn.Module):
    """Image [N,H,W,C] -> pooled features [N,D]; `to_tap` and `from_tap` are its two halves.

    A tap "stageK" is the raw output of the last convolution of the last block of stage K, the GradCAM layer of ExCon.
    """

    stage_sizes: Sequence[int]
    widths: Sequence[int]
    strides: Sequence[int]
    block: str = "basic"
    stem: str = "cifar"
    dtype: Any = jnp.float32
    norm: str = "batch"
    momentum: float = MOMENTUM
    norm_sets: Sequence[str] = ()  # names of sets beside the clean one
    norm_set_momentum: float = SET_MOMENTUM
    convolution: Callable | None = None
    remat: bool = False  # the backward pass computes each block once more, and keeps only what lies between them

    @property
    def expansion(self) -> int:
        """Channels of a stage's output over its planes."""
        return BLOCKS[self.block].expansion

    @property
    def features(self) -> int:
        return self.widths[len(self.stage_sizes) - 1] * self.expansion

    def setup(self):
        width, block = self.widths[0], BLOCKS[self.block]
        if self.stem == "cifar":
            self.stem_conv = _conv(width, 3, 1, self.dtype, self.convolution)
        elif self.stem == "imagenet":
            self.stem_conv = _conv(width, 7, 2, self.dtype, self.convolution)
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
        # Rows that do not count stay zero from here on: what follows has no bias but the norms', which know them.
        x = zero_rows(x.astype(self.dtype), mode.get("where"))
        x = relu(apply_norm(self, "stem_bn", self.stem_conv(x), mode))
        if self.stem == "imagenet":
            # Post-ReLU values are >= 0, so zero padding equals the -inf padding of the original.
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        return x

    def _mode(self, train: bool, where: Array | None, norm_set: str) -> dict:
        """What the norms are told in this call. A group norm sees each image alone: nothing."""
        if self.norm != "batch":
            return {}
        return dict(use_running_average=not train, where=where if train else None, norm_set=norm_set)

    @staticmethod
    def _pool(x: Array, mode: dict) -> Array:
        # Zero already, in rows that do not count: this is for their gradient, which the norms rely on too.
        return zero_rows(x.astype(jnp.promote_types(x.dtype, jnp.float32)).mean((1, 2)), mode.get("where"))

    def __call__(self, x: Array, train: bool = False, where: Array | None = None, norm_set: str = "") -> Array:
        """x [N,H,W,C] normalised images; `where` [N] bool: rows that count in the batch statistics.

        norm_set: the batch norms to use, "" or one of `norm_sets`.
        """
        return self._pool(self.maps(x, train, where, norm_set)[-1], self._mode(train, where, norm_set))

    def maps(
        self, x: Array, train: bool = False, where: Array | None = None, norm_set: str = "", depth: int = 0
    ) -> list[Array]:
        """x [N,H,W,C] -> what each stage gives, [N,h,w,M], of the first `depth` stages (0: all), and no further."""
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
        """-> (activations [N,h,w,M] at the tap, the input of the tapped block, which `from_tap` wants back)."""
        mode, stage = self._mode(train, where, norm_set), tap_stage(tap, self.stage_sizes)
        x = self._stem(x, mode)
        for blocks in self.stages[:stage]:
            for block in blocks:
                x = block(x, mode)
        for block in self.stages[stage][:-1]:
            x = block(x, mode)
        return self.stages[stage][-1].to_tap(x, mode), x

    def from_tap(
        self, a: Array, x: Array, tap: str, train: bool = False, where: Array | None = None, norm_set: str = ""
    ) -> Array:
        """Activations at the tap and the tapped block's input -> pooled features [N,D]."""
        mode, stage = self._mode(train, where, norm_set), tap_stage(tap, self.stage_sizes)
        x = self.stages[stage][-1].from_tap(a, x, mode)
        for blocks in self.stages[stage + 1 :]:
            for block in blocks:
                x = block(x, mode)
        return self._pool(x, mode)


def remat_block(*args: Any) -> Callable[[nn.Module, Array], Array]:
    """(block, x) -> block(x, *args), which keeps nothing for the backward pass but x (and args)."""
    return nn.remat(lambda block, x: block(x, *args))


def tap_stage(tap: str, stage_sizes: Sequence[int]) -> int:
    """The index of the stage that a tap's name means; UserError where the network has no such stage."""
    names = [f"stage{i + 1}" for i in range(len(stage_sizes))]
    if tap not in names:
        raise UserError(f"tap {tap!r} is not in this encoder; expected one of {', '.join(names)}")
    return names.index(tap)


def resnet(
    *,
    depth: int = 18,
    stem: str = "cifar",
    width: float = 1.0,
    stage_sizes: Sequence[int] = (),
    stage_widths: Sequence[int] = (),
    strides: Sequence[int] = (),
    dtype: Any = jnp.float32,
    norm: str = "batch",
    norm_sets: Sequence[str] = (),
    norm_set_momentum: float = SET_MOMENTUM,
    remat: bool = False,
) -> ResNet:
    """A ResNet by depth (18, 34, 50, 101), stem and width factor; the three sequences override the standard stages.

    norm: "batch", or "group" (Wu and He 2018, arXiv 1803.08494; see `norms.norm_groups`), which keeps no statistics and
    sees each image alone.
    norm_sets: names of further sets of batch norms (see `norms`), whose running statistics keep norm_set_momentum.
    Errors: UserError for an unknown depth, stem or norm, sequences of unequal length, or sets without batch norm.
    """
    if depth not in DEPTHS:
        raise UserError(f"model.depth is {depth}; expected one of {', '.join(map(str, DEPTHS))}")
    if stem not in STEMS:
        raise UserError(f"model.stem is {stem!r}; expected one of {', '.join(STEMS)}")
    if norm not in NORMS:
        raise UserError(f"model.norm is {norm!r}; expected one of {', '.join(NORMS)}")
    check_norm_sets(norm, norm_sets, norm_set_momentum)
    if not width > 0:
        raise UserError(f"model.width is {width}; expected a factor above 0")
    block, sizes = DEPTHS[depth]
    sizes = tuple(stage_sizes) or sizes
    widths = tuple(stage_widths) or tuple(64 * 2**i for i in range(len(sizes)))
    strides = tuple(strides) or (1,) + (2,) * (len(sizes) - 1)
    if not len(sizes) == len(widths) == len(strides):
        raise UserError(
            f"model.stage_sizes, stage_widths and strides have {len(sizes)}, {len(widths)} and {len(strides)} entries; "
            "expected one of each per stage"
        )
    for key, values in (("stage_sizes", sizes), ("stage_widths", widths), ("strides", strides)):
        if min(values) < 1:
            raise UserError(f"model.{key} is {values}; expected whole numbers of at least 1")
    widths = tuple(max(1, round(w * width)) for w in widths)
    return ResNet(
        stage_sizes=sizes,
        widths=widths,
        strides=strides,
        block=block,
        stem=stem,
        dtype=dtype,
        norm=norm,
        norm_sets=tuple(norm_sets),
        norm_set_momentum=norm_set_momentum,
        remat=remat,
    )
