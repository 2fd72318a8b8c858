"""How alike two whole images are in structure, whatever their brightness, contrast, colours, size or a crop.

An image is a thumbnail of `SIDE` x `SIDE` pixels in two greys, from which its mean is removed. A window (left, top,
width, height) is a part of an image, in shares of its sides; (0, 0, 1, 1) is all of it.

N images, n pairs, S = SIDE, R pixels a side of a comparison, W windows, P = 2 x S x S values of a thumbnail.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SIDE = 32
COARSE = 6  # side of the descriptors by which all pairs are compared first
SMALLEST = 0.7  # side of a window: a crop that leaves less than half of the area is another picture
LEAST_CONTRAST = 2.0  # standard deviation of grey values (of 255) below which an image has no structure
LEAST_CORRELATION = 0.8  # of the windows, before their parts are compared
_STRIDE = 4  # between the parts that are compared one by one, which are twice as large
_NOISE = 0.05  # variance of a part, in units of the image's, below which it is plain
_FRAME = 0.03  # of each side that does not count: there the pixels of a border or of a cut mix with the picture's
_WORST = 10  # percent of the parts
_LUMA = (0.299, 0.587, 0.114)


def windows() -> np.ndarray:
    """The parts of an image by which its crops are looked for: all of it, then crops of 8 and 17 %. [W,4]"""
    found = [(0.0, 0.0, 1.0, 1.0), (0.04, 0.04, 0.92, 0.92)]
    for side, count in ((0.92, 2), (0.83, 3)):
        places = np.linspace(0, 1 - side, count)
        found += [(x, y, side, side) for y in places for x in places]
    return np.array(found, np.float32)


def thumbnail(pixels: jax.Array) -> jax.Array:
    """Images [B,H,W,C] in [0,1] -> luma and the largest channel, uint8 [B,P].

    The largest channel (the V of HSV) does not change where hues are turned, and luma where colours are taken away.
    """
    small = jax.image.resize(pixels, (len(pixels), SIDE, SIDE, pixels.shape[-1]), "linear", antialias=True)
    luma = small @ jnp.array(_LUMA, small.dtype) if small.shape[-1] == 3 else small.mean(-1)
    greys = jnp.stack([luma, small.max(-1)], 1).reshape(len(pixels), -1)
    return jnp.round(255 * greys.clip(0, 1)).astype(jnp.uint8)


def unboxed(thumbnails_NxP: np.ndarray, aspect: np.ndarray) -> np.ndarray:
    """Thumbnails of letterboxed images, without their bars. aspect: width / height of the images, [N]."""
    out = np.empty_like(thumbnails_NxP)
    for begin in range(0, len(out), 4096):
        rows = slice(begin, begin + 4096)
        ratio = np.minimum(1.0, np.stack([aspect[rows], 1 / aspect[rows]], 1))
        window = np.concatenate([(1 - ratio) / 2, ratio], 1).astype(np.float32).repeat(2, 0)
        grey = thumbnails_NxP[rows].reshape(-1, SIDE, SIDE).astype(np.float32)
        out[rows] = np.round(sampled(grey, window, SIDE)[0]).reshape(-1, thumbnails_NxP.shape[1])
    return out


def has_structure(thumbnails_NxP: np.ndarray) -> np.ndarray:
    """Whether there is anything to compare, bool [N]: images of one colour have no structure."""
    greys = thumbnails_NxP.reshape(len(thumbnails_NxP), 2, -1)
    blocks = range(0, len(greys), 4096)
    found = [greys[i : i + 4096].astype(np.float32).std(-1).min(-1) >= LEAST_CONTRAST for i in blocks]
    return np.concatenate([np.zeros(0, bool), *found])


def descriptors(thumbnails_NxP: np.ndarray, parts: np.ndarray, *, mirrored: bool = False) -> np.ndarray:
    """Coarse pictures of windows [W,4] at mean 0 and length 1, by the largest channel; float32 [N,W,COARSE^2]."""
    grey = thumbnails_NxP.reshape(len(thumbnails_NxP), 2, SIDE, SIDE)[:, 1].astype(np.float32)
    grey = grey[..., ::-1] if mirrored else grey
    out = np.empty((len(grey), len(parts), COARSE**2), np.float32)
    for i, (x, y, w, h) in enumerate(parts.tolist()):
        out[:, i] = _unit((_means(y, h) @ grey @ _means(x, w).T).reshape(len(grey), -1))
    return out


def _means(begin: float, extent: float) -> np.ndarray:
    """Means over COARSE equal parts of a window of a row, as a matrix [COARSE,S]."""
    edges = (begin + extent * np.arange(COARSE + 1) / COARSE) * SIDE
    pixels = np.arange(SIDE)
    share = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    share = np.maximum(share, 0).astype(np.float32)
    return share / share.sum(1, keepdims=True)


class Likeness(NamedTuple):
    """Of n pairs. The window of the container looks like the whole of the other image.

    Attributes:
      score: [n] in [-1,1]; 1 for the same picture. The lower of two: the correlation of details, each part weighted by
        its contrast; and the mean similarity of the worst tenth of the parts, which a change in one place lowers.
      window: [n,4].
      second_contains: bool [n]; the window is one of the second image, otherwise of the first.
      mirrored: bool [n].
    """

    score: np.ndarray
    window: np.ndarray
    second_contains: np.ndarray
    mirrored: np.ndarray


def compare(first_nxP: np.ndarray, second_nxP: np.ndarray, stretch: np.ndarray) -> Likeness:
    """Compares pairs of thumbnails, whichever is a crop of the other one, mirrored or not.

    Args:
      first_nxP, second_nxP: thumbnails.
      stretch: [n] width / height of the second image, divided by that of the first one. A window keeps the
        proportions of what it is compared with: a picture in other proportions is no copy unless it is a crop.
    """
    found = [
        _contained(*pair, ratio.astype(np.float32))
        for pair, ratio in (((first_nxP, second_nxP), stretch), ((second_nxP, first_nxP), 1 / stretch))
    ]
    score, window, mirrored = (np.stack(values) for values in zip(*found, strict=True))
    which, n = score.argmax(0), np.arange(len(first_nxP))
    return Likeness(score[which, n], window[which, n], which == 1, mirrored[which, n])


def _contained(a_nxP: np.ndarray, b_nxP: np.ndarray, ratio: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(score [n], window [n,4] of a that looks most like all of b, whether it is mirrored [n]).

    ratio: width / height of the windows, [n].
    """
    n, parts = len(a_nxP), windows()
    whole = descriptors(b_nxP, parts[:1])[:, 0]
    alike = np.stack(
        [np.einsum("nwd,nd->nw", descriptors(a_nxP, parts, mirrored=flip), whole) for flip in (False, True)], 1
    )
    best = alike.reshape(n, -1).argmax(1)
    mirrored, place = best >= len(parts), best % len(parts)
    a, b = (x.reshape(n, 2, SIDE, SIDE).astype(np.float32) for x in (a_nxP, b_nxP))
    a = np.where(mirrored[:, None, None, None], a[..., ::-1], a)
    window = _with_ratio(parts[place], ratio)
    score = np.full(n, -1.0, np.float32)
    left = np.flatnonzero((ratio >= SMALLEST) & (ratio <= 1 / SMALLEST))
    for side, steps in ((16, 6), (SIDE, 3)):  # coarse pictures first: their correlation has fewer local maxima
        if not len(left):
            return score, window, mirrored
        window[left], correlation = _aligned(a[left], b[left], window[left], ratio[left], side, steps)
        left = left[correlation >= LEAST_CORRELATION]
    if len(left):
        frame = np.full((len(left), 4), (_FRAME, _FRAME, 1 - 2 * _FRAME, 1 - 2 * _FRAME), np.float32)
        inner = np.concatenate([window[left, :2] + _FRAME * window[left, 2:], window[left, 2:] * (1 - 2 * _FRAME)], 1)
        sides = ((sampled(a[left, c], inner, SIDE)[0], sampled(b[left, c], frame, SIDE)[0]) for c in (0, 1))
        score[left] = np.maximum(*(np.minimum(*parts_of(*pair)) for pair in sides))
    return score, window, mirrored


