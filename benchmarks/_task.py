"""The contract of a contestant: its name in the table, the work that its process repeats, and the needs of a task."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple


class Needs(NamedTuple):
    """The least work of a task: FLOPs of matmuls and convolutions, and bytes read and written. See `_floor`."""

    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One implementation of a task. `key` is the argument of `prepare`."""

    key: str
    name: str
    ours: bool = False
    package: str = ""  # a package that it needs in addition to the dependencies of jaxcl
    differs: str = ""  # what it does differently, in a few words


@dataclasses.dataclass(frozen=True)
class Ready:
    """The work that the process of a contestant repeats."""

    run: Callable[[], object]  # one call; it returns when everything is computed
    work: float = 1  # units of work per call; a row holds work per second or, for a unit of time, time per call
    answer: Any = None  # numbers that must be equal for all contestants of the task; None: nothing to compare
    needs: Needs | None = None  # of one call of the task, given by our contestant; None: not counted


class NotApplicable(Exception):
    """Raised by `prepare`, with the reason why this contestant cannot do this task."""
