"""The Lance table of a tower: one row for each live product. The only home of `lance`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import lance
import pyarrow as pa

from pipelines.errors import StoreError
from pipelines.schema import PUBLISHED


def read_published(uri: str, *, version: int, options: Mapping[str, str]) -> Iterator[pa.Table]:
    """Stream the id and the hashes of every product in one version of a table; vectors are not touched."""
    try:
        table = lance.dataset(uri, version=version, storage_options=dict(options) or None)
        missing = [name for name in PUBLISHED.names if name not in table.schema.names]
        if missing:
            raise StoreError(f"table {uri} version {version} lacks the columns {', '.join(missing)}. It was not written by catalog-embed.")
        for batch in table.scanner(columns=PUBLISHED.names, batch_size=1 << 16).to_batches():
            yield pa.Table.from_batches([batch]).cast(PUBLISHED)
    except (OSError, ValueError) as error:
        raise StoreError(f"cannot read table {uri} at version {version}: {_first_line(error)}. Run `catalog-embed doctor`.") from error


def _first_line(error: Any) -> str:
    return str(error).strip().split("\n", maxsplit=1)[0]
