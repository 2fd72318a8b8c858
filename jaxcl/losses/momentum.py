"""Losses of methods with a slow or frozen second branch: MoCo, BYOL, SimSiam. The second branch gets no gradient.

Letters: N rows (images on this device), D features, K queued keys, M negatives of a row's own.
"""

import functools

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


def moco(
    q: ArrayLike,
    k: ArrayLike,
    queue: ArrayLike,
    *,
    negatives: ArrayLike | None = None,
    alpha: float = 2.0,
    temperature: float = 0.2,
    where: ArrayLike | None = None,
    axis_name: AxisName = None,
) -> jax.Array:
    """MoCo's InfoNCE against a queue, optionally with non-semantic negatives that only their own query sees.

    With q, k and the negatives n scaled to unit length::

        logits_i = [ <q_i, k_i>, <q_i, queue_1> ... <q_i, queue_K>, alpha <q_i, n_i1> ... alpha <q_i, n_iM> ] / T
        loss     = mean over i of ( log sum exp(logits_i) - logits_i0 )

    Only q receives gradient: k, queue and negatives are under stop-gradient inside. Other rows' keys are no
    negatives of this batch (they are once enqueued); the queue is the one before this batch is enqueued.

    `alpha` is the reciprocal of a temperature for the own negatives, not a weight of their terms, so it enlarges
    the term of a similar negative and shrinks that of a dissimilar one; alpha=0 leaves a constant 1 for each in
    the denominator. Plain MoCo is negatives=None or M = 0.

    Args:
      q: [N, D], any float type, outputs of the trained encoder, any length. Computed in float32 at least.
      k: [N, D], outputs of the momentum encoder for the other view of the same images, any length.
      queue: [D, K], earlier keys as **unit** columns; used as they are. The same on every device.
      negatives: [N, M, D], outputs of the momentum encoder for each query's own negatives, any length. A zero
        vector is a constant logit of 0.
      alpha: scale of the similarity to the own negatives.
      temperature: > 0.
      where: [N] bool, False for padded rows: they count nothing and may hold anything.
      axis_name: inside `jax.shard_map`, the mesh axis (or axes) over which the rows are split; the result is
        then the mean over the global batch, equal on every device.

    Returns:
      A scalar, float32 or wider. 0 if no row exists.

    Raises:
      UserError: shapes that do not match, integers, a temperature not above 0.

    References:
      He et al., "Momentum Contrast", arXiv:1911.05722, eq. 1; own negatives: Ge et al., "Robust Contrastive
      Learning Using Negative Samples with Diminished Semantics", arXiv:2110.14189.
    """
    arrays = {"q": jnp.asarray(q), "k": jnp.asarray(k), "queue": jnp.asarray(queue)}
    where = _checked_rows("moco", {name: arrays[name] for name in ("q", "k")}, where)
    check_floating("moco", queue=arrays["queue"])
    num_rows, dim = arrays["q"].shape
    if arrays["queue"].ndim != 2 or len(arrays["queue"]) != dim:
        raise UserError(f"moco: queue of shape {arrays['queue'].shape}, expected ({dim}, keys): one key a column")
    if negatives is not None:
        negatives = _checked_negatives("moco", jnp.asarray(negatives), num_rows, dim)
    check_above_zero("moco", temperature=temperature)
    return _moco(*arrays.values(), negatives, alpha, temperature, where, axis_name=axis_name)


