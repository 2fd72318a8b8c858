"""The stage ladder: what each rung's random view is made of, from the first stage's to the last one's.

On a ladder of mode "addone" the last rung has all types of augmentation and each one below has one type less: earlier
stages are asked for fewer invariances. The types are added in the given order, which is not the order in which a view
applies them (crop, flip, rotation, jitter, grayscale, blur). The crop is on every rung. All is drawn independently: no
two views share anything. Source: Zhang and Ma 2022, arXiv 2206.00227 (papers/hierarchical_augmentation.md 2, 8.3).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxcl.errors import UserError

TYPES = ("jitter", "grayscale", "blur", "flip")  # in the paper's order
MODES = ("addone", "uniform", "strength", "two_view")
# The options of `augment.random_view` that are the probability of a type.
PROBABILITY = {"jitter": "jitter_p", "grayscale": "grayscale", "blur": "blur", "flip": "flip", "rotation": "rotation"}


def rungs(
    top: Mapping[str, Any], *, mode: str = "addone", count: int = 4, order: Sequence[str] = TYPES
) -> tuple[dict[str, Any] | None, ...]:
    """Options of `augment.random_view`, one rung after the other; the last is `top` itself.

    Args:
      top: options of the last rung, with all that have a part in the ladder: crop_area, jitter, and a probability for
        each type of `order`. A rotation that is not in `order` stays on the last rung alone.
      mode: "addone": see above; "uniform": every rung is `top` (several stages without the ladder); "strength": every
        rung has all types, weaker from rung to rung down (probabilities of flip, grayscale, blur and rotation by 0.05,
        jitter by 0.02 a factor, the smallest crop by 0.1 of the area larger); "two_view": nothing below `top`.
      count: rungs, as many as the network has stages.
      order: in which types are added. With more rungs than types the first ones have the crop alone.

    Returns:
      None for a rung without views.

    Raises:
      UserError: an unknown mode or type, a type twice, no rung.
    """
    if mode not in MODES:
        raise UserError(f"ladder: mode is {mode!r}; expected one of {', '.join(MODES)}")
    if set(order) - set(PROBABILITY) or len(set(order)) < len(order):
        raise UserError(f"ladder: order is {tuple(order)}; expected some of {', '.join(PROBABILITY)}, each once")
    if count < 1:
        raise UserError(f"ladder: count is {count}; expected at least 1")
    top = dict(top)
    below = [count - rung for rung in range(1, count)]  # rungs down from the last
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
    """All types, each weaker by so many steps; what is off stays off."""
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
