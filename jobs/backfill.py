"""Which products a backfill makes again: by a filter, by ids, by dates, or by what went wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import pyarrow as pa

from jobs.nightly import open_store
from jobs.settings import Settings
from pipelines.diff import Selection
from pipelines.errors import InputError
from pipelines.hashes import id_hashes
from pipelines.manifest import Manifest
from pipelines.publish import current, open_manifest
from pipelines.schema import ADD, ID, ID_HASH, VID
from pipelines.storage import Store
from pipelines.stores.lance import TableSearcher, take
from pipelines.stores.parquet import decode
from pipelines.where import parse_where

Reason = Literal["missing", "failed", "all"]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a person asks a backfill for. At least one thing, or another tower."""

    where: str | None = None
    ids: Sequence[str] = ()
    since: str | None = None
    until: datetime | None = None
    reason: Reason | None = None
    tower: Path | None = None

    def __post_init__(self) -> None:
        chosen = [name for name in ("where", "ids", "reason") if getattr(self, name)]
        dated = self.since is not None or self.until is not None
        if len(chosen) > 1:
            raise InputError(f"--{chosen[0]} and --{chosen[1]} say two things about which products are meant. Give one of them.")
        if not chosen and not dated and self.tower is None:
            raise InputError("a backfill needs to know of what: give --where, --ids, --from/--to, --reason or --tower.")
        if self.tower is not None and (chosen or dated):
            raise InputError("another tower embeds the whole catalog: give --tower alone.")


def selection(settings: Settings, choice: Choice) -> Selection | None:
    """Return the part of the products that is made again; None means all that differ."""
    if choice.tower is not None:
        return None
    if choice.reason == "all" or (choice.reason is None and not choice.where and not choice.ids):
        return Selection(again=True)
    if choice.reason == "missing":
        return Selection(actions=(ADD,))
    store = open_store(settings)
    manifest = _live(store, settings)
    if choice.reason == "failed":
        return Selection(id_hashes=id_hashes(pa.array(_failed(store, manifest), pa.string())), again=True)
    if choice.ids:
        return Selection(id_hashes=id_hashes(pa.array(sorted(set(choice.ids)), pa.string())), again=True)
    return Selection(id_hashes=_matching(store, manifest, settings, str(choice.where)), again=True)


def _live(store: Store, settings: Settings) -> Manifest:
    entry = current(store, settings.publish.alias)
    if entry is None:
        raise InputError("nothing is published yet, so there is nothing to fill in. Run `catalog-embed run` first.")
    return open_manifest(store, entry)


def _failed(store: Store, manifest: Manifest) -> list[str]:
    """Return the ids that the live generation's runs put into quarantine."""
    listed = [item for item in manifest.attachments if item.role == "quarantine"]
    tables = [decode(store.read_verified(item), where=item.key) for item in listed]
    return sorted({name for table in tables for name in table.column(ID).to_pylist() if name is not None})


def _matching(store: Store, manifest: Manifest, settings: Settings, where: str) -> pa.Array:
    """Return the id hashes of published products that pass a filter."""
    if manifest.table is None:
        raise InputError(f"{manifest.generation} pins no table to filter. Run `catalog-embed run` first.")
    uri, options = store.uri(manifest.table.uri), settings.store.options
    searcher = TableSearcher(uri, manifest.table.version, options)
    vids = searcher.matching(parse_where(where, searcher.columns))
    rows = take(uri, version=manifest.table.version, by=VID, values=pa.array(vids), columns=[ID_HASH], options=options)
    return rows.column(ID_HASH).combine_chunks()
