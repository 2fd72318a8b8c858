"""Gradient accumulation: the gradient of a batch as the mean of its micro-batches' gradients.

It needs terms that are a mean over images (`Term.per_image`: BYOL, SimSiam, MoCo against its queue, cross-entropy,
reconstruction). For them it gives the gradient of the whole batch without GradCache's second forward pass. Where images
of a batch meet in a loss, each micro-batch would see its own negatives only; that is refused (see `grad_cache`). Batch
norm is refused too, unless the config accepts that each micro-batch is normalised by its own statistics.

N rows, C micro-batches.
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
from jaxcl.runtime.options import Options, Range

Array = jax.Array
Tree = Any


@dataclasses.dataclass(frozen=True)
class Accumulate(Options):
    """Options of `accumulate` in a config."""

    micro_batch: Annotated[int, Range(0)] = 0  # images at a time, over all devices; 0: the whole batch
    # What to do with batch norm: refuse, or let each micro-batch use its own statistics.
    batch_norm: Literal["refuse", "micro_batch"] = "refuse"

    def check(self, recipe: Any, num_devices: int) -> None:
        """Errors: UserError if it does not divide the batch and the devices, or if anything couples images."""
        m = self.micro_batch
        if not m:
            return
        if recipe.batch_size % m or m % num_devices:
            raise UserError(
                f"accumulate.micro_batch {m} does not divide batch_size {recipe.batch_size} and over {num_devices} "
                "devices; use a divisor of the one that is a multiple of the other"
            )
        if recipe.grad_cache.micro_batch:
            raise UserError("accumulate.micro_batch with grad_cache.micro_batch: both divide the batch; use one")
        for name, term in recipe.terms.items():
            if not term.per_image:
                raise UserError(
                    f"accumulate.micro_batch with terms.{name}: images meet in its loss; a micro-batch would have its "
                    "own negatives only; use grad_cache.micro_batch, which is exact"
                )
        if recipe.stages:
            raise UserError("accumulate.micro_batch with stages, which take whole batches; use grad_cache.micro_batch")
        if any(p.bn_groups > 1 for p in recipe.passes):
            raise UserError("accumulate.micro_batch with bn_groups: both divide the batch norm; use one of them")
        if self.batch_norm == "refuse" and (where := _batch_norms(recipe)):
            raise UserError(
                f"accumulate.micro_batch with batch norm ({where}): a micro-batch's statistics differ from the "
                "batch's; use other norms, or accept that with accumulate.batch_norm=micro_batch"
            )


def _batch_norms(recipe: Any) -> str:
    """The config key of the first network with batch norm; "" without any."""
    for name, model in {"model": recipe.model, **{f"encoders.{n}": m for n, m in recipe.encoders.items()}}.items():
        if model.batch_norm or model.head.embeds or "none" != model.head.norm or "none" != model.head.out_norm:
            return name
    for name, head in recipe.heads.items():
        shapes = jax.eval_shape(lambda h=head, n=name: h.init(jax.random.key(0), recipe.head_input(n)))
        if jax.tree.leaves(shapes[1]):
            return f"heads.{name}"
    return ""


def gradients(
    grad_fn: Callable,
    params: Tree,
    rows: Tree,
    stats: Tree,
    key: Array,
    *,
    micro_batches: int,
    mesh: Mesh | None,
    counts: Callable[[Tree], Tree] | None = None,
) -> tuple[Array, Tree, Tree, Tree, Tree]:
    """Accumulate `grad_fn(params, rows, stats, key) -> ((loss, (metrics, outputs, stats)), gradients)`.

    A loss that is a mean over some of the rows (the labelled ones) needs `counts`, unless each micro-batch has equally
    many: the mean of its micro-batches' means would not be the batch's.

    Running statistics move once a micro-batch. On several devices gradients are summed over them once a micro-batch,
    which sends more than without accumulation. No row moves between devices.

    Args:
      rows: arrays [N, ...], sharded by rows where the mesh has more than one device.
      micro_batches: C, a divisor of N.
      counts: rows of a micro-batch -> over how many of them its loss is a mean, a number. Or a tree of numbers, one
        for each part of the loss: then grad_fn takes a fifth argument, a tree of factors, by which it multiplies
        these parts and their metrics.

    Returns:
      (mean loss, mean metrics, outputs in the order of the rows, last statistics, mean gradients)
    """
    C = micro_batches

    def deal(x: Array) -> Array:
        """[N, ...] -> [C, N/C, ...]: every C-th row, so that each device keeps rows in every micro-batch."""
        x = jnp.moveaxis(x.reshape(len(x) // C, C, *x.shape[1:]), 1, 0)
        if mesh is None or mesh.size == 1:
            return x
        return lax.with_sharding_constraint(x, NamedSharding(mesh, P(None, AXIS)))

    def collect(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])

    def step(carry: tuple[Tree, Tree], xs: tuple[Tree, Array]) -> tuple[tuple[Tree, Tree], Tree]:
        grads, stats = carry
        micro_batch, i, share = xs
        args = () if share is None or isinstance(share, Array) else (share,)
        (loss, (metrics, outputs, stats)), new = grad_fn(params, micro_batch, stats, jax.random.fold_in(key, i), *args)
        if isinstance(share, Array):
            loss, metrics, new = jax.tree.map(lambda x: x * share.astype(x.dtype), (loss, metrics, new))
        return (jax.tree.map(jnp.add, grads, new), stats), (loss, metrics, outputs)

    zero = jax.tree.map(jnp.zeros_like, params)
    parts, shares = jax.tree.map(deal, rows), None
    if counts is not None:
        found = jax.vmap(counts)(parts)  # [C] each; the share of a micro-batch is its count by the mean count
        shares = jax.tree.map(lambda n: (n * C).astype(jnp.float32) / jnp.maximum(n.sum(), 1), found)
    dealt = (parts, jnp.arange(C), shares)
    (grads, stats), (loss, metrics, outputs) = lax.scan(step, (zero, stats), dealt)
    loss, metrics = jax.tree.map(lambda x: x.mean(0), (loss, metrics))
    return loss, metrics, jax.tree.map(collect, outputs), stats, jax.tree.map(lambda g: g / C, grads)
