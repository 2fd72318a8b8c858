"""Nearest neighbours on frozen features, and classification by their weighted vote.

Letters: N bank rows, Q queries, D features, C classes, k neighbours.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxcl.errors import UserError
from jaxcl.evaluate.base import Evaluator, Metric, Metrics, Panels, accuracy
from jaxcl.evaluate.context import EvalContext
from jaxcl.evaluate.rows import check_finite
from jaxcl.losses.common import check_above_zero, rescaled
from jaxcl.losses.labels import as_array, class_numbers

# Similarities in memory at one time (64 MiB in float32): a chunk of queries against the whole bank.
CHUNK_ENTRIES = 2**24
CHUNK_QUERIES_MAX = 4096


def knn_predict(
    bank: ArrayLike,
    bank_labels: ArrayLike,
    queries: ArrayLike,
    *,
    k: int = 200,
    temperature: float = 0.1,
    num_classes: int,
) -> jax.Array:
    """Class probabilities by a vote of the k most similar bank rows, weighted by exp(cosine / temperature).

    Args:
      bank: [N, D] features; scaled to unit length here.
      bank_labels: [N] int in [0, num_classes); a negative label (unlabelled, padded) never votes.
      queries: [Q, D], on the same encoder.
      k: neighbours that vote; at most the whole bank.
      temperature: > 0. Small values are safe: only differences to the best neighbour are exponentiated.
      num_classes: C.

    Returns:
      [Q, C] float32 or wider; rows sum to 1, or to 0 if no bank row has a label.

    Raises:
      UserError: an empty bank, shapes that do not match, k < 1, a temperature not above 0, a label that is no class, or
        a row of features that is not finite. Of traced arrays: a query with a bad row among its neighbours is NaN.

    References:
      Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", arXiv:1805.01978,
      section 3.4.
    """
    bank, bank_labels, queries = jnp.asarray(bank), as_array(bank_labels), jnp.asarray(queries)
    _check(bank, queries, k)
    check_above_zero("knn", temperature=temperature)
    if bank_labels.shape != (len(bank),):
        raise UserError(f"knn: bank_labels of shape {bank_labels.shape}, expected ({len(bank)},)")
    bank_labels = class_numbers("knn: bank_labels", bank_labels, num_classes)
    check_finite("knn: bank", bank, bank_labels >= 0)
    check_finite("knn: queries", queries)
    return _knn(bank, bank_labels, queries, temperature, k=min(k, len(bank)), num_classes=num_classes)


def _check(bank: jax.Array, queries: jax.Array, k: int) -> None:
    if bank.ndim != 2 or queries.ndim != 2 or bank.shape[1] != queries.shape[1] or not len(bank):
        raise UserError(
            f"knn: bank of shape {bank.shape} and queries of shape {queries.shape}, expected [rows, "
            "features] with as many features in both and at least one bank row"
        )
    if k < 1:
        raise UserError(f"knn: k={k}, expected at least 1")


def nearest_neighbours(bank: ArrayLike, queries: ArrayLike, *, k: int) -> tuple[jax.Array, jax.Array]:
    """The k most similar bank rows of each query.

    Args:
      bank: [N, D] features; scaled to unit length here.
      queries: [Q, D], on the same encoder.
      k: at most the whole bank.

    Returns:
      (cosines [Q, k], float32 or wider, most similar first; their rows in the bank, int32 [Q, k]).

    Raises:
      UserError: as `knn_predict`.
    """
    bank, queries = jnp.asarray(bank), jnp.asarray(queries)
    _check(bank, queries, k)
    check_finite("nearest_neighbours: bank", bank)
    check_finite("nearest_neighbours: queries", queries)
    return _nearest(bank, queries, k=min(k, len(bank)))


@functools.partial(jax.jit, static_argnames="k")
def _nearest(bank, queries, *, k):
    return _search(bank, queries, lambda s_qxN: tuple(lax.top_k(s_qxN, k)))


@functools.partial(jax.jit, static_argnames=("k", "num_classes"))
def _knn(bank, labels_N, queries, temperature, *, k, num_classes):
    def vote(s_qxN):
        dtype = s_qxN.dtype
        excluded_N = jnp.where(labels_N >= 0, 0, -jnp.inf).astype(dtype)
        excluded_N = jnp.where(labels_N < num_classes, excluded_N, jnp.nan)
        s_qxk, index_qxk = lax.top_k(s_qxN + excluded_N, k)
        # A maximum instead of s_qxk[:, :1]: XLA would merge that slice into the top-k and sort whole rows, which
        # is far slower.
        best_qx1 = jnp.max(s_qxk, axis=1, keepdims=True)
        best_qx1 = jnp.where(jnp.isfinite(best_qx1), best_qx1, 0)
        weight_qxk = jnp.exp((s_qxk - best_qx1) / jnp.asarray(temperature, dtype))
        row_qx1 = jnp.arange(len(s_qxN))[:, None]
        # Unlabelled neighbours have weight exp(-inf) = 0, so the class they are added to does not matter.
        votes_qxC = jnp.zeros((len(s_qxN), num_classes), dtype)
        votes_qxC = votes_qxC.at[row_qx1, jnp.maximum(labels_N[index_qxk], 0)].add(weight_qxk)
        total_qx1 = jnp.sum(votes_qxC, axis=1, keepdims=True)
        bad_qx1 = jnp.isnan(jnp.sum(weight_qxk, axis=1, keepdims=True))  # votes for no class are dropped
        return jnp.where(bad_qx1, jnp.nan, votes_qxC / jnp.where(total_qx1 > 0, total_qx1, 1))

    bank = jnp.where((labels_N >= 0)[:, None], bank, 0)  # unlabelled rows may hold anything
    return _search(bank, queries, vote)


def _search(bank, queries, of_chunk):
    """of_chunk(cosines [q,N]) for chunks of the queries, joined to [Q, ...]; [Q,N] never exists as a whole."""
    dtype = jnp.promote_types(jnp.promote_types(bank.dtype, queries.dtype), jnp.float32)
    bank_NxD, queries_QxD = _unit(bank.astype(dtype)), _unit(queries.astype(dtype))
    num_queries = len(queries_QxD)
    chunk = max(1, min(num_queries, CHUNK_QUERIES_MAX, CHUNK_ENTRIES // len(bank_NxD)))
    padded = jnp.pad(queries_QxD, ((0, -num_queries % chunk), (0, 0)))
    out = lax.map(
        lambda chunk_qxD: of_chunk(jnp.matmul(chunk_qxD, bank_NxD.T, precision=lax.Precision.HIGHEST)),
        padded.reshape(-1, chunk, padded.shape[1]),
    )
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:num_queries], out)


def _unit(x):
    x = rescaled(x)
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.where(norm > 0, norm, 1)


def neighbours_for(labels: np.ndarray, k: int) -> int:
    """k, or the median number of images of a class if that is less: more neighbours are mostly of other classes.

    Args:
      labels: [N] int; negative ones do not count.
      k: at least 1.
    """
    counts = np.bincount(labels[labels >= 0])
    return max(1, min(k, int(np.median(counts[counts > 0])))) if counts.any() else k


def knn_accuracy(context: EvalContext) -> tuple[float, int]:
    """-> (accuracy on the labelled test images, k) by the options `eval.knn_*`."""
    options, labels = context.options, context.source("train").labels
    kind = options.knn_features or options.features
    k = neighbours_for(labels, options.knn_k)
    probabilities = knn_predict(
        context.features("train", kind),
        labels,
        context.features("test", kind),
        k=k,
        temperature=options.knn_temperature,
        num_classes=context.num_classes,
    )
    return accuracy(np.asarray(probabilities).argmax(-1), context.test.labels), k


class KNN(Evaluator):
    """Weighted nearest neighbours in the training features; `eval.knn_temperature`, and at most `eval.knn_k` of them.

    A class of median size bounds their number.
    """

    needs_labels = ("train", "test")
    features_only = True
    intervals = ("accuracy",)
    metrics = {
        "accuracy": Metric(
            "Nearest neighbours",
            meaning="the class of the most similar training features, with nothing trained on top",
        )
    }

    def __call__(self, context: EvalContext) -> tuple[Metrics, Panels]:
        right, k = knn_accuracy(context)
        return {"accuracy": right, "k": k}, {}
