"""Floors under the rows of a benchmark: the least work of a task, over the most that the machine can do.

The needs of a task are the FLOPs of its matmuls and convolutions (a product and a sum count as two) and the bytes that
must be read and written. They belong to the task, not to an implementation. Where a formula is enough (losses,
neighbours, augmentation, loaders) they are counted by hand; for a network, from its own program (`of_program`). Other
arithmetic (exponentials, colours, norms, decoding of JPEG files) counts as nothing, so a floor is low where such work
dominates.

The two rates of the machine are measured like contestants, in the same rounds: a matmul of square matrices, and a pass
over memory that reads and writes it. The floor is the larger of the two times, needs over rates.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks._task import Needs, Ready
from jaxcl.commands.plan.program_costs import cost, size

PRODUCTS, MEMORY = "products", "memory"
SIDE = 2048  # of the matrices, float32
LENGTH = 2**26  # of the array in memory, float32: larger than any cache


def of_program(function: Callable[..., Any], *arguments: Any) -> Needs:
    """Needs of a program: its matmuls and convolutions; its inputs, and the values it must write and read again."""
    closed = jax.make_jaxpr(function)(*arguments)
    counted = cost(closed)
    return Needs(
        counted.flops, counted.moved + sum(size(v.aval) for v in (*closed.jaxpr.invars, *closed.jaxpr.constvars))
    )


def total(needs: list[Needs]) -> Needs:
    """The sum of several needs."""
    return Needs(*map(sum, zip(*needs, strict=True)))


def prepare(contestant: str) -> Ready:
    """The rates of the machine, for `benchmarks._paired`: FLOPs per second, bytes per second."""
    if contestant == PRODUCTS:
        a = jnp.ones((SIDE, SIDE), jnp.float32)
        product = jax.jit(jnp.matmul)
        return Ready(lambda: product(a, a).block_until_ready(), 2.0 * SIDE**3)
    held = [jnp.ones(LENGTH, jnp.float32)]
    over = jax.jit(lambda x: x * 0.999, donate_argnums=0)  # in place, because the system clears new memory first

    def run():
        held[0] = over(held[0]).block_until_ready()

    return Ready(run, 2.0 * 4 * LENGTH)
