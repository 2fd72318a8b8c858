"""What people read of a run: the metrics while it trains, the progress line, figures, and one page at the end.

Writers, figures and HTML belong here. They take NumPy arrays and plain dicts and import no model, no loss and no jax.
Metrics are computed in `jaxcl.evaluate`; tables over several runs are made by `jaxcl.commands`.
"""

from jaxcl.report.metrics import JsonLines, MetricsWriter, read_metrics
from jaxcl.report.progress import Progress
from jaxcl.report.wandb import open_wandb

__all__ = ["JsonLines", "MetricsWriter", "Progress", "open_wandb", "read_metrics", "write_report"]


def __getattr__(name: str):
    # Lazy: the page imports matplotlib and scikit-learn.
    if name == "write_report":
        from jaxcl.report.page import write_report

        return write_report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
