"""Near-duplicates: images that are there more than once, as other files. Neither labels nor an encoder are needed.

Found: other sizes, compressions, crops to 80 % of the sides, borders, mirrors and recoloured copies. N images, P values
of a thumbnail, k candidates of each image.
"""

import heapq
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from jaxcl.evaluate import structure
from jaxcl.runtime.cores import usable_cores

# Of two images that count as near-duplicates, by default. Of 400 altered copies of CIFAR-10's training images all but
# none have more than 0.8, and of 2,000 of these images all pairs that are no copies by eye have less than 0.55.
LEAST_SCORE = 0.7
CANDIDATES = 12  # images that each image is compared with in detail
COARSELY_ALIKE = 0.75  # correlation of coarse pictures below which nothing is compared in detail
MOST_COMPARED = 2_000_000  # pairs inside groups; beyond it `complete` is False
_QUERIES, _BANK, _PAIRS = 64, 4096, 256  # rows in memory at one time


class Pair(NamedTuple):
    """Two images that are nearly the same, first < second.

    Attributes:
      score: in [0,1], 1 for the same picture; as of `structure.Likeness`.
      mirrored: one is the mirror image of the other.
      part: side of the picture that both show, as a share of the larger one; below 1 for a crop or a border.
    """

    first: int
    second: int
    score: float
    mirrored: bool = False
    part: float = 1.0


class Found(NamedTuple):
    """Near-duplicates.

    Attributes:
      groups: sets of images that are all near-duplicates of each other (complete linkage), the largest first; an image
        is in one of them at most. Images with the same thumbnail are near-duplicates without a comparison.
      pairs: of images that differ. Every image of a group forms a pair with the first of each other thumbnail in it.
      complete: no pair was left out for its number.
      twin: the first image with the same thumbnail, for each image, int64 [N]; `pairs` are of these.
    """

    groups: list[list[int]]
    pairs: list[Pair]
    complete: bool
    twin: np.ndarray


def near_duplicates(
    thumbnails_NxP: np.ndarray, aspect: np.ndarray | None = None, *, least: float = LEAST_SCORE
) -> Found:
    """The near-duplicates among images.

    Every pair is compared coarsely, as a whole, mirrored and as a crop; the `CANDIDATES` most similar images of each
    image are compared in detail. Pairs that are then connected by others are compared, too.

    Args:
      thumbnails_NxP: from `structure.thumbnail`, uint8, of whole images.
      aspect: width / height of the images before they became squares, [N]; None: all the same.
      least: the least score.
    """
    N = len(thumbnails_NxP)
    if not N:
        return Found([], [], True, np.arange(0))
    aspect = np.ones(N) if aspect is None else np.asarray(aspect, np.float64)
    same = _identical(thumbnails_NxP, aspect)
    first, twin = np.array([rows[0] for rows in same], np.int64), np.arange(N)
    for rows in same:
        twin[rows] = rows[0]
    x, aspect = thumbnails_NxP[first], aspect[first]
    candidates = _candidates(x, aspect)
    pairs = list(_confirmed(x, aspect, candidates, least))
    more, complete = _inside_groups(pairs, set(map(tuple, candidates.tolist())))
    pairs += _confirmed(x, aspect, more, least)
    linked = complete_linkage(pairs)
    alone = set(range(len(same))).difference(*linked)
    groups = [sorted(i for node in group for i in same[node]) for group in linked]
    groups += [same[node] for node in alone if len(same[node]) > 1]
    named = [p._replace(first=int(first[p.first]), second=int(first[p.second])) for p in pairs]
    return Found(
        sorted(groups, key=lambda g: (-len(g), g)),
        sorted(named, key=lambda p: (-p.score, p.first, p.second)),
        complete,
        twin,
    )


def _identical(x: np.ndarray, aspect: np.ndarray) -> list[list[int]]:
    """Rows by thumbnail and, to a percent, proportions; in the order of their first rows."""
    rows: dict[tuple[bytes, int], list[int]] = {}
    for i, percent in enumerate(np.round(100 * np.log(aspect)).astype(int).tolist()):
        rows.setdefault((x[i].tobytes(), percent), []).append(i)
    return list(rows.values())


