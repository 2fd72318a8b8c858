"""Losses of MoCo, BYOL and SimSiam. Their second branch (momentum encoder or stop-gradient) gets no gradient.

Shapes: N rows (images on this device), D features, K queued keys, M negatives for each row.
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
from jaxcl.losses.labels import flags


def moco(
    q: Array,
    k: Array,
    queue: Array,
    *,
    negatives: Array | None = None,
    alpha: float = 2.0,
    temperature: float = 0.2,
    where: Array | None = None,
    axis_name: AxisName = None,
) -> Array:
    """InfoNCE of MoCo against a queue, with optional non-semantic negatives that only one query sees.

    With q, k and the negatives n scaled to unit length::

        logits_i = [ <q_i, k_i>, <q_i, queue_1> ... <q_i, queue_K>, alpha <q_i, n_i1> ... alpha <q_i, n_iM> ] / T
        loss     = mean over i of ( log sum exp(logits_i) - logits_i0 )

    Only q receives gradient: k, queue and negatives are under stop-gradient inside. The keys of other rows of this
    batch are not negatives. Pass the queue as it is before this batch is enqueued.

    `alpha` is the reciprocal of a temperature for the negatives of the query and not a weight of their terms. It
    enlarges the term of a similar negative and shrinks the term of a dissimilar one; with alpha=0 each negative adds a
    constant 1 to the denominator. Plain MoCo is negatives=None or M = 0.

    Collapsed encoder: if all vectors are equal, the loss is log(K + 1), and log(K + 1 + M) with alpha=1. A loss that
    stays at this value has learnt nothing. It starts lower while the queue holds random vectors.

    Args:
      q: [N, D], any float type, outputs of the trained encoder, any length, or anything that `jnp.asarray` takes.
        Computed in float32 at least.
      k: [N, D], outputs of the momentum encoder for the other view of the same images, any length.
      queue: [D, K], earlier keys as **unit** columns, which are not scaled. Equal on every device.
      negatives: [N, M, D], outputs of the momentum encoder for the negatives of each query, any length. A zero
        vector is a constant logit of 0.
      alpha: scale of the similarity to the query's negatives.
      temperature: > 0.
      where: [N] bool, False for padded rows, which do not count and may hold any value.
      axis_name: inside `jax.shard_map`, the mesh axis (or axes) over which the rows are split. The result is
        then the mean over the global batch, equal on every device.

    Returns:
      A scalar, float32 or wider. 0 if no row is valid.

    Raises:
      UserError: shapes that do not match, integers, or a temperature not above 0.

    Example:
      loss = losses.moco(q, k, queue, temperature=0.2)

    References:
      He et al., "Momentum Contrast", arXiv:1911.05722, eq. 1. The negatives of each query: Ge et al., "Robust
      Contrastive Learning Using Negative Samples with Diminished Semantics", arXiv:2110.14189.
    """
    arrays = {"q": jnp.asarray(q), "k": jnp.asarray(k), "queue": jnp.asarray(queue)}
    where = _checked_rows("moco", {name: arrays[name] for name in ("q", "k")}, where)
    check_floating("moco", queue=arrays["queue"])
    num_rows, dim = arrays["q"].shape
    if arrays["queue"].ndim != 2 or len(arrays["queue"]) != dim:
        raise UserError(f"moco: queue has shape {arrays['queue'].shape}, expected ({dim}, keys): each key is a column")
    if negatives is not None:
        negatives = _checked_negatives("moco", jnp.asarray(negatives), num_rows, dim)
    check_above_zero("moco", temperature=temperature)
    return _moco(*arrays.values(), negatives, alpha, temperature, where, axis_name=axis_name)


# Compiled as a whole: op by op, the first call in a notebook would compile dozens of small programs.
@functools.partial(jax.jit, static_argnames="axis_name")
def _moco(q_NxD, k_NxD, queue_DxK, n_NxMxD, alpha, temperature, where, *, axis_name):
    if n_NxMxD is None:
        n_NxMxD = jnp.zeros((len(q_NxD), 0, q_NxD.shape[1]), q_NxD.dtype)
    q_NxD, k_NxD, queue_DxK, n_NxMxD = widened(q_NxD, k_NxD, queue_DxK, n_NxMxD)
    k_NxD, queue_DxK, n_NxMxD = lax.stop_gradient((k_NxD, queue_DxK, n_NxMxD))
    alpha, temperature = jnp.asarray(alpha, q_NxD.dtype), jnp.asarray(temperature, q_NxD.dtype)
    q_NxD, k_NxD, n_NxMxD = (unit(_zero_padding(x, where)) for x in (q_NxD, k_NxD, n_NxMxD))

    positive_N = jnp.sum(q_NxD * k_NxD, axis=1) / temperature
    queue_NxK = inner(q_NxD, queue_DxK.T) / temperature
    negative_NxM = alpha * inner(q_NxD[:, None], n_NxMxD)[:, 0] / temperature
    # The log-sum-exp of the queue is joined and not its logits, which saves a copy of N x K numbers.
    joined = jnp.concatenate([positive_N[:, None], negative_NxM], axis=1)
    if queue_NxK.shape[1]:
        joined = jnp.concatenate([joined, jax.nn.logsumexp(queue_NxK, axis=1, keepdims=True)], axis=1)
    return _mean(jax.nn.logsumexp(joined, axis=1) - positive_N, where, axis_name)


def byol(
    p1: Array,
    p2: Array,
    z1: Array,
    z2: Array,
    *,
    negatives: Array | tuple[Array | None, Array | None] | None = None,
    alpha: float = 0.2,
    where: Array | None = None,
    axis_name: AxisName = None,
) -> Array:
    """The symmetric loss of BYOL, with optional non-semantic negatives that push the predictions of their view away.

    With d(x, y) = 2 - 2 cos(x, y), the squared distance of the unit vectors::

        loss = mean over rows of ( d(p1, z2) + d(p2, z1) - alpha (d(p1, n1) + d(p2, n2)) )

    It is the sum of both directions (in [0, 8] without negatives) and not their mean. Only p1 and p2 receive gradient:
    targets and negatives are under stop-gradient inside. With hard negatives alpha must be well below 1, or the
    best prediction points away from its target.

    Collapsed encoder: if all vectors are equal, the loss without negatives is 0, its minimum. The loss therefore does
    not reveal a collapse; watch the standard deviation of the features of the unit vectors over the batch.

    Args:
      p1: [N, D], any float type, predictions of the online network for view 1, any length, or anything that
        `jnp.asarray` takes. Computed in float32 at least.
      p2: [N, D], predictions for view 2.
      z1: [N, D], projections of the target network for view 1, any length. A zero row has cosine 0.
      z2: [N, D], projections for view 2.
      negatives: (n1, n2), target projections [N, D] or [N, M, D]; the M distances are summed. n1 is made from
        view 1 and repels p1. With None instead of n1 or n2 that view has no negatives. One array serves both views.
      alpha: weight of the negatives; 0 is plain BYOL.
      where: [N] bool, False for padded rows, which do not count and may hold any value.
      axis_name: inside `jax.shard_map`, the mesh axis (or axes) over which the rows are split. The result is
        then the mean over the global batch, equal on every device.

    Returns:
      A scalar, float32 or wider. 0 if no row is valid.

    Raises:
      UserError: shapes that do not match, or integers.

    Example:
      loss = losses.byol(predictor(z1), predictor(z2), target_z1, target_z2)

    References:
      Grill et al., "Bootstrap Your Own Latent", arXiv:2006.07733, eq. 2 (symmetrised). Negatives: Ge et al.,
      "Robust Contrastive Learning Using Negative Samples with Diminished Semantics", arXiv:2110.14189. They
      publish no code for BYOL: the sign, the sum and the default of alpha are this library's interpretation.
    """
    rows = {"p1": jnp.asarray(p1), "p2": jnp.asarray(p2), "z1": jnp.asarray(z1), "z2": jnp.asarray(z2)}
    where = _checked_rows("byol", rows, where)
    if isinstance(negatives, (tuple, list)) and len(negatives) != 2:
        raise UserError(f"byol: negatives holds {len(negatives)} arrays, expected a pair, one for each view (or None)")
    pair = negatives if isinstance(negatives, (tuple, list)) else (negatives, negatives)
    shape = rows["p1"].shape
    checked = []
    for n in pair:
        if n is not None:
            n = jnp.asarray(n)
            n = _checked_negatives("byol", n[:, None] if n.shape == shape else n, *shape)
        checked.append(n)
    return _byol(*rows.values(), *checked, alpha, where, axis_name=axis_name)


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
    p1: Array,
    p2: Array,
    z1: Array,
    z2: Array,
    *,
    where: Array | None = None,
    axis_name: AxisName = None,
) -> Array:
    """SimSiam's symmetric negative cosine similarity, in [-1, 1]::

        loss = mean over rows of ( -cos(p1, z2) / 2 - cos(p2, z1) / 2 )

    Only p1 and p2 receive gradient: z1 and z2 are under stop-gradient inside, so pass the projections unchanged.

    Collapsed encoder: if all vectors are equal, the loss is -1, its minimum. The loss therefore does not reveal a
    collapse; watch the standard deviation of the features of the unit vectors over the batch, which is about 1/sqrt(D)
    for vectors that are spread evenly and 0 for equal vectors.

    Args:
      p1: [N, D], any float type, predictions for view 1, any length, or anything that `jnp.asarray` takes. Computed in
        float32 at least.
      p2: [N, D], predictions for view 2.
      z1: [N, D], projections of view 1 by the same encoder, any length. A zero row has cosine 0.
      z2: [N, D], projections of view 2.
      where: [N] bool, False for padded rows, which do not count and may hold any value.
      axis_name: inside `jax.shard_map`, the mesh axis (or axes) over which the rows are split. The result is
        then the mean over the global batch, equal on every device.

    Returns:
      A scalar, float32 or wider. 0 if no row is valid.

    Raises:
      UserError: shapes that do not match, or integers.

    Example:
      loss = losses.simsiam(predictor(z1), predictor(z2), z1, z2)

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
    """Cosine of vectors along the last axis, [N, ...]. `y` gets no gradient."""
    x, y = widened(x, lax.stop_gradient(y))
    return jnp.sum(unit(_zero_padding(x, where)) * unit(_zero_padding(y, where)), axis=-1)


