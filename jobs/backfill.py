"""Which products a backfill makes again: by a filter, by ids, by dates, or by what went wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import pyarrow as pa

from jobs.inspect import quarantined
from jobs.logs import event
from jobs.nightly import Night, fingerprint_of, open_store
from jobs.settings import Settings
from pipelines.diff import Selection
from pipelines.errors import InputError
from pipelines.hashes import id_hashes
from pipelines.manifest import Manifest
from pipelines.publish import current, open_manifest
from pipelines.schema import ADD, ID, ID_HASH, VID
from pipelines.storage import Store
from pipelines.stores.lance import TableSearcher, take
from pipelines.where import parse_where
from pipelines.window import resolve

Reason = Literal["missing", "failed", "all"]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a person asks a backfill for. At least one thing, or another tower. `since` and `until` are words as for `run --since`."""

    where: str | None = None
    ids: Sequence[str] = ()
    since: str | None = None
    until: str | None = None
    reason: Reason | None = None
    tower: Path | None = None

    def __post_init__(self) -> None:
        chosen = [name for name in ("where", "ids", "reason") if getattr(self, name)]
        if len(chosen) > 1:
            raise InputError(f"--{chosen[0]} and --{chosen[1]} say two things about which products are meant. Give one of them.")
        if not chosen and not self.dated and self.tower is None:
            raise InputError("a backfill needs to know of what: give --where, --ids, --from/--to, --reason or --tower.")
        if self.tower is not None and (chosen or self.dated):
            raise InputError("another tower embeds the whole catalog: give --tower alone.")

    @property
    def dated(self) -> bool:
        """Whether only products of some dates are meant."""
        return self.since is not None or self.until is not None


def chosen(settings: Settings, choice: Choice, night: Night) -> Night:
    """Return a night that makes what was chosen again; the window and the products are its only difference."""
    if choice.tower is not None:
        tower = choice.tower.resolve()
        live = _live(settings)
        if live is not None and live[1].tower == fingerprint_of(settings, tower):
            raise InputError(f"{live[1].generation} was made by this very tower. To embed everything again, give --reason all.")
        return replace(night, since="beginning", tower=tower)
    until = _until(settings, choice, now=night.now or datetime.now(tz=UTC)) if choice.dated else None
    return replace(night, since=choice.since or "beginning", until=until, selection=_selection(settings, choice))


def _until(settings: Settings, choice: Choice, *, now: datetime) -> datetime:
    """Return where the dates end: at a moment that was given in words, or now."""
    if choice.until is None:
        return now
    try:
        moment = resolve(choice.until, now=now, tz=settings.zone, lookback=timedelta(0), watermark=None).since
    except InputError as error:
        raise InputError(str(error).replace("--since", "--to", 1)) from error
    if moment is None:
        raise InputError(f"--to `{choice.until}` is no moment. Give a date, ISO-8601, or a span such as 2d.")
    return moment


def _selection(settings: Settings, choice: Choice) -> Selection:
    """Return which products are made again, and whether their vectors are although the index has them."""
    if choice.reason == "missing":
        return Selection(actions=(ADD,))
    if choice.reason == "all" or not (choice.reason or choice.where or choice.ids):
        return Selection(again=True)
    if choice.ids:
        return Selection(id_hashes=_hashed(choice.ids), again=True)
    live = _live(settings)
    if live is None:
        raise InputError("nothing is published yet, so there is nothing to fill in. Run `catalog-embed run` first.")
    store, manifest = live
    if choice.reason == "failed":
        # A row that failed has no vector, so it is missing from the index, unless a later run has mended it.
        ids = {name for _, rows in quarantined(store, manifest) for name in rows.column(ID).to_pylist() if name is not None}
        found, what = Selection(id_hashes=_hashed(sorted(ids)), actions=(ADD,)), "no run that led here has rejected a row"
    else:
        hashes = _matching(store, manifest, settings, str(choice.where))
        found, what = Selection(id_hashes=hashes, again=True), "no published product passes the filter"
    if found.id_hashes is not None and not len(found.id_hashes):
        event("backfill.empty", level="warning", generation=manifest.generation, why=what)
    return found


def _hashed(ids: Sequence[str]) -> pa.Array:
    return id_hashes(pa.array(sorted(set(ids)), pa.string()))


def _live(settings: Settings) -> tuple[Store, Manifest] | None:
    if "://" not in settings.store.root and not Path(settings.store.root).exists():
        return None
    store = open_store(settings)
    entry = current(store, settings.publish.alias)
    return (store, open_manifest(store, entry)) if entry else None


def _matching(store: Store, manifest: Manifest, settings: Settings, where: str) -> pa.Array:
    """Return the id hashes of published products that pass a filter."""
    if manifest.table is None:
        raise InputError(f"{manifest.generation} pins no table to filter. Run `catalog-embed run` first.")
    uri, options = store.uri(manifest.table.uri), settings.store.options
    searcher = TableSearcher(uri, manifest.table.version, options)
    vids = searcher.matching(parse_where(where, searcher.columns))
    rows = take(uri, version=manifest.table.version, by=VID, values=pa.array(vids), columns=[ID_HASH], options=options)
    return rows.column(ID_HASH).combine_chunks()
