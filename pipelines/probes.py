"""Measure a candidate: what the gates judge. Samples are chosen by hash, so that the same generation gives the same numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.errors import ManifestError, OldFormat, StoreError
from pipelines.filter_probes import recall_filtered
from pipelines.gates import GateLimits, Measured
from pipelines.hashes import id_hashes, vids
from pipelines.index.probe import recall_at
from pipelines.index.search import SegmentSearcher
from pipelines.manifest import Manifest, ManifestObject, TablePin
from pipelines.schema import ACTION, ADD, DELETE, ID, ID_HASH, TEXT, TEXT_HASH, VECTOR, VID
from pipelines.storage import Store
from pipelines.stores import lance
from pipelines.stores.parquet import FINGERPRINT, decode, metadata_of
from pipelines.telemetry import Observer
from pipelines.towers import fetch
from pipelines.truth import TOP, Truth, matrix

_REPLAYED = 16
_SEARCHERS = 4
_MOST_LANCE_QUERIES = 64
_DELETED = 256
# Below so few products one pair of equal vectors is more than the share that the gate allows.
_LEAST_FOR_IDENTICAL = 200
_SCORE_TIE = 1e-5
# A gap of norms that makes a product an example; the gate has the limit.
_EXAMPLE_GAP = 1e-3

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A generation to measure. Without `new_parts` it is one that exists already, and every object of it is read back."""

    store: Store
    options: Mapping[str, str] = field(repr=False)
    manifest: Manifest
    base: Manifest | None = None
    recall_before: Mapping[str, float] = field(default_factory=dict)
    new_parts: Sequence[ManifestObject] | None = None
    texts: Mapping[str, str] = field(default_factory=dict, repr=False)
    delete_ratio: float | None = None
    samples: int = 128
    recall_filtered: float = GateLimits.recall_filtered
    token_budget: int | None = None

    @cached_property
    def table(self) -> TablePin:
        """The pinned table."""
        if self.manifest.table is None:
            raise ManifestError(f"{self.manifest.generation} pins no table, so it cannot be measured. Build it again.")
        return self.manifest.table

    @cached_property
    def address(self) -> dict[str, Any]:
        """Where the table is, as the table's functions take it."""
        return {"version": self.table.version, "options": self.options}

    @property
    def uri(self) -> str:
        """The address of the table."""
        return self.store.uri(self.table.uri)

    @property
    def truth(self) -> Truth:
        """What searches of it are compared with."""
        return Truth(uri=self.uri, samples=self.samples, **self.address)


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """Live products that are searched for: the ones with the smallest numbers, half of them changed in this run."""

    ids: list[str]
    vids: npt.NDArray[np.int64]
    text_hashes: list[bytes]
    vectors: Vectors


def measure(candidate: Candidate, observer: Observer) -> Measured:
    """Measure everything that a gate judges; what cannot be measured says why."""
    skipped: dict[str, str] = {}
    found: dict[str, Any] = {"delete_ratio": candidate.delete_ratio, "tower": candidate.manifest.tower}
    corrupt = _corrupt(candidate)
    found["corrupt"] = corrupt
    if corrupt:
        # Reading on would serve what is known to be damaged.
        return Measured(**found, skipped={})
    log = _Log(candidate)
    found |= log.measured
    with observer.stage("search"):
        segments = SegmentSearcher.open(candidate.store, candidate.manifest)
        table = lance.TableSearcher(candidate.uri, candidate.table.version, candidate.options, **lance.tuned(candidate.manifest))
        found |= _counted(candidate, segments)
        found["deleted_found"] = _still_there(candidate, log.gone, segments)
        sample = _sample(candidate, log.changed)
        found |= _searched(candidate, sample, segments, table, skipped)
        if sample.ids:
            found |= recall_filtered(segments, table, sample.vectors, skipped, floor=candidate.recall_filtered)
    with observer.stage("replay"):
        found |= _replayed(candidate, skipped)
    if candidate.delete_ratio is None:
        skipped["delete_ratio"] = "only a run knows what it took out"
    return Measured(**found, recall_before=dict(candidate.recall_before), skipped=skipped)


