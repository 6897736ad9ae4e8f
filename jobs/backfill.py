"""Which products a backfill makes again: by a filter, by ids, by dates, or by what went wrong."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from jobs.inspect import quarantined
from jobs.logs import event
from jobs.nightly import Night, Work, fingerprint_of, open_source_of, open_store, started
from jobs.records import Record
from jobs.settings import Settings
from pipelines.build import Embedded
from pipelines.diff import Selection
from pipelines.errors import InputError, SourceMoved
from pipelines.generation import leased
from pipelines.hashes import id_hashes
from pipelines.manifest import Manifest
from pipelines.normalize.reasons import REASONS
from pipelines.publish import current, open_manifest
from pipelines.report import LATE_REASONS
from pipelines.schema import ADD, ID, ID_HASH, REASON, VID
from pipelines.storage import Store
from pipelines.stores.lance import TableSearcher, take
from pipelines.where import parse_where
from pipelines.window import resolve

# Longer than any night that goes first.
_JOIN_WAIT = timedelta(days=2)
_MOST_PLANS = 100

REASONS_ASKED = ("missing", "failed", "all")
# Why a product can be quarantined: each may be what a backfill mends.
CODES = (*(code for code, reason in REASONS.items() if reason.action == "quarantine"), *LATE_REASONS)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a person asks a backfill for. At least one thing, or another tower. `since` and `until` are words as for `run --since`."""

    where: str | None = None
    ids: Sequence[str] = ()
    since: str | None = None
    until: str | None = None
    # One of REASONS_ASKED, or the code of one reason.
    reason: str | None = None
    tower: Path | None = None

    def __post_init__(self) -> None:
        chosen = [name for name in ("where", "ids", "reason") if getattr(self, name)]
        if len(chosen) > 1:
            raise InputError(f"--{chosen[0]} and --{chosen[1]} say two things about which products are meant. Give one of them.")
        if not chosen and not self.dated and self.tower is None:
            raise InputError("a backfill needs to know of what: give --where, --ids, --from/--to, --reason or --tower.")
        if self.reason is not None and self.reason not in (*REASONS_ASKED, *CODES):
            raise InputError(
                f"--reason `{self.reason[:60]}` is none of {', '.join(REASONS_ASKED)}, nor a code of docs/operations.md: {', '.join(CODES)}."
            )
        if self.tower is not None and (chosen or self.dated):
            raise InputError("another tower embeds the whole catalog: give --tower alone.")

    @property
    def digest(self) -> str:
        """Hash the words, so that the same ones are known again."""
        return hashlib.sha256(repr((self.where, sorted(set(self.ids)), self.since, self.until, self.reason)).encode()).hexdigest()

    @property
    def dated(self) -> bool:
        """Whether only products of some dates are meant."""
        return self.since is not None or self.until is not None


def run_backfill(settings: Settings, night: Night) -> Record:
    """Embed what was chosen beside whoever publishes, then join: plan again under the table's lease, from what is paid for by then.

    While it embeds, a run that writes goes first, and so does a person's `pause`.
    """
    with started(settings, night, ahead=True) as work:
        embedded = _embedded(settings, night, work)
        with leased(work.options, work.record.run_id, wait=_JOIN_WAIT, tell=work.record.waits) as lease:
            joined = replace(work, lease=lease, source=open_source_of(settings))
            joined.finish(*joined.plan(settings, night), ahead=embedded)
    return work.record


def _embedded(settings: Settings, night: Night, work: Work) -> Embedded | None:
    """Embed ahead; where the catalog changes meanwhile plan again, as often as nights come while a long backfill works."""
    made: Embedded | None = None
    for number in range(1, _MOST_PLANS + 1):
        (folder := work.folder / f"ahead-{number}").mkdir()
        ahead = replace(work, folder=folder, source=open_source_of(settings))
        more = ahead.embed(*ahead.plan(settings, night), number=number)
        if more is None:
            return made
        made = more.after(made) if made else more
        if not more.moved:
            return made
        work.record.recorder.event("backfill.replans", why=more.moved)
    raise SourceMoved(
        f"the catalog changed {_MOST_PLANS} times while it was read. Run again when it rests: vectors that are made are kept."
    )


def chosen(settings: Settings, choice: Choice, night: Night) -> Night:
    """Return a night that makes what was chosen again; the window and the products are its only difference."""
    if choice.tower is not None:
        tower = choice.tower.resolve()
        live = _live(settings)
        if live is not None and live[1].tower == fingerprint_of(settings, tower):
            raise InputError(f"{live[1].generation} was made by this very tower. To embed everything again, give --reason all.")
        return replace(night, since="beginning", tower=tower)
    until = _until(settings, choice, now=night.now or datetime.now(tz=UTC)) if choice.dated else None
    selection = _selection(settings, choice)
    intent = choice.digest if selection.again else None
    return replace(night, since=choice.since or "beginning", until=until, selection=selection, intent=intent)


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
    if choice.reason is not None:
        # A row that failed has no vector, so it is missing from the index, unless a later run has mended it.
        wanted = CODES if choice.reason == "failed" else (choice.reason,)
        rejected = (rows.filter(pc.is_in(rows.column(REASON), pa.array(wanted))) for _, rows in quarantined(store, manifest))
        ids = {name for rows in rejected for name in rows.column(ID).to_pylist() if name is not None}
        found, what = (
            Selection(id_hashes=_hashed(sorted(ids)), actions=(ADD,)),
            f"no run that led here has rejected a row{'' if choice.reason == 'failed' else f' for {choice.reason}'}",
        )
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
