"""The Lance table of a tower: one row for each live product. The only home of `lance`."""

from pipelines.stores.lance.digest import rows_digest
from pipelines.stores.lance.distributed import Workers
from pipelines.stores.lance.health import VectorHealth, vector_health
from pipelines.stores.lance.indexes import VECTOR_INDEX, IndexState, fold_vector_index, index_state, refresh_indexes, retrain_vector_index
from pipelines.stores.lance.neighbours import as_lancedb
from pipelines.stores.lance.pinning import move_tag, pin, untag
from pipelines.stores.lance.reading import counts, fragment_groups, read_published, read_rows, sizes, take, vectors_of
from pipelines.stores.lance.searching import TableSearcher, tuned
from pipelines.stores.lance.sweeping import SweepResult, stray_tags, sweep
from pipelines.stores.lance.table import TableSpec, apply, build, commit_build, restore, write_fragments

__all__ = [
    "VECTOR_INDEX",
    "IndexState",
    "SweepResult",
    "TableSearcher",
    "TableSpec",
    "VectorHealth",
    "Workers",
    "apply",
    "as_lancedb",
    "build",
    "commit_build",
    "counts",
    "fold_vector_index",
    "fragment_groups",
    "index_state",
    "move_tag",
    "pin",
    "read_published",
    "read_rows",
    "refresh_indexes",
    "restore",
    "retrain_vector_index",
    "rows_digest",
    "sizes",
    "stray_tags",
    "sweep",
    "take",
    "tuned",
    "untag",
    "vector_health",
    "vectors_of",
    "write_fragments",
]
