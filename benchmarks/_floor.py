"""What a task needs at least, and what the machine gives at most: the floor under a benchmark's rows.

A task's needs are the FLOPs of its products of matrices and its convolutions, a product and a sum counting two, and the
bytes that must be read and written. They are the task's, whoever does it: counted by hand where a formula is all
(losses, neighbours, augmentation, loaders), and from the network's own program where it is one (`of_program`). Other
arithmetic (exponentials, colours, norms, decoding a JPEG) counts as nothing, so a floor is low where that is the work.

The machine's two rates are measured as contestants are, in the same rounds: a product of square matrices, and a pass
over memory that reads and writes it. Floor: needs over rates, the larger of the two times.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcl.commands.plan.program_costs import cost, size

PRODUCTS, MEMORY = "products", "memory"
SIDE, LENGTH = 2048, 2**26  # of the matrices, in float32; of the array that is passed over, larger than any cache


class Needs(NamedTuple):
    flops: float
    bytes: float


def of_program(function: Callable[..., Any], *arguments: Any) -> Needs:
    """Of a network's pass: its products; what it is given, and what is written between them at least and read again."""
    closed = jax.make_jaxpr(function)(*arguments)
    counted = cost(closed)
    return Needs(
        counted.flops, counted.moved + sum(size(v.aval) for v in (*closed.jaxpr.invars, *closed.jaxpr.constvars))
    )


def total(needs: list[Needs]) -> Needs:
    return Needs(*map(sum, zip(*needs, strict=True)))


def prepare(contestant: str):
    """The machine's rates, for `benchmarks._paired`: FLOPs a second, bytes a second."""
    from benchmarks._paired import Ready

    if contestant == PRODUCTS:
        a = jnp.ones((SIDE, SIDE), jnp.float32)
        product = jax.jit(jnp.matmul)
        return Ready(lambda: product(a, a).block_until_ready(), 2.0 * SIDE**3)
    held = [jnp.ones(LENGTH, jnp.float32)]
    over = jax.jit(lambda x: x * 0.999, donate_argnums=0)  # in place: new memory would have to be cleared first

    def run():
        held[0] = over(held[0]).block_until_ready()

    return Ready(run, 2.0 * 4 * LENGTH)