def _candidates(x: np.ndarray, aspect: np.ndarray) -> np.ndarray:
    """Pairs [n,2] (first < second) of which one is among the most similar ones of the other, coarsely."""
    rows = np.flatnonzero(structure.has_structure(x))
    parts, k = structure.windows(), min(CANDIDATES, len(rows) - 1)
    if k < 1:
        return np.zeros((0, 2), np.int64)
    bank = np.concatenate(
        [structure.descriptors(x[b], parts[:1])[:, 0] for b in np.array_split(rows, -(-len(rows) // 4096))]
    )
    found = []
    for begin in range(0, len(rows), _QUERIES):
        chosen = rows[begin : begin + _QUERIES]
        queries = [structure.descriptors(x[chosen], parts), structure.descriptors(x[chosen], parts[:1], mirrored=True)]
        queries = np.concatenate(queries, 1).transpose(1, 0, 2)  # [windows, queries, values]
        count, flat = queries.shape[1], queries.reshape(-1, queries.shape[2])
        value, index = np.full((count, k), -2.0, np.float32), np.zeros((count, k), np.int64)
        for other in range(0, len(bank), _BANK):
            block = bank[other : other + _BANK]
            alike = (flat @ block.T).reshape(len(queries), count, -1).max(0)
            own = np.arange(begin, begin + count) - other
            here = (own >= 0) & (own < len(block))
            alike[np.flatnonzero(here), own[here]] = -2
            if other and not (alike.max(1) > value.min(1)).any():
                continue
            alike = np.concatenate([value, alike], 1)
            which = np.argpartition(-alike, k - 1, axis=1)[:, :k]
            value = np.take_along_axis(alike, which, 1)
            old = np.take_along_axis(index, np.minimum(which, k - 1), 1)
            index = np.where(which < k, old, which - k + other)
        r, c = np.nonzero(value >= COARSELY_ALIKE)
        found.append(np.stack([chosen[r], rows[index[r, c]]], 1))
    pairs = np.sort(np.concatenate(found), axis=1)
    stretch = np.abs(np.log(aspect[pairs[:, 0]] / aspect[pairs[:, 1]]))
    return np.unique(pairs[stretch <= -np.log(structure.SMALLEST)], axis=0)


def _confirmed(x: np.ndarray, aspect: np.ndarray, pairs: np.ndarray, least: float) -> Iterator[Pair]:
    """Those of the pairs [n,2] that have the least score, in their order."""

    def look(block: np.ndarray) -> list[Pair]:
        i, j = block.T
        found = structure.compare(x[i], x[j], aspect[j] / aspect[i])
        part = found.window[:, 2:].max(1)
        return [
            Pair(int(i[r]), int(j[r]), min(1.0, float(found.score[r])), bool(found.mirrored[r]), float(part[r]))
            for r in np.flatnonzero(found.score >= least)
        ]

    blocks = (pairs[b : b + _PAIRS] for b in range(0, len(pairs), _PAIRS))
    with ThreadPoolExecutor(usable_cores()) as pool:
        for some in pool.map(look, blocks):
            yield from some


def _inside_groups(pairs: Sequence[Pair], tested: set[tuple[int, int]]) -> tuple[np.ndarray, bool]:
    """(pairs [n,2] that others connect and that were not tested; whether these are all of them)."""
    label: dict[int, int] = {}

    def root(i: int) -> int:
        while label.setdefault(i, i) != i:
            label[i] = label[label[i]]
            i = label[i]
        return i

    for pair in pairs:
        a, b = sorted((root(pair.first), root(pair.second)))
        label[b] = a
    members: dict[int, list[int]] = {}
    for i in sorted(label):
        members.setdefault(root(i), []).append(i)
    every = (p for m in members.values() for p in itertools.combinations(m, 2) if p not in tested)
    found = list(itertools.islice(every, MOST_COMPARED + 1))
    return np.array(found[:MOST_COMPARED], np.int64).reshape(-1, 2), len(found) <= MOST_COMPARED


def complete_linkage(pairs: Sequence[Pair]) -> list[list[int]]:
    """Groups of images of which every two form a pair, by agglomeration.

    The two groups are joined whose least score between them is the largest, as long as all their images form pairs;
    of equal ones, those with the lower numbers.

    Returns:
      groups of two and more, each ascending, in the order of their first images.
    """
    near: dict[int, dict[int, float]] = {}
    heap = []
    for p in pairs:
        near.setdefault(p.first, {})[p.second] = near.setdefault(p.second, {})[p.first] = p.score
        heap.append((-p.score, p.first, p.second))
    heapq.heapify(heap)
    members = {i: [i] for i in near}
    while heap:
        score, a, b = heapq.heappop(heap)
        if a not in near or near[a].get(b) != -score:
            continue  # of a group that has grown since
        joined = {c: min(v, near[b][c]) for c, v in near[a].items() if c != b and c in near[b]}
        for group in (a, b):
            for c in near.pop(group):
                near[c].pop(group, None) if c in near else None
        members[a] = sorted(members[a] + members.pop(b))
        near[a] = joined
        for c, v in joined.items():
            near[c][a] = v
            heapq.heappush(heap, (-v, *sorted((a, c))))
    return sorted(group for group in members.values() if len(group) > 1)
