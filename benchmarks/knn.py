"""Classification of 10,000 queries by 200 neighbours among 50,000, compared with torch, numpy and scikit-learn.

    python -m benchmarks.run --only=knn

Letters: N bank rows, Q queries, D features, C classes, k neighbours. All compute the same class probabilities.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import _paired
from benchmarks._measure import cores
from benchmarks._paired import torch_threads
from benchmarks._table import Row, Settings
from benchmarks._task import Contestant, Needs, Ready
from jaxcl.evaluate.knn import knn_predict

TITLE = "Nearest neighbours"
NOTE = (
    "The k = 200 nearest by cosine vote with weight exp(cosine / 0.1). torch and numpy are the usual few lines: a "
    "chunk of queries against the bank, the largest k, a sum per class. All agree to 1e-3."
)
CLASSES, TEMPERATURE, CHUNK = 10, 0.1, 1000

CONTESTANTS = (
    Contestant("jaxcl", "jaxcl", ours=True),
    Contestant("torch", "torch", package="torch"),
    Contestant("numpy", "numpy", differs="argpartition, which uses one core"),
    Contestant("sklearn", "scikit-learn", package="scikit-learn", differs="KNeighborsClassifier, brute force"),
)


def rows(settings: Settings) -> list[Row]:
    """Queries per second."""
    arguments = dict(zip("NQDk", (500, 64, 8, 20) if settings.quick else (50_000, 10_000, 128, 200), strict=True))
    task = f"{arguments['Q']:,} queries in {arguments['N']:,} rows of {arguments['D']}"
    options = dict(arguments=arguments, unit="queries/s", cores=cores(), tolerance=1e-3)
    return _paired.rows("benchmarks.knn", task, CONTESTANTS, settings, **options)


def prepare(contestant: str, *, N: int, Q: int, D: int, k: int) -> Ready:  # noqa: N803
    rng = np.random.default_rng(0)
    centres_CxD = rng.normal(size=(CLASSES, D)).astype(np.float32)
    labels_N, classes_Q = rng.integers(0, CLASSES, N), rng.integers(0, CLASSES, Q)
    bank_NxD = (centres_CxD[labels_N] + 2 * rng.normal(size=(N, D))).astype(np.float32)
    queries_QxD = (centres_CxD[classes_Q] + 2 * rng.normal(size=(Q, D))).astype(np.float32)
    run = MAKE[contestant](bank_NxD, labels_N, queries_QxD, k)
    # All cosines; bank, labels and queries are read once, probabilities are written.
    needs = Needs(2 * N * Q * D, 4 * (N * (D + 1) + Q * (D + CLASSES)))
    return Ready(run, Q, np.asarray(run())[:100], needs)


def of_jaxcl(bank, labels, queries, k) -> Callable[[], Any]:
    options = dict(k=k, temperature=TEMPERATURE, num_classes=CLASSES)
    return lambda: jax.block_until_ready(knn_predict(bank, labels, queries, **options))


def of_torch(bank, labels, queries, k) -> Callable[[], Any]:
    torch = torch_threads()
    bank, labels, queries = map(torch.from_numpy, (bank, labels, queries))

    def run():
        unit = torch.nn.functional.normalize
        bank_DxN, out = unit(bank, dim=1).T, []
        for chunk_qxD in unit(queries, dim=1).split(CHUNK):
            s_qxk, index_qxk = (chunk_qxD @ bank_DxN).topk(k, dim=1)
            votes_qxC = torch.zeros(len(chunk_qxD), CLASSES)
            votes_qxC.scatter_add_(1, labels[index_qxk], (s_qxk / TEMPERATURE).exp())
            out.append(votes_qxC / votes_qxC.sum(1, keepdim=True))
        return torch.cat(out)

    return run


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def of_numpy(bank, labels, queries, k) -> Callable[[], Any]:
    def run():
        bank_DxN, out = _unit(bank).T, []
        for begin in range(0, len(queries), CHUNK):
            s_qxN = _unit(queries[begin : begin + CHUNK]) @ bank_DxN
            index_qxk = np.argpartition(s_qxN, -k, axis=1)[:, -k:]
            weight_qxk = np.exp(np.take_along_axis(s_qxN, index_qxk, axis=1) / TEMPERATURE)
            votes = [np.sum(weight_qxk * (labels[index_qxk] == c), axis=1) for c in range(CLASSES)]
            out.append(np.stack(votes, axis=1) / np.sum(weight_qxk, axis=1, keepdims=True))
        return np.concatenate(out)

    return run


def of_sklearn(bank, labels, queries, k) -> Callable[[], Any]:
    from sklearn.neighbors import KNeighborsClassifier

    def weigh(squared_qxk):  # of unit vectors: |a - b|^2 = 2 - 2 cos
        return np.exp((1 - squared_qxk / 2) / TEMPERATURE)

    # Squared distances of unit vectors have the order of cosines, and scikit-learn has a fast search for them only.
    def run():
        classifier = KNeighborsClassifier(k, weights=weigh, algorithm="brute", metric="sqeuclidean")
        return classifier.fit(_unit(bank), labels).predict_proba(_unit(queries))

    return run


MAKE = {"jaxcl": of_jaxcl, "torch": of_torch, "numpy": of_numpy, "sklearn": of_sklearn}
