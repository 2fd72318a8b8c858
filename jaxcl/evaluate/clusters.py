"""Groups of images that are alike to the encoder, and images that are like no other; needs no labels.

N images, D features, G groups.
"""

import warnings

import numpy as np

from jaxcl.errors import UserError
from jaxcl.evaluate.all_images import AllImages
from jaxcl.evaluate.base import Evaluator, Metric, Metrics, NotApplicable, Panels
from jaxcl.evaluate.context import EvalContext, EvalSetup
from jaxcl.evaluate.knn import nearest_neighbours
from jaxcl.evaluate.rows import normalized

FEWEST, MOST = 2, 48  # groups, where their number is not given
SAMPLE = 2000  # images that the components and the silhouette are computed of
BANK = 20_000  # images among which the nearest ones are looked for
NEAREST = 5  # by which an image is odd
COMPONENTS = 50  # principal components of the features that are clustered
PICTURED, GROUPS, ODD = 8, 48, 16  # images of a group in the report; groups there; odd images


class Clusters(Evaluator):
    """Groups by k-means on the features, scaled to unit length and reduced to 50 principal components.

    The number of groups is `eval.clusters`, or `usual_count`. How odd an image is: 1 less the mean cosine to the five
    images nearest to it. The report has the images nearest to the centre
    of each group, the oddest ones, and a file with the group of every image.

    Metrics: "count", number of groups; "silhouette", in [-1, 1]; "largest", the share of the images in the largest
    group; "nmi", normalised mutual information of groups and classes, where labels are known; "odd", names and figures
    of the oddest images.
    """

    metrics = {
        "count": Metric("Groups", "", percent=False, meaning="groups of images that are alike to the encoder"),
        "nmi": Metric("Groups and classes", percent=False, meaning="normalised mutual information, 1 for the same"),
    }

    def check(self, setup: EvalSetup) -> None:
        if setup.options.clusters < 0 or setup.options.clusters == 1:
            raise UserError(f"eval.clusters is {setup.options.clusters}; expected at least 2 groups, or 0 to choose")

    def __call__(self, context: EvalContext) -> tuple[Metrics, Panels]:
        both = AllImages(context)
        features_NxD = normalized(both.features(context))
        if len(both) < 6:
            raise NotApplicable(f"{len(both)} images are too few for groups")
        group_N, apart_N, silhouette = clusters(features_NxD, context.options.clusters)
        odd_N, nearest_N = oddness(features_NxD)
        sizes_G = np.bincount(group_N)
        oddest = np.argsort(-odd_N, kind="stable")[:ODD]
        metrics = {
            "count": len(sizes_G),
            "silhouette": silhouette,
            "largest": float(sizes_G.max() / len(both)),
            "odd": [{"image": both.name(i), "odd": float(odd_N[i])} for i in oddest],
        }
        known_N = both.labels >= 0
        if known_N.any():
            from sklearn.metrics import normalized_mutual_info_score  # late: slow to import

            metrics["nmi"] = float(normalized_mutual_info_score(both.labels[known_N], group_N[known_N]))

        members = [np.flatnonzero(group_N == g) for g in range(len(sizes_G))]
        shown = [rows[np.argsort(apart_N[rows], kind="stable")][:PICTURED] for rows in members[:GROUPS]]
        columns = ("file", "split", "class", "group", "distance_to_centre", "odd", "nearest")
        rows = (
            (both.name(i), both.split(i), both.class_name(both.labels[i]), int(group_N[i]) + 1)
            + (f"{apart_N[i]:.4f}", f"{odd_N[i]:.4f}", both.name(nearest_N[i]))
            for i in range(len(both))
        )
        panels = {
            "clusters": {
                "images": [both.images(rows) for rows in shown],
                "names": [[both.name(i) for i in rows] for rows in shown],
                "sizes": sizes_G[: len(shown)].tolist(),
                "more": len(sizes_G) - len(shown),
            },
            "odd": {"images": both.images(oddest), "names": [both.name(i) for i in oddest], "odd": odd_N[oddest]},
            "map": {"groups": (group_N[both.mapped()] + 1).tolist()},
            "table": {"columns": columns, "rows": list(rows)},
        }
        return metrics, panels


def usual_count(images: int) -> int:
    """The number of groups of so many images: the square root of half of them, from 2 to 48.

    The silhouette would choose, but for features of images it mostly falls from 2 groups on, and two are no help.
    """
    return min(max(round((images / 2) ** 0.5), FEWEST), MOST)


def clusters(features_NxD: np.ndarray, count: int = 0) -> tuple[np.ndarray, np.ndarray, float]:
    """Groups of features, the largest first.

    Args:
      features_NxD: at unit length; at least 6.
      count: number of groups, at most N - 1; 0: `usual_count`.

    Returns:
      (group of each [N], numbered from 0; its distance to the centre of the group [N]; the mean silhouette, of a
      sample).

    References:
      Rousseeuw, "Silhouettes: a graphical aid to the interpretation and validation of cluster analysis", 1987.
    """
    # late: slow to import
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.decomposition import PCA
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.metrics import silhouette_score
    from threadpoolctl import threadpool_limits

    N = len(features_NxD)
    few = np.sort(np.random.default_rng(0).permutation(N)[:SAMPLE])
    components = min(COMPONENTS, len(few), features_NxD.shape[1])
    # One thread: on a busy machine, threads that wait for each other make this many times slower.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct images than groups
        pca = PCA(components, svd_solver="randomized", random_state=0).fit(features_NxD[few])
        x = pca.transform(features_NxD).astype(np.float32)

        kind = KMeans if N <= 10 * SAMPLE else MiniBatchKMeans
        found = kind(min(count, N - 1) or usual_count(N), n_init=4, random_state=0).fit(x)
        labels_few = found.labels_[few]
        distinct = len(np.unique(labels_few))
        silhouette = float(silhouette_score(x[few], labels_few)) if 2 <= distinct < len(few) else -1.0
    sizes = np.bincount(found.labels_, minlength=len(found.cluster_centers_))
    order = np.argsort(-sizes, kind="stable")
    order = order[sizes[order] > 0]
    place = np.empty(len(sizes), np.int64)
    place[order] = np.arange(len(order))
    return place[found.labels_], np.linalg.norm(x - found.cluster_centers_[found.labels_], axis=1), silhouette


def oddness(features_NxD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(1 less the mean cosine to the nearest others [N], the row of the nearest one [N]); features at unit length.

    Of many images, the nearest ones are looked for in a seeded sample of `BANK` of them.
    """
    N = len(features_NxD)
    bank = np.sort(np.random.default_rng(0).permutation(N)[:BANK])
    cosine, rows = map(np.asarray, nearest_neighbours(features_NxD[bank], features_NxD, k=min(NEAREST + 1, len(bank))))
    rows = bank[rows]
    own = rows == np.arange(N)[:, None]
    # An image that is not among its nearest ones (copies of it push it out, or it is not in the bank): leave the last.
    own[~own.any(1), -1] = True
    others = ~own
    shape = (N, rows.shape[1] - 1)
    return 1 - cosine[others].reshape(shape).mean(1), rows[others].reshape(shape)[:, 0]
