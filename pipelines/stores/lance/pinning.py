"""Pin one version of the table for a generation: read back what is new, hash every file, sync, tag.

Lance never calls fsync, commits a file whose last write failed, and reads flipped bits without complaint. So nothing
is pinned that was not read back whole, and readers can compare every byte with what the manifest says.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pipelines.errors import CorruptObject, StoreError
from pipelines.manifest import ManifestObject, TablePin
from pipelines.storage import Store
from pipelines.stores.lance.digest import DIGESTED, rows_digest
from pipelines.stores.lance.opening import explained, open_table, steady
from pipelines.stores.lance.reading import read_rows

ROLE = "table"
_NEEDED = ("data file", "deletion file", "index file", "manifest")
_PIECE_BYTES = 16 << 20
_HASHERS = 4  # sha256 releases the interpreter; more threads hold more pieces


@dataclass(frozen=True, kw_only=True)
class _DataFile:
    """A data file as the manifest of Lance describes it: where it belongs, which columns it holds, and how much."""

    fragment: Any
    columns: frozenset[str]
    size: int | None
    rows: int


def pin(
    uri: str,
    *,
    version: int,
    tag: str,
    previous: TablePin | None,
    store: Store,
    key: str,
    options: Mapping[str, str],
) -> TablePin:
    """Return the pin of one version, after it was proved readable and made durable, and move its tag there.

    What `previous` lists was proved before and is immutable: it is neither read nor hashed again, only its size is checked.
    """
    if uri.rstrip("/") != store.uri(key):
        raise StoreError(f"table {uri} is not at key {key} of {store.root}. Pass the store that holds the table.")
    dataset = open_table(uri, version=version, options=options)
    known = {item.key: item for item in previous.objects} if previous else {}
    with explained(f"list the files of version {version} of", uri):
        keys = {f"{key}/{path}" for path in _paths(dataset)}
        data = {f"{key}/data/{path}": file for path, file in _data_files(dataset).items()}
    fresh = sorted(keys - known.keys())
    kept = [known[name] for name in sorted(keys & known.keys())]
    _check_sizes(store, kept)
    _read_back(dataset, [data[name] for name in fresh if name in data])
    digest = _digest_of(uri, version=version, options=options, rows=dataset.count_rows())
    with ThreadPoolExecutor(max_workers=_HASHERS) as pool:
        objects = [*kept, *pool.map(lambda name: _hashed(store, name, data.get(name)), fresh)]
    store.sync(fresh)
    move_tag(uri, tag=tag, version=version, options=options)
    store.sync([f"{key}/_refs/tags/{tag}.json"])
    ordered = tuple(sorted(objects, key=lambda item: item.key))
    return TablePin(uri=key, version=version, tag=tag, rows_digest=digest, objects=ordered)


def move_tag(uri: str, *, tag: str, version: int, options: Mapping[str, str]) -> None:
    """Make a tag name this version, so that no sweep removes it."""
    dataset = open_table(uri, options=options)
    with explained(f"tag version {version} of", uri):
        try:
            if tag in steady(dataset.tags.list):
                dataset.tags.update(tag, version)
            else:
                dataset.tags.create(tag, version)
        except (OSError, ValueError):
            # Where the answer was lost, Lance's own second try meets the tag that the first one made.
            found = steady(dataset.tags.list).get(tag)
            if found is None or found["version"] != version:
                raise


def untag(uri: str, tag: str, options: Mapping[str, str]) -> None:
    """Remove a tag; one that is not there is no error."""
    dataset = open_table(uri, options=options)

    def remove() -> None:
        if tag in dataset.tags.list():
            dataset.tags.delete(tag)

    with explained("remove a tag of", uri):
        steady(remove)


def _paths(dataset: Any) -> Iterable[str]:
    """Return the files that this version needs, relative to the table."""
    files = steady(lambda: dataset.tracked_files(min_version=dataset.version).read_all())
    rows = zip(*(files.column(name).to_pylist() for name in ("version", "type", "path")), strict=True)
    return {path for version, kind, path in rows if version == dataset.version and kind in _NEEDED}


def _data_files(dataset: Any) -> dict[str, _DataFile]:
    names = {field.id(): field.name() for field in dataset.lance_schema.fields()}
    return {
        file.path: _DataFile(
            fragment=fragment,
            columns=frozenset(names[number] for number in file.fields if number in names),
            size=file.file_size_bytes,
            rows=fragment.metadata.physical_rows,
        )
        for fragment in dataset.get_fragments()
        for file in fragment.metadata.files
    }


def _read_back(dataset: Any, files: Iterable[_DataFile]) -> None:
    """Scan every column that a new file holds, and count the rows; fragments that need the same columns go together."""
    columns: dict[int, set[str]] = defaultdict(set)
    fragments = {}
    for file in files:
        columns[file.fragment.fragment_id] |= file.columns
        fragments[file.fragment.fragment_id] = file.fragment
    groups: dict[frozenset[str], list[Any]] = defaultdict(list)
    for number, names in columns.items():
        groups[frozenset(names)].append(fragments[number])
    with explained(f"read back version {dataset.version} of", dataset.uri):
        for wanted, members in groups.items():
            found = 0
            for batch in dataset.scanner(columns=sorted(wanted), fragments=members).to_batches():
                batch.validate(full=True)
                found += batch.num_rows
            if (expected := sum(member.count_rows() for member in members)) != found:
                raise StoreError(f"{len(members)} new fragments of table {dataset.uri} hold {found} rows, expected {expected}. Run again.")


def _digest_of(uri: str, *, version: int, options: Mapping[str, str], rows: int) -> str:
    found = 0

    def counted() -> Any:
        nonlocal found
        for table in read_rows(uri, version=version, columns=DIGESTED, options=options):
            found += table.num_rows
            yield table

    digest = rows_digest(counted())
    if found != rows:
        raise StoreError(f"table {uri} version {version} says {rows} rows and gave {found}. Run again.")
    return digest


def _check_sizes(store: Store, objects: Iterable[ManifestObject]) -> None:
    expected = {item.key: item.size for item in objects}
    found = store.sizes(expected)
    for name, size in expected.items():
        if found.get(name) != size:
            there = f"has {found[name]} bytes" if name in found else "is gone"
            raise CorruptObject(
                f"{store.uri(name)} {there}, expected {size} bytes. Run `catalog-embed rollback`, or restore it from a copy."
            )


def _hashed(store: Store, key: str, data: _DataFile | None) -> ManifestObject:
    info = store.head(key)
    if info is None or (data is not None and data.size is not None and info.size != data.size):
        there = "is gone" if info is None else f"has {info.size} bytes, expected {data.size if data else '?'}"
        raise CorruptObject(f"{store.uri(key)} {there}: it was not written whole. Run again.")
    sha = hashlib.sha256()
    for start in range(0, info.size, _PIECE_BYTES):
        sha.update(store.get_range(key, start=start, length=min(_PIECE_BYTES, info.size - start)))
    return ManifestObject(key=key, size=info.size, sha256=sha.hexdigest(), role=ROLE, rows=data.rows if data else None)