# Compiled as one: op by op, the first call in a notebook would compile dozens of little programs.
@functools.partial(jax.jit, static_argnames="axis_name")
def _moco(q_NxD, k_NxD, queue_DxK, n_NxMxD, alpha, temperature, where, *, axis_name):
    if n_NxMxD is None:
        n_NxMxD = jnp.zeros((len(q_NxD), 0, q_NxD.shape[1]), q_NxD.dtype)
    q_NxD, k_NxD, queue_DxK, n_NxMxD = widened(q_NxD, k_NxD, queue_DxK, n_NxMxD)
    k_NxD, queue_DxK, n_NxMxD = lax.stop_gradient((k_NxD, queue_DxK, n_NxMxD))
    alpha, temperature = jnp.asarray(alpha, q_NxD.dtype), jnp.asarray(temperature, q_NxD.dtype)
    q_NxD, k_NxD, n_NxMxD = (unit(_existing(x, where)) for x in (q_NxD, k_NxD, n_NxMxD))

    positive_N = jnp.sum(q_NxD * k_NxD, axis=1) / temperature
    queue_NxK = inner(q_NxD, queue_DxK.T) / temperature
    own_NxM = alpha * inner(q_NxD[:, None], n_NxMxD)[:, 0] / temperature
    # Joined as sums, not as columns: a copy of the N x K logits is saved.
    joined = jnp.concatenate([positive_N[:, None], own_NxM], axis=1)
    if queue_NxK.shape[1]:
        joined = jnp.concatenate([joined, jax.nn.logsumexp(queue_NxK, axis=1, keepdims=True)], axis=1)
    return _mean(jax.nn.logsumexp(joined, axis=1) - positive_N, where, axis_name)


def byol(
    p1: ArrayLike,
    p2: ArrayLike,
    z1: ArrayLike,
    z2: ArrayLike,
    *,
    negatives: ArrayLike | tuple[ArrayLike | None, ArrayLike | None] | None = None,
    alpha: float = 0.2,
    where: ArrayLike | None = None,
    axis_name: AxisName = None,
) -> jax.Array:
    """BYOL's symmetric loss, optionally pushing each prediction away from non-semantic negatives of its own view.

    With d(x, y) = 2 - 2 cos(x, y), the squared distance of the unit vectors::

        loss = mean over rows of ( d(p1, z2) + d(p2, z1) - alpha (d(p1, n1) + d(p2, n2)) )

    The sum of both directions (in [0, 8] without negatives), not their mean. Only p1 and p2 receive gradient:
    targets and negatives are under stop-gradient inside. With hard negatives alpha must stay well below 1, or the
    best prediction points away from its target.

    Args:
      p1: [N, D], any float type, predictions of the online network for view 1, any length. Computed in float32 at
        least.
      p2: [N, D], predictions for view 2.
      z1: [N, D], projections of the target network for view 1, any length. A zero row has cosine 0.
      z2: [N, D], projections for view 2.
      negatives: (n1, n2), target projections [N, D], or [N, M, D] whose M distances are summed; n1 is made from
        view 1 and repels p1. None in place of one leaves that view without (one-sided). One array serves both.
      alpha: weight of the negatives; 0 is plain BYOL.
      where: [N] bool, False for padded rows: they count nothing and may hold anything.
      axis_name: inside `jax.shard_map`, the mesh axis (or axes) over which the rows are split; the result is
        then the mean over the global batch, equal on every device.

    Returns:
      A scalar, float32 or wider. 0 if no row exists.

    Raises:
      UserError: shapes that do not match, integers.

    References:
      Grill et al., "Bootstrap Your Own Latent", arXiv:2006.07733, eq. 2 (symmetrised); negatives: Ge et al.,
      "Robust Contrastive Learning Using Negative Samples with Diminished Semantics", arXiv:2110.14189. The latter
      publish no code for BYOL: the sign, the sum and alpha's default are this library's reading.
    """
    rows = {"p1": jnp.asarray(p1), "p2": jnp.asarray(p2), "z1": jnp.asarray(z1), "z2": jnp.asarray(z2)}
    where = _checked_rows("byol", rows, where)
    if isinstance(negatives, (tuple, list)) and len(negatives) != 2:
        raise UserError(f"byol: {len(negatives)} arrays of negatives, expected a pair, one for each view (or None)")
    pair = negatives if isinstance(negatives, (tuple, list)) else (negatives, negatives)
    shape = rows["p1"].shape
    own = []
    for n in pair:
        if n is not None:
            n = jnp.asarray(n)
            n = _checked_negatives("byol", n[:, None] if n.shape == shape else n, *shape)
        own.append(n)
    return _byol(*rows.values(), *own, alpha, where, axis_name=axis_name)


