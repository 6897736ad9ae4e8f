"""The same table through LanceDB, for programs that speak it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.stores.lance.opening import engine_options, explained


def as_lancedb(uri: str, *, version: int, options: Mapping[str, str]) -> Any:
    """Return the table as a `lancedb.table.Table` that stays at this version. Read from it; writes belong to runs."""
    import lancedb  # noqa: PLC0415  three seconds that only its users pay

    folder, _, name = uri.rpartition("/")
    with explained("open through LanceDB", uri):
        table = lancedb.connect(folder, storage_options=engine_options(uri, options)).open_table(name.removesuffix(".lance"))
        table.checkout(version)
    return table
