"""Segments as objects of a store: cards, id maps and tombstones, read verified and written once. Knows no FAISS."""

from __future__ import annotations

import contextlib
import hashlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.contracts import ObjectRef
from pipelines.errors import AlreadyExists, CorruptObject, InputError, ManifestError, PlanError
from pipelines.index.spec import METRIC, IndexSpec, Kind, Segment, Training
from pipelines.manifest import Manifest, ManifestObject, built, canonical, count, number, optional, parse, sha256_hex, text
from pipelines.schema import ID, VID
from pipelines.storage import MAX_CONDITIONAL_BYTES, Store

Vids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
"""One bit for each entry of a segment, in the order of its roster."""

FAISS, IDS, TRAINED, CARD, TOMBSTONES = "faiss", "ids", "trained", "segment", "tombstones"
FILES: Mapping[str, str] = {FAISS: "index.faiss", IDS: "ids.parquet", TRAINED: "trained.faiss", CARD: "segment.json"}
# A template is in the folder of the base that trained it; whoever adds a delta reads it instead of the whole base.
_REQUIRED = {FAISS, IDS, CARD}
_MAX_CARD_BYTES = 64 * 1024
# Format 1 was of indexes whose entries had other numbers.
_CARD_FORMAT = 2
_DEAD = "dead"


@dataclass(frozen=True, kw_only=True)
class Roster:
    """The products of a segment: their numbers, ascending, and the id of each."""

    vids: Vids
    ids: pa.ChunkedArray

    def position(self, vids: Vids) -> tuple[npt.NDArray[np.int64], Mask]:
        """Return where each number would be, and whether it is there."""
        if not len(self.vids):
            return np.zeros(len(vids), np.int64), np.zeros(len(vids), np.bool_)
        at = np.minimum(np.searchsorted(self.vids, vids), len(self.vids) - 1)
        return at, self.vids[at] == vids


def segments_of(store: Store, manifest: Manifest) -> list[Segment]:
    """Read the cards of a generation's segments: the base first, then its deltas in the order of the manifest."""
    found: dict[str, list[ManifestObject]] = defaultdict(list)
    for item in manifest.segments:
        folder, _, file = item.key.rpartition("/")
        name = folder.removeprefix("segments/")
        if folder != f"segments/{name}" or FILES.get(item.role) != file:
            raise ManifestError(f"{manifest.generation}: {item.key} with role `{item.role}` is no object of a segment. Roll back.")
        found[name].append(item)
    segments = [_segment(store, name, tuple(objects)) for name, objects in found.items()]
    bases = [segment.name for segment in segments if segment.kind == "base"]
    if segments and len(bases) != 1:
        raise ManifestError(f"{manifest.generation}: {len(bases)} base segments, where an index has one. Roll back.")
    _check_templates(segments)
    return sorted(segments, key=lambda segment: segment.kind)


def card_bytes(segment: Segment) -> bytes:
    """Return the canonical bytes of a segment's card."""
    fields = {"name": segment.name, "kind": segment.kind, "rows": segment.rows, "template": segment.template, "spread": segment.spread}
    trained = asdict(segment.trained) if segment.trained else None
    spec = {"metric": METRIC, "factory": segment.spec.factory, "dims": segment.spec.dims}
    return canonical({"format_version": _CARD_FORMAT, **fields, "trained": trained, **spec})


def read_roster(store: Store, segment: Segment) -> Roster:
    """Read the id map of a segment, verified."""
    item = segment.object(IDS)
    table = _read_table(store, item, {VID: pa.int64(), ID: pa.string()})
    roster = Roster(vids=table[VID].to_numpy(), ids=table[ID])
    if len(roster.vids) != segment.rows or not _ascending(roster.vids):
        raise CorruptObject(f"{store.uri(item.key)}: expected {segment.rows} ascending numbers. Run `catalog-embed rollback`.")
    return roster


def read_tombstones(store: Store, manifest: Manifest) -> dict[str, Mask]:
    """Read which entries of each segment a generation hides; a segment without tombstones is not in the answer."""
    found = {}
    for item in manifest.tombstones:
        segment = PurePosixPath(item.key).stem.removeprefix("tombstones-")
        if item.role != TOMBSTONES or PurePosixPath(item.key).name != _tombstone_file(segment):
            raise ManifestError(f"{manifest.generation}: {item.key} with role `{item.role}` holds no tombstones. Roll back.")
        dead: Mask = _read_table(store, item, {_DEAD: pa.bool_()})[_DEAD].to_numpy()
        if int(dead.sum()) != item.rows:
            raise CorruptObject(f"{store.uri(item.key)}: expected {item.rows} hidden entries. Run `catalog-embed rollback`.")
        found[segment] = dead
    return found


def write_tombstones(store: Store, generation: str, segment: str, dead: Mask, *, work: Path) -> ManifestObject:
    """Write which entries of one segment are hidden, a bit for each, into the folder of a generation. `rows` counts the hidden."""
    path = work / _tombstone_file(segment)
    write_table(pa.table({_DEAD: dead}), path)
    ref = keep(store, f"generations/{generation}/{path.name}", path)
    return ManifestObject.of(ref, role=TOMBSTONES, rows=int(dead.sum()))


