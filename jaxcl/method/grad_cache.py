"""GradCache: the encoder runs in micro-batches and keeps no activations, while the losses see the whole batch.

Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", arXiv 2101.06983. A scan
over micro-batches embeds a pass, every term runs on all embeddings, and the backward pass encodes each micro-batch
again before it differentiates it. That costs one more forward pass of the encoder, and works for any term. Accumulated
gradients differ: there each micro-batch has its own negatives only.

Stages (a saliency map, an attack) still use the whole batch, so the memory they need is not reduced.

N rows of a pass, C micro-batches, G groups (C divides G) of N/G neighbouring rows that stay in one micro-batch,
D features.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcl.errors import UserError
from jaxcl.method.sharding import AXIS
from jaxcl.models import Model
from jaxcl.models.trees import ENCODER, encoder_stats
from jaxcl.runtime.options import Options, Range

Array = jax.Array
Tree = Any


@dataclasses.dataclass(frozen=True)
class GradCache(Options):
    """Options of `grad_cache` in a config."""

    micro_batch: Annotated[int, Range(0)] = 0  # images encoded at a time, over all devices; 0: no GradCache
    # With batch norm: refuse, or fixed statistics from a first pass (see `encode`).
    batch_norm: Literal["refuse", "first_pass"] = "refuse"

    def chunks(self, batch_size: int) -> int:
        """Micro-batches a batch is encoded in; 0 without GradCache."""
        return batch_size // self.micro_batch if self.micro_batch else 0

    def check(self, model: Model, batch_size: int, num_devices: int) -> None:
        """Errors: UserError if micro-batches do not fit the batch, the devices or the encoder."""
        m = self.micro_batch
        if not m:
            return
        if batch_size % m:
            raise UserError(f"grad_cache.micro_batch {m} does not divide batch_size {batch_size}; use a divisor of it")
        if m % num_devices:
            raise UserError(
                f"grad_cache.micro_batch {m} does not divide over {num_devices} devices; "
                f"use a multiple of {num_devices}"
            )
        if model.batch_norm and self.batch_norm == "refuse":
            raise UserError(
                "grad_cache with batch norm: the statistics of a micro-batch are not those of the batch; use "
                "model.norm=group, or accept fixed statistics from a first pass with grad_cache.batch_norm=first_pass"
            )

    def check_rows(self, what: str, rows: int, batch_size: int, num_devices: int) -> None:
        """Errors: UserError unless a view with its own number of rows divides into micro-batches."""
        chunks = self.chunks(batch_size)
        if chunks and rows % (chunks * num_devices):
            raise UserError(
                f"{what} gives {rows} rows, which do not divide into {chunks} micro-batches over {num_devices} "
                f"devices; use a multiple of {chunks * num_devices} rows, or a larger grad_cache.micro_batch"
            )


def encode(
    model: Model,
    params: Tree,
    stats: Tree,
    images: Array,
    *,
    where: Array | None = None,
    norm_set: str = "",
    chunks: int,
    groups: int,
    mesh: Mesh | None = None,
    key: Array | None = None,
) -> tuple[Array, Tree]:
    """`Model.encode` with train=True, in micro-batches: images -> (features [N,D] in order, new statistics).

    Without batch norm the features and their gradient are those of `Model.encode`, up to rounding.

    With batch norm, a first pass without gradient computes each layer's statistics of each micro-batch, which is
    normalised by its own statistics as in training. Pooled over the micro-batches (`pool`) they become constants that
    the differentiated pass normalises by, and the running statistics move by them once. Two things differ from batch
    norm on the whole batch. First, no gradient flows through the statistics, so the gradient keeps components along
    each channel's shift and scale. Second, from the second layer on the statistics are of activations that each
    micro-batch normalised by itself. With one micro-batch the features are equal; the gradient is not.

    Args:
      images: [N, H, W, C], sharded by rows where the mesh has more than one device.
      where: [N] bool, rows that count in the statistics. If none does, running statistics stay.
      norm_set: the set of batch norms to use, "" the clean one; only its statistics move.
      chunks: number of micro-batches; times the number of devices it must divide `groups`.
      groups: N/groups neighbouring rows (an image's views) stay together. Group j is in micro-batch j mod chunks of the
        first pass, whatever the number of devices.
      key: for dropout in an encoder without batch norm; each micro-batch on each device has a key of its own.
      mesh: the mesh of the update, or None for one device. No image moves between devices, and the gradient of the
        parameters is summed over devices once, not once a micro-batch.
    """
    encoder = {ENCODER: model.encoder_params(params)}  # merged once, not in each micro-batch
    devices = 1 if mesh is None else mesh.size
    if groups % (chunks * devices):
        raise UserError(
            f"grad_cache: a pass of {len(images)} rows in {groups} groups does not divide into {chunks} "
            f"micro-batches over {devices} devices; use a larger grad_cache.micro_batch"
        )
    model.check_norm_set("norm_set", norm_set)
    looped = model.for_loops()
    if not model.batch_norm:

        def whole(params: Tree, stats: Tree, x: Array, key: Array | None) -> Array:
            return looped.encode(params, stats, x, train=True, norm_set=norm_set, key=key)[0]

        return _by_rows(whole, chunks, mesh, key)(encoder, encoder_stats(stats), images), stats
    batch = batch_statistics(
        model, encoder, stats, images, where=where, norm_set=norm_set, chunks=chunks, groups=groups, mesh=mesh
    )

    def normalised(params: Tree, stats: Tree, x: Array, _: None) -> Array:
        return looped.encode(params, stats, x, train=False, norm_set=norm_set)[0]

    h = _by_rows(normalised, chunks, mesh)(encoder, batch, images)
    return h, model.move_statistics(stats, batch, norm_set)


def _by_rows(f: Callable[..., Array], chunks: int, mesh: Mesh | None, key: Array | None = None):
    """Maps f(params, constants, rows, key) -> rows over chunks of rows, recomputing f in the backward pass."""

    def scan(params: Tree, constants: Tree, rows: Array, keys: Array | None) -> Array:
        # XLA merges nothing across a scan, so the barriers of prevent_cse are not needed.
        recomputed = jax.checkpoint(f, prevent_cse=False)
        x = rows.reshape(chunks, -1, *rows.shape[1:])
        _, y = lax.scan(lambda _, xs: (None, recomputed(params, constants, *xs)), None, (x, keys))
        return y.reshape(-1, *y.shape[2:])

    if mesh is None or mesh.size == 1:
        keys = None if key is None else jax.random.split(key, chunks)
        return lambda params, constants, rows: scan(params, constants, rows, keys)

    def local(params: Tree, constants: Tree, rows: Array, keys: Array | None) -> Array:
        # Made varying outside the loop: the transpose of this cast is the gradient's sum over devices, done once.
        params = jax.tree.map(lambda p: lax.pcast(p, AXIS, to="varying"), params)
        return scan(params, constants, rows, keys)

    keys = None if key is None else jax.random.split(key, chunks * mesh.size)
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(P(), P(), P(AXIS), P(AXIS)), out_specs=P(AXIS))
    return lambda params, constants, rows: sharded(params, constants, rows, keys)


def batch_statistics(
    model: Model,
    params: Tree,
    stats: Tree,
    images: Array,
    *,
    where: Array | None = None,
    norm_set: str = "",
    chunks: int,
    groups: int,
    mesh: Mesh | None = None,
) -> Tree:
    """Batch statistics of a pass, pooled over micro-batches that are each normalised by themselves. See `encode`.

    Only of the set of batch norms in use, as in `Model.batch_statistics`; without gradient.
    """

    def deal(x: Array) -> Array:
        """[N, ...] -> [C, G/C, N/G, ...]: every chunks-th group, so each device keeps rows in every micro-batch."""
        x = jnp.moveaxis(x.reshape(groups // chunks, chunks, len(x) // groups, *x.shape[1:]), 1, 0)
        if mesh is None or mesh.size == 1:
            return x
        return lax.with_sharding_constraint(x, NamedSharding(mesh, P(None, AXIS)))

    def one(_: None, chunk: tuple[Array, Array | None]) -> tuple[None, tuple[Tree, Array]]:
        x, exists = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), chunk)
        count = jnp.asarray(len(x)) if exists is None else exists.sum()
        return None, (model.batch_statistics(params, stats, x, where=exists, norm_set=norm_set), count)

    params, images = lax.stop_gradient((params, images))
    _, (each, count_C) = lax.scan(one, None, jax.tree.map(deal, (images, where)))
    pooled = pool(each, count_C)
    running = model.statistics_of(stats, norm_set)
    return jax.tree.map(lambda new, old: jnp.where(count_C.sum() > 0, new, old), pooled, running)


def pool(statistics: Tree, count_C: Array) -> Tree:
    """Pool the statistics of micro-batches, equal or unequal, into those of the batch.

    The mean is the mean of the means, weighted by counts; the variance is the mean of the variances plus the variance
    of the means.

    Args:
      statistics: {"mean": [C, M], "var": [C, M]} for each layer, at any depth of the tree.
      count_C: [C] rows that each micro-batch counts; one without any may hold NaN.
    """
    weight_C = count_C / jnp.maximum(count_C.sum(), 1)

    def average(x_CxM: Array) -> Array:
        counts = (count_C > 0)[:, None]
        return jnp.sum(jnp.where(counts, weight_C.astype(x_CxM.dtype)[:, None] * x_CxM, 0), axis=0)

    def layer(s: dict[str, Array]) -> dict[str, Array]:
        mean_M = average(s["mean"])
        return {"mean": mean_M, "var": average(s["var"] + (s["mean"] - mean_M) ** 2)}

    return jax.tree.map(layer, statistics, is_leaf=lambda s: isinstance(s, dict) and "mean" in s)
