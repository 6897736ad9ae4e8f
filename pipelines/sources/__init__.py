"""Catalogs to read, whatever holds them: `open_source` gives the one three-method contract of `pipelines.contracts.Source`."""

from pipelines.sources.opening import open_source
from pipelines.sources.spec import SourceSpec

__all__ = ["SourceSpec", "open_source"]
