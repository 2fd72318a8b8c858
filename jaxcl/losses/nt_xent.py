"""NT-Xent (SimCLR) with negatives of an anchor's own, and one-directional InfoNCE between two sets of vectors.

Letters: B images on this device, N = 2B rows (view 1, then view 2), R rows, C columns of the global batch,
D features, M negatives of an anchor's own.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxcl.errors import UserError
from jaxcl.losses.common import (
    AxisName,
    check_above_zero,
    check_floating,
    check_shape,
    inner,
    total,
    unit,
    widened,
)
from jaxcl.losses.engine import choose, is_bounded, row_sums
from jaxcl.losses.tiles import Side, Sums, logits

Implementation = Literal["auto", "dense", "tiled", "ring"]


def nt_xent(
    z1: ArrayLike,
    z2: ArrayLike,
    *,
    negatives: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
    alpha: float = 1.0,
    temperature: float = 0.5,
    implementation: Implementation = "auto",
    axis_name: AxisName = None,
) -> jax.Array:
    """NT-Xent, the loss of SimCLR, optionally with further negatives that only their own anchor sees.

    With A the 2B rows of [z1; z2] scaled to unit length, p(a) the other view of the same image, and n_am the
    unit vectors of the anchor's own negatives::

        l_a  = -<A_a, A_p(a)> / T + log( sum_{b != a} exp(<A_a, A_b> / T) + sum_m exp(alpha <A_a, n_am> / T) )
        loss = mean of l_a over the 2B anchors

    Which of the losses of this name it is: cosine similarity (rows are scaled inside), both views are anchors,
    the denominator holds the positive and the 2B - 2 negatives of both views, never the anchor itself.

    `alpha` is the reciprocal of a temperature for the anchor's own negatives, not a weight of their terms:
    alpha=0 leaves a constant 1 for each in the denominator. For the plain loss pass negatives=None or M = 0.

    Args:
      z1: [B, D], any float type, first views. Computed in float32 at least. A zero row has similarity 0 with
        everything, and zero gradient.
      z2: [B, D], second views of the same images.
      negatives: (n1, n2), each [B, M, D]: n1[i] belongs to anchor z1[i], n2[i] to z2[i]. One array [B, M, D]
        serves both views. They are scaled to unit length and are no anchors. The gradient flows into them:
        where that is not wanted (negatives of a target network) pass `jax.lax.stop_gradient` of them.
      alpha: scale of the similarity to the own negatives; above 1, similar ones push harder.
      temperature: > 0.
      implementation: how the [2B, 2B] part is computed; the number is the same. "dense" forms all logits at
        once, "tiled" keeps a few numbers a row and recomputes tiles for the gradient (a first reverse-mode
        derivative only), "ring" is tiled with the blocks going from device to device (needs `axis_name`),
        "auto" chooses by size (`jaxcl.losses.limits`), and is differentiated as "tiled" is.
      axis_name: inside `jax.shard_map`, the mesh axis (or axes) over which the images are split. z1, z2 and
        negatives then hold this device's images; its anchors meet the rows of all devices, and the result is
        the loss of the global batch, equal on every device.

    Returns:
      A scalar, float32 or wider.

    Raises:
      UserError: shapes that do not match, integers, a global batch of one image without own negatives (nothing
        to contrast with), an unknown implementation, "ring" without `axis_name`.

    References:
      Chen et al., "A Simple Framework for Contrastive Learning", arXiv:2002.05709, eq. 1; own negatives: the
      SimCLR form of Ge et al., "Robust Contrastive Learning Using Negative Samples with Diminished Semantics",
      arXiv:2110.14189.
    """
    z1, z2 = jnp.asarray(z1), jnp.asarray(z2)
    if isinstance(negatives, (tuple, list)):
        if len(negatives) != 2:
            raise UserError(f"nt_xent: {len(negatives)} arrays of negatives, expected a pair, one array for each view")
        own = tuple(jnp.asarray(n) for n in negatives)
    else:
        own = () if negatives is None else (jnp.asarray(negatives),) * 2
    _check_pair("nt_xent", {"z1": z1, "z2": z2}, temperature)
    for name, n in zip(("negatives of z1", "negatives of z2"), own, strict=False):
        check_floating("nt_xent", **{name: n})
        if n.ndim != 3:
            raise UserError(f"nt_xent: {name} of shape {n.shape}, expected [images, negatives of each, features]")
        check_shape("nt_xent", name, n, (len(z1), own[0].shape[1], z1.shape[1]))
    if total(len(z1), axis_name) < 2 and (not own or own[0].shape[1] == 0):
        raise UserError("nt_xent: a batch of one image has no negatives, expected at least 2 images; raise batch_size")
    rows = 2 * len(z1)
    how = choose("nt_xent", implementation, rows, total(rows, axis_name), axis_name)
    return _nt_xent(
        z1, z2, own, alpha, temperature, bounded=is_bounded(True, temperature), how=how, axis_name=axis_name
    )


# Compiled as one: op by op, the first call in a notebook would compile dozens of little programs.
@functools.partial(jax.jit, static_argnames=("bounded", "how", "axis_name"))
def _nt_xent(z1, z2, own, alpha, temperature, *, bounded, how, axis_name):
    z1, z2, *own = widened(z1, z2, *own)
    temperature, alpha = jnp.asarray(temperature, z1.dtype), jnp.asarray(alpha, z1.dtype)
    # Half of the temperature on each side: rows and columns are then the same vectors.
    shrink = lax.rsqrt(temperature)
    z_NxD = jnp.concatenate([unit(z1) * shrink, unit(z2) * shrink])
    sums = Sums(logits, ("lse",), bounded)
    (log_denominator_N,) = row_sums(sums, Side(z_NxD), how=how, axis_name=axis_name)
    if own:
        n_NxMxD = unit(jnp.concatenate(own)) * shrink
        own_NxM = alpha * inner(z_NxD[:, None], n_NxMxD)[:, 0]
        log_denominator_N = jax.nn.logsumexp(jnp.concatenate([log_denominator_N[:, None], own_NxM], axis=1), axis=1)
    loss = jnp.sum(log_denominator_N) - 2 * jnp.sum(_positives(z_NxD))
    return total(loss, axis_name) / total(len(z_NxD), axis_name)


@jax.checkpoint  # its intermediates are as large as the features, and cheaper to form again than to keep
def _positives(z_NxD):
    """Similarity of the two views of each image [B]."""
    half = len(z_NxD) // 2
    return jnp.sum(z_NxD[:half] * z_NxD[half:], axis=1)


def one_way_infonce(
    anchors: ArrayLike,
    keys: ArrayLike,
    *,
    temperature: float = 0.1,
    implementation: Implementation = "auto",
    axis_name: AxisName = None,
) -> jax.Array:
    """InfoNCE in one direction: each anchor picks its key among the keys of the batch ("Plain" in CLAE).

    With S_ij = <anchors_i, keys_j> / temperature::

        loss = mean over i of ( log sum_j exp(S_ij) - S_ii ),   j over all keys, the positive included

    Which of the losses of this name it is: plain inner products, **no scaling to unit length** (pass unit rows
    for cosine similarity); only the first argument's rows are anchors, so it is not symmetric; an anchor never
    meets another anchor. Both arguments receive gradient.

    Args:
      anchors: [B, D], any float type. Computed in float32 at least.
      keys: [B, D], keys[i] is the positive of anchors[i].
      temperature: > 0.
      implementation: as in `nt_xent`.
      axis_name: as in `nt_xent`: the rows of both arguments are then this device's.

    Returns:
      A scalar, float32 or wider.

    Raises:
      UserError: shapes that do not match, integers, a global batch of one row (nothing to contrast with), an
        unknown implementation, "ring" without `axis_name`.

    References:
      The baseline "Plain" of Ho and Vasconcelos, "Contrastive Learning with Adversarial Examples",
      arXiv:2010.12050.
    """
    anchors, keys = jnp.asarray(anchors), jnp.asarray(keys)
    _check_pair("one_way_infonce", {"anchors": anchors, "keys": keys}, temperature)
    if total(len(anchors), axis_name) < 2:
        raise UserError(
            "one_way_infonce: a batch of one row has no negatives, expected at least 2 rows; raise batch_size"
        )
    how = choose("one_way_infonce", implementation, len(anchors), total(len(keys), axis_name), axis_name)
    return _one_way_infonce(anchors, keys, temperature, how=how, axis_name=axis_name)


@functools.partial(jax.jit, static_argnames=("how", "axis_name"))
def _one_way_infonce(anchors_BxD, keys_BxD, temperature, *, how, axis_name):
    anchors_BxD, keys_BxD = widened(anchors_BxD, keys_BxD)
    temperature = jnp.asarray(temperature, anchors_BxD.dtype)
    anchors_BxD = anchors_BxD / temperature
    rows, columns = Side(anchors_BxD), Side(keys_BxD)
    (log_denominator_B,) = row_sums(Sums(logits, ("lse",)), rows, columns, how=how, axis_name=axis_name)
    positive_B = jnp.sum(anchors_BxD * keys_BxD, axis=1)
    return total(jnp.sum(log_denominator_B - positive_B), axis_name) / total(len(anchors_BxD), axis_name)


def _check_pair(loss, pair, temperature):
    (first, a), (second, b) = pair.items()
    check_floating(loss, **pair)
    if a.ndim != 2 or 0 in a.shape:
        raise UserError(f"{loss}: {first} of shape {a.shape}, expected [images, features], none of them 0")
    check_shape(loss, second, b, a.shape, f"like {first}")
    check_above_zero(loss, temperature=temperature)
