"""TrainState: everything one step hands to the next, as one frozen pytree."""

from typing import Any

import flax.struct
import jax

Tree = Any


@flax.struct.dataclass
class TrainState:
    """All that is saved, donated and sharded together.

    step: int32 scalar, updates done; with the seed it fixes every random draw and the position in the data.
    key: typed PRNG key of the seed; never split, only folded with (step, example index, view).
    memory: what is carried besides the optimiser, by the name of its part (the online probe; EMA targets, queues).
    """

    step: jax.Array
    key: jax.Array
    params: Tree
    batch_stats: Tree
    opt_state: Tree
    memory: dict[str, Tree]
