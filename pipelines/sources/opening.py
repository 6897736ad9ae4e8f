"""From a description to a source: each engine is imported only when a catalog needs it."""

from __future__ import annotations

from importlib import import_module

from pipelines.contracts import ColumnMap, Source
from pipelines.errors import InputError
from pipelines.sources.projection import Projection
from pipelines.sources.spec import SourceSpec

# Which module makes a source, and the extra that installs its engine where the core does not.
_MAKERS = {
    "parquet": ("pipelines.sources.parquet", ""),
    "csv": ("pipelines.sources.delimited", ""),
    "jsonl": ("pipelines.sources.jsonl", ""),
    "memory": ("pipelines.sources.memory", ""),
    "lance": ("pipelines.sources.lance", ""),
    "delta": ("pipelines.sources.delta", "delta"),
    "sql": ("pipelines.sources.sql", "sql"),
}


def open_source(spec: SourceSpec, *, columns: ColumnMap, fields: tuple[str, ...]) -> Source:
    """Return the catalog that `spec` describes; `fields` are the text fields and filters to read besides id and times."""
    projection = Projection.of(columns, fields=fields)
    module, extra = _MAKERS[spec.type]
    try:
        source: Source = import_module(module).make(spec, projection)
    except ModuleNotFoundError as error:
        package = f"catalog-embed[{extra}]" if extra else "catalog-embed"
        raise InputError(f"a source of type `{spec.type}` needs `{error.name}`: pip install '{package}'.") from error
    return source
