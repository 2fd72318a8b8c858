"""Image sets, one kind of source per module, and the deterministic loader that feeds them to devices.

A source gives uint8 batches by row number (`Source`); which rows, in which order and on which process is decided here.
What is computed on a device, such as views and normalisation, belongs in jaxcl/augment and jaxcl/method, and commands
that write data sets belong in jaxcl/commands.
"""

from jaxcl.data.from_config import order_of, source_of
from jaxcl.data.kind import SourceKind
from jaxcl.data.loader import Loader, batches
from jaxcl.data.source import ArraySource, Source
from jaxcl.data.sources import default_fit, has_own_validation, keeps_size, make_source

__all__ = [
    "ArraySource",
    "Loader",
    "Source",
    "SourceKind",
    "batches",
    "default_fit",
    "has_own_validation",
    "keeps_size",
    "make_source",
    "order_of",
    "source_of",
]
