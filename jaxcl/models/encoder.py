"""The contracts of an encoder: the network (`Encoder`) and its options in a config (`EncoderOptions`).

A new encoder is one file with a subclass of each, and a line in jaxcl/models/registry.py (none if configs name it as
"package.module:MyOptions"). The smallest one:

    class Pixels(Encoder):
        features: int = 8

        @nn.compact
        def __call__(self, x, train=False, where=None, norm_set=""):
            return nn.Dense(self.features)(x.mean((1, 2)))

    @dataclasses.dataclass(frozen=True)
    class PixelsOptions(EncoderOptions):
        width: Annotated[int, Range(1)] = 8

        def make(self, dtype):
            return Pixels(self.width)

N batch, H W image, C image channels, h w M height, width and channels of a stage's map, D features.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcl.errors import UserError
from jaxcl.models.norms import MOMENTUM, SET_MOMENTUM
from jaxcl.runtime.options import Options, Range
from jaxcl.runtime.registry import Contract

Array = jax.Array


class Encoder(Contract, nn.Module):
    """A flax module: image [N,H,W,C] -> pooled features [N,D]. `Model` calls it, and nothing else does.

    A subclass must have `features` and `__call__`. The rest tells what else it can do; the defaults mean: nothing.
    Any attribute may be a class attribute, a property or a field of the module.

    Attributes:
      features: D.
      dtype: of the activations. The features are float32 at least.
      norm: "batch" if the features of an image depend on its batch in training; any other word if they do not.
      norm_sets: names of further sets of batch norms beside the clean one, which is called "". The norm of a set lies
        beside the clean one in the variables, as "NAME_SET" (`jaxcl.models.norms` adds and applies them).
      momentum: share of the running statistics of the clean set that a batch keeps.
      norm_set_momentum: the same for the other sets.
      takes_key: whether `__call__` takes `key`, because it drops something at random in training.
      num_stages: number of maps that `maps` returns; 0 without stages.
      taps: names of the activations that `to_tap` can return.
      pixels_at_once: of the images that a CPU encodes together in inference, so that their maps stay in its cache; 0:
        of all images.
      num_layers: number of blocks, which are numbered 1 .. num_layers by `layer_of`; 0: the layers are not told apart.
      layer_decay: the `optimizer.layer_decay` that is usual when such an encoder is trained on from weights.
      lora_modules: for `jaxcl.models.lora`: a word such as "qkv" -> modules, as in `LoRA.modules`.
    """

    # Not annotated: a subclass that declares one as a field may place it after fields without a default.
    features = 0
    dtype = jnp.float32
    norm = "none"
    norm_sets = ()
    momentum = MOMENTUM
    norm_set_momentum = SET_MOMENTUM
    takes_key = False
    num_stages = 0
    taps = ()
    pixels_at_once = 0
    num_layers = 0
    layer_decay = 1.0
    lora_modules: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def __call__(
        self,
        x: Array,
        train: bool = False,
        where: Array | None = None,
        norm_set: str = "",
        key: Array | None = None,
    ) -> Array:
        """Normalised images [N,H,W,C] -> features [N,D]. Without batch norms `where` and `norm_set` change nothing.

        Args:
          x: the images.
          train: normalise by this batch and move the running statistics; with a key, drop at random.
          where: [N] bool, the rows that count in the batch statistics; the others are padding.
          norm_set: the set of batch norms to use.
          key: of what is dropped; None: nothing is. Only passed if `takes_key`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `__call__`")

    def maps(
        self, x: Array, train: bool = False, where: Array | None = None, norm_set: str = "", depth: int = 0
    ) -> list[Array]:
        """Images -> the output [N,h,w,M] of each of the first `depth` stages (0: all). Runs no further than that."""
        raise NotImplementedError(f"{type(self).__name__} has num_stages, and must define `maps`")

    def to_tap(
        self, x: Array, tap: str, train: bool = False, where: Array | None = None, norm_set: str = ""
    ) -> tuple[Array, Any]:
        """Images -> (activations [N,h,w,M] at the tap, whatever else `from_tap` needs)."""
        raise NotImplementedError(f"{type(self).__name__} has taps, and must define `to_tap`")

    def from_tap(
        self, a: Array, rest: Any, tap: str, train: bool = False, where: Array | None = None, norm_set: str = ""
    ) -> Array:
        """Activations at the tap and what `to_tap` returned with them -> features [N,D]."""
        raise NotImplementedError(f"{type(self).__name__} has taps, and must define `from_tap`")

    @nn.nowrap
    def adapter(self, stage: int) -> nn.Module:
        """For `model.branches`: a module (map of this stage, from 1, train=, where=, norm_set=) -> features [N,D]."""
        raise NotImplementedError(f"{type(self).__name__} must define `adapter` to have branches")

    @nn.nowrap
    def forgetting(self, norm_set: str) -> "Encoder":
        """The same encoder with momentum 0 in a set: the last batch replaces its running statistics."""
        return self.clone(**{"norm_set_momentum" if norm_set else "momentum": 0.0})

    @nn.nowrap
    def may_lack(self, name: str) -> bool:
        """Whether this variable ("params.project.kernel") of a checkpoint is left out where the encoder has none."""
        return False

    @nn.nowrap
    def with_convolution(self, convolution: Callable) -> "Encoder":
        """The same encoder with another function in place of `lax.conv_general_dilated`, where it allows for that."""
        return self

    @nn.nowrap
    def layer_of(self, path: tuple[str, ...]) -> int:
        """The layer of a parameter by its path in the encoder's tree.

        Returns:
          0 for the stem or embedding, 1 .. num_layers for the blocks in order, num_layers + 1 for what follows them.
        """
        raise NotImplementedError(f"{type(self).__name__} has num_layers, and must define `layer_of`")

    @nn.nowrap
    def layer_of_stage(self, stage: int) -> int:
        """The last layer of a stage, from 1; of encoders with num_stages and num_layers."""
        raise NotImplementedError(f"{type(self).__name__} has num_layers and stages, and must define `layer_of_stage`")

    @nn.nowrap
    def tap_index(self, tap: str) -> int:
        """The place of a tap in `taps`. Raises UserError, which lists the taps, for an unknown one."""
        if tap not in self.taps:
            known = f"one of {', '.join(self.taps)}" if self.taps else "none, since it has no taps"
            raise UserError(f"tap {tap!r} is not in this encoder; expected {known}")
        return self.taps.index(tap)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderOptions(Options, Contract):
    """The options of an encoder and its projection head that all kinds share.

    A kind adds its own options as fields. Where it supports one of the class attributes below, it declares that one as
    a field as well.

    Attributes:
      torch_layout: a `jaxcl.models.torch_layout.TorchLayout`; None: the encoder has none.
      norm_sets, norm_set_momentum: further sets of batch norms, see `Encoder`.
      branches: the stages with an adapter and a head of their own, for passes that end there.
      branch_embeds: the branches with conditioned heads.
      head_embeds: the augmentation parameters that heads are conditioned on, by name; () for none.
      head_embed_features: the features that each of them becomes.
    """

    torch_layout = None  # not annotated, as in Encoder
    norm_sets = ()
    norm_set_momentum = SET_MOMENTUM
    branches = ()
    branch_embeds = ()
    head_embeds = ()
    head_embed_features = 512

    head_hidden_layers: Annotated[int, Range(0)] = 1  # 0: the head is one dense layer
    head_features: Annotated[int, Range(0)] = 128  # size of the embedding; 0: no head, the embedding is the features
    head_hidden: Annotated[int, Range(0)] = 0  # width of the hidden layers of the head; 0: as wide as the features
    head_norm: Literal["none", "batch"] = "none"  # after each hidden layer of the head
    # After the last layer; scale: a batch norm without bias (SimCLR); plain: without scale and bias.
    head_out_norm: Literal["none", "batch", "scale", "plain"] = "none"
    head_unit_input: bool = False  # the head gets the features at unit length (SupCon on ImageNet)
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; parameters, losses, statistics are float32
    remat: bool = False  # keep activations between blocks only, and compute each block again in the backward pass
    # Start from these: a word, hf:ORG/NAME, a folder or a file (`jaxcl.models.pretrained`).
    weights: str = ""
    # Batch norms of the encoder in training: by the statistics of the batch, or frozen, by the running ones, which then
    # stay as they are (scales and biases still learn). Encoders without batch norms are the same with both.
    norm_statistics: Literal["batch", "frozen"] = "batch"
    lora_rank: Annotated[int, Range(0)] = 0  # train low-rank factors instead of the encoder's own parameters; 0: no
    lora_alpha: Annotated[float, Range(0)] = 0.0  # the factors' product is multiplied by this / rank; 0: as the rank
    lora_targets: tuple[str, ...] = ("qkv",)  # the kernels that get factors, in words of the encoder: qkv, proj, mlp
    # Side to which images are resized on the device, before the encoder; 0: they stay as they are.
    input_size: Annotated[int, Range(0)] = 0
    input_interpolation: Literal["bilinear", "bicubic"] = "bilinear"  # of that, antialiased

    def make(self, dtype: Any) -> Encoder:
        """The encoder that these options describe. dtype: of the activations, a type of jax.numpy."""
        raise NotImplementedError(f"{type(self).__name__} must define `make`")
