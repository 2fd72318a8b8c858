"""Training: the loop, and all that a run reads and writes in its folder (config, checkpoints, log, profile).

A module belongs here if it needs a run folder or a TrainState that changes over time. One update is defined in
`jaxcl.method`, measurements of a frozen encoder in `jaxcl.evaluate`, pages and pictures in `jaxcl.report`.
"""

__all__ = ["run"]


def __getattr__(name: str):
    # Lazy: commands import `run_folder` and `config_diff` from here and do not need the loop for that.
    if name == "run":
        from jaxcl.train.loop import run

        return run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
