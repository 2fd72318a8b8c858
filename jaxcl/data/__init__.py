"""Image sets and the deterministic loader that feeds them to devices."""

from jaxcl.data.from_config import source_of
from jaxcl.data.loader import Loader, batches
from jaxcl.data.sources import Source, make_source

__all__ = ["Loader", "Source", "batches", "make_source", "source_of"]
