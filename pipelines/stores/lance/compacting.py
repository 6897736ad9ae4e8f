"""Write fragments anew that nights of changes have worn: small ones, and those of which many rows are deleted."""

from __future__ import annotations

from typing import Any

from pipelines.stores.lance.opening import Line, committed, open_table
from pipelines.stores.lance.table import TableSpec

# A fragment of so many live rows, few of them deleted, is left as it is: writing it anew would save nothing.
_WORN_SHARE, _SMALL_ROWS = 0.1, 8192
# A full build makes parts of about 32,000 rows, or 64 parts of less. Every fragment costs a scan 0.3 ms, and more on S3.
_FRAGMENTS, _ROWS_EACH = 128, 16_384
# Lance reserves the numbers of the new fragments in a commit of its own.
_COMMITS = 2


def compact(line: Line, spec: TableSpec) -> int:
    """Write worn fragments anew where too much of the table is deleted rows or small pieces; return how many went.

    Indexes are carried along: they cover afterwards what they covered before. Older versions keep their files.
    """
    dataset = open_table(line.uri, options=line.options)
    fragments = [fragment.metadata for fragment in dataset.get_fragments()]
    physical = sum(fragment.physical_rows for fragment in fragments)
    live = sum(_live(fragment) for fragment in fragments)
    if not live or (physical - live <= spec.compact_above * physical and len(fragments) <= _FRAGMENTS + live // _ROWS_EACH):
        return 0
    sound = [fragment.id for fragment in fragments if not _worn(fragment)]
    line.check()
    done = committed(line.uri, options=line.options, work=lambda latest: latest.optimize.compact_files(excluded_fragment_ids=sound))
    line.check(commits=_COMMITS if done.fragments_removed else 0)
    return int(done.fragments_removed)


def _worn(fragment: Any) -> bool:
    live = _live(fragment)
    return bool(live < _SMALL_ROWS or fragment.physical_rows - live > _WORN_SHARE * fragment.physical_rows)


def _live(fragment: Any) -> int:
    return int(fragment.physical_rows - fragment.num_deletions)
