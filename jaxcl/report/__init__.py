"""What a run leaves behind for people: numbers as they come, a progress line, and one page at the end.

Everything here takes NumPy arrays and plain dicts; nothing imports a model, a loss or jax.
"""

from jaxcl.report.metrics import JsonLines, MetricsWriter, read_metrics
from jaxcl.report.progress import Progress
from jaxcl.report.wandb import open_wandb

__all__ = ["JsonLines", "MetricsWriter", "Progress", "open_wandb", "read_metrics", "write_report"]


def __getattr__(name: str):
    # The page pulls in matplotlib and scikit-learn; a loop that draws nothing should not pay for them.
    if name == "write_report":
        from jaxcl.report.page import write_report

        return write_report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
