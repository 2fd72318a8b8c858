"""How near embeddings are to their positives, to their own negatives and to other images: figures beside the loss.

N rows, E embedding, M others of a row's own, K others that all rows meet.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.losses.common import inner, unit, widened

Array = jax.Array
BINS = 40  # of cosines from -1 to 1
ROWS, SHARED = 32, 1024  # at most so many enter the histogram of what all rows meet


class Similarity(NamedTuple):
    """Cosines between rows [N,E] and others, [N,M,E] each row's own, or [K,E] that all rows meet; any length."""

    rows: Array
    others: Array


def of_views(
    rows: Sequence[Array], positives: Sequence[Array], own: Sequence[Array | None]
) -> dict[str, list[Similarity]]:
    """Both views with their positives [N,E], their own negatives [N,M,E] if they have any, and with another image."""
    if all(n is None for n in own):
        return {}
    return {
        "positive": [Similarity(x, p[:, None]) for x, p in zip(rows, positives, strict=True)],
        "own negative": [Similarity(x, n) for x, n in zip(rows, own, strict=True) if n is not None],
        "another image": [Similarity(rows[0], jnp.roll(positives[0], 1, axis=0)[:, None])],
    }


def similarity_metrics(terms: dict[str, Any], embeddings: dict[str, Any], count: int, memory: dict) -> dict[str, Array]:
    """{"similarity/KIND": mean cosine, "similarity_histogram/KIND": shares [BINS] of the cosines from -1 to 1}.

    Of the terms with something to compare (`Term.similarities`); where several have, the term's name goes before the
    kind. Without gradient. memory: what its parts show, by name. count: images of the batch.
    """
    found = {n: t.similarities(embeddings, count, memory) for n, t in terms.items()}
    found = {n: kinds for n, kinds in found.items() if kinds}
    figures = {}
    for n, kinds in found.items():
        for kind, pairs in kinds.items():
            name = kind if len(found) == 1 else f"{n} {kind}"
            parts = [Similarity(*(unit(x) for x in widened(*p))) for p in pairs]
            figures[f"similarity/{name}"] = sum(mean_cosine(p) for p in parts) / len(parts)
            figures[f"similarity_histogram/{name}"] = sum(histogram(p) for p in parts) / len(parts)
    return jax.lax.stop_gradient(figures)


def mean_cosine(s: Similarity) -> Array:
    """Mean over all pairs, of unit vectors; of rows with what all of them meet in O(N + K)."""
    if s.others.ndim == 2:
        return jnp.sum(s.rows.mean(0) * s.others.mean(0))
    return jnp.mean(jnp.sum(s.rows[:, None] * s.others, axis=-1))


def histogram(s: Similarity) -> Array:
    """Shares of the cosines of unit vectors in BINS equal parts of [-1, 1]; sums to 1 if all are finite."""
    if s.others.ndim == 2:
        cosine = inner(s.rows[:ROWS], s.others[:: -(-len(s.others) // SHARED)])
    else:
        cosine = jnp.sum(s.rows[:, None] * s.others, axis=-1)
    # Counted below edges: comparisons vectorise where a scatter into bins does not. Rounding may leave [-1, 1].
    edges = np.linspace(-1, 1, BINS + 1)[1:-1].astype(np.float32)
    below = jnp.mean(cosine.reshape(-1)[:, None] < edges, axis=0)
    return jnp.diff(below, prepend=0, append=1)