@functools.partial(jax.jit, static_argnames="axis_name")
def _byol(p1, p2, z1, z2, n1, n2, alpha, where, *, axis_name):
    loss_N = 4 - 2 * _cosine(p1, z2, where) - 2 * _cosine(p2, z1, where)
    alpha = jnp.asarray(alpha, loss_N.dtype)
    for p_NxD, n_NxMxD in ((p1, n1), (p2, n2)):
        if n_NxMxD is not None:
            distance_NxM = 2 - 2 * _cosine(p_NxD[:, None], n_NxMxD, where)
            loss_N = loss_N - alpha * jnp.sum(distance_NxM, axis=1)
    return _mean(loss_N, where, axis_name)


def simsiam(
    p1: ArrayLike,
    p2: ArrayLike,
    z1: ArrayLike,
    z2: ArrayLike,
    *,
    where: ArrayLike | None = None,
    axis_name: AxisName = None,
) -> jax.Array:
    """SimSiam's symmetric negative cosine similarity, in [-1, 1]::

        loss = mean over rows of ( -cos(p1, z2) / 2 - cos(p2, z1) / 2 )

    Only p1 and p2 receive gradient: z1 and z2 are under stop-gradient inside, so pass the projections as they are.

    Args:
      p1: [N, D], any float type, predictions for view 1, any length. Computed in float32 at least.
      p2: [N, D], predictions for view 2.
      z1: [N, D], projections of view 1 by the same encoder, any length. A zero row has cosine 0.
      z2: [N, D], projections of view 2.
      where: [N] bool, False for padded rows: they count nothing and may hold anything.
      axis_name: inside `jax.shard_map`, the mesh axis (or axes) over which the rows are split; the result is
        then the mean over the global batch, equal on every device.

    Returns:
      A scalar, float32 or wider. 0 if no row exists.

    Raises:
      UserError: shapes that do not match, integers.

    References:
      Chen and He, "Exploring Simple Siamese Representation Learning", arXiv:2011.10566, eq. 4.
    """
    rows = {"p1": jnp.asarray(p1), "p2": jnp.asarray(p2), "z1": jnp.asarray(z1), "z2": jnp.asarray(z2)}
    where = _checked_rows("simsiam", rows, where)
    return _simsiam(*rows.values(), where, axis_name=axis_name)


@functools.partial(jax.jit, static_argnames="axis_name")
def _simsiam(p1, p2, z1, z2, where, *, axis_name):
    return _mean(-(_cosine(p1, z2, where) + _cosine(p2, z1, where)) / 2, where, axis_name)


def _cosine(x, y, where):
    """Cosine of vectors along the last axis, [N, ...]; `y` is a constant."""
    x, y = widened(x, lax.stop_gradient(y))
    return jnp.sum(unit(_existing(x, where)) * unit(_existing(y, where)), axis=-1)


def _existing(x, where):
    """Padded rows zeroed before anything is computed: 0 * NaN would poison the gradient."""
    return x if where is None else jnp.where(jnp.expand_dims(where, range(1, x.ndim)), x, 0)


def _mean(values_N, where, axis_name):
    """Mean over the existing rows of all devices; 0 if there is none."""
    kept_N = jnp.ones(len(values_N), bool) if where is None else where
    count = total(jnp.sum(kept_N, dtype=jnp.int32), axis_name)
    return total(jnp.sum(jnp.where(kept_N, values_N, 0)), axis_name) / jnp.maximum(count, 1).astype(values_N.dtype)


def _checked_rows(loss, rows, where):
    """`where` as an array of bool, after all rows were found to match."""
    check_floating(loss, **rows)
    first, shape = next((name, x.shape) for name, x in rows.items())
    if len(shape) != 2:
        raise UserError(f"{loss}: {first} of shape {shape}, expected [images, features]")
    for name, x in rows.items():
        check_shape(loss, name, x, shape, f"like {first}")
    if where is None:
        return None
    where = jnp.asarray(where)
    check_shape(loss, "where", where, shape[:1], "one a row")
    return where.astype(bool)


def _checked_negatives(loss, negatives, num_rows, dim):
    check_floating(loss, negatives=negatives)
    if negatives.ndim != 3 or negatives.shape != (num_rows, negatives.shape[1], dim):
        raise UserError(
            f"{loss}: negatives of shape {negatives.shape}, expected ({num_rows}, negatives of each, {dim}); "
            "for one negative a row pass negatives[:, None]"
        )
    return negatives
