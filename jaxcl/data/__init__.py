"""Image sets and the deterministic loader that feeds them to devices."""

from jaxcl.data.from_config import source_of
from jaxcl.data.loader import Loader, batches
from jaxcl.data.sources import Source, has_own_validation, make_source

__all__ = ["Loader", "Source", "batches", "has_own_validation", "make_source", "source_of"]
