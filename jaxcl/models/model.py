"""A model: an encoder and its projection head, as functions from parameters and statistics to features and statistics.

N batch, H W image, C image channels, h w M height, width and channels of a map, D features, E embedding.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcl.errors import UserError
from jaxcl.models import cpu
from jaxcl.models.encoder import Encoder, EncoderOptions
from jaxcl.models.heads import ProjectionHead
from jaxcl.models.lora import LoRA as LowRank
from jaxcl.models.norms import replace, statistics_of, with_running_statistics
from jaxcl.models.trees import (
    ADAPTER,
    BRANCHES,
    ENCODER,
    HEAD,
    LORA,
    branch_name,
    encoder_stats,
    with_branch,
    with_head,
)

Array = jax.Array
Tree = Any
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Model:
    """An encoder and a projection head. It has no state: parameters and batch statistics are passed in and returned.

    Attributes:
      encoder: the network, by the contract of `jaxcl.models.encoder`.
      head: features [N,D] -> embedding [N,E].
      branches: (stage, counted from 1, its adapter, its head), where a pass of that depth leaves the encoder.
      input_size: side to which images are resized before the encoder; 0: they are encoded as they are.
      input_interpolation: "bilinear" or "bicubic", antialiased.
      few_at_once: in inference, encode as many images together as `Encoder.pixels_at_once` says.
      lora: low-rank factors of the encoder's kernels; None: it has none.
      frozen_norms: the last layer (`Encoder.layer_of`) whose batch norms normalise by their running statistics in
        training too, and keep them; -1: none, inf: all.

    `jaxcl.models.trees` says where the parameters and statistics of each lie.
    """

    encoder: Encoder
    head: ProjectionHead
    branches: tuple[tuple[int, nn.Module, ProjectionHead], ...] = ()
    input_size: int = 0
    input_interpolation: str = "bilinear"
    few_at_once: bool = False
    lora: LowRank | None = None
    frozen_norms: float = -1

    # ---- facts

    @property
    def features(self) -> int:
        """D"""
        return self.encoder.features

    @property
    def embedding_features(self) -> int:
        """E"""
        return self.head.features or self.features

    @property
    def num_stages(self) -> int:
        """The number of maps that `maps` returns; 0 for an encoder without stages."""
        return self.encoder.num_stages

    @property
    def batch_norm(self) -> bool:
        """Whether the features of an image depend on its batch in training."""
        return self.encoder.norm == "batch" and self.frozen_norms < math.inf

    def check_depth(self, where: str, depth: int) -> None:
        """Raises UserError unless `encode` can stop after that many stages; 0 means the whole network.

        where: the config key that names the depth.
        """
        known = (0, *(stage for stage, _, _ in self.branches))
        if depth not in known:
            names = ", ".join(map(str, known))
            raise UserError(f"{where} is {depth}; expected one of {names}; model.branches adds further ones")

    def check_norm_set(self, where: str, name: str) -> None:
        """Raises UserError unless the encoder has this set of batch norms. where: the config key that names it."""
        known = ("", *self.encoder.norm_sets)
        if name not in known:
            if self.encoder.norm != "batch":
                raise UserError(f"{where} is {name!r}; expected '': this encoder has no batch norms")
            names = ", ".join(map(repr, known))
            raise UserError(f"{where} is {name!r}; expected one of {names}; model.norm_sets adds further ones")

    def check_tap(self, tap: str) -> None:
        """Raises UserError, which lists the taps, unless `split_at` knows this one."""
        self.encoder.tap_index(tap)

    # ---- parameters and statistics

    def init(self, key: Array, image_shape: tuple[int, int, int]) -> tuple[Tree, Tree]:
        """-> (parameters, batch statistics of all sets of batch norms). image_shape: (H, W, C)."""
        encoder_key, head_key = jax.random.split(key)
        if self.input_size:
            image_shape = (self.input_size, self.input_size, image_shape[-1])
        variables = self.encoder.init(encoder_key, jnp.zeros((1, *image_shape)), train=False)
        if "batch_stats" in variables and self.encoder.norm != "batch":
            name = type(self.encoder).__name__
            raise UserError(f"{name} keeps batch statistics, but says norm={self.encoder.norm!r}; expected 'batch'")
        head = self.head.init(head_key, jnp.zeros((1, self.features)))
        stats = with_head(dict(variables.get("batch_stats", {})), head.get("batch_stats", {}))
        params = {ENCODER: variables["params"], HEAD: head.get("params", {})}
        if self.lora:
            params[LORA] = self.lora.init(jax.random.fold_in(key, zlib.crc32(LORA.encode())), params[ENCODER])
        if not self.branches:
            return params, stats
        image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
        maps = jax.eval_shape(lambda x: self.encoder.apply(variables, x, method="maps"), image)
        for stage, adapter, head in self.branches:
            adapter_key, head_key = jax.random.split(jax.random.fold_in(key, stage))
            branch = {
                ADAPTER: adapter.init(adapter_key, jnp.zeros(maps[stage - 1].shape)),
                HEAD: head.init(head_key, jnp.zeros((1, self.features))),
            }
            for tree, kind in ((params, "params"), (stats, "batch_stats")):
                own = {k: v[kind] for k, v in branch.items() if v.get(kind)}
                tree[BRANCHES] = {**tree.get(BRANCHES, {}), branch_name(stage): own}
        return params, stats

    def encoder_params(self, params: Tree) -> Tree:
        """The parameters that the network runs with: with LoRA, its own and what the factors add."""
        if self.lora and LORA in params:  # GradCache hands over what is merged already
            return self.lora.merged(params[ENCODER], params[LORA])
        return params[ENCODER]

    def keeps_statistics(self, path: tuple[str, ...]) -> bool:
        """Whether a batch norm at this path in the encoder's tree keeps its running statistics in training."""
        return self.frozen_norms == math.inf or self.encoder.layer_of(path) <= self.frozen_norms

    def statistics_of(self, stats: Tree, norm_set: str = "") -> Tree:
        """The encoder's batch statistics of one set of batch norms."""
        # Heads normalise whole batches, and no micro-batch takes a branch, so nobody asks for theirs.
        return statistics_of(encoder_stats(stats), norm_set, self.encoder.norm_sets)

    def batch_statistics(
        self, params: Tree, stats: Tree, images: Array, *, where: Array | None = None, norm_set: str = ""
    ) -> Tree:
        """The means and variances by which `encode` normalises these images [N,H,W,C] in training, {} without any.

        They form the tree of the running statistics of the set (`statistics_of`). The values in `stats` do not matter.
        """
        if not self.batch_norm:
            return {}
        forgetting = dataclasses.replace(self, encoder=self.encoder.forgetting(norm_set))
        _, new = forgetting.encode(params, stats, images, train=True, where=where, norm_set=norm_set)
        return self.statistics_of(new, norm_set)

    def move_statistics(self, stats: Tree, batch: Tree, norm_set: str = "") -> Tree:
        """Running statistics of all sets, after a batch with these statistics (`batch_statistics`) of one set."""
        if not self.batch_norm:
            return stats
        keep = self.encoder.norm_set_momentum if norm_set else self.encoder.momentum
        return replace(stats, batch, lambda old, new: keep * old + (1 - keep) * new)

    # ---- images -> features -> embeddings

    def resized(self, images: Array) -> Array:
        """Images [N,H,W,C] at the encoder's `input_size`; unchanged if they have it, or if there is none."""
        count, *size, channels = images.shape
        S = self.input_size
        if not S or size == [S, S]:
            return images
        method = "cubic" if self.input_interpolation == "bicubic" else "linear"
        return jax.image.resize(images, (count, S, S, channels), method, antialias=True)

    def encode(
        self,
        params: Tree,
        stats: Tree,
        images: Array,
        *,
        train: bool,
        where: Array | None = None,
        norm_set: str = "",
        key: Array | None = None,
        depth: int = 0,
    ) -> tuple[Array, Tree]:
        """Normalised images -> features, and the new batch statistics.

        Args:
          params, stats: as from `init`.
          images: [N,H,W,C].
          train: normalise by this batch and move the running statistics of the set.
          where: [N] bool, the rows that count in the batch statistics; the others are padding.
          norm_set: the set of batch norms to use; "" is the clean one.
          key: of what an encoder drops at random in training (`Encoder.takes_key`); None: nothing is dropped.
          depth: run this many stages only, then the adapter of that stage, which drops nothing; 0: the whole network.

        Returns:
          (features [N,D] float32, batch statistics)

        Raises:
          UserError: the model has no such set or depth.
        """
        images = self.resized(images)
        mode = dict(train=train, where=where, norm_set=norm_set)
        if not depth:
            extra = {"key": key} if self.encoder.takes_key else {}
            if self.few_at_once and not train:
                return self._few_at_once(params, stats, images, norm_set), stats
            return self._apply(params, stats, images, **mode, **extra)
        adapter, _ = self._branch(depth)
        maps, stats = self._apply(params, stats, images, **mode, depth=depth, method="maps")
        name = branch_name(depth)
        own = stats.get(BRANCHES, {}).get(name, {})
        variables = {"params": params[BRANCHES][name][ADAPTER], "batch_stats": own.get(ADAPTER, {})}
        if not train:
            return adapter.apply(variables, maps[-1], **mode), stats
        h, new = adapter.apply(variables, maps[-1], mutable=["batch_stats"], **mode)
        return h, with_branch(stats, name, ADAPTER, {**own.get(ADAPTER, {}), **new.get("batch_stats", {})})

    def embed(
        self,
        params: Tree,
        stats: Tree,
        h: Array,
        *,
        train: bool,
        where: Array | None = None,
        norm_set: str = "",
        aug_params: dict[str, Array] | None = None,
        depth: int = 0,
    ) -> tuple[Array, Tree]:
        """Features [N,D] -> (embedding [N,E], not normalised, new batch statistics); options as for `encode`.

        aug_params: for a conditioned head, name -> the parameters drawn for each row [N,...]; None: the identity.
        """
        name = branch_name(depth)
        head = self._branch(depth)[1] if depth else self.head
        params, own = (tree.get(BRANCHES, {}).get(name, {}) if depth else tree for tree in (params, stats))
        variables = {"params": params.get(HEAD, {}), "batch_stats": own.get(HEAD, {})}
        options = dict(norm_set=norm_set, aug_params=aug_params)
        if not train:
            return head.apply(variables, h, **options), stats
        z, new = head.apply(variables, h, mutable=["batch_stats"], train=True, where=where, **options)
        new = {**own.get(HEAD, {}), **new.get("batch_stats", {})}
        return z, with_branch(stats, name, HEAD, new) if depth else with_head(stats, new)

    def project(self, params: Tree, stats: Tree, h: Array) -> Array:
        """Features [N,D] -> embedding [N,E], not normalised (the losses normalise), in inference mode."""
        return self.embed(params, stats, h, train=False)[0]

    def maps(self, params: Tree, stats: Tree, images: Array) -> list[Array]:
        """images [N,H,W,C] -> outputs [N,h,w,M] of the stages, in inference mode. Raises UserError without stages."""
        if not self.num_stages:
            raise UserError("this encoder has no stages; expected one with stages, such as a resnet")
        images = self.resized(images)
        return self._apply(params, stats, images, train=False, where=None, norm_set="", method="maps")[0]

    def split_at(
        self, params: Tree, stats: Tree, images: Array, tap: str, *, train: bool, norm_set: str = ""
    ) -> tuple[Array, Callable[[Array], tuple[Array, Tree]], Tree]:
        """Split the encoder at a tap (`Encoder.taps`): run the first half, and return the second as a function.

        The tail is a function of the activations alone, so its `jax.vjp` costs the backward pass down to the tap only.
        With `train` both halves use the statistics of this batch, as one pass over the network would. Nothing is
        dropped. `norm_set` as in `encode`.

        Returns:
          (activations at the tap, such as [N,h,w,M]; tail: activations -> (features [N,D], batch statistics after both
          halves); batch statistics after the first half)
        """
        images = self.resized(images)
        (a, rest), new = self._apply(params, stats, images, tap, train=train, norm_set=norm_set, method="to_tap")

        def tail(a: Array) -> tuple[Array, Tree]:
            return self._apply(params, new, a, rest, tap, train=train, norm_set=norm_set, method="from_tap")

        return a, tail, new

    def _few_at_once(self, params: Tree, stats: Tree, images: Array, norm_set: str) -> Array:
        """Features in inference mode, by a loop over equal parts of the batch."""
        (N, H, W, _), model = images.shape, self.for_loops()
        most = min(N, max(1, self.encoder.pixels_at_once // max(1, H * W)))
        rows = next((n for n in range(most, 1, -1) if N % n == 0), 1)

        def encode(x: Array) -> Array:
            return model._apply(params, stats, x, train=False, where=None, norm_set=norm_set)[0]

        if rows >= N:
            return encode(images)
        h = jax.lax.map(encode, images.reshape(N // rows, rows, *images.shape[1:]))
        return h.reshape(N, *h.shape[2:])

    def _branch(self, depth: int) -> tuple[nn.Module, ProjectionHead]:
        self.check_depth("depth", depth)
        return next((adapter, head) for stage, adapter, head in self.branches if stage == depth)

    def _apply(self, params: Tree, stats: Tree, *args, train: bool, norm_set: str, **kwargs) -> tuple[Any, Tree]:
        """Call the encoder -> (its output, batch statistics of the model)."""
        self.check_norm_set("norm_set", norm_set)
        kwargs |= dict(train=train, norm_set=norm_set)
        variables = {"params": self.encoder_params(params), "batch_stats": encoder_stats(stats)}
        if not train:
            return self.encoder.apply(variables, *args, **kwargs), stats
        if self.frozen_norms < 0 or self.encoder.norm != "batch":
            out, new = self.encoder.apply(variables, *args, mutable=["batch_stats"], **kwargs)
        else:
            with with_running_statistics(self.keeps_statistics):
                out, new = self.encoder.apply(variables, *args, mutable=["batch_stats"], **kwargs)
        return out, {**stats, **new.get("batch_stats", {})}

    # ---- forms for CPUs (`jaxcl.models.cpu`); on other backends these are the same model

    def for_loops(self) -> "Model":
        """The same function, faster to differentiate inside a loop."""
        return self._with_convolution(cpu.loop_conv)

    def for_one_device(self) -> "Model":
        """The same function, faster outside of loops if one device has the whole batch."""
        model = self._with_convolution(cpu.chunked_conv)
        few = cpu.in_use() and self.encoder.pixels_at_once > 0
        return dataclasses.replace(model, few_at_once=True) if few else model

    def _with_convolution(self, convolution: Callable) -> "Model":
        if not cpu.in_use():
            return self
        encoder = self.encoder.with_convolution(convolution)
        return self if encoder is self.encoder else dataclasses.replace(self, encoder=encoder)


def make_model(options: EncoderOptions) -> Model:
    """The model of an encoder's options, with the head and the branches that they describe."""
    dtype = DTYPES[options.dtype]
    encoder = options.make(dtype)
    if encoder.features < 1:
        raise UserError(f"{type(encoder).__name__}.features is {encoder.features}; expected the number of features")

    def head(conditioned: bool) -> ProjectionHead:
        return ProjectionHead(
            features=options.head_features,
            hidden_layers=options.head_hidden_layers,
            hidden=options.head_hidden,
            norm=options.head_norm,
            out_norm=options.head_out_norm,
            unit_input=options.head_unit_input,
            dtype=dtype,
            norm_sets=encoder.norm_sets,
            norm_set_momentum=encoder.norm_set_momentum,
            embeds=tuple(options.head_embeds) if conditioned else (),
            embed_features=options.head_embed_features,
        )

    stages = sorted(set(options.branches))
    branches = tuple((i, encoder.adapter(i), head(i in options.branch_embeds)) for i in stages)
    return Model(
        encoder,
        head(True),
        branches,
        input_size=options.input_size,
        input_interpolation=options.input_interpolation,
        lora=LowRank.of(options, encoder),
        frozen_norms=math.inf if options.norm_statistics == "frozen" else -1,
    )
