"""Durations of a config, in steps, epochs, examples or percent, converted to steps."""

import re

from jaxcl.errors import UserError

_AT_LEAST = re.compile(r"\s*,?\s*\bat least\b\s*")
_PATTERN = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(steps?|epochs?|examples?|%|percent|)\s*$")


def to_steps(duration: str | int, *, name: str, steps_per_epoch: int, batch_size: int, total: int | None = None) -> int:
    """The number of steps of a duration, rounded to the nearest step.

    Args:
      duration: "300 steps", "8 epochs", "50000 examples", "25%" (of `total`), or a number of steps; also the longer of
        two, "4 epochs, at least 200 steps".
      name: the config key, for messages.
      steps_per_epoch, batch_size: steps of an epoch, and examples of a step.
      total: steps that are 100 %; None: percent is not allowed.

    Raises:
      UserError: anything else, or percent without `total`.
    """
    if isinstance(duration, int) and not isinstance(duration, bool) and duration >= 0:
        return duration
    if isinstance(duration, str) and _AT_LEAST.search(duration):
        unit = dict(name=name, steps_per_epoch=steps_per_epoch, batch_size=batch_size, total=total)
        return max(to_steps(part, **unit) for part in _AT_LEAST.split(duration, maxsplit=1))
    match = _PATTERN.match(duration) if isinstance(duration, str) else None
    if match is None:
        raise UserError(
            f"{name} is {duration!r}; expected a duration such as '300 steps', '8 epochs', '50000 examples' or '25%'"
        )
    number, unit = float(match[1]), match[2]
    if unit.startswith("step") or not unit:
        return round(number)
    if unit.startswith("epoch"):
        return round(number * steps_per_epoch)
    if unit.startswith("example"):
        return round(number / batch_size)
    if total is None:
        raise UserError(f"{name} is {duration!r}, but percent is not possible here; use steps or epochs")
    if number > 100:
        raise UserError(f"{name} is {duration!r}; expected at most 100%")
    return round(total * number / 100)