def _corrupt(candidate: Candidate) -> tuple[str, ...]:
    """Read back every object that is new with this generation, or every object there is."""
    known = {item.key for item in candidate.base.objects} if candidate.base and candidate.new_parts is not None else set()
    bad = []
    for item in candidate.manifest.objects:
        # The table's new files were hashed from what was read back when its version was pinned, moments ago.
        if item.key in known or (item.role == "table" and candidate.new_parts is not None):
            continue
        try:
            candidate.store.verify(item)
        except StoreError:
            bad.append(item.key)
    return tuple(bad)


class _Log:
    """What the parts of the vector log say, read back once: how many rows live, whether vectors are sound, what came and went.

    For a run only its own parts are read, and counted on top of the base; for a generation that exists, all of them.
    """

    def __init__(self, candidate: Candidate) -> None:
        own, base = candidate.new_parts, candidate.base
        extends = own is not None and base is not None and base.parts == candidate.manifest.parts[: len(base.parts)] and bool(base.parts)
        self.changed: list[npt.NDArray[np.int64]] = []
        self.gone: list[str] = []
        self._towers = {candidate.manifest.tower}
        self._non_finite: list[str] = []
        self._non_unit: list[str] = []
        self._gap = 0.0
        numbers, alive, added = [np.empty(0, np.int64)], [np.empty(0, bool)], 0
        for item in candidate.manifest.parts if own is None else own:
            data = candidate.store.read_verified(item)
            self._towers.add(metadata_of(data, where=item.key).get(FINGERPRINT, "none"))
            part = decode(data, where=item.key)
            leaves = pc.equal(part.column(ACTION), DELETE)
            numbers.append(vids(part.column(ID_HASH).combine_chunks()))
            alive.append(~leaves.to_numpy())
            added += pc.sum(pc.equal(part.column(ACTION), ADD)).as_py() or 0
            self._look_at(part.filter(pc.is_valid(part.column(VECTOR))))
            if own is not None:
                self.gone += part.filter(leaves).column(ID).to_pylist()
        if extends and base is not None:
            rows = base.counts["live"] + added - len(self.gone)
        else:
            rows = _last_alive(np.concatenate(numbers), np.concatenate(alive))
        self.measured: dict[str, Any] = {
            "parts_rows": rows,
            "non_finite": tuple(self._non_finite),
            "norm_gap": self._gap,
            "non_unit": tuple(self._non_unit),
            "fingerprints": tuple(sorted(self._towers)),
        }

    def _look_at(self, rows: pa.Table) -> None:
        """Note vectors that are not sound, and which products have a new one."""
        norms = np.linalg.norm(matrix(rows.column(VECTOR)), axis=1)
        sound = np.isfinite(norms) & (norms > 0)
        gaps = np.abs(np.where(sound, norms, 1.0) - 1.0)
        ids = rows.column(ID)
        self._non_finite += ids.filter(pa.array(~sound)).to_pylist()
        self._non_unit += ids.filter(pa.array(gaps > _EXAMPLE_GAP)).to_pylist()
        self._gap = max(self._gap, float(gaps.max(initial=0.0)))
        embedded = rows.filter(pc.is_in(rows.column(ACTION), pa.array([ADD, TEXT])))
        self.changed.append(vids(embedded.column(ID_HASH).combine_chunks()))


def _last_alive(numbers: npt.NDArray[np.int64], alive: npt.NDArray[np.bool_]) -> int:
    """Return how many products live after all rows of a log: of each product the last row counts."""
    _, last = np.unique(numbers[::-1], return_index=True)
    return int(alive[::-1][last].sum())


def _counted(candidate: Candidate, segments: SegmentSearcher) -> dict[str, Any]:
    return {
        "expected_rows": candidate.manifest.counts["live"],
        "table_rows": lance.counts(candidate.uri, **candidate.address),
        "index_rows": segments.num_live,
        "unindexed": lance.index_state(candidate.uri, options=candidate.options, version=candidate.table.version).unindexed,
    }


