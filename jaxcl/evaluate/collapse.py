"""Collapse of embeddings: within classes, and onto few dimensions.

B images, V views, N = B * V points, D dimensions, C classes, T images of a tile.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxcl.errors import UserError
from jaxcl.evaluate.base import Evaluator, Metric, Metrics, Panels
from jaxcl.evaluate.context import EvalContext
from jaxcl.losses.common import inner, rescaled, unit, widened
from jaxcl.losses.labels import class_ids, flags

Array = jax.Array
TILE_ENTRIES = 2**22  # distances in memory at one time (16 MiB in float32)


def collapse_metrics(
    embeddings: ArrayLike, labels: ArrayLike | None = None, *, where: ArrayLike | None = None
) -> dict[str, Array]:
    """Spread within classes, effective rank, alignment and uniformity of embeddings, scaled to unit length here.

    Pairs are points of different images: two views of one image count in `alignment` only. Time is O(N^2 D), memory
    O(N D + D^2). It can be jitted, also with a sharded batch.

    Args:
      embeddings: [B, V, D], or [B, D] for one view; any float type, computed in float32 at least.
      labels: [B] int, any values; rows with a negative label (unlabelled) only count where no class is needed. None:
        no row has a label.
      where: [B] bool, False for padded rows.

    Returns:
      Scalars, NaN where nothing can be measured:
      "within_class_cosine": mean cosine over all pairs within a class, 1 at class collapse;
      "between_class_cosine": mean cosine over pairs from two classes, -1/(C-1) at the optimum of SupCon;
      "class_spread": 1 - |mean of a class's unit embeddings|^2, averaged over the classes with at least two images,
        in [0, 1], 0 at class collapse;
      "effective_rank": exp of the entropy of the singular values of the centred points, scaled to sum 1; from 1 to
        min(N - 1, D), and 0 where all points are equal;
      "uniformity": log of the mean of exp(-2 |zi - zj|^2) over pairs, from -8 to 0, 0 at complete collapse;
      "alignment", with two views or more: mean of |zi - zi'|^2 over the pairs of views of an image, from 0 to 4.

    Raises:
      UserError: shapes that do not match, or labels that are NaN or no numbers.

    References:
      Chen et al. 2022, arXiv 2204.07596 (class collapse and spread); Wang and Isola 2020, arXiv 2005.10242 (alignment
      and uniformity); Roy and Vetterli, EUSIPCO 2007 (effective rank).
    """
    z_BxVxD = jnp.asarray(embeddings)
    if z_BxVxD.ndim == 2:
        z_BxVxD = z_BxVxD[:, None]
    if z_BxVxD.ndim != 3 or not jnp.issubdtype(z_BxVxD.dtype, jnp.floating):
        raise UserError(
            f"collapse_metrics: embeddings are {z_BxVxD.dtype} {jnp.shape(embeddings)}; expected floats [images, "
            "dimensions] or [images, views, dimensions]"
        )
    count = len(z_BxVxD)
    labels_B = jnp.full(count, -1) if labels is None else class_ids("collapse_metrics", labels)
    where_B = jnp.ones(count, bool) if where is None else flags(where).astype(bool)
    for name, array in (("labels", labels_B), ("where", where_B)):
        if array.shape != (count,):
            raise UserError(f"collapse_metrics: {name} of shape {array.shape}, expected ({count},), one for each image")
    return _metrics(z_BxVxD, labels_B, where_B)


@jax.jit
def _metrics(z_BxVxD: Array, labels_B: Array, where_B: Array) -> dict[str, Array]:
    z_BxVxD = jnp.where(where_B[:, None, None], unit(rescaled(widened(z_BxVxD)[0])), 0)
    image_BxD = jnp.mean(z_BxVxD, axis=1)  # an image's mean over its views
    metrics = _classes(z_BxVxD, image_BxD, labels_B, where_B)
    metrics["effective_rank"] = _effective_rank(z_BxVxD, where_B)
    metrics["uniformity"] = _uniformity(z_BxVxD, where_B)
    views = z_BxVxD.shape[1]
    if views > 1:
        # The mean over pairs of views, computed from the distances to their mean: more precise for small distances.
        apart_B = jnp.sum((z_BxVxD - image_BxD[:, None]) ** 2, axis=(1, 2)) * 2 / (views - 1)
        metrics["alignment"] = _mean(apart_B, where_B)
    return metrics


def _classes(z_BxVxD: Array, image_BxD: Array, labels_B: Array, where_B: Array) -> dict[str, Array]:
    """The metrics of classes, from the class means: the sum over pairs is a squared sum without its diagonal."""
    count, views, _ = z_BxVxD.shape
    dtype = z_BxVxD.dtype
    known_B = where_B & (labels_B >= 0)
    # Labels may have any values: number the classes from 0, at most B of them. Unlabelled rows become class B.
    _, class_B = jnp.unique(jnp.where(known_B, labels_B, -1), return_inverse=True, size=count, fill_value=-1)
    class_B = jnp.where(known_B, class_B, count)
    add = lambda x: jax.ops.segment_sum(x, class_B, count + 1)[:count]  # noqa: E731
    n_C = add(jnp.ones(count, dtype))
    mean_CxD = add(image_BxD) / jnp.maximum(n_C, 1)[:, None]
    own_BxD = jnp.take(mean_CxD, class_B, axis=0, mode="fill", fill_value=0)
    # 1 - |mean|^2 as the mean of |z - mean|^2, which is precise near collapse. Zero rows do not have length 1.
    off_B = jnp.mean(jnp.sum((z_BxVxD - own_BxD[:, None]) ** 2, axis=2) + 1 - jnp.sum(z_BxVxD**2, axis=2), axis=1)
    spread_C = add(off_B) / jnp.maximum(n_C, 1)

    # Sums of cosines over ordered pairs, divided by V^2; `same` is the sum over pairs of an image with itself.
    same = jnp.sum(jnp.where(known_B, jnp.sum(image_BxD**2, axis=1), 0))
    within = jnp.sum(n_C**2 * (1 - spread_C)) - same
    total = jnp.sum(n_C)
    mean_D = jnp.sum(n_C[:, None] * mean_CxD, axis=0) / jnp.maximum(total, 1)
    between = total**2 * jnp.sum(mean_D**2) - jnp.sum(n_C**2 * jnp.sum(mean_CxD**2, axis=1))
    pairs = jnp.sum(n_C**2)
    return {
        "within_class_cosine": _ratio(within, pairs - total),
        "between_class_cosine": _ratio(between, total**2 - pairs),
        "class_spread": _mean(spread_C, n_C > 1),
    }


def _effective_rank(z_BxVxD: Array, where_B: Array) -> Array:
    z_NxD, where_N = _points(z_BxVxD, where_B)
    mean_D = jnp.sum(z_NxD, axis=0) / jnp.maximum(jnp.sum(where_N), 1)
    z_NxD = jnp.where(where_N[:, None], z_NxD - mean_D, 0)
    # The triangular factor is small and has the same singular values; a covariance would lose half the digits.
    s = jnp.linalg.svd(jnp.linalg.qr(z_NxD, mode="r"), compute_uv=False)
    # Rounding errors of the points and of their mean are not dimensions.
    s = jnp.where(s > jnp.finfo(s.dtype).eps * (max(z_NxD.shape) * jnp.sum(where_N)) ** 0.5, s, 0)
    total = jnp.sum(s)
    share = s / jnp.where(total > 0, total, 1)
    entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1)), 0))
    rank = jnp.where(total > 0, jnp.exp(entropy), 0)
    return jnp.where(jnp.sum(where_B) > 1, rank, jnp.nan)


def _uniformity(z_BxVxD: Array, where_B: Array) -> Array:
    count, views, _ = z_BxVxD.shape
    z_NxD, where_N = _points(z_BxVxD, where_B)
    square_N = jnp.sum(z_NxD**2, axis=1)
    image_N = jnp.repeat(jnp.arange(count), views)
    tile = max(1, min(count, TILE_ENTRIES // (len(z_NxD) * views)))
    padding = -count % tile

    def tiles(x: Array) -> Array:
        x = jnp.pad(x, ((0, padding * views), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(-1, tile * views, *x.shape[1:])

    def kernel(rows: tuple[Array, ...]) -> Array:
        z_TxD, square_T, image_T, where_T = rows
        distance_TxN = square_T[:, None] + square_N - 2 * inner(z_TxD, z_NxD)
        counts_TxN = where_T[:, None] & where_N & (image_T[:, None] != image_N)
        return jnp.sum(jnp.where(counts_TxN, jnp.exp(-2 * jnp.maximum(distance_TxN, 0)), 0))

    sums = lax.map(kernel, tuple(tiles(x) for x in (z_NxD, square_N, image_N, where_N)))
    points = jnp.sum(where_N, dtype=z_NxD.dtype)
    pairs = points * (points - views)
    return jnp.log(_ratio(jnp.sum(sums), pairs))


def _points(z_BxVxD: Array, where_B: Array) -> tuple[Array, Array]:
    return z_BxVxD.reshape(-1, z_BxVxD.shape[2]), jnp.repeat(where_B, z_BxVxD.shape[1])


def _mean(values: Array, valid: Array) -> Array:
    return _ratio(jnp.sum(jnp.where(valid, values, 0)), jnp.sum(valid, dtype=values.dtype))


def _ratio(total: Array, count: Array) -> Array:
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1), jnp.nan)


class Collapse(Evaluator):
    """`collapse_metrics` of the test images without augmentation: of features "h_..." and of embeddings "z_..."."""

    features_only = True
    feature_kinds = ("z",)
    metrics = {
        "z_within_class_cosine": Metric(
            "Cosine within a class", "", percent=False, meaning="mean cosine of embeddings of one class; 1 is collapse"
        ),
        "z_effective_rank": Metric(
            "Effective rank", "", percent=False, meaning="number of dimensions that the embeddings use"
        ),
    }

    def __call__(self, context: EvalContext) -> tuple[Metrics, Panels]:
        metrics = {}
        for kind in ("h", "z"):
            measured = collapse_metrics(context.features("test", kind), context.test.labels)
            # Without labels, or with one class, some cannot be measured.
            metrics |= {f"{kind}_{name}": float(v) for name, v in measured.items() if not np.isnan(v)}
        return metrics, {}
