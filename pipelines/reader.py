"""What readers open: one generation, verified, with its own query tower; and a handle that follows an alias as it moves.

Every query runs on one generation from its begin to its end. A move of the alias opens the next one beside it and then
swaps; queries in flight finish on the generation that they began with.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from encoder.registry import TowerCard, TowerOptions, read_card
from pipelines.errors import CatalogEmbedError, CorruptObject, InputError, ManifestError, NotFound, StoreError
from pipelines.index.search import SegmentSearcher
from pipelines.leases import pin_reader, release_reader, renew_reader
from pipelines.manifest import Manifest, check_generation
from pipelines.publish import current, open_manifest, read_manifest
from pipelines.schema import ID, VID
from pipelines.storage import Store
from pipelines.stores.lance import TableSearcher, as_lancedb
from pipelines.towers import fetch
from pipelines.where import Filter, parse_where

if TYPE_CHECKING:
    from encoder.inference import Encoder

Engine = Literal["faiss", "lance"]
Verify = Literal["size", "full"]
Query = str | Sequence[float] | npt.NDArray[np.floating[Any]]

SCORE = "score"


class Opened:
    """One generation, open and verified. Safe to share between threads."""

    def __init__(
        self, store: Store, manifest: Manifest, *, options: Mapping[str, str], tower: Path | None, cache: Path | None, verify: Verify
    ) -> None:
        if manifest.table is None:
            raise ManifestError(f"{manifest.generation} pins no table, so it cannot be searched. Build it again.")
        self.manifest = manifest
        _check_objects(store, manifest, verify=verify)
        self._store, self._options, self._tower, self._cache = store, options, tower, cache
        if tower is not None:
            _check_tower(tower, manifest)
        self.table = TableSearcher(store.uri(manifest.table.uri), manifest.table.version, options)
        self.segments = SegmentSearcher.open(store, manifest, cache=cache)
        self._encoder: Encoder | None = None
        self._lock = threading.Lock()

    @property
    def encoder(self) -> Encoder:
        """The tower that made the generation's vectors, loaded when a text is first asked for."""
        with self._lock:
            if self._encoder is None:
                from encoder.inference import Encoder  # noqa: PLC0415  seconds of imports that a vector query need not pay

                tower = [item for item in self.manifest.attachments if item.role == "tower"]
                directory = self._tower or fetch(self._store, tower, self._cache)
                self._encoder = Encoder(directory, tower=_options_of(directory, self.manifest), fingerprint=self.manifest.tower)
            return self._encoder

    def lancedb(self) -> Any:
        """Return the table as LanceDB knows it, at this generation's version."""
        table = self.manifest.table
        assert table is not None
        return as_lancedb(self._store.uri(table.uri), version=table.version, options=self._options)

    def embed(self, query: Query) -> npt.NDArray[np.float32]:
        """Return the vector of a query: a text through the query side of the tower, or a vector as it is."""
        if isinstance(query, str):
            if not query.strip():
                raise InputError("the query is empty. Give at least one word.")
            vector: npt.NDArray[np.float32] = self.encoder.encode([query], kind="query")[0]
            return vector
        return np.asarray(query, dtype=np.float32)

    def search(
        self,
        query: Query,
        k: int = 10,
        *,
        where: str | Filter | None = None,
        engine: Engine = "faiss",
        exact: bool = False,
        columns: Sequence[str] = (),
    ) -> pa.Table:
        """Return the `k` nearest live products, best first: id, score (cosine), then `columns` of the table."""
        chosen = parse_where(where, self.table.columns) if isinstance(where, str) else where
        vector = self.embed(query)
        if engine == "lance" or exact:
            found = self.table.nearest(vector, k, where=chosen, exact=exact, columns=columns)
            return found.drop_columns([name for name in (VID,) if name not in columns])
        if engine != "faiss":
            raise InputError(f"there is no engine `{engine}`. Use faiss or lance.")
        allowed = self.table.matching(chosen) if chosen is not None else None
        hits = self.segments.search(vector[None, :], k, allowed=allowed)
        answers = pa.table({ID: pa.array(hits.ids[0], pa.string()), SCORE: pa.array(hits.scores[0][: len(hits.ids[0])].astype(np.float64))})
        if not columns:
            return answers
        rows = self.table.rows(hits.ids[0], [ID, *(name for name in columns if name != ID)])
        place = pa.compute.index_in(answers.column(ID), rows.column(ID).combine_chunks())
        for name in columns:
            if name != ID:
                answers = answers.append_column(name, rows.column(name).take(place))
        return answers