def _with_ratio(window: np.ndarray, ratio: np.ndarray) -> np.ndarray:
    """Windows about the same middles whose width is `ratio` times their height."""
    middle, root = window[:, :2] + window[:, 2:] / 2, np.sqrt(ratio)[:, None]
    sides = window[:, 2:] * np.concatenate([root, 1 / root], 1)
    return _inside(np.concatenate([middle - sides / 2, sides], 1), ratio)


def _inside(window: np.ndarray, ratio: np.ndarray) -> np.ndarray:
    """Windows moved and shrunk, or widened, until they are neither outside the image nor too small a part of it."""
    height = np.clip(window[:, 3], SMALLEST * np.maximum(1, 1 / ratio), np.minimum(1, 1 / ratio))
    height = np.minimum(height, np.minimum(1, 1 / ratio))
    sides = np.stack([height * ratio, height], 1)
    return np.concatenate([np.clip(window[:, :2], 0, 1 - sides), sides], 1).astype(np.float32)


def _aligned(
    a: np.ndarray, b: np.ndarray, window: np.ndarray, ratio: np.ndarray, side: int, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Windows [n,4] of images a [n,2,S,S] that look most like all of b, and their correlations [n].

    By Gauss-Newton steps on the correlation of pictures of side x side pixels, in the one of the two greys that
    correlates more where the steps begin. After Evangelidis and Psarakis, "Parametric image alignment using enhanced
    correlation coefficient maximization", 2008.
    """
    b = _shrunk(b, SIDE // side)
    begin = np.stack([_correlation(sampled(a[:, c], window, side)[0], b[:, c]) for c in (0, 1)])
    use, n = begin.argmax(0), np.arange(len(a))
    a, wanted = a[n, use], _unit(b[n, use].reshape(len(b), -1))
    best, most = window, np.full(len(a), -2.0, np.float32)
    for step in range(steps + 1):
        values, across, down = sampled(a, window, side)
        v, length = _unit(values.reshape(len(a), -1), with_length=True)
        alike = (v * wanted).sum(1)
        better = alike > most
        best, most = np.where(better[:, None], window, best), np.where(better, alike, most)
        if step < steps:
            window = _inside(window + _step(v, wanted, alike, length, across, down, ratio), ratio)
    return best, most


def _step(
    v: np.ndarray, wanted: np.ndarray, alike: np.ndarray, length: np.ndarray, across: np.ndarray, down: np.ndarray,
    ratio: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """The change of windows [n,4] that raises the correlation of v [n,R^2] with what is wanted."""
    n, side = len(v), across.shape[-1]
    place = (np.arange(side, dtype=np.float32) + 0.5) / side
    growth = across * place * ratio[:, None, None] + down * place[:, None]
    J = np.stack([across, down, growth], 1).reshape(n, 3, -1)
    J = (J - J.mean(2, keepdims=True)) / length[:, None]
    J -= (J @ v[..., None]) * v[:, None]
    H = J @ J.transpose(0, 2, 1)
    H += (0.01 * np.trace(H, axis1=1, axis2=2) / 3 + 1e-6)[:, None, None] * np.eye(3, dtype=np.float32)
    gradient = J @ (wanted - alike[:, None] * v)[..., None]
    d = np.clip(np.linalg.solve(H, gradient)[..., 0] / np.maximum(alike, 0.3)[:, None], -0.08, 0.08)
    return np.stack([d[:, 0], d[:, 1], d[:, 2] * ratio, d[:, 2]], 1)


def sampled(grey: np.ndarray, window: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Windows [n,4] of pictures [n,S,S], bilinear: values, and their derivatives by x and y, each [n,side,side]."""
    n, S, _ = grey.shape
    place = ((np.arange(side) + 0.5) / side).astype(np.float32)
    x, y = (np.clip((window[:, i, None] + window[:, 2 + i, None] * place) * S - 0.5, 0, S - 1) for i in (0, 1))
    column, row = np.minimum(x.astype(np.int32), S - 2), np.minimum(y.astype(np.int32), S - 2)
    u, v = (x - column)[:, None], (y - row)[:, :, None]
    at = (np.arange(n, dtype=np.int32)[:, None, None] * S + row[:, :, None]) * S + column[:, None]
    flat = grey.reshape(-1)
    upper, lower = flat[at], flat[at + S]
    right, below = flat[at + 1] - upper, flat[at + S + 1] - lower
    top, bottom = upper + u * right, lower + u * below
    return top + v * (bottom - top), (right + v * (below - right)) * S, (bottom - top) * S


def _shrunk(grey: np.ndarray, by: int) -> np.ndarray:
    S = grey.shape[-1]
    return grey.reshape(*grey.shape[:-2], S // by, by, S // by, by).mean((-3, -1)) if by > 1 else grey


def _unit(x: np.ndarray, with_length: bool = False):
    """Rows at mean 0 and length 1; rows without contrast are 0."""
    x = x - x.mean(-1, keepdims=True)
    length = np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-3)
    return (x / length, length) if with_length else x / length


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (_unit(a.reshape(len(a), -1)) * _unit(b.reshape(len(b), -1))).sum(1)


def parts_of(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(correlation of details [n], mean similarity of the worst tenth of the parts [n]) of pictures [n,S,S]."""
    n = len(a)
    a, b = (_unit(x.reshape(n, -1)).reshape(n, SIDE, SIDE) * SIDE for x in (a, b))
    mean_a, mean_b = _blocks(a), _blocks(b)
    var_a, var_b = (np.maximum(_blocks(x * x) - m * m, 0) for x, m in ((a, mean_a), (b, mean_b)))
    both = _blocks(a * b) - mean_a * mean_b
    weight = np.maximum(var_a, var_b)
    details = (both + _NOISE / 2) / (np.sqrt(var_a * var_b) + _NOISE / 2)
    details = (weight * details).sum(1) / np.maximum(weight.sum(1), 1e-6)
    similar = np.sort((2 * both + _NOISE) / (var_a + var_b + _NOISE), axis=1)
    return details, similar[:, : max(1, similar.shape[1] * _WORST // 100)].mean(1)


def _blocks(x: np.ndarray) -> np.ndarray:
    """Means of overlapping blocks, [n,S,S] -> [n,number of blocks]."""
    n, S, _ = x.shape
    cells = x.reshape(n, S // _STRIDE, _STRIDE, S // _STRIDE, _STRIDE).mean((2, 4))
    pairs = cells[:, 1:] + cells[:, :-1]  # a block is two by two cells
    return ((pairs[:, :, 1:] + pairs[:, :, :-1]) / 4).reshape(n, -1)
