"""Worst-group accuracy: hidden groups found by clustering features, and a classifier that is robust over them.

The protocol is ours, after GEORGE (Sohoni et al. 2020, arXiv 2011.12945), with principal components instead of UMAP.
Chen et al. 2022 (arXiv 2204.07596) follow GEORGE too, but their code does not contain this evaluation.

N rows, D features, C classes, G groups, M rows of each group in a step.
"""

import functools
import itertools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike

from jaxcl.data.selection import hold_out
from jaxcl.errors import UserError
from jaxcl.evaluate.base import Evaluator, Metric, Metrics, NotApplicable, Panels
from jaxcl.evaluate.context import EvalContext
from jaxcl.evaluate.linear_probe import LinearFit, moments, probe_logits, rescaled_columns
from jaxcl.evaluate.rows import check_finite
from jaxcl.losses import cross_entropy
from jaxcl.losses.labels import class_numbers

# Standard deviation, as a share of the largest value, below which a feature is constant.
MIN_STD = 1e-6

METHODS = ("gmm", "kmeans")
# The choices of `robust_probe`. With eta 0 the groups have constant weights: it only balances them by sampling.
ETAS, PENALTIES = (0.0, 0.01), (1e-3, 1e-2, 1e-1)
FITTED_ROWS = 2000  # of a class, at most: the cost of silhouettes is quadratic


def find_groups(
    features: np.ndarray,
    labels: np.ndarray,
    *,
    method: str = "gmm",
    dims: int = 4,
    max_clusters: int = 8,
    overcluster: int = 3,
    seed: int = 0,
) -> np.ndarray:
    """Finds pseudo-groups: clusters of the features within each class; the silhouette score chooses their number.

    For each class: scale the features to mean 0 and standard deviation 1, take their first `dims` principal
    components, cluster them into 2 to `max_clusters` clusters, and keep the clustering with the best mean silhouette.
    Then cluster into `overcluster` times as many: a smaller cluster becomes a separate group if the mean silhouette of
    its points is better in it than in the larger one. In a class of more than 2,000 rows, 2,000 random rows are
    clustered and the others assigned.

    Args:
      features: [N, D].
      labels: [N] int; a row with a negative label is in no group.
      method: "gmm", a Gaussian mixture with full covariances, or "kmeans".
      dims: >= 1, the most principal components.
      max_clusters: >= 2, the most clusters of a class before the second clustering.
      overcluster: >= 1; 1: no second clustering.
      seed: for the clusterings and the random rows.

    Returns:
      int32 [N], groups numbered from 0, each within one class; -1 for unlabelled rows. A class with fewer than ten
      rows, or with equal points only, is one group.

    Raises:
      UserError: an unknown method, numbers out of range, shapes that do not match, a labelled row that is not finite.
    """
    features, labels = np.asarray(features, np.float64), np.asarray(labels)
    _check_rows("find_groups", features, labels)
    check_finite("find_groups: features", features, labels >= 0)
    if method not in METHODS:
        raise UserError(f"find_groups: method={method!r}, expected one of {', '.join(METHODS)}")
    if dims < 1 or max_clusters < 2 or overcluster < 1:
        raise UserError(
            f"find_groups: dims={dims}, max_clusters={max_clusters}, overcluster={overcluster}; "
            "expected at least 1, 2 and 1"
        )
    from threadpoolctl import threadpool_limits  # a dependency of scikit-learn

    groups, count = np.full(len(labels), -1, np.int32), 0
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of mixtures that stop early; the silhouette decides
        for c in np.unique(labels[labels >= 0]):
            rows = np.flatnonzero(labels == c)
            _, own = np.unique(
                _clusters(features[rows], method, dims, max_clusters, overcluster, seed), return_inverse=True
            )
            groups[rows] = count + own
            count += 1 + own.max()
    return groups