def _zero_padding(x, where):
    """Zeroes the padded rows before anything is computed: 0 * NaN would make the gradient NaN."""
    return x if where is None else jnp.where(jnp.expand_dims(where, range(1, x.ndim)), x, 0)


def _mean(values_N, where, axis_name):
    """Mean over the valid rows of all devices; 0 if there are none."""
    valid_N = jnp.ones(len(values_N), bool) if where is None else where
    count = total(jnp.sum(valid_N, dtype=jnp.int32), axis_name)
    return total(jnp.sum(jnp.where(valid_N, values_N, 0)), axis_name) / jnp.maximum(count, 1).astype(values_N.dtype)


def _checked_rows(loss, rows, where):
    """Checks that all rows match -> `where` as an array of bool, or None."""
    check_floating(loss, **rows)
    first, shape = next((name, x.shape) for name, x in rows.items())
    if len(shape) != 2:
        raise UserError(f"{loss}: {first} has shape {shape}, expected [images, features]")
    for name, x in rows.items():
        check_shape(loss, name, x, shape, f"like {first}")
    if where is None:
        return None
    where = flags(where)
    check_shape(loss, "where", where, shape[:1], "one for each row")
    return where.astype(bool)


def _checked_negatives(loss, negatives, num_rows, dim):
    check_floating(loss, negatives=negatives)
    if negatives.ndim != 3 or negatives.shape != (num_rows, negatives.shape[1], dim):
        raise UserError(
            f"{loss}: negatives has shape {negatives.shape}, expected ({num_rows}, negatives, {dim}); "
            "if each row has one negative, pass negatives[:, None]"
        )
    return negatives