def _still_there(candidate: Candidate, gone: Sequence[str], segments: SegmentSearcher) -> tuple[str, ...]:
    """Return deleted products that the table or an index still has."""
    ids = sorted(gone)[:_DELETED]
    if not ids:
        return ()
    names = pa.array(ids, pa.string())
    in_table = set(lance.take(candidate.uri, by=ID, values=names, columns=[ID], **candidate.address).column(ID).to_pylist())
    in_index = segments.contains(vids(id_hashes(names)))
    return tuple(name for name, found in zip(ids, in_index.tolist(), strict=True) if found or name in in_table)


def _sample(candidate: Candidate, changed: Sequence[npt.NDArray[np.int64]]) -> _Sample:
    """Choose live products: the smallest numbers of those that changed, then the smallest of all."""
    fresh = np.sort(np.concatenate([np.empty(0, np.int64), *changed]))[: candidate.samples // 2]
    smallest = np.empty(0, np.int64)
    for batch in lance.read_rows(candidate.uri, columns=[VID], **candidate.address):
        merged = np.concatenate([smallest, batch.column(VID).to_numpy()])
        smallest = np.sort(merged)[: candidate.samples]
    chosen = np.unique(np.concatenate([fresh, smallest[: candidate.samples - len(fresh)]]))
    rows = lance.take(candidate.uri, by=VID, values=pa.array(chosen), columns=[ID, VID, TEXT_HASH, VECTOR], **candidate.address)
    rows = rows.sort_by(VID)
    return _Sample(
        ids=rows.column(ID).to_pylist(),
        vids=rows.column(VID).to_numpy(),
        text_hashes=rows.column(TEXT_HASH).to_pylist(),
        vectors=matrix(rows.column(VECTOR)),
    )


def _searched(
    candidate: Candidate, sample: _Sample, segments: SegmentSearcher, table: lance.TableSearcher, skipped: dict[str, str]
) -> dict[str, Any]:
    """Search both indexes for the sample, and compare with exact search, with each other, and with the night before."""
    if not sample.ids:
        names = (
            "self_retrieval",
            "recall_faiss",
            "recall_lance",
            "recall_filtered_faiss",
            "recall_filtered_lance",
            "parity",
            "churn",
            "identical",
        )
        skipped |= dict.fromkeys(names, "the generation has no product")
        return {}
    truth = candidate.truth
    held = truth.exam_for(sample.vectors)
    exact = held.scores
    faiss_hits = segments.search(sample.vectors, TOP)
    # A table search costs milliseconds each, so half of a large sample asks for them.
    asked = np.arange(0, len(sample.ids), 2 if len(sample.ids) > _MOST_LANCE_QUERIES else 1)
    lance_vids = np.full((len(sample.ids), TOP), -1, np.int64)
    with ThreadPoolExecutor(max_workers=_SEARCHERS) as pool:
        searches = pool.map(lambda row: table.nearest(sample.vectors[row], TOP).column(VID).to_numpy(), asked)
        for row, answers in zip(asked, searches, strict=True):
            lance_vids[row, : len(answers)] = answers
    by_faiss, by_lance = held.score_of(faiss_hits.vids), held.score_of(lance_vids)
    recalls = {
        "faiss": recall_at(faiss_hits.vids, by_faiss, held.vids, exact, TOP),
        "lance": recall_at(lance_vids[asked], by_lance[asked], held.vids[asked], exact[asked], TOP),
    }
    own = _finds_itself(sample, faiss_hits.vids, by_faiss, exact)
    own_lance = _finds_itself(sample, lance_vids, by_lance, exact)[asked]
    missing = sorted({*np.flatnonzero(~own).tolist(), *asked[~own_lance].tolist()})
    return {
        "self_retrieval": float(min(own.mean(), own_lance.mean())),
        "missing": tuple(sample.ids[row] for row in missing),
        "recall": {name: float(values.mean()) for name, values in recalls.items()},
        # Of the mean of one sample; the night before looked at another.
        "recall_error": {name: float(values.std() / math.sqrt(len(values))) for name, values in recalls.items()},
        "parity": float(recall_at(faiss_hits.vids[asked], by_faiss[asked], lance_vids[asked], by_lance[asked], TOP).mean()),
        **_identical(sample, skipped),
        **_churn(candidate, sample, faiss_hits.vids, skipped),
    }


def _finds_itself(sample: _Sample, found: npt.NDArray[np.int64], scores: Vectors, exact: Vectors) -> npt.NDArray[np.bool_]:
    """Say for each product whether it is among the best answers to its own vector; equal vectors tie."""
    tied = scores >= exact[:, :1] - _SCORE_TIE
    itself = found == sample.vids[:, None]
    # Where more products than answers share a vector, any of them will do.
    crowded = tied.all(axis=1)
    right: npt.NDArray[np.bool_] = (itself & tied).any(axis=1) | crowded
    return right


def _identical(sample: _Sample, skipped: dict[str, str]) -> dict[str, Any]:
    """Return the largest share of the sample with different texts and one vector."""
    if len(sample.ids) < min(_LEAST_FOR_IDENTICAL, 100):
        skipped["identical"] = f"a sample of {len(sample.ids)} products is too small to tell"
        return {}
    groups: dict[bytes, dict[bytes, str]] = {}
    for vector, text_hash, name in zip(sample.vectors, sample.text_hashes, sample.ids, strict=True):
        groups.setdefault(vector.tobytes(), {})[text_hash] = name
    largest = max(groups.values(), key=len)
    return {
        "identical": (len(largest) - 1) / len(sample.ids),
        "identical_ids": tuple(sorted(largest.values())) if len(largest) > 1 else (),
    }


def _churn(candidate: Candidate, sample: _Sample, now: npt.NDArray[np.int64], skipped: dict[str, str]) -> dict[str, Any]:
    """Return the share of top-10 answers that were not there in the generation before."""
    base = candidate.base
    if base is None or base.tower != candidate.manifest.tower or not base.segments:
        skipped["churn"] = "there is no earlier generation of this tower to compare with"
        skipped["recall_drop"] = skipped["churn"]
        return {}
    try:
        before, _ = SegmentSearcher.open(candidate.store, base).nearest(sample.vectors, TOP)
    except OldFormat:
        skipped["churn"] = "the index of the generation before is of an older format"
        return {}
    shares = [
        1.0 - len(set(old[old >= 0].tolist()) & set(new.tolist())) / max(1, int((old >= 0).sum()))
        for old, new in zip(before, now, strict=True)
    ]
    return {"churn": float(np.mean(shares))}


def _replayed(candidate: Candidate, skipped: dict[str, str]) -> dict[str, Any]:
    """Embed a few texts again, one at a time, and compare with what was stored."""
    if not candidate.texts:
        skipped["replay"] = "no text was embedded" if candidate.new_parts is not None else "a generation does not keep its texts"
        return {}
    from encoder.inference import EncodeOptions, Encoder  # noqa: PLC0415  a night that embeds nothing need not load torch

    names = sorted(candidate.texts)[:_REPLAYED]
    rows = lance.take(candidate.uri, by=ID, values=pa.array(names), columns=[ID, VECTOR], **candidate.address).sort_by(ID)
    tower = [item for item in candidate.manifest.attachments if item.role == "tower"]
    options = EncodeOptions(token_budget=candidate.token_budget)
    encoder = Encoder(fetch(candidate.store, tower), fingerprint=candidate.manifest.tower, options=options)
    stored = matrix(rows.column(VECTOR))
    ids = rows.column(ID).to_pylist()
    cosines = []
    for name, vector in zip(ids, stored, strict=True):
        again = encoder.encode([candidate.texts[name]])[0]
        cosines.append(float(again @ vector / (np.linalg.norm(again) * np.linalg.norm(vector))))
    order = np.argsort(cosines)
    return {"replay_cosine": min(cosines, default=1.0), "replay_ids": tuple(ids[row] for row in order[:TOP])}