def _clusters(
    features: np.ndarray, method: str, dims: int, max_clusters: int, overcluster: int, seed: int
) -> np.ndarray:
    """The cluster of each row of a class, int [n]."""
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.metrics import silhouette_samples
    from sklearn.mixture import GaussianMixture

    std = features.std(0)
    varies = std > MIN_STD * np.abs(features).max(0)
    one = np.zeros(len(features), np.int64)
    if len(features) < 10 or not varies.any():
        return one
    scaled = (features[:, varies] - features[:, varies].mean(0)) / std[varies]
    pca = PCA(min(dims, *scaled.shape), svd_solver="full", random_state=seed)
    fitted = np.arange(len(scaled))
    if len(fitted) > FITTED_ROWS:
        fitted = np.sort(np.random.default_rng(seed).permutation(len(fitted))[:FITTED_ROWS])
    pca.fit(scaled[fitted])
    points = pca.transform(scaled)
    some = points[fitted]

    def cluster(k: int) -> tuple[np.ndarray, np.ndarray]:
        """-> (cluster of every row, silhouettes of the fitted rows)."""
        model = KMeans(k, n_init=4, random_state=seed) if method == "kmeans" else GaussianMixture(k, random_state=seed)
        found = model.fit(some).predict(points)
        alone = len(np.unique(found[fitted])) < 2
        return found, np.full(len(some), -1.0) if alone else silhouette_samples(some, found[fitted])

    distinct = len(np.unique(some, axis=0))
    tried = [cluster(k) for k in range(2, min(max_clusters, distinct - 1) + 1)]
    if not tried:
        return one
    found, silhouette = max(tried, key=lambda t: t[1].mean())
    small = min(overcluster * len(np.unique(found)), distinct - 1)
    if overcluster == 1 or small <= len(np.unique(found)):
        return found
    finer, finer_silhouette = cluster(small)
    cut = found.copy()
    for k in np.unique(finer[fitted]):
        own = finer[fitted] == k
        if own.sum() > 1 and finer_silhouette[own].mean() > silhouette[own].mean():
            cut[finer == k] = max_clusters + k
    return cut


