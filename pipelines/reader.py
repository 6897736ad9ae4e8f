"""What readers open: one generation, verified, with its own query tower; and a handle that follows an alias as it moves.

Every query runs on one generation from its begin to its end. A move of the alias opens the next one beside it and then
swaps; queries in flight finish on the generation that they began with.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from encoder.errors import TowerError
from encoder.registry import CARD, TowerCard, TowerOptions, read_card
from pipelines.errors import CorruptObject, InputError, ManifestError, NotFound, StoreError
from pipelines.index.search import SegmentSearcher
from pipelines.manifest import Manifest, ManifestObject, check_generation
from pipelines.publish import current, open_manifest, read_manifest
from pipelines.reader_pins import pin_reader, release_reader, renew_reader
from pipelines.schema import ID
from pipelines.storage import Store
from pipelines.stores.lance import TableSearcher, as_lancedb, tuned
from pipelines.towers import ROLE, fetch
from pipelines.variants import best_of_groups
from pipelines.where import Column, Expression, Filter, Nulls, parse_where

if TYPE_CHECKING:
    from encoder.inference import Encoder

Engine = Literal["faiss", "lance"]
Verify = Literal["size", "full"]
Where = str | Column | Expression | Filter
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
            _check_tower(tower, store, manifest)
        self.table = TableSearcher(store.uri(manifest.table.uri), manifest.table.version, options, **tuned(manifest))
        self.segments = SegmentSearcher.open(store, manifest, cache=cache)
        self._encoder: Encoder | None = None
        self._lock = threading.Lock()

    def lancedb(self) -> Any:
        """Return the table as LanceDB knows it, at this generation's version."""
        table = self.manifest.table
        assert table is not None
        return as_lancedb(self._store.uri(table.uri), version=table.version, options=self._options)

    def embed(self, query: Query) -> npt.NDArray[np.float32]:
        """Return the unit vector of a query: a text through the query side of the tower, or a vector of any length."""
        if not isinstance(query, str):
            return _unit(query)
        if not query.strip():
            raise InputError("the query is empty. Give at least one word.")
        # An encoder serves one thread at a time; it uses all cores for it.
        with self._lock:
            if self._encoder is None:
                self._encoder = self._load()
            return _unit(self._encoder.encode([query], kind="query")[0])

    def _load(self) -> Encoder:
        """Open the tower that made the generation's vectors."""
        from encoder.inference import Encoder  # noqa: PLC0415  seconds of imports that a vector query need not pay

        directory = self._tower or fetch(self._store, _tower_files(self.manifest), self._cache)
        options = _options(_card(self._store, self.manifest))
        return Encoder(directory, tower=options, fingerprint=self.manifest.tower)

    def search(
        self,
        query: Query,
        k: int = 10,
        *,
        where: Where | None = None,
        nulls: Nulls = "drop",
        engine: Engine = "faiss",
        exact: bool = False,
        columns: Sequence[str] = (),
        group_by: str | None = None,
        per_group: int = 1,
    ) -> pa.Table:
        """Return the `k` nearest live products, best first: id, score (cosine), then `columns` of the table.

        `where` is a filter as a text or built with `col`; `nulls="keep"` passes also the rows that it leaves undecided
        because a value is missing. `exact` compares every vector of the table instead of asking an index. With
        `group_by`, at most `per_group` of the answers share a value of that column.
        """
        if engine not in get_args(Engine):
            raise InputError(f"there is no engine `{engine}`. Use {' or '.join(get_args(Engine))}.")
        shown = [name for name in dict.fromkeys(columns) if name != ID]
        self._check_columns([*shown, *([] if group_by is None else [group_by])], "show" if group_by in (None, *shown) else "group by")
        chosen = self._filter(where, nulls)
        k = min(_whole(k, "k"), max(self.table.num_rows, 1))
        per_group = _whole(per_group, "per_group")
        if group_by is None and per_group != 1:
            raise InputError(f"per_group is {per_group}: give `group_by` a column, and `per_group` at least one answer of each group.")
        vector = self.embed(query)
        ask = partial(self._answers, vector, where=chosen, engine=engine, exact=exact)
        if group_by is None:
            return ask(k, columns=shown)
        grouped = partial(ask, columns=[group_by])
        found = best_of_groups(grouped, group=group_by, per_group=per_group, k=k, total=self.table.num_rows)
        return self._with_columns(found.select([ID, SCORE]), shown)

    def _answers(
        self,
        vector: npt.NDArray[np.float32],
        k: int,
        *,
        where: Filter | None,
        engine: Engine,
        exact: bool,
        columns: Sequence[str],
    ) -> pa.Table:
        if engine == "lance" or exact:
            names = [name for name in columns if name != ID]
            return self.table.nearest(vector, k, where=where, exact=exact, columns=names).select([ID, SCORE, *names])
        allowed = self.table.matching(where) if where is not None else None
        hits = self.segments.search(vector[None, :], k, allowed=allowed)
        ids = pa.array(hits.ids[0], pa.string())
        answers = pa.table({ID: ids, SCORE: pa.array(hits.scores[0][: len(ids)].astype(np.float64))})
        return self._with_columns(answers, columns)

    def _with_columns(self, answers: pa.Table, columns: Sequence[str]) -> pa.Table:
        """Put columns of the table behind answers."""
        names = [name for name in columns if name != ID]
        if not names:
            return answers
        ids = answers.column(ID).combine_chunks()
        rows = self.table.rows(ids.to_pylist(), [ID, *names])
        place = pc.index_in(ids, rows.column(ID).combine_chunks())
        for name in names:
            answers = answers.append_column(rows.schema.field(name), rows.column(name).take(place))
        return answers

    def _check_columns(self, names: Sequence[str], purpose: str) -> None:
        if unknown := [name for name in names if name not in self.table.columns]:
            raise InputError(
                f"{self.manifest.generation} has no column {', '.join(map(repr, unknown))} to {purpose}. It has: {', '.join(self.table.columns)}."
            )

    def _filter(self, where: Where | None, nulls: Nulls) -> Filter | None:
        """Return a filter that fits the table."""
        columns = self.table.columns
        if where is None:
            if nulls != "drop":
                raise InputError(f"nulls is `{nulls}`, which says what a filter does with missing values, and there is no filter.")
            return None
        if isinstance(where, str):
            return parse_where(where, columns, nulls=nulls)
        if isinstance(where, Expression | Column):
            return where.filter(columns, nulls=nulls)
        if not isinstance(where, Filter):
            raise InputError(f"a filter is a text or made with `col`, not {type(where).__name__}.")
        self._check_columns(sorted(where.columns), "filter by")
        return Filter.of(where.tree, nulls)


