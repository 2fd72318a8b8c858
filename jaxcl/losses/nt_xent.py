"""NT-Xent (SimCLR) with optional negatives for each anchor, and one-directional InfoNCE between two sets of vectors.

Shapes: B images on this device, N = 2B rows (first views, then second views), D features, M negatives for each anchor.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.errors import UserError
from jaxcl.losses.common import (
    Array,
    AxisName,
    check_above_zero,
    check_floating,
    check_shape,
    inner,
    total,
    unit,
    widened,
)
from jaxcl.losses.engine import reduce_rows
from jaxcl.losses.plan import Implementation, choose_plan, is_bounded
from jaxcl.losses.reduction import Operand, Reduction, all_but_self


def nt_xent(
    z1: Array,
    z2: Array,
    *,
    negatives: Array | tuple[Array, Array] | None = None,
    alpha: float = 1.0,
    temperature: float = 0.5,
    implementation: Implementation = "auto",
    axis_name: AxisName = None,
) -> Array:
    """NT-Xent, the loss of SimCLR, with optional further negatives that only one anchor sees.

    With A the 2B rows of [z1; z2] scaled to unit length, p(a) the other view of the same image, and n_am the
    unit vectors of the negatives of anchor a::

        l_a  = -<A_a, A_p(a)> / T + log( sum_{b != a} exp(<A_a, A_b> / T) + sum_m exp(alpha <A_a, n_am> / T) )
        loss = mean of l_a over the 2B anchors

    Several losses have this name. Here the similarity is the cosine (rows are scaled inside), both views are
    anchors, and the denominator holds the positive and the 2B - 2 negatives of both views but not the anchor itself.

    Collapsed encoder: if all vectors are equal, the loss is log(2B - 1), for example 5.541 for 128 images, with the
    global B under `axis_name`. With M negatives for each anchor and alpha=1 it is log(2B - 1 + M). A loss that stays
    at this value has learnt nothing.

    `alpha` is the reciprocal of a temperature for the negatives of the anchor and not a weight of their terms: with
    alpha=0 each adds a constant 1 to the denominator. For the plain loss pass negatives=None or M = 0.

    Args:
      z1: [B, D], any float type, first views, or anything that `jnp.asarray` takes. Computed in float32 at least. A
        zero row has similarity 0 to every vector, and zero gradient.
      z2: [B, D], second views of the same images.
      negatives: (n1, n2), each [B, M, D]: n1[i] belongs to anchor z1[i], n2[i] to z2[i]. One array [B, M, D]
        serves both views. They are scaled to unit length and are not anchors. They receive gradient; pass
        `jax.lax.stop_gradient(negatives)` for the negatives of a target network.
      alpha: scale of the similarity to the anchor's negatives. Above 1, similar negatives push harder.
      temperature: > 0.
      implementation: how the [2B, 2B] matrix is computed; the result is equal up to rounding. "dense" forms all
        logits at once. "tiled" keeps a few numbers for each row and computes the tiles again for the gradient; it
        supports reverse-mode differentiation once. "ring" is tiled, with the blocks of the devices travelling round
        (needs `axis_name`). "auto" chooses by size (`jaxcl.losses.limits`) and is differentiated like "tiled".
      axis_name: inside `jax.shard_map`, the mesh axis (or axes) over which the images are split. z1, z2 and
        negatives then hold this device's images. Their anchors meet the rows of all devices, and the result is
        the loss of the global batch, equal on every device.

    Returns:
      A scalar, float32 or wider.

    Raises:
      UserError: shapes that do not match, integers, a global batch of one image without negatives (there is nothing
        to contrast), an unknown implementation, or "ring" without `axis_name`.

    Example:
      loss = losses.nt_xent(z1, z2, temperature=0.5)

    References:
      Chen et al., "A Simple Framework for Contrastive Learning", arXiv:2002.05709, eq. 1. The negatives of each anchor:
      the SimCLR form of Ge et al., "Robust Contrastive Learning Using Negative Samples with Diminished Semantics",
      arXiv:2110.14189.
    """
    z1, z2 = jnp.asarray(z1), jnp.asarray(z2)
    if isinstance(negatives, (tuple, list)):
        if len(negatives) != 2:
            raise UserError(f"nt_xent: negatives holds {len(negatives)} arrays, expected a pair, one for each view")
        pair = tuple(jnp.asarray(n) for n in negatives)
    else:
        pair = () if negatives is None else (jnp.asarray(negatives),) * 2
    _check_pair("nt_xent", {"z1": z1, "z2": z2}, temperature)
    for name, n in zip(("negatives of z1", "negatives of z2"), pair, strict=False):
        check_floating("nt_xent", **{name: n})
        if n.ndim != 3:
            raise UserError(f"nt_xent: {name} has shape {n.shape}, expected [images, negatives, features]")
        check_shape("nt_xent", name, n, (len(z1), pair[0].shape[1], z1.shape[1]))
    if total(len(z1), axis_name) < 2 and (not pair or pair[0].shape[1] == 0):
        raise UserError("nt_xent: z1 holds one image and so no negatives, expected at least 2; raise batch_size")
    rows = 2 * len(z1)
    plan = choose_plan("nt_xent", implementation, rows, total(rows, axis_name), axis_name)
    return _nt_xent(
        z1, z2, pair, alpha, temperature, bounded=is_bounded(True, temperature), plan=plan, axis_name=axis_name
    )


# Compiled as a whole: op by op, the first call in a notebook would compile dozens of small programs.
@functools.partial(jax.jit, static_argnames=("bounded", "plan", "axis_name"))
def _nt_xent(z1, z2, negatives, alpha, temperature, *, bounded, plan, axis_name):
    z1, z2, *negatives = widened(z1, z2, *negatives)
    temperature, alpha = jnp.asarray(temperature, z1.dtype), jnp.asarray(alpha, z1.dtype)
    # Each operand is divided by the root of the temperature, so that rows and columns are the same vectors.
    shrink = lax.rsqrt(temperature)
    z_NxD = jnp.concatenate([unit(z1) * shrink, unit(z2) * shrink])
    reduction = Reduction(all_but_self, ("lse",), bounded)
    (log_denominator_N,) = reduce_rows(reduction, Operand(z_NxD), plan=plan, axis_name=axis_name)
    if negatives:
        n_NxMxD = unit(jnp.concatenate(negatives)) * shrink
        negative_NxM = alpha * inner(z_NxD[:, None], n_NxMxD)[:, 0]
        joined = jnp.concatenate([log_denominator_N[:, None], negative_NxM], axis=1)
        log_denominator_N = jax.nn.logsumexp(joined, axis=1)
    loss = jnp.sum(log_denominator_N) - 2 * jnp.sum(_positives(z_NxD))
    return total(loss, axis_name) / total(len(z_NxD), axis_name)


@jax.checkpoint  # its intermediates are as large as the features; computing them again is cheaper than keeping them
def _positives(z_NxD):
    """Similarity of the two views of each image [B]."""
    half = len(z_NxD) // 2
    return jnp.sum(z_NxD[:half] * z_NxD[half:], axis=1)


def one_way_infonce(
    anchors: Array,
    keys: Array,
    *,
    temperature: float = 0.1,
    implementation: Implementation = "auto",
    axis_name: AxisName = None,
) -> Array:
    """InfoNCE in one direction: each anchor identifies its key among the keys of the batch ("Plain" in CLAE).

    With S_ij = <anchors_i, keys_j> / temperature::

        loss = mean over i of ( log sum_j exp(S_ij) - S_ii ),   j over all keys, the positive included

    Several losses have this name. This one uses plain inner products, **without scaling to unit length** (pass unit
    rows for cosine similarity). Only the rows of the first argument are anchors, so it is not symmetric, and an anchor
    never meets another anchor. Both arguments receive gradient.

    Collapsed encoder: if all vectors are equal, the loss is log(B), with the global B under `axis_name`.

    Args:
      anchors: [B, D], any float type, or anything that `jnp.asarray` takes. Computed in float32 at least.
      keys: [B, D]; keys[i] is the positive of anchors[i].
      temperature: > 0.
      implementation: how the [B, B] matrix is computed; the result is equal up to rounding. "dense" forms all
        logits at once. "tiled" keeps a few numbers for each row and computes the tiles again for the gradient; it
        supports reverse-mode differentiation once. "ring" is tiled, with the blocks of the devices travelling round
        (needs `axis_name`). "auto" chooses by size (`jaxcl.losses.limits`) and is differentiated like "tiled".
      axis_name: inside `jax.shard_map`, the mesh axis (or axes) over which the rows are split. Both arguments then
        hold this device's rows. Its anchors meet the keys of all devices, and the result is the loss of the global
        batch, equal on every device.

    Returns:
      A scalar, float32 or wider.

    Raises:
      UserError: shapes that do not match, integers, a global batch of one row (there is nothing to contrast), an
        unknown implementation, or "ring" without `axis_name`.

    Example:
      loss = losses.one_way_infonce(unit_anchors, unit_keys, temperature=0.1)

    References:
      The baseline "Plain" of Ho and Vasconcelos, "Contrastive Learning with Adversarial Examples",
      arXiv:2010.12050.
    """
    anchors, keys = jnp.asarray(anchors), jnp.asarray(keys)
    _check_pair("one_way_infonce", {"anchors": anchors, "keys": keys}, temperature)
    if total(len(anchors), axis_name) < 2:
        raise UserError(
            "one_way_infonce: anchors holds one row and so no negatives, expected at least 2; raise batch_size"
        )
    plan = choose_plan("one_way_infonce", implementation, len(anchors), total(len(keys), axis_name), axis_name)
    return _one_way_infonce(anchors, keys, temperature, plan=plan, axis_name=axis_name)


@functools.partial(jax.jit, static_argnames=("plan", "axis_name"))
def _one_way_infonce(anchors_BxD, keys_BxD, temperature, *, plan, axis_name):
    anchors_BxD, keys_BxD = widened(anchors_BxD, keys_BxD)
    temperature = jnp.asarray(temperature, anchors_BxD.dtype)
    anchors_BxD = anchors_BxD / temperature
    rows, columns = Operand(anchors_BxD), Operand(keys_BxD)
    reduction = Reduction(all_but_self, ("lse",))
    (log_denominator_B,) = reduce_rows(reduction, rows, columns, plan=plan, axis_name=axis_name)
    positive_B = jnp.sum(anchors_BxD * keys_BxD, axis=1)
    return total(jnp.sum(log_denominator_B - positive_B), axis_name) / total(len(anchors_BxD), axis_name)


def _check_pair(loss, pair, temperature):
    (first, a), (second, b) = pair.items()
    check_floating(loss, **pair)
    if a.ndim != 2 or 0 in a.shape:
        raise UserError(f"{loss}: {first} has shape {a.shape}, expected [images, features], neither of them 0")
    check_shape(loss, second, b, a.shape, f"like {first}")
    check_above_zero(loss, temperature=temperature)
