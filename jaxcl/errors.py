"""Errors that end a run. `main` prints one plain line for each and turns it into an exit code."""

from collections.abc import Mapping
from typing import Any


class UserError(ValueError):
    """A mistake that the user can correct. One line: what is wrong, what was expected, what to do. Exit code 2."""


class Diverged(RuntimeError):
    """The loss is not finite. Exit code 3; a restart would only repeat it.

    Attributes:
      step: of the update that showed it, from 1; None if it is not known. The state before it is ruined.
      update: step of the update to look at; the same, unless parameters were ruined by the update before.
      metrics: of that update, by name.
    """

    def __init__(
        self,
        message: str,
        *,
        step: int | None = None,
        update: int | None = None,
        metrics: Mapping[str, Any] | None = None,
    ):
        super().__init__(message)
        self.step, self.update = step, step if update is None else update
        self.metrics = dict(metrics or {})


class Preempted(RuntimeError):
    """The run was asked to end and saved a checkpoint. Exit code 75 (try again), so that a scheduler requeues it.

    Attributes:
      at_once: the process ends without waiting for its threads, which may wait for data for ever.
    """

    at_once = False


class LostHost(RuntimeError):
    """Another process of the run has ended. Exit code 75 (try again), so that a scheduler requeues all processes."""
