"""The theory of L_spread, alpha * A + (1 - alpha) * R: how far classes of free embeddings spread. NumPy only.

The setting: K balanced classes of n points each, unit vectors, equal views, true cosines, no clamp. The theory covers
the family z = sqrt(1 - t) * (vertex of the class) + sqrt(t) * (vertex of the point). At t = 0 (class collapse) each
class is one point and the classes form a regular simplex; at t = 1 the classes have no direction and the points of each
class form a regular simplex. Gradient descent on free points ends in this family. An encoder is less free: it must also
be a function of the images, and other terms may train it.
"""

import numpy as np
from numpy.typing import ArrayLike

from jaxcl.errors import UserError


def family(t: ArrayLike, K: float, n: float, tau: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # noqa: N803
    """A (`losses.attract`), R (`losses.class_conditional_infonce`) and the within-class cosine along the family.

    Args:
      t: in [0, 1], any shape; 0 is class collapse.
      K: >= 2, classes.
      n: > 1, points of a class; need not be whole (batch size / classes).
      tau: > 0, temperature.

    Returns:
      (A, R, within-class cosine 1 - t n / (n - 1)), float64, of t's shape.

    Raises:
      UserError: numbers out of range.

    References:
      Closed forms of ours, checked against the released code of Chen et al., arXiv:2204.07596.
    """
    _check(K, n, tau)
    t = np.asarray(t, np.float64)
    if not ((t >= 0) & (t <= 1)).all():
        raise UserError("family: t is outside [0, 1]; expected 0 (collapse) to 1 (classes without a direction)")
    within, across = 1 - t * n / (n - 1), -(1 - t) / (K - 1)
    others = np.log(n * (K - 1))
    a = np.logaddexp(0, others + (across - 1) / tau) + (n - 1) * np.logaddexp(0, others + (across - within) / tau)
    r = np.logaddexp(0, np.log(n - 1) + (within - 1) / tau)
    return a / n, r, within


def alpha_threshold(K: float, n: float, tau: float) -> float:  # noqa: N803
    """The lowest weight of attraction, in (0, 1), for which class collapse is the optimum within the family.

    1 / (1 + q K / (K - 1)) with q = e / (1 + e), e = n (K - 1) exp(-K / ((K - 1) tau)): there the slopes of A and R at
    collapse cancel. Arguments and errors as in `family`.
    """
    _check(K, n, tau)
    q = np.exp(-np.logaddexp(0, K / ((K - 1) * tau) - np.log(n * (K - 1))))
    return float(1 / (1 + q * K / (K - 1)))


def optimal_t(alpha: ArrayLike, K: float, n: float, tau: float) -> np.ndarray:  # noqa: N803
    """The minimum of alpha * A + (1 - alpha) * R within the family: 0 from `alpha_threshold` on, 1 for alpha = 0.

    Args:
      alpha: in [0, 1], any shape; a_lc / (a_lc + a_spread) of `losses.spread`.
      K, n, tau: as in `family`.

    Returns:
      t in [0, 1], float64 of alpha's shape, to about 1e-7.

    Raises:
      UserError: numbers out of range.
    """
    alpha = np.asarray(alpha, np.float64)
    if not ((alpha >= 0) & (alpha <= 1)).all():
        raise UserError("optimal_t: alpha is outside [0, 1]; it is a_lc / (a_lc + a_spread)")
    # There may be several minima: search a grid of the whole range, then finer grids around the best point.
    low, high = np.zeros_like(alpha), np.ones_like(alpha)
    best = low
    for points in (1001, 101, 101, 101):
        t = low[..., None] + (high - low)[..., None] * np.linspace(0, 1, points)
        a, r, _ = family(t, K, n, tau)
        least = np.argmin(alpha[..., None] * a + (1 - alpha[..., None]) * r, axis=-1)
        best = np.take_along_axis(t, least[..., None], axis=-1)[..., 0]
        step = (high - low) / (points - 1)
        low, high = np.maximum(best - step, 0), np.minimum(best + step, 1)
    return best


def _check(K: float, n: float, tau: float) -> None:  # noqa: N803
    if not (K >= 2 and n > 1 and tau > 0):
        raise UserError(
            f"the theory expects K >= 2 classes of n > 1 points and tau > 0; got K={K:g}, n={n:g}, tau={tau:g}"
        )
