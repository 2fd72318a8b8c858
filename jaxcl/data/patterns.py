"""Procedural textures: scalar fields in [0, 1] on the pixel grid, one function per texture.

N images, S pixels a side. Every function takes uniforms `u` [N, NUMBERS] in [0, 1) and returns float32 [N, S, S];
0 and 1 are the two colours of the texture. Lengths are in pixels. Edges are about one pixel soft, so nothing aliases.
"""

import numpy as np

from jaxcl.data import hashing

NUMBERS = 8  # uniforms a texture may use
TAU = np.float32(2 * np.pi)


def _span(u: np.ndarray, low: float, high: float) -> np.ndarray:
    return (low + (high - low) * u).astype(np.float32)[:, None, None]


def _grid(u: np.ndarray, size: int, angle: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates [N,S,S] turned by `angle` [N,1,1] (default: any) about a random origin."""
    angle = _span(u[:, 0], 0.0, 2 * np.pi) if angle is None else angle
    y, x = np.mgrid[:size, :size].astype(np.float32)
    x, y = x + _span(u[:, 1], 0, 64), y + _span(u[:, 2], 0, 64)
    cos, sin = np.cos(angle), np.sin(angle)
    return x * cos + y * sin, y * cos - x * sin


def _soft(signed_distance: np.ndarray) -> np.ndarray:
    """Signed distance to an edge, in pixels -> coverage."""
    return np.clip(signed_distance + 0.5, 0.0, 1.0)


def _fold(x: np.ndarray, period: np.ndarray) -> np.ndarray:
    """Distance to the nearest multiple of `period`, from 0 to period / 2."""
    return np.abs(x - period * np.rint(x / period))


def _lattice(u: np.ndarray, size: int, cells: int) -> np.ndarray:
    """Smooth value noise [N,S,S] in [0,1]: random values on a lattice, smoothstep between."""
    seeds = (u[:, 7].astype(np.float64) * 2**24).astype(np.int64)
    values = hashing.uniforms(0, 17, seeds, (cells + 1) ** 2).reshape(-1, cells + 1, cells + 1)
    t = np.arange(size) * (cells / size)
    low = t.astype(np.int64)
    fraction = (t - low).astype(np.float32)
    weight = fraction * fraction * (3 - 2 * fraction)
    spread = np.zeros((size, cells + 1), np.float32)
    spread[np.arange(size), low] = 1 - weight
    spread[np.arange(size), low + 1] = weight
    return spread @ values @ spread.T


def stripes(u, size):
    x, _ = _grid(u, size)
    period = _span(u[:, 3], 4.5, 10)
    return _soft(period * 0.25 - _fold(x, period))


def checks(u, size):
    x, y = _grid(u, size, _span(u[:, 0], -0.25, 0.25))
    period = _span(u[:, 3], 7, 13)
    column, row = _soft(period * 0.25 - _fold(x, period)), _soft(period * 0.25 - _fold(y, period))
    return column + row - 2 * column * row


def dots(u, size):
    x, y = _grid(u, size)
    period = _span(u[:, 3], 5.5, 10)
    radius = period * _span(u[:, 4], 0.26, 0.34)
    # A square lattice and its centres: a quincunx.
    near = np.minimum(
        np.hypot(_fold(x, period), _fold(y, period)),
        np.hypot(_fold(x + period / 2, period), _fold(y + period / 2, period)) + period * 0.12,
    )
    return _soft(radius - near)


def camouflage(u, size):
    return np.clip((_lattice(u, size, 6) - 0.5) * 6 + 0.5, 0, 1)


def gradient(u, size):
    angle = _span(u[:, 0], 0.0, 2 * np.pi)
    y, x = np.mgrid[:size, :size].astype(np.float32) / (size - 1) - 0.5
    along = x * np.cos(angle) + y * np.sin(angle)
    return np.clip(0.5 + along * _span(u[:, 3], 0.9, 1.2), 0, 1)


def plaid(u, size):
    x, y = _grid(u, size, _span(u[:, 0], -0.3, 0.3) + TAU / 8 * (u[:, 5] > 0.5)[:, None, None])
    period = _span(u[:, 3], 6.5, 12)
    bands = _soft(period * 0.22 - _fold(x, period)) + _soft(period * 0.22 - _fold(y, period))
    thin = np.maximum(_soft(0.5 - _fold(x + period / 2, period)), _soft(0.5 - _fold(y + period / 2, period)))
    return np.maximum(bands * 0.5, thin * 0.85)


def zigzag(u, size):
    x, y = _grid(u, size)
    period = _span(u[:, 3], 5.5, 9.5)
    wave = _fold(y, _span(u[:, 4], 7, 12))
    return _soft((period * 0.25 - _fold(x + wave, period)) * 0.8)


def rings(u, size):
    y, x = np.mgrid[:size, :size].astype(np.float32)
    radius = np.hypot(x - _span(u[:, 1], 0, size - 1), y - _span(u[:, 2], 0, size - 1))
    period = _span(u[:, 3], 4.5, 9)
    return _soft(period * 0.25 - _fold(radius + _span(u[:, 4], 0, 9), period))


def bricks(u, size):
    x, y = _grid(u, size, _span(u[:, 0], -0.2, 0.2) + TAU / 4 * (u[:, 5] > 0.5)[:, None, None])
    height = _span(u[:, 3], 4.5, 7.5)
    length = height * _span(u[:, 4], 1.8, 2.3)
    shifted = x + length / 2 * np.mod(np.floor(y / height), 2)
    return np.maximum(_soft(0.6 - _fold(y, height)), _soft(0.6 - _fold(shifted, length)))


def speckle(u, size):
    return np.clip((_lattice(u, size, 16) - 0.5) * 3.2 + 0.45, 0, 1)


def waves(u, size):
    x, y = _grid(u, size)
    period = _span(u[:, 3], 6, 11)
    bent = x + _span(u[:, 4], 1.5, 3.0) * np.sin(y * TAU / _span(u[:, 5], 10, 18))
    return 0.5 + 0.5 * np.sin(bent * TAU / period)


def rays(u, size):
    y, x = np.mgrid[:size, :size].astype(np.float32)
    dx, dy = x - _span(u[:, 1], 0, size - 1), y - _span(u[:, 2], 0, size - 1)
    count = 4 + np.floor(_span(u[:, 3], 0, 5))
    turn = np.arctan2(dy, dx) * count + _span(u[:, 0], 0, 6.28)
    return _soft(np.sin(turn) * (np.hypot(dx, dy) + 1) / count)


def triangles(u, size):
    x, y = _grid(u, size)
    period = _span(u[:, 3], 7, 12)
    up = np.mod(y, period)
    return _soft((up / 2 - _fold(x, period)) * 0.9)


def marble(u, size):
    x, _ = _grid(u, size)
    return 0.5 + 0.5 * np.sin((x + 11 * _lattice(u, size, 5)) * TAU / _span(u[:, 3], 7, 12))


def plain(u, size):
    return np.zeros((len(u), size, size), np.float32)


# Ten, one for every fine class; the next four occur in the shifted test split only.
FAMILIAR = (stripes, checks, dots, camouflage, gradient, plaid, zigzag, rings, bricks, speckle)
UNSEEN = (waves, rays, triangles, marble)
ALL = (*FAMILIAR, *UNSEEN, plain)
NAMES = tuple(f.__name__ for f in ALL)
PLAIN = NAMES.index("plain")


def draw(texture: np.ndarray, u: np.ndarray, size: int) -> np.ndarray:
    """One texture per image: `texture` int [N] into ALL, `u` [N, NUMBERS] -> float32 [N, S, S]."""
    field = np.empty((len(texture), size, size), np.float32)
    for t in np.unique(texture):
        rows = np.flatnonzero(texture == t)
        field[rows] = ALL[t](u[rows], size)
    return field
