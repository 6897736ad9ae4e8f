"""The Lance table of a tower: one row for each live product. The only home of `lance`."""

from pipelines.stores.lance.digest import rows_digest
from pipelines.stores.lance.indexes import IndexState, index_state, refresh_indexes
from pipelines.stores.lance.neighbours import as_lancedb
from pipelines.stores.lance.pinning import move_tag, pin, untag
from pipelines.stores.lance.reading import counts, read_published, read_rows, sizes, take, vectors_of
from pipelines.stores.lance.searching import TableSearcher
from pipelines.stores.lance.sweeping import SweepResult, stray_tags, sweep
from pipelines.stores.lance.table import TableSpec, apply, build, commit_build, restore, write_fragments

__all__ = [
    "IndexState",
    "SweepResult",
    "TableSearcher",
    "TableSpec",
    "apply",
    "as_lancedb",
    "build",
    "commit_build",
    "counts",
    "index_state",
    "move_tag",
    "pin",
    "read_published",
    "read_rows",
    "refresh_indexes",
    "restore",
    "rows_digest",
    "sizes",
    "stray_tags",
    "sweep",
    "take",
    "untag",
    "vectors_of",
    "write_fragments",
]