def write_table(table: pa.Table, path: Path) -> None:
    """Write a Parquet file whose pages carry checksums; equal tables give equal bytes."""
    pq.write_table(table, path, compression="zstd", use_dictionary=False, write_page_checksum=True)


def keep(store: Store, key: str, path: Path) -> ObjectRef:
    """Store a file under a key of this run, once: a repeated run finds its own bytes there, and other bytes are refused."""
    if store.head(key) is None:
        # A bucket takes a conditional put as one request of limited size. Nobody else writes under the key of this run.
        large = "://" in store.root and path.stat().st_size > MAX_CONDITIONAL_BYTES
        with contextlib.suppress(AlreadyExists):
            return store.put(key, path) if large else store.put_if_absent(key, path)
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    ref = ObjectRef(key=key, size=path.stat().st_size, sha256=sha256)
    try:
        store.verify(ref)
    except CorruptObject as error:
        raise PlanError(f"{store.uri(key)} exists with other content: its run id was used before. Start a run with a new id.") from error
    return ref


def check_size(segments: list[Segment], *, limit_bytes: int) -> None:
    """Raise when segments together are larger than a reader wants to load."""
    total = sum(item.size for segment in segments for item in segment.objects)
    if total > limit_bytes:
        raise InputError(f"the index has {total} bytes, more than the limit of {limit_bytes}. Raise the limit, or use a smaller index.")


def _segment(store: Store, name: str, objects: tuple[ManifestObject, ...]) -> Segment:
    roles = [item.role for item in objects]
    if missing := _REQUIRED - set(roles):
        raise ManifestError(f"segment {name} has no {', '.join(sorted(missing))}. Roll back to a generation that is whole.")
    card = objects[roles.index(CARD)]
    if card.size > _MAX_CARD_BYTES:
        raise CorruptObject(f"{store.uri(card.key)}: {card.size} bytes are too many for a card. Run `catalog-embed rollback`.")

    def build(*, metric: str, factory: str, dims: int, **fields: Any) -> Segment:
        if metric != METRIC or fields["name"] != name:
            raise ManifestError(f"the card of {fields['name']} with metric {metric} lies in the folder of {name}.")
        return Segment(spec=IndexSpec(factory=factory, dims=dims), objects=objects, **fields)

    segment = parse(
        store.read_verified(card),
        where=store.uri(card.key),
        limit_bytes=_MAX_CARD_BYTES,
        parsers=_CARD,
        build=build,
        earliest=_CARD_FORMAT,
        latest=_CARD_FORMAT,
    )
    for item in objects:
        if item.role in (FAISS, IDS) and item.rows != segment.rows:
            raise ManifestError(f"{item.key}: the manifest says {item.rows} rows, the card {segment.rows}. Roll back.")
    return segment


def _check_templates(segments: list[Segment]) -> None:
    """Raise unless every delta uses the trained template of the base: lists of other centroids mean other things."""
    base = {segment.name: segment for segment in segments if segment.kind == "base"}
    for segment in segments:
        if segment.template is None:
            continue
        owner = base.get(segment.template)
        if owner is None or (owner.trained, owner.spec) != (segment.trained, segment.spec):
            raise ManifestError(
                f"segment {segment.name} was made with another template than the base has. Roll back, or build the index again."
            )


def _read_table(store: Store, item: ManifestObject, columns: Mapping[str, pa.DataType]) -> pa.Table:
    """Read a verified Parquet object that has exactly these columns and no nulls."""
    try:
        # Not `read_table`: it reads ahead in threads that may let go of Python's bytes as the interpreter ends, and abort it.
        source = pa.BufferReader(store.read_verified(item))
        with pq.ParquetFile(source, pre_buffer=False, page_checksum_verification=True) as file:
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        raise CorruptObject(f"{store.uri(item.key)} is not readable as Parquet. Run `catalog-embed rollback`.") from error
    if dict(zip(table.schema.names, table.schema.types, strict=True)) != columns or any(c.null_count for c in table.columns):
        raise CorruptObject(
            f"{store.uri(item.key)}: expected the columns {', '.join(columns)} without nulls. Run `catalog-embed rollback`."
        )
    return table


def _tombstone_file(segment: str) -> str:
    return f"tombstones-{segment}.parquet"


def _ascending(vids: Vids) -> bool:
    return bool((np.diff(vids) > 0).all())


def _kind(data: Any, where: str) -> Kind:
    if data not in ("base", "delta"):
        raise ManifestError(f"{where}: expected base or delta, found {str(data)[:40]!r}.")
    return data  # type: ignore[no-any-return]


_CARD: Mapping[str, Any] = {
    "name": text,
    "kind": _kind,
    "rows": count,
    "template": optional(text),
    "spread": number,
    "trained": optional(built(Training, {"sha256": sha256_hex, "rows": count, "spread": number, "imbalance": number})),
    "metric": text,
    "factory": text,
    "dims": count,
}
