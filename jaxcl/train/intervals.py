"""How often a run logs, evaluates and saves, in steps."""

import dataclasses

from ml_collections import ConfigDict

from jaxcl.method.recipe import Recipe
from jaxcl.runtime.durations import to_steps


@dataclasses.dataclass(frozen=True)
class Intervals:
    """Steps between two log lines, evaluations, collapse metrics and checkpoints; 0: never."""

    log: int
    eval: int
    collapse: int
    checkpoint: int


def intervals_of(config: ConfigDict, recipe: Recipe) -> Intervals:
    """The intervals of a config."""
    unit = dict(steps_per_epoch=recipe.steps_per_epoch, batch_size=recipe.batch_size, total=recipe.total_steps)
    return Intervals(
        log=max(1, to_steps(config.log_every, name="log_every", **unit)),
        eval=to_steps(config.eval.every, name="eval.every", **unit),
        collapse=to_steps(config.collapse_every, name="collapse_every", **unit),
        checkpoint=to_steps(config.checkpoint.every, name="checkpoint.every", **unit),
    )


def due(step: int, interval: int) -> bool:
    """Whether something that happens every `interval` steps (0: never) happens after this one."""
    return interval > 0 and step % interval == 0