def group_dro(
    features: ArrayLike,
    labels: ArrayLike,
    groups: ArrayLike,
    *,
    num_classes: int,
    eta: float = 0.01,
    l2: float = 1e-3,
    steps: int = 2000,
    batch_size: int = 256,
    learning_rate: float = 0.01,
    seed: int = 0,
) -> LinearFit:
    """Fits a linear classifier to the worst group: group distributionally robust optimisation.

    A step draws the same number of rows from every group, with replacement. Group weights become
    q_g <- q_g exp(eta * loss_g), scaled to sum 1; then Adam takes a step on sum_g q_g loss_g + l2 / 2 * |weights|^2.
    Its rate falls to 0 along a cosine. Features are scaled to mean 0 and standard deviation 1. Deterministic.

    Args:
      features: [N, D], any float type; computed in float32 at least.
      labels: [N] int in [0, num_classes).
      groups: [N] int, any values; rows with a negative group or label do not count.
      num_classes: C.
      eta: >= 0, step size of the group weights; 0: all groups keep the same weight.
      l2: >= 0.
      steps: >= 1.
      batch_size: rows of a step, divided among the groups, at least one for each.
      learning_rate: > 0, the initial one.
      seed: for the rows drawn.

    Returns:
      LinearFit, for features that are not scaled.

    Raises:
      UserError: shapes that do not match, no row with a label and a group, numbers out of range, a label that is no
        class, a row that is not finite.

    References:
      Sagawa et al. 2020, arXiv 1911.08731, algorithm 1.
    """
    features, labels, groups = (np.asarray(x) for x in (features, labels, groups))
    _check_rows("group_dro", features, labels, groups)
    if eta < 0 or l2 < 0 or steps < 1 or batch_size < 1 or not learning_rate > 0:
        raise UserError(
            f"group_dro: eta={eta}, l2={l2}, steps={steps}, batch_size={batch_size}, learning_rate={learning_rate}; "
            "expected eta and l2 from 0, the others above 0"
        )
    known = (labels >= 0) & (groups >= 0)
    if not known.any():
        raise UserError("group_dro: no row has a label and a group, expected at least one")
    class_numbers("group_dro", labels, num_classes)
    check_finite("group_dro: features", features, known)
    features, labels, groups = features[known], labels[known], groups[known]
    by_group = np.argsort(groups, kind="stable")
    _, count_G = np.unique(groups, return_counts=True)
    return _dro(
        jnp.asarray(features)[by_group],
        jnp.asarray(labels)[by_group],
        jnp.asarray(count_G),
        eta,
        l2,
        learning_rate,
        seed,
        num_classes=num_classes,
        steps=steps,
        per_group=max(1, batch_size // len(count_G)),
    )


def robust_probe(
    features: ArrayLike, labels: ArrayLike, groups: ArrayLike, *, num_classes: int, seed: int = 0
) -> tuple[LinearFit, dict[str, float]]:
    """`group_dro` with the eta and l2 that give the best worst-group accuracy on held-out rows.

    A fifth of each group is held out to choose eta and l2, the first of ETAS x PENALTIES among equals; the choice is
    then fitted to all rows. Only the given groups count: with pseudo-groups, the true groups are never used.

    Args:
      features, labels, groups, num_classes, seed: as in `group_dro`.

    Returns:
      (the probe, {"eta", "l2"}).

    Raises:
      UserError: as in `group_dro`.
    """
    features, labels, groups = (np.asarray(x) for x in (features, labels, groups))
    _check_rows("robust_probe", features, labels, groups)
    held = hold_out(groups, 0.2, seed=seed)
    options = dict(num_classes=num_classes, seed=seed)
    best, chosen = -1.0, dict(eta=ETAS[0], l2=PENALTIES[0])
    for eta, l2 in itertools.product(ETAS, PENALTIES):
        probe = group_dro(features[~held], labels[~held], groups[~held], eta=eta, l2=l2, **options)
        predicted = np.asarray(probe_logits(probe, features[held])).argmax(-1)
        if (worst := group_accuracies(predicted, labels[held], groups[held])["worst"]) > best:
            best, chosen = worst, dict(eta=eta, l2=l2)
    return group_dro(features, labels, groups, **chosen, **options), chosen


@functools.partial(jax.jit, static_argnames=("num_classes", "steps", "per_group"))
def _dro(x_NxD, labels_N, count_G, eta, l2, rate, seed, *, num_classes, steps, per_group):
    """`group_dro` on rows that are sorted by group."""
    dtype = jnp.promote_types(x_NxD.dtype, jnp.float32)
    x_NxD = x_NxD.astype(dtype)
    x_NxD, scale_D = rescaled_columns(x_NxD)
    mean_D, std_D = moments(x_NxD, jnp.ones(len(x_NxD), bool))
    x_NxD = (x_NxD - mean_D) / std_D
    num_groups, (_, num_features) = len(count_G), x_NxD.shape
    first_G = jnp.cumsum(count_G) - count_G
    tx = optax.adam(optax.cosine_decay_schedule(rate, steps))
    start = LinearFit(jnp.zeros((num_features, num_classes), dtype), jnp.zeros(num_classes, dtype))

    def step(carry, key):
        probe, state, log_q_G = carry
        rows_GxM = first_G[:, None] + jax.random.randint(key, (num_groups, per_group), 0, count_G[:, None])
        x_GxMxD, labels_GxM = x_NxD[rows_GxM], labels_N[rows_GxM]

        def objective(probe):
            loss_G = jax.vmap(lambda x, y: cross_entropy(probe_logits(probe, x), y))(x_GxMxD, labels_GxM)
            log_q = jax.nn.log_softmax(log_q_G + eta * lax.stop_gradient(loss_G))
            return jnp.sum(jnp.exp(log_q) * loss_G) + 0.5 * l2 * jnp.sum(probe.weights**2), log_q

        (_, log_q_G), grads = jax.value_and_grad(objective, has_aux=True)(probe)
        updates, state = tx.update(grads, state, probe)
        return (optax.apply_updates(probe, updates), state, log_q_G), None

    even_G = jnp.zeros(num_groups, dtype)  # scaled to sum 1 in the first step
    (probe, _, _), _ = lax.scan(step, (start, tx.init(start), even_G), jax.random.split(jax.random.key(seed), steps))
    weights = probe.weights / std_D[:, None]
    return LinearFit(weights / scale_D[:, None], probe.bias - mean_D @ weights)


def group_accuracies(predicted: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
    """Accuracy over all rows, in the worst group, and in each group.

    Args:
      predicted, labels: int [N]; rows with a negative label or group do not count.
      groups: int [N].

    Returns:
      {"average", "worst"} in [0, 1], NaN without rows, and "by_group" {group: accuracy}.

    Raises:
      UserError: shapes that do not match.
    """
    predicted, labels, groups = (np.asarray(x) for x in (predicted, labels, groups))
    if predicted.ndim != 1 or not predicted.shape == labels.shape == groups.shape:
        raise UserError(
            f"group_accuracies: shapes {predicted.shape}, {labels.shape} and {groups.shape}, "
            "expected [rows] three times"
        )
    known = (labels >= 0) & (groups >= 0)
    right, groups = (predicted == labels)[known], groups[known]
    by_group = {int(g): float(right[groups == g].mean()) for g in np.unique(groups)}
    nan = float("nan")
    return {
        "average": float(right.mean()) if len(right) else nan,
        "worst": min(by_group.values(), default=nan),
        "by_group": by_group,
    }


def cluster_quality(pseudo: np.ndarray, true: np.ndarray) -> dict[str, Any]:
    """How well pseudo-groups match the true groups; each true group is matched with at most one of them.

    The matching has the largest sum of F1 scores (Hungarian method); a true group without a match scores 0.

    Args:
      pseudo, true: int [N]; rows where either is negative do not count.

    Returns:
      {"precision", "recall", "f1"}: means over the true groups, in [0, 1], NaN without rows; "by_group": {true group:
      {"precision", "recall", "f1", "pseudo": its match, or -1}}.

    Raises:
      UserError: shapes that do not match.
    """
    from scipy.optimize import linear_sum_assignment

    pseudo, true = np.asarray(pseudo), np.asarray(true)
    if pseudo.ndim != 1 or pseudo.shape != true.shape:
        raise UserError(f"cluster_quality: shapes {pseudo.shape} and {true.shape}, expected [rows] twice")
    known = (pseudo >= 0) & (true >= 0)
    pseudo_names, p = np.unique(pseudo[known], return_inverse=True)
    true_names, t = np.unique(true[known], return_inverse=True)
    shared = np.zeros((len(true_names), len(pseudo_names)))
    np.add.at(shared, (t, p), 1)
    sizes, found = shared.sum(1), shared.sum(0)
    f1 = 2 * shared / np.maximum(sizes[:, None] + found, 1)
    match = dict(zip(*linear_sum_assignment(f1, maximize=True), strict=True))
    by_group = {}
    for i, name in enumerate(true_names):
        j = match.get(i)
        # A match without common rows is no match.
        scores = (0.0, 0.0, 0.0, -1)
        if j is not None and shared[i, j]:
            scores = (shared[i, j] / found[j], shared[i, j] / sizes[i], f1[i, j], pseudo_names[j])
        by_group[int(name)] = dict(zip(("precision", "recall", "f1"), map(float, scores[:3]), strict=True))
        by_group[int(name)]["pseudo"] = int(scores[3])
    means = {
        k: np.mean([g[k] for g in by_group.values()]) if by_group else np.nan for k in ("precision", "recall", "f1")
    }
    return {k: float(v) for k, v in means.items()} | {"by_group": by_group}


def _check_rows(what: str, features: np.ndarray, *columns: np.ndarray) -> None:
    if features.ndim != 2 or any(c.shape != (len(features),) for c in columns):
        shapes = ", ".join(str(c.shape) for c in columns)
        raise UserError(
            f"{what}: features of shape {features.shape} and {shapes}, expected [rows, features] and [rows]"
        )


class WorstGroup(Evaluator):
    """Accuracy on the worst true group of the test images, with and without robust training of the last layer.

    Metrics, "NAME_worst" and "NAME_average" each: "erm", the linear probe; "dro", `robust_probe` on the groups that
    `find_groups` finds in the training features, without the true ones; "oracle", `robust_probe` on the true groups of
    the training images, an upper bound for better clusters. "cluster_...": how well found and true groups match.
    """

    needs_labels = ("train", "test")
    features_only = True
    metrics = {
        "dro_worst": Metric(
            "Worst group, robust",
            meaning="accuracy on the worst true group, of a probe that is robust over groups found by clustering",
        ),
        "erm_worst": Metric("Worst group", meaning="accuracy on the worst true group, of the linear probe"),
        "cluster_f1": Metric("Found groups, F1", meaning="how well the groups found by clustering match the true ones"),
    }

    def __call__(self, context: EvalContext) -> tuple[Metrics, Panels]:
        train, source = context.source("train"), context.test
        if not all((s.extras.get("group", np.array([-1])) >= 0).any() for s in (train, source)):
            raise NotApplicable(
                "the data has no groups (those with some: spurious garments, waterbirds, celeb_a, npz, csv)"
            )
        features, test = context.features("train"), context.features("test")
        pseudo = find_groups(features, train.labels, seed=context.recipe.seed)
        options = dict(num_classes=context.num_classes, seed=context.recipe.seed)
        probes, metrics, by_group = {"erm": context.fitted_probe()}, {}, {}
        for name, groups in (("dro", pseudo), ("oracle", train.extras["group"])):
            probes[name], chosen = robust_probe(features, train.labels, groups, **options)
            metrics |= {f"{name}_{k}": v for k, v in chosen.items()}
        for name, probe in probes.items():
            predicted = np.asarray(probe_logits(probe, test)).argmax(-1)
            accuracies = group_accuracies(predicted, source.labels, source.extras["group"])
            metrics |= {f"{name}_worst": accuracies["worst"], f"{name}_average": accuracies["average"]}
            for group, value in accuracies["by_group"].items():
                by_group.setdefault(source.group_names[group], {})[name] = value
        quality = cluster_quality(pseudo, train.extras["group"])
        metrics |= {f"cluster_{k}": quality[k] for k in ("precision", "recall", "f1")}
        return metrics | {"groups_found": int(pseudo.max() + 1), "by_group": by_group}, {}
