"""Labels of two levels: the coarse class of each fine class, and sources labelled with either level.

N images, K fine classes.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxcl.data.source import ArraySource, Source
from jaxcl.errors import UserError


class Level(NamedTuple):
    """Names of the coarse classes, and the coarse class of each fine class, int32 [K]."""

    names: tuple[str, ...]
    of_class: np.ndarray


def _level(names: str | Sequence[str], of_class: str | Sequence[int]) -> Level:
    names = tuple(name.strip() for name in names.split(",")) if isinstance(names, str) else tuple(names)
    of_class = [int(c) for c in of_class.split()] if isinstance(of_class, str) else of_class
    return Level(names, np.array(of_class, np.int32))


_CIFAR100 = """
    4 1 14 8 0 6 7 7 18 3 3 14 9 18 7 11 3 9 7 11 6 11 5 10 7 6 13 15 3 15 0 11 1 10 12 14 16 9 11 5 5 19 8 8 15 13 14
    17 18 10 16 4 17 4 2 0 17 4 18 17 10 3 2 12 12 16 12 1 9 19 2 10 0 1 16 12 9 13 15 13 16 19 2 4 6 19 5 5 8 19 18 1
    2 15 6 0 17 8 14 13
"""
_CIFAR100_NAMES = """
    aquatic_mammals, fish, flowers, food_containers, fruit_and_vegetables, household_electrical_devices,
    household_furniture, insects, large_carnivores, large_man-made_outdoor_things, large_natural_outdoor_scenes,
    large_omnivores_and_herbivores, medium_mammals, non-insect_invertebrates, people, reptiles, small_mammals, trees,
    vehicles_1, vehicles_2
"""
# Classes in the order of their WordNet ids. 52 of the 67 superclasses occur.
_TINY_IMAGENET = """
    14 31 16 16 8 34 35 0 0 0 4 3 22 14 7 23 23 23 9 9 3 3 3 21 11 11 11 11 11 11 6 6 6 39 39 2 4 4 4 4 4 4 4
    4 5 5 12 30 19 37 37 37 37 37 28 28 28 37 2 61 46 53 46 41 53 45 45 47 43 53 65 45 56 52 46 62 58 41 49 62
    62 64 45 62 66 46 61 50 62 47 49 45 50 45 65 65 58 53 53 55 62 58 58 64 48 46 41 65 44 61 50 65 46 49 65
    44 65 62 58 46 46 65 62 41 45 55 55 50 50 51 47 62 60 65 46 52 62 66 60 61 53 50 53 43 46 65 60 61 60 46
    54 50 58 65 58 50 46 58 46 62 48 63 45 62 65 58 65 61 41 46 58 43 47 58 48 48 59 48 52 52 52 52 52 38 38
    18 17 17 17 17 52 52 52 52 58 58 7 58 58 27
"""
# By TFDS's name of the set. The tables come from Thanos's released code (arXiv 2204.07596), except Fashion-MNIST's,
# which is ours; the superclasses of CIFAR-100 are its authors'.
LEVELS = {
    "cifar10": _level("animals, vehicles", "1 1 0 0 0 0 0 0 1 1"),
    "cifar100": _level(_CIFAR100_NAMES, _CIFAR100),
    "mnist": _level("digits 0-4, digits 5-9", "0 0 0 0 0 1 1 1 1 1"),
    "fashion_mnist": _level("upper body, trousers, footwear, bag", "0 1 0 0 0 2 0 2 3 2"),
    "tiny_imagenet": _level([f"superclass {c}" for c in range(67)], _TINY_IMAGENET),
}


def known_level(name: str, class_names: Sequence[str]) -> Level | None:
    """The coarse level of a set of this name and these classes, None where there is no table for it."""
    level = LEVELS.get(name)
    if level is None or len(level.of_class) != len(class_names):
        return None
    # The table of Tiny ImageNet is for classes in the order of their ids.
    return None if name == "tiny_imagenet" and list(class_names) != sorted(class_names) else level


def at_level(source: Source, labels: str, *, spec: str) -> Source:
    """The source labelled with its "fine" or its "coarse" classes.

    With "coarse", `labels` and `class_names` are the coarse ones, and extras["fine"] and `fine_names` hold the fine
    ones; extras["coarse"] stays. Where extras has "cue" and "coarse_cue" (the class that the texture of an image
    indicates, -1 for none), they make extras["group"]: 2 * label, + 1 where the cue indicates another class.

    Raises:
      UserError: "coarse" for a source without coarse classes.
    """
    if labels == "coarse":
        if not source.coarse_names:
            raise UserError(
                f"{spec} has no second level of labels; use labels='fine', or an npz file with coarse_labels or a csv"
                " file with a column coarse"
            )
        source = source.coarse()
    cue = source.extras.get("cue" if labels == "fine" else "coarse_cue") if isinstance(source, ArraySource) else None
    if cue is None:
        return source
    group = np.where(source.labels >= 0, 2 * source.labels + (cue != source.labels), -1).astype(np.int32)
    names = tuple(f"{name}, {cue}" for name in source.class_names for cue in ("its own cue", "another cue"))
    return dataclasses.replace(source, extras={**source.extras, "group": group}, group_names=names)


def coarse_of_fine(fine: np.ndarray, coarse: np.ndarray, num_fine: int) -> np.ndarray:
    """The coarse class of each fine class, int32 [K]: the one most of its images have, -1 for a class without images.

    Args:
      fine, coarse: int [N] labels of the same images; rows where either is negative do not count.
      num_fine: K.
    """
    known = (fine >= 0) & (coarse >= 0)
    votes = np.zeros((num_fine, 1 + int(coarse.max(initial=0))), np.int64)
    np.add.at(votes, (fine[known], coarse[known]), 1)
    return np.where(votes.any(1), votes.argmax(1), -1).astype(np.int32)