class Reader:
    """Follows an alias. Ask it from any thread; close it, or use it as a context manager."""

    def __init__(
        self,
        store: Store,
        alias: str,
        *,
        opening: Mapping[str, Any],
        generation: str | None,
        reload_s: float | None,
        lease: timedelta | None,
    ) -> None:
        self._store, self._alias, self._opening = store, alias, opening
        self._fixed, self._lease, self._pin = generation, lease, ""
        self._stop, self._moving = threading.Event(), threading.Lock()
        self.reload_error: CatalogEmbedError | None = None
        self._opened = self._open(self._wanted())
        self._hold()
        beat = min(filter(None, (reload_s if generation is None else None, lease.total_seconds() / 3 if lease else None)), default=None)
        self._thread = threading.Thread(target=self._follow, args=(beat,), name=f"reader-{alias}", daemon=True) if beat else None
        if self._thread is not None:
            self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def opened(self) -> Opened:
        """The generation that queries go to now. Hold on to it to ask several questions of one generation."""
        return self._opened

    @property
    def generation(self) -> str:
        """The id of that generation."""
        return self._opened.manifest.generation

    def search(self, query: Query, k: int = 10, **how: Any) -> pa.Table:
        """Search the generation that is live at this moment; see `Opened.search`."""
        return self._opened.search(query, k, **how)

    def refresh(self) -> bool:
        """Move to the generation that the alias names now. What cannot be opened is an error, and the old one stays."""
        with self._moving:
            manifest = self._wanted()
            if manifest.generation == self.generation:
                return False
            fresh = self._open(manifest)
            # One assignment: a query sees the old generation or the new one, whole.
            self._opened = fresh
            self._hold()
            return True

    def close(self) -> None:
        """Stop following, and let go of the lease."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._let_go(self._pin)

    def _wanted(self) -> Manifest:
        if self._fixed is not None:
            return read_manifest(self._store, check_generation(self._fixed))
        entry = current(self._store, self._alias)
        if entry is None:
            raise NotFound(f"alias `{self._alias}` names nothing yet in {self._store.root}. Publish a generation with `catalog-embed run`.")
        return open_manifest(self._store, entry)

    def _open(self, manifest: Manifest) -> Opened:
        return Opened(self._store, manifest, **self._opening)

    def _hold(self) -> None:
        """Lease the generation, so that `gc` keeps it, and let the one before go."""
        if self._lease is not None:
            before = self._pin
            self._pin = pin_reader(self._store, self.generation, ttl=self._lease, name=f"reader-{self._alias}", clock=_now)
            self._let_go(before)

    def _let_go(self, pin: str) -> None:
        # A lease that cannot be removed ends by itself.
        with suppress(StoreError):
            if pin:
                release_reader(self._store, pin)

    def _follow(self, every_s: float) -> None:
        while not self._stop.wait(every_s):
            try:
                if self._lease is not None:
                    renew_reader(self._store, self._pin, ttl=self._lease, clock=_now)
                self.refresh()
                self.reload_error = None
            except CatalogEmbedError as error:
                # Queries go on with what is open; whoever watches the reader sees why it does not move.
                self.reload_error = error


def open_generation(
    root: str | Path,
    alias: str = "prod",
    *,
    options: Mapping[str, str] | None = None,
    generation: str | None = None,
    tower: Path | None = None,
    reload_s: float | None = 30.0,
    lease: timedelta | None = None,
    verify: Verify = "size",
    cache: Path | None = None,
) -> Reader:
    """Open what an alias names, or one `generation`, for searching.

    `tower` is a local query tower and must be the very one that made the vectors; without it the generation's own is
    used. Every `reload_s` seconds the reader looks whether the alias moved. `lease` keeps `gc` away from the generation.
    FAISS files are always checked by sha256; `verify="full"` checks every object.
    """
    store = Store.open(root, options=options or {})
    opening = {"options": dict(options or {}), "tower": tower, "cache": cache, "verify": verify}
    return Reader(store, alias, opening=opening, generation=generation, reload_s=reload_s, lease=lease)


def _check_objects(store: Store, manifest: Manifest, *, verify: Verify) -> None:
    sizes = store.sizes(item.key for item in manifest.objects)
    bad = [item.key for item in manifest.objects if sizes.get(item.key) != item.size]
    if bad:
        raise CorruptObject(f"{manifest.generation} is damaged: {', '.join(bad[:3])} is missing or cut. Run `catalog-embed rollback`.")
    if verify == "full":
        for item in manifest.objects:
            store.verify(item)


def _check_tower(directory: Path, manifest: Manifest) -> TowerCard:
    """Refuse a query tower that did not make the generation's vectors."""
    card = read_card(directory, TowerOptions(template_digest=manifest.template_digest))
    if card.fingerprint != manifest.tower:
        card = read_card(directory, _options_of(directory, manifest))
    if card.fingerprint != manifest.tower:
        raise InputError(
            f"the tower in {directory} has the fingerprint {card.fingerprint[:12]}, but {manifest.generation} was made with {manifest.tower[:12]}. "
            "Their vectors cannot be compared: open the generation without `tower`, which loads its own."
        )
    return card


def _options_of(directory: Path, manifest: Manifest) -> TowerOptions:
    """Return the options of an exported tower, which its card keeps, or of a plain one under this template."""
    return TowerOptions() if (directory / "card.json").exists() else TowerOptions(template_digest=manifest.template_digest)


def _now() -> datetime:
    return datetime.now(tz=UTC)
