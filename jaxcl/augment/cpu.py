"""Forms of crops and flips for CPUs only. All other code of jaxcl/augment runs on every device.

`gathers` is the only place where an operation is chosen by device. GPUs and TPUs always use the matmuls and selections
in `jaxcl.augment.ops`. So do CPUs for small images; for large ones a CPU is faster if it reads only the pixels that it
needs. The results agree up to rounding.

Letters: N images, V crops of each, M = V N, H height, W width, S and R output side, C channels, K taps.
"""

import jax
import jax.numpy as jnp

GATHER_SIDE = 32  # a CPU gathers from images of at least this many pixels a side per tap


def gathers(side: int, taps: int) -> bool:
    """Whether to gather from images of this side if every output is a sum of this many pixels along an axis."""
    return jax.default_backend() == "cpu" and side >= max(2, taps) * GATHER_SIDE


def gather_crops(images: jax.Array, rows: tuple[jax.Array, jax.Array], cols: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Crops [M,S,R,C] of images [N,H,W,C]; rows and cols: pixels and weights from `ops.resize_taps`, [M,S,K] each."""

    def one(image_HxWxC, row_SxK, row_weight_SxK, col_RxK, col_weight_RxK):
        height, width, channels = image_HxWxC.shape
        rows_HxWC = image_HxWxC.astype(jnp.float32).reshape(height, width * channels)
        tall_SxWC = sum(row_weight_SxK[:, k, None] * rows_HxWC[row_SxK[:, k]] for k in range(row_SxK.shape[1]))
        tall_SxWxC = tall_SxWC.reshape(len(row_SxK), width, channels)
        return sum(col_weight_RxK[:, k, None] * tall_SxWxC[:, col_RxK[:, k]] for k in range(col_RxK.shape[1]))

    images = jnp.repeat(images, len(rows[0]) // len(images), axis=0)
    return jax.vmap(one)(images, *rows, *cols).astype(images.dtype)


def gather_flip(images: jax.Array, flipped: jax.Array) -> jax.Array:
    """Mirrors the images [N,H,W,C] left to right where flipped, bool [N]."""
    # After a gathered crop, a selection between both orders would compute the crop twice.
    width = images.shape[2]
    column = jnp.arange(width)
    columns_NxW = jnp.where(flipped[:, None], width - 1 - column, column)
    return jax.vmap(lambda image, columns: image[:, columns])(images, columns_NxW)
