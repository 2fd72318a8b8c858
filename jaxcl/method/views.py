"""Views: named image batches inside the update, and the random keys they are drawn with.

B batch, S side of a view, C channels.
"""

import zlib
from typing import NamedTuple

import jax

Array = jax.Array


class View(NamedTuple):
    """A named image batch inside the update.

    image: [B,S,S,C] float32, normalised. params: what the pipeline drew, by name, each [B,...].
    where: [B] bool, rows that exist (None: all do); padded rows enter no statistics and no loss.
    """

    image: Array
    params: dict[str, Array]
    where: Array | None = None


def view_keys(key: Array, step: Array, index: Array, view: str) -> Array:
    """One key an image [B], from (seed, step, example index, view).

    A view is known by its name and an image by its global index, so neither the order of views in a config, nor the
    slot in the batch, nor the number of hosts can change a draw.
    """
    key = jax.random.fold_in(jax.random.fold_in(key, step), zlib.crc32(view.encode()))
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
