"""What ends a run early; `main` prints each as one plain line and turns it into an exit code."""


class UserError(ValueError):
    """A mistake to mend: what is wrong, what was expected and what to do, in one line. Exit code 2."""


class Diverged(RuntimeError):
    """The loss is no longer finite. Exit code 3; running on would only repeat it."""


class Preempted(RuntimeError):
    """The run was asked to end and has saved itself. Exit code 75 (try again), so that a scheduler requeues it."""


class LostHost(RuntimeError):
    """Another process of the run is gone. Exit code 75 (try again), so that a scheduler requeues all of them."""
