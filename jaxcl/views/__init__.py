"""How a batch becomes what the encoder sees: named views, and stages that make views from views.

B batch, H W image, S side of a view, C channels.
"""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Array = jax.Array
Tree = Any


class View(NamedTuple):
    """A named image batch inside the update.

    image: [B,S,S,C] float32, normalised. params: what the pipeline drew, by name, each [B,...].
    where: [B] bool, rows that exist (None: all do); padded rows enter no statistics and no loss.
    """

    image: Array
    params: dict[str, Array]
    where: Array | None = None


class Context(NamedTuple):
    """What a stage may use of the running update. Everything it returns is under stop-gradient."""

    model: Any
    params: Tree
    batch_stats: Tree
    memory: dict[str, Tree]
    pixels: Array  # [B,H,W,C] float32 in [0,1]
    mean: tuple[float, ...]  # [C] the colour that is 0 once normalised
    std: tuple[float, ...]  # [C] what normalising divides by
    label: Array  # [B] int32
    classifier: Callable[[Tree, Array], Array] | None  # (memory, features [B,D]) -> logits [B,classes]
    augment: Callable[[str, str, Array], View]  # (view's pipeline, name for its keys, pixels) -> view
    loss: Callable[[str, dict[str, Any]], Array]  # (term, embeddings by name) -> its value on the global batch
    reads: Callable[[str], tuple[str, ...]]  # term -> names of the embeddings it cannot do without
    embed: Callable[[str, View, str], Any]  # (encoder, view, set of batch norms) -> its embedding, in training mode
    keys: Callable[[str], Array]  # name -> one key an image [B]
    textures: Array | None = None  # [B,H,W,C] float32 in [0,1], made beforehand of the images, where the data has them


class StageOutput(NamedTuple):
    """Views a stage adds or replaces, batch statistics (None: its updates are discarded) and figures to log."""

    views: dict[str, View]
    batch_stats: Tree | None
    metrics: dict[str, Array]


def view_keys(key: Array, step: Array, index: Array, view: str) -> Array:
    """One key an image [B], from (seed, step, example index, view).

    A view is known by its name and an image by its global index, so neither the order of views in a config, nor the
    slot in the batch, nor the number of hosts can change a draw.
    """
    key = jax.random.fold_in(jax.random.fold_in(key, step), zlib.crc32(view.encode()))
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


# Below the definitions, which these import from here.
from jaxcl.views.patches import patch_negatives, tile_patches  # noqa: E402
from jaxcl.views.quilting import quilt_texture  # noqa: E402
from jaxcl.views.sampling import sample_texture  # noqa: E402

__all__ = [
    "Context",
    "StageOutput",
    "View",
    "patch_negatives",
    "quilt_texture",
    "sample_texture",
    "tile_patches",
    "view_keys",
]
