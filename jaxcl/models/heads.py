"""The projection head on pooled features, and dense layers initialised like torch's Linear."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcl.augment import IDENTITY
from jaxcl.losses.common import unit
from jaxcl.models.batch_norm import BatchNorm, zero_rows
from jaxcl.models.layers import relu
from jaxcl.models.norms import MOMENTUM, SET_MOMENTUM, name_in_set
from jaxcl.runtime.options import OptionError

Array = jax.Array
EMBED = "embed_"  # prefix of the modules that embed augmentation parameters, before the parameter's name


def check_embeds(embeds: Sequence[str], features: int) -> None:
    """Raises OptionError for augmentation parameters that a head cannot be conditioned on. features: of the head."""
    for name in embeds:
        if name not in IDENTITY:
            raise OptionError("head_embeds", f"holds {name!r}; expected some of {', '.join(IDENTITY)}")
    if len(set(embeds)) < len(embeds):
        raise OptionError("head_embeds", f"is {tuple(embeds)}; expected each name once")
    if embeds and not features:
        raise OptionError("head_embeds", f"is {tuple(embeds)} with head_features 0, which means no head; give it some")


# Uniform +-1/sqrt(fan_in), torch's default, for weights and biases alike.
dense_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _bias_init(fan_in: int):
    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Dense(nn.Module):
    """A dense layer with the torch default initialisation."""

    features: int
    dtype: Any = jnp.float32
    bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.Dense(
            self.features,
            use_bias=self.bias,
            kernel_init=dense_init,
            bias_init=_bias_init(x.shape[-1]),
            dtype=self.dtype,
            name="dense",
        )(x)


class ProjectionHead(nn.Module):
    """Features [N,D] -> embedding [N,features], not normalised: `hidden_layers` times Dense - [norm] - ReLU, Dense.

    With features 0 there is no head: the embedding is the features themselves.

    The head can be conditioned on augmentation parameters (`embeds`), so that the encoder need not be invariant to
    them: each goes through a separate Dense - BN - ReLU and is concatenated with the features (Zhang and Ma 2022, arXiv
    2206.00227).
    """

    features: int = 128
    hidden_layers: int = 1
    hidden: int = 0  # 0: as wide as the input
    norm: str = "none"  # after each hidden dense layer: none, batch
    out_norm: str = "none"  # after the last one: none, batch, scale (without bias), plain (without scale and bias)
    unit_input: bool = False  # the features are first scaled to unit length
    dtype: Any = jnp.float32
    momentum: float = MOMENTUM
    norm_sets: Sequence[str] = ()  # those of the encoder
    norm_set_momentum: float = SET_MOMENTUM
    embeds: Sequence[str] = ()  # names of augmentation parameters, in the order of concatenation
    embed_features: int = 512  # of each parameter

    @nn.compact
    def __call__(
        self,
        h: Array,
        train: bool = False,
        where: Array | None = None,
        norm_set: str = "",
        aug_params: dict[str, Array] | None = None,
    ) -> Array:
        """Features -> embedding.

        Args:
          h: [N,D].
          train: normalise by this batch and move the running statistics.
          where: [N] bool, rows that count in the batch statistics.
          norm_set: the set of batch norms to use.
          aug_params: name -> the parameters drawn for each row, [N] or [N,P]. A missing name means the identity.
        """
        if not self.features:
            return h
        where = where if train else None
        mode = dict(use_running_average=not train, where=where)
        width = self.hidden or h.shape[-1]
        embedded = []
        for name in self.embeds:
            # Without bias: the batch norm has one. It also makes the scale of a parameter irrelevant.
            a = Dense(self.embed_features, self.dtype, False, name=f"{EMBED}{name}")(
                aug_param_numbers(name, aug_params, len(h))
            )
            embedded.append(relu(self._normalise(f"{EMBED}{name}_bn", "batch", a, mode, norm_set)))
        h = zero_rows(h, where)  # a padded row that is not finite would spoil the kernels' gradients
        h = unit(h) if self.unit_input else h
        h = jnp.concatenate([h, *embedded], -1) if embedded else h
        for i in range(self.hidden_layers):
            # A bias before a batch norm would have no effect.
            h = Dense(width, self.dtype, self.norm == "none", name=f"hidden{i}")(h)
            h = relu(self._normalise(f"bn{i}", self.norm, h, mode, norm_set))
        h = Dense(self.features, self.dtype, self.out_norm == "none", name="out")(h)
        h = self._normalise("out_bn", self.out_norm, h, mode, norm_set)
        return h.astype(jnp.promote_types(self.dtype, jnp.float32))

    def _normalise(self, name: str, kind: str, x: Array, mode: dict, norm_set: str) -> Array:
        if kind == "none":
            return x
        out = x = zero_rows(x, mode["where"])  # a layer with a bias may precede this norm
        for one in ("", *self.norm_sets):
            # flax makes variables only of the modules that are called
            if one != norm_set and not self.is_initializing():
                continue
            norm = BatchNorm(
                momentum=self.norm_set_momentum if one else self.momentum,
                epsilon=1e-5,
                dtype=self.dtype,
                use_scale=kind in ("batch", "scale"),
                use_bias=kind == "batch",
                name=name_in_set(name, one),
            )
            y = norm(x, **mode)
            out = y if one == norm_set else out
        return out


def aug_param_numbers(name: str, aug_params: dict[str, Array] | None, count: int) -> Array:
    """The augmentation parameters of each row as numbers [N,P]; the identity where the name is missing."""
    if aug_params is None or name not in aug_params:
        return jnp.broadcast_to(jnp.array(IDENTITY[name], jnp.float32), (count, len(IDENTITY[name])))
    return aug_params[name].astype(jnp.float32).reshape(count, -1)
