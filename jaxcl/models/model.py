"""Encoders behind a small functional interface: parameters in, features and new batch statistics out.

N batch, D features, E embedding.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcl.errors import UserError
from jaxcl.models.convolution import loop_conv, parted_conv
from jaxcl.models.encoder import EncoderOptions
from jaxcl.models.heads import ProjectionHead, check_embeds, check_head
from jaxcl.models.norms import SET_MOMENTUM, replace, statistics_of
from jaxcl.models.resnet import ResNet, resnet, tap_stage
from jaxcl.models.stages import Adapter
from jaxcl.models.vit import ViT, ViTOptions, tap_block, vit

Array = jax.Array
Tree = Any
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class ModelOptions(EncoderOptions):
    """What a config may say of a ResNet."""

    depth: int = 18  # 18, 34, 50, 101
    stem: str = "cifar"  # cifar 3x3; imagenet 7x7 stride 2 and max-pool; patch2, patch4, patch8 strided patches
    width: float = 1.0  # factor on all widths
    stage_sizes: Sequence[int] = ()  # blocks per stage, instead of the depth's own
    stage_widths: Sequence[int] = ()  # planes per stage, instead of 64, 128, ...
    strides: Sequence[int] = ()  # stride of each stage, instead of 1, 2, 2, ...
    norm: str = "batch"  # or "group": each image by itself, no running statistics
    norm_sets: Sequence[str] = ()  # names of further sets of batch norms, beside the clean one that evaluates
    norm_set_momentum: float = SET_MOMENTUM  # of their running statistics; the clean set keeps 0.9 of the old value
    head_hidden_layers: int = 1  # 0: one dense layer
    head_features: int = 128  # size of the embedding; 0: no head, the features themselves
    head_hidden: int = 0  # width of its hidden layers; 0: as wide as the features
    head_norm: str = "none"  # after each hidden layer of the head: none, batch
    head_out_norm: str = "none"  # after its last: none, batch, plain (no scale, no bias)
    head_embeds: Sequence[str] = ()  # what the head is told of how a view was drawn: jitter, crop, blur_sigma, ...
    head_embed_features: int = 512  # numbers that each of these becomes
    branches: Sequence[int] = ()  # stages with an adapter and a head of their own, where a pass of that depth ends
    branch_embeds: Sequence[int] = ()  # those of them whose heads are told too; the main head is in any case
    dtype: str = "float32"  # or bfloat16: of activations; parameters, losses and statistics of norms stay float32
    remat: bool = False  # keep activations between blocks only, and compute each block again in the backward pass
    weights: str = ""  # begin with these, not at random: what jaxcl export wrote, or a torchvision ResNet; safetensors


@dataclasses.dataclass(frozen=True)
class Model:
    """An encoder and a projection head; all state is passed in and handed back."""

    encoder: nn.Module
    head: nn.Module
    branches: tuple[tuple[int, Adapter, ProjectionHead], ...] = ()  # stage (from 1), what leads off it, its own head

    @property
    def features(self) -> int:
        return self.encoder.features

    @property
    def num_stages(self) -> int:
        """Stages whose maps can be seen; 0 for an encoder without."""
        return len(self.encoder.stage_sizes) if isinstance(self.encoder, ResNet) else 0

    def check_depth(self, where: str, depth: int) -> None:
        """UserError unless the network can be left after that many stages; 0 is the whole of it."""
        known = (0, *(stage for stage, _, _ in self.branches))
        if depth not in known:
            names = ", ".join(map(str, known))
            raise UserError(f"{where} is {depth}; expected one of {names}; model.branches adds further ones")

    def _branch(self, depth: int) -> tuple[Adapter, ProjectionHead]:
        self.check_depth("depth", depth)
        return next((adapter, head) for stage, adapter, head in self.branches if stage == depth)

    @property
    def batch_norm(self) -> bool:
        """Whether what an image becomes depends on its batch."""
        return self.encoder.norm == "batch"

    def check_norm_set(self, where: str, name: str) -> None:
        """UserError unless this is a set of batch norms that the model has; "" is the clean one."""
        known = ("", *self.encoder.norm_sets)
        if name not in known:
            if isinstance(self.encoder, ViT):
                raise UserError(f"{where} is {name!r}; expected '': a vit has no batch norms, and so no sets of them")
            names = ", ".join(map(repr, known))
            raise UserError(f"{where} is {name!r}; expected one of {names}; model.norm_sets adds further ones")

    def check_tap(self, tap: str) -> None:
        """UserError, which names those there are, unless `split_at` knows the tap."""
        if isinstance(self.encoder, ViT):
            tap_block(tap, self.encoder.depth)
        else:
            tap_stage(tap, self.encoder.stage_sizes)

    def init(self, key: Array, image_shape: tuple[int, int, int]) -> tuple[Tree, Tree]:
        """-> (params {"encoder", "head"}, batch statistics of the encoder), of all sets of batch norms."""
        encoder_key, head_key = jax.random.split(key)
        variables = self.encoder.init(encoder_key, jnp.zeros((1, *image_shape)), train=False)
        head = self.head.init(head_key, jnp.zeros((1, self.features)))
        stats = {**variables.get("batch_stats", {}), **_head_stats(head.get("batch_stats", {}))}
        params = {"encoder": variables["params"], "head": head.get("params", {})}
        if not self.branches:
            return params, stats
        image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
        maps = jax.eval_shape(lambda x: self.encoder.apply(variables, x, method="maps"), image)
        for stage, adapter, head in self.branches:
            adapter_key, head_key = jax.random.split(jax.random.fold_in(key, stage))
            parts = {
                "adapter": adapter.init(adapter_key, jnp.zeros(maps[stage - 1].shape)),
                HEAD: head.init(head_key, jnp.zeros((1, self.features))),
            }
            for tree, kind in ((params, "params"), (stats, "batch_stats")):
                own = {k: v[kind] for k, v in parts.items() if v.get(kind)}
                tree[BRANCHES] = {**tree.get(BRANCHES, {}), f"stage{stage}": own}
        return params, stats

    def _encoder(self, params: Tree, stats: Tree, *args, train: bool, norm_set: str, **kwargs) -> tuple[Any, Tree]:
        self.check_norm_set("norm_set", norm_set)
        kwargs |= dict(train=train, norm_set=norm_set)
        variables = {"params": params["encoder"], "batch_stats": _of_encoder(stats)}
        if not train:
            return self.encoder.apply(variables, *args, **kwargs), stats
        out, new = self.encoder.apply(variables, *args, mutable=["batch_stats"], **kwargs)
        return out, {**stats, **new.get("batch_stats", {})}

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
        """images [N,H,W,C] -> (features [N,D] float32, new batch statistics).

        train: normalise by this batch (rows with `where` False do not count) and move the running statistics.
        norm_set: the set of batch norms to use, "" the clean one; no statistics but its own move.
        key: with `train`, what an encoder with dropout drops; None: nothing is dropped. A ResNet has none.
        depth: run the first so many stages only, and what leads off there; 0: the whole network.
        Errors: UserError for a set or a depth that the model has not.
        """
        mode = dict(train=train, where=where, norm_set=norm_set)
        if not depth:
            dropout = {"key": key} if isinstance(self.encoder, ViT) else {}
            return self._encoder(params, stats, images, **mode, **dropout)
        adapter, _ = self._branch(depth)
        maps, stats = self._encoder(params, stats, images, **mode, depth=depth, method="maps")
        name = f"stage{depth}"
        own = stats.get(BRANCHES, {}).get(name, {})
        variables = {"params": params[BRANCHES][name]["adapter"], "batch_stats": own.get("adapter", {})}
        if not train:
            return adapter.apply(variables, maps[-1], **mode), stats
        h, new = adapter.apply(variables, maps[-1], mutable=["batch_stats"], **mode)
        return h, _with_branch(stats, name, "adapter", {**own.get("adapter", {}), **new.get("batch_stats", {})})

    def maps(self, params: Tree, stats: Tree, images: Array) -> list[Array]:
        """images [N,H,W,C] -> what each stage gives, [N,h,w,M], in inference mode. Errors: as `num_stages` 0."""
        if not self.num_stages:
            raise UserError("this encoder has no stages; expected a resnet")
        return self._encoder(params, stats, images, train=False, where=None, norm_set="", method="maps")[0]

    def statistics_of(self, stats: Tree, norm_set: str = "") -> Tree:
        """The part of the batch statistics that belongs to one set; all, where there is one set."""
        # Heads normalise whole batches, and no micro-batch is sent down a branch.
        return statistics_of(_of_encoder(stats), norm_set, self.encoder.norm_sets)

    def batch_statistics(
        self, params: Tree, stats: Tree, images: Array, *, where: Array | None = None, norm_set: str = ""
    ) -> Tree:
        """The means and variances that `encode` normalises these images [N,H,W,C] by when training, {} without any.

        The tree of the running statistics of the set (`statistics_of`), which here do not enter.
        """
        if not self.batch_norm:
            return {}
        momentum = "norm_set_momentum" if norm_set else "momentum"
        forgetful = dataclasses.replace(self, encoder=self.encoder.clone(**{momentum: 0.0}))
        _, new = forgetful.encode(params, stats, images, train=True, where=where, norm_set=norm_set)
        return self.statistics_of(new, norm_set)

    def move_statistics(self, stats: Tree, batch: Tree, norm_set: str = "") -> Tree:
        """Running statistics of all sets after a batch with the given ones (`batch_statistics`) of one set."""
        if not self.batch_norm:
            return stats
        keep = self.encoder.norm_set_momentum if norm_set else self.encoder.momentum
        return replace(stats, batch, lambda old, new: keep * old + (1 - keep) * new)

    def for_loops(self) -> "Model":
        """The same model, to be differentiated inside a loop: see models.convolution."""
        return self._with(loop_conv)

    def for_one_device(self) -> "Model":
        """The same model, to be differentiated on a batch that is all on one device: see models.convolution."""
        return self._with(parted_conv)

    def _with(self, convolution: Callable) -> "Model":
        """With a convolution for CPUs."""
        if jax.default_backend() != "cpu" or not isinstance(self.encoder, ResNet):
            return self
        return dataclasses.replace(self, encoder=self.encoder.clone(convolution=convolution))

    @property
    def embedding_features(self) -> int:
        """E, the size of the embedding."""
        return self.head.features or self.features

    def project(self, params: Tree, stats: Tree, h: Array) -> Array:
        """features [N,D] -> embedding [N,E], not normalised (the losses normalise), in inference mode."""
        return self.embed(params, stats, h, train=False)[0]

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
        """features [N,D] -> (embedding [N,E], not normalised, new batch statistics); options as for `encode`.

        aug_params: what was drawn for each view, [N,...] by name, for a head that is told; None: as if nothing was done.
        """
        name = f"stage{depth}"
        head = self._branch(depth)[1] if depth else self.head
        params, own = (tree.get(BRANCHES, {}).get(name, {}) if depth else tree for tree in (params, stats))
        variables = {"params": params.get(HEAD, {}), "batch_stats": own.get(HEAD, {})}
        options = dict(norm_set=norm_set, aug_params=aug_params)
        if not train:
            return head.apply(variables, h, **options), stats
        z, new = head.apply(variables, h, mutable=["batch_stats"], train=True, where=where, **options)
        new = {**own.get(HEAD, {}), **new.get("batch_stats", {})}
        return z, _with_branch(stats, name, HEAD, new) if depth else {**stats, **_head_stats(new)}

    def split_at(
        self, params: Tree, stats: Tree, images: Array, tap: str, *, train: bool, norm_set: str = ""
    ) -> tuple[Array, Callable[[Array], tuple[Array, Tree]], Tree]:
        """-> (activations [N,h,w,M] at the tap, tail: activations -> (features [N,D], statistics), statistics).

        The tail is a function of the activations alone, so its `jax.vjp` costs the backward pass down to the tap and
        no more. With `train` both halves use the statistics of this batch, as one pass over the network would.
        Taps are "stage1" ... of a ResNet, and "block1" ... of a vision transformer, whose activations are the patch
        tokens and whose last block has no tap (see `vit.ViT`). Nothing is dropped.
        `norm_set` as in `encode`.
        """
        (a, x), new = self._encoder(params, stats, images, tap, train=train, norm_set=norm_set, method="to_tap")

        def tail(a: Array) -> tuple[Array, Tree]:
            return self._encoder(params, new, a, x, tap, train=train, norm_set=norm_set, method="from_tap")

        return a, tail, new


def make_model(options: ModelOptions | ViTOptions) -> Model:
    """A model from its options, a ResNet or a vision transformer; UserError for what does not exist."""
    if options.dtype not in DTYPES:
        raise UserError(f"model.dtype is {options.dtype!r}; expected one of {', '.join(DTYPES)}")
    dtype = DTYPES[options.dtype]
    if isinstance(options, ViTOptions):
        encoder = vit(options, dtype)
    else:
        encoder = resnet(
            depth=options.depth,
            stem=options.stem,
            width=options.width,
            stage_sizes=options.stage_sizes,
            stage_widths=options.stage_widths,
            strides=options.strides,
            norm=options.norm,
            norm_sets=options.norm_sets,
            norm_set_momentum=options.norm_set_momentum,
            dtype=dtype,
            remat=options.remat,
        )
    head = dict(
        features=options.head_features,
        hidden_layers=options.head_hidden_layers,
        hidden=options.head_hidden,
        norm=options.head_norm,
        out_norm=options.head_out_norm,
    )
    check_head("model.head_", **head)
    sets = dict(norm_sets=encoder.norm_sets, norm_set_momentum=getattr(options, "norm_set_momentum", SET_MOMENTUM))
    if isinstance(options, ViTOptions):
        return Model(encoder, ProjectionHead(**head, **sets, dtype=dtype))
    told = dict(embeds=tuple(options.head_embeds), embed_features=options.head_embed_features)
    check_embeds("model.head_", **told)
    if told["embeds"] and not options.head_features:
        raise UserError("model.head_embeds with head_features 0: there is no head to be told; give it features")
    stages = len(encoder.stage_sizes)
    for key, given, known in (
        ("branches", options.branches, range(1, stages)),
        ("branch_embeds", options.branch_embeds, options.branches),
    ):
        if not set(given) <= set(known):
            names = ", ".join(map(str, known)) or "none"
            raise UserError(f"model.{key} is {tuple(given)}; expected some of {names}")
    norms = dict(norm=encoder.norm, momentum=encoder.momentum, **sets, dtype=dtype)
    branches = tuple(
        (
            i,
            Adapter(encoder.widths[i - 1 :], encoder.strides[i:], encoder.features, **norms),
            ProjectionHead(**head, **sets, **(told if i in options.branch_embeds else {}), dtype=dtype),
        )
        for i in sorted(set(options.branches))
    )
    return Model(encoder, ProjectionHead(**head, **sets, **told, dtype=dtype), branches)


# Where the parameters and statistics of heads and of what leads off the stages lie, beside those of the encoder.
HEAD, BRANCHES = "head", "branches"


def _of_encoder(stats: Tree) -> Tree:
    return {k: v for k, v in stats.items() if k not in (HEAD, BRANCHES)}


def _head_stats(stats: Tree) -> Tree:
    return {HEAD: stats} if stats else {}


def _with_branch(stats: Tree, name: str, part: str, value: Tree) -> Tree:
    if not value:
        return stats
    branches = stats.get(BRANCHES, {})
    return {**stats, BRANCHES: {**branches, name: {**branches.get(name, {}), part: value}}}
