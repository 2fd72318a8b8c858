"""Heads on pooled features: projection MLP and linear classifier, initialised like torch's Linear."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcl.augment import IDENTITY
from jaxcl.errors import UserError
from jaxcl.models.activations import relu
from jaxcl.models.batch_norm import BatchNorm, zero_rows
from jaxcl.models.norms import MOMENTUM, SET_MOMENTUM, name_in_set

Array = jax.Array
NORMS = ("none", "batch")
OUT_NORMS = ("none", "batch", "plain")
EMBED = "embed_"  # what the modules that take drawn parameters are called, before the parameter's name


def check_head(where: str, *, features: int, hidden_layers: int, hidden: int, norm: str, out_norm: str) -> None:
    """UserError, which names the option, for a head that cannot be."""
    for name, value in (("features", features), ("hidden_layers", hidden_layers), ("hidden", hidden)):
        if value < 0:
            raise UserError(f"{where}{name} is {value}; expected at least 0")
    for name, value, known in (("norm", norm, NORMS), ("out_norm", out_norm, OUT_NORMS)):
        if value not in known:
            raise UserError(f"{where}{name} is {value!r}; expected one of {', '.join(known)}")


def check_embeds(where: str, embeds: Sequence[str], embed_features: int) -> None:
    """UserError for parameters that no head can be told."""
    for name in embeds:
        if name not in IDENTITY:
            raise UserError(f"{where}embeds holds {name!r}; expected some of {', '.join(IDENTITY)}")
    if len(set(embeds)) < len(embeds):
        raise UserError(f"{where}embeds is {tuple(embeds)}; expected each name once")
    if embed_features < 1:
        raise UserError(f"{where}embed_features is {embed_features}; expected at least 1")


# Uniform +-1/sqrt(fan_in), the default of the authors' framework, for weights and biases alike.
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
    """Features [N,D] -> embedding [N,features], not normalised: `hidden_layers` times Dense - [norm] - ReLU, a Dense.

    With features 0 there is no head: the embedding is the features themselves.

    The head may be told what was drawn for each view, by name (`embeds`), so that the encoder need not forget it: each
    goes through Dense - BN - ReLU of its own and stands beside the features (Zhang and Ma 2022, arXiv 2206.00227).
    """

    features: int = 128
    hidden_layers: int = 1
    hidden: int = 0  # 0: as wide as the input
    norm: str = "none"  # after each hidden dense layer: none, batch
    out_norm: str = "none"  # after the last one: none, batch, plain (a batch norm without scale and bias)
    dtype: Any = jnp.float32
    momentum: float = MOMENTUM
    norm_sets: Sequence[str] = ()  # as of the encoder, where there are batch norms
    norm_set_momentum: float = SET_MOMENTUM
    embeds: Sequence[str] = ()  # names of drawn parameters, in the order in which they stand beside the features
    embed_features: int = 512  # of each

    @nn.compact
    def __call__(
        self,
        h: Array,
        train: bool = False,
        where: Array | None = None,
        norm_set: str = "",
        aug_params: dict[str, Array] | None = None,
    ) -> Array:
        """`where` [N] bool: rows that count in the batch statistics; norm_set: the batch norms to use.

        aug_params: by name, what was drawn for each view, [N] or [N,P], as it was drawn; what is not there was not done.
        """
        if not self.features:
            return h
        where = where if train else None
        mode = dict(use_running_average=not train, where=where)
        width = self.hidden or h.shape[-1]
        told = []
        for name in self.embeds:
            # No bias: the batch norm has one. It also takes parameters of any scale.
            a = Dense(self.embed_features, self.dtype, False, name=f"{EMBED}{name}")(
                aug_param_numbers(name, aug_params, len(h))
            )
            told.append(relu(self._normalise(f"{EMBED}{name}_bn", "batch", a, mode, norm_set)))
        h = zero_rows(h, where)  # not finite, it would spoil the kernels' gradients
        h = jnp.concatenate([h, *told], -1) if told else h
        for i in range(self.hidden_layers):
            # A bias before a batch norm would do nothing.
            h = Dense(width, self.dtype, self.norm == "none", name=f"hidden{i}")(h)
            h = relu(self._normalise(f"bn{i}", self.norm, h, mode, norm_set))
        h = Dense(self.features, self.dtype, self.out_norm == "none", name="out")(h)
        h = self._normalise("out_bn", self.out_norm, h, mode, norm_set)
        return h.astype(jnp.promote_types(self.dtype, jnp.float32))

    def _normalise(self, name: str, kind: str, x: Array, mode: dict, norm_set: str) -> Array:
        if kind == "none":
            return x
        out = x = zero_rows(x, mode["where"])  # a layer with a bias may lie between two norms
        for one in ("", *self.norm_sets):
            if one != norm_set and not self.is_initializing():  # only what is called gets variables
                continue
            norm = BatchNorm(
                momentum=self.norm_set_momentum if one else self.momentum,
                epsilon=1e-5,
                dtype=self.dtype,
                use_scale=kind == "batch",
                use_bias=kind == "batch",
                name=name_in_set(name, one),
            )
            y = norm(x, **mode)
            out = y if one == norm_set else out
        return out


def aug_param_numbers(name: str, aug_params: dict[str, Array] | None, count: int) -> Array:
    """What was drawn for each view as numbers [N,P]; of a view that drew nothing of the kind, the identity."""
    if aug_params is None or name not in aug_params:
        return jnp.broadcast_to(jnp.array(IDENTITY[name], jnp.float32), (count, len(IDENTITY[name])))
    return aug_params[name].astype(jnp.float32).reshape(count, -1)
