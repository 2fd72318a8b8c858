"""The stage ladder: the options of the random view of each stage of a network, from the first to the last.

In the mode "addone" the last rung has all types of augmentation and each rung below has one type less, because earlier
stages should learn fewer invariances. The types are added in the given order, which differs from the order in which a
view applies them (crop, flip, rotation, jitter, grayscale, blur). Every rung has the crop. Views are drawn
independently and share nothing.

Source: Zhang and Ma 2022, arXiv 2206.00227.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxcl.errors import UserError

TYPES = ("jitter", "grayscale", "blur", "flip")  # in the paper's order
MODES = ("addone", "uniform", "strength", "two_view")
# The option of `augment.random_view` that is the probability of a type.
PROBABILITY = {"jitter": "jitter_p", "grayscale": "grayscale", "blur": "blur", "flip": "flip", "rotation": "rotation"}


def rungs(
    top: Mapping[str, Any], *, mode: str = "addone", count: int = 4, order: Sequence[str] = TYPES
) -> tuple[dict[str, Any] | None, ...]:
    """Options of `augment.random_view` for each rung, from the first to the last, which is `top`.

    Args:
      top: options of the last rung. They include crop_area, jitter, and a probability for each type of `order`. Only
        the last rung has a rotation that is not in `order`.
      mode: "addone": see above. "uniform": every rung is `top`. "strength": every rung has all types, but each rung
        down is weaker (probabilities of flip, grayscale, blur and rotation by 0.05, strengths of the jitter by 0.02;
        the smallest crop grows by 0.1 of the area). "two_view": only the last rung has views.
      count: number of rungs, one per stage of the network.
      order: the order in which types are added. If there are more rungs than types, the first ones only crop.

    Returns:
      One dict of options per rung; None for a rung without views.

    Raises:
      UserError: an unknown mode or type, a type twice, or no rung.
    """
    if mode not in MODES:
        raise UserError(f"ladder: mode is {mode!r}; expected one of {', '.join(MODES)}")
    if set(order) - set(PROBABILITY) or len(set(order)) < len(order):
        raise UserError(f"ladder: order is {tuple(order)}; expected some of {', '.join(PROBABILITY)}, each once")
    if count < 1:
        raise UserError(f"ladder: count is {count}; expected at least 1")
    top = dict(top)
    below = [count - rung for rung in range(1, count)]  # distance from the last rung
    if mode == "two_view":
        return (*(None for _ in below), top)
    if mode == "uniform":
        return (*(dict(top) for _ in below), top)
    if mode == "strength":
        return (*(_weaker(top, down) for down in below), top)
    named = (*order, *(t for t in PROBABILITY if t not in order and top.get(PROBABILITY[t])))
    off = [named[max(0, len(order) - down) :] for down in below]
    return (*(top | {PROBABILITY[t]: 0.0 for t in types} for types in off), top)


def _weaker(top: dict[str, Any], down: int) -> dict[str, Any]:
    """All types, each weakened `down` times; a type that is off stays off."""
    weaker = dict(top)
    for kind in ("flip", "grayscale", "blur", "rotation"):
        name = PROBABILITY[kind]
        if name in top:
            weaker[name] = _down(top[name], 0.05 * down)
    weaker["jitter"] = tuple(_down(s, 0.02 * down) for s in top["jitter"])
    low, high = top["crop_area"]
    weaker["crop_area"] = (min(round(low + 0.1 * down, 6), high), high)
    return weaker


def _down(value: float, by: float) -> float:
    return max(0.0, round(value - by, 6))