class Reader:
    """Follows an alias. Ask it from any thread; close it, or use it as a context manager.

    `reload_error` is why it does not follow the alias at the moment; queries go on with what is open.
    """

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
        self.reload_error: Exception | None = None
        self._opened = self._open(self._wanted())
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
            # One assignment: a query sees the old generation or the new one, whole.
            self._opened = self._open(manifest)
            return True

    def close(self) -> None:
        """Stop following, and let go of the lease."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._let_go(self._pin)
        self._pin = ""

    def _wanted(self) -> Manifest:
        if self._fixed is not None:
            return read_manifest(self._store, check_generation(self._fixed))
        entry = current(self._store, self._alias)
        if entry is None:
            raise NotFound(f"alias `{self._alias}` names nothing yet in {self._store.root}. Publish a generation with `catalog-embed run`.")
        return open_manifest(self._store, entry)

    def _open(self, manifest: Manifest) -> Opened:
        """Open a generation, leased first, so that `gc` does not take it while it opens; then let the one before go."""
        pin = self._lease_of(manifest.generation)
        try:
            if pin:  # a collection that came before the lease has taken the manifest first
                read_manifest(self._store, manifest.generation)
            opened = Opened(self._store, manifest, **self._opening)
        except BaseException:
            self._let_go(pin)
            raise
        before, self._pin = self._pin, pin
        self._let_go(before)
        return opened

    def _lease_of(self, generation: str) -> str:
        if self._lease is None:
            return ""
        return pin_reader(self._store, generation, ttl=self._lease, name=f"reader-{self._alias}", clock=_now)

    def _let_go(self, pin: str) -> None:
        # A lease that cannot be removed ends by itself.
        with suppress(StoreError):
            if pin:
                release_reader(self._store, pin)

    def _renew(self) -> None:
        """Keep the lease; one that ended while this process slept is taken again."""
        if self._lease is None:
            return
        try:
            renew_reader(self._store, self._pin, ttl=self._lease, clock=_now)
        except NotFound:
            self._pin = self._lease_of(self.generation)

    def _follow(self, every_s: float) -> None:
        while not self._stop.wait(every_s):
            failure: Exception | None = None
            for step in (self._renew, self.refresh):
                try:
                    step()
                except Exception as error:  # noqa: BLE001  a thread that ends would never follow again, and say nothing
                    failure = error
            self.reload_error = failure


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


def _tower_files(manifest: Manifest) -> list[ManifestObject]:
    return [item for item in manifest.attachments if item.role == ROLE]


def _card(store: Store, manifest: Manifest) -> TowerCard:
    """Read the card of the tower that made a generation's vectors."""
    found = [item for item in _tower_files(manifest) if item.key.rpartition("/")[2] == CARD]
    if not found:
        raise ManifestError(
            f"{manifest.generation} does not keep its tower, so it cannot embed a text. Ask with a vector, or build it again."
        )
    return TowerCard.from_json(store.read_verified(found[0]))


def _options(card: TowerCard) -> TowerOptions:
    """Return what the project asked of the tower when the vectors were made."""
    return TowerOptions(template_digest=card.template_digest, dims=card.dims, max_tokens=card.max_tokens, dtype=card.dtype)


def _check_tower(directory: Path, store: Store, manifest: Manifest) -> None:
    """Refuse a query tower that did not make the generation's vectors."""
    try:
        found = read_card(directory, _options(_card(store, manifest))).fingerprint
    except TowerError as error:
        raise InputError(f"{directory} cannot be the query tower of {manifest.generation}: {error}") from error
    if found != manifest.tower:
        raise InputError(
            f"the tower in {directory} has the fingerprint {found[:12]}, but {manifest.generation} was made with {manifest.tower[:12]}. "
            "Their vectors cannot be compared: open the generation without `tower`, which loads its own."
        )


def _whole(number: Any, name: str) -> int:
    """Return a number of answers as Python's own."""
    if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < 1:
        raise InputError(f"{name} is {number!r}; ask for at least one answer, in whole numbers.")
    return int(number)


def _unit(query: Any) -> npt.NDArray[np.float32]:
    """Return a vector of length one, or say what is wrong with it."""
    try:
        vector = np.asarray(query, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"the query is neither a text nor a list of numbers: {str(error)[:200]}.") from error
    length = float(np.linalg.norm(vector.astype(np.float64)))
    if vector.ndim != 1 or not np.isfinite(length) or length == 0.0:
        raise InputError(
            f"the query vector has the shape {vector.shape} and the length {length}. Give one list of finite numbers that are not all zero."
        )
    unit: npt.NDArray[np.float32] = (vector / length).astype(np.float32)
    return unit


def _now() -> datetime:
    return datetime.now(tz=UTC)
