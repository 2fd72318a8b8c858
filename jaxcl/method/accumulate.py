"""Micro-batching: a batch whose gradient is the mean of its parts' gradients, each part by itself from view to loss.

Only for terms that take each image by itself (`per_image`: BYOL, SimSiam, MoCo against its queue, cross-entropy,
reconstruction): there it is the gradient of the whole batch, without the second forward pass of GradCache. Where images
of a batch meet in a loss, each part would have its own negatives only; that is refused (see `grad_cache`). Batch norm
is another meeting: it is refused too, unless the config says that each part may normalise by its own statistics, as
so many smaller steps would.

N rows, C parts.
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
    """What a config may say of it."""

    micro_batch: Annotated[int, Range(0)] = 0  # images at a time, over all devices; 0: the whole batch at once
    batch_norm: Literal["refuse", "micro_batch"] = (
        "refuse"  # with batch norm: "refuse", or "micro_batch": each part by its own statistics
    )

    def check(self, recipe: Any, num_devices: int) -> None:
        """UserError for parts that do not fit the batch or the devices, and for whatever couples the images of one."""
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
                    f"accumulate.micro_batch with terms.{name}: its images meet in the loss, and each part would have "
                    "its own negatives only; use grad_cache.micro_batch, which is exact"
                )
        if recipe.stages:
            raise UserError("accumulate.micro_batch with stages, which take whole batches; use grad_cache.micro_batch")
        if any(p.bn_groups > 1 for p in recipe.passes):
            raise UserError("accumulate.micro_batch with bn_groups: both divide the batch norm; use one of them")
        if self.batch_norm == "refuse" and (where := _batch_norms(recipe)):
            raise UserError(
                f"accumulate.micro_batch with batch norm ({where}): the statistics of a part are not those of the "
                "batch; use norms without, or accept that with accumulate.batch_norm=micro_batch"
            )


def _batch_norms(recipe: Any) -> str:
    """Where the first of them is; "" without any."""
    for name, model in {"model": recipe.model, **{f"encoders.{n}": m for n, m in recipe.encoders.items()}}.items():
        if model.batch_norm or model.head.embeds or "none" != model.head.norm or "none" != model.head.out_norm:
            return name
    for name, head in recipe.heads.items():
        shapes = jax.eval_shape(lambda h=head, n=name: h.init(jax.random.key(0), recipe.head_input(n)))
        if jax.tree.leaves(shapes[1]):
            return f"heads.{name}"
    return ""


def gradients(
    f: Callable, params: Tree, rows: Tree, stats: Tree, key: Array, *, parts: int, mesh: Mesh | None
) -> tuple[Array, Tree, Tree, Tree, Tree]:
    """f(params, rows, stats, key) -> ((loss, (figures, outputs, stats)), gradients) part by part.

    -> (mean loss, mean figures, outputs in the order of the rows, last stats, mean gradients). Running statistics move
    once a part. On several devices the gradients are summed over them once a part, which is more to send than without.

    Args:
      rows: arrays [N, ...], sharded by rows where the mesh has more than one device. No row moves between devices.
    """

    def deal(x: Array) -> Array:
        """[N, ...] -> [C, N/C, ...]: every C-th row, so that every device has rows of its own in each part."""
        x = jnp.moveaxis(x.reshape(len(x) // parts, parts, *x.shape[1:]), 1, 0)
        if mesh is None or mesh.size == 1:
            return x
        return lax.with_sharding_constraint(x, NamedSharding(mesh, P(None, AXIS)))

    def collect(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])

    def one(carry: tuple[Tree, Tree], part: tuple[Tree, Array]) -> tuple[tuple[Tree, Tree], Tree]:
        grads, stats = carry
        part, i = part
        (loss, (figures, outputs, stats)), own = f(params, part, stats, jax.random.fold_in(key, i))
        return (jax.tree.map(jnp.add, grads, own), stats), (loss, figures, outputs)

    zero = jax.tree.map(jnp.zeros_like, params)
    dealt = (jax.tree.map(deal, rows), jnp.arange(parts))
    (grads, stats), (loss, figures, outputs) = lax.scan(one, (zero, stats), dealt)
    loss, figures = jax.tree.map(lambda x: x.mean(0), (loss, figures))
    return loss, figures, jax.tree.map(collect, outputs), stats, jax.tree.map(lambda g: g / parts, grads)
