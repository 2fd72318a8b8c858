"""Image sets and the deterministic loader that feeds them to devices."""

from jaxcl.data.from_config import FILES, order_of, source_of
from jaxcl.data.loader import Loader, batches
from jaxcl.data.sources import Source, has_own_validation, make_source

__all__ = ["FILES", "Loader", "Source", "batches", "has_own_validation", "make_source", "order_of", "source_of"]
