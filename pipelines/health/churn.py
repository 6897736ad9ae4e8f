"""What changed for those who search since another generation: products that came and went, each with the reason, and centroids that moved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipelines.health.parity import Mean
from pipelines.health.questions import Answers, Found, Questions, Subject, judged
from pipelines.index.lists import Floats
from pipelines.index.segments import Vids
from pipelines.schema import TEXT_HASH, VID

_Standing = Literal["wrong", "right", "tied"]
WENT: Mapping[str, str] = {
    "deleted": "deleted from the catalog",
    "missed": "right, and no longer found",
    "tied": "another of equal score is shown",
    "text": "its text changed",
    "wrong": "it was never right",
    "outranked": "others are nearer now",
    "tower": "another tower puts it elsewhere",
}
CAME: Mapping[str, str] = {
    "new": "new in the catalog",
    "found": "right before, and found only now",
    "tied": "it is shown for another of equal score",
    "text": "its text changed",
    "wrong": "not right: it fills the place of one that is not found",
    "risen": "others above it went",
    "tower": "another tower puts it here",
}
_TENTHS = 10
# So many centroids of the older index are followed, evenly spread over it.
_FOLLOWED = 4096
_SCORES_AT_ONCE = 1 << 23


@dataclass(frozen=True, kw_only=True)
class Moved:
    """A product that came into an answer, at its place there, or went from one, from its place before; and why."""

    id: str
    rank: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class QueryChurn:
    """One query: the share of its answer that stayed, and what came and went."""

    query: str
    overlap: float
    came: tuple[Moved, ...]
    went: tuple[Moved, ...]


@dataclass(frozen=True, kw_only=True)
class Churn:
    """How far the answers of the FAISS index stayed the same: on average, query by query in tenths, with reasons, and the worst queries."""

    overlap: Mean
    tenths: tuple[int, ...]
    changed: int
    came: Mapping[str, int]
    went: Mapping[str, int]
    worst: tuple[QueryChurn, ...]


@dataclass(frozen=True, kw_only=True)
class CentroidMoves:
    """How far centroids moved (one minus the cosine) that have a counterpart: each is the nearest of the other's index.

    `same` says that the lists are those of the older generation, so that none moved. `followed` of the older were looked at.
    """

    same: bool
    before: int
    now: int
    followed: int
    matched: int
    mean: float | None
    largest: float | None

    @property
    def lost(self) -> int:
        """How many have no counterpart."""
        return self.followed - self.matched


@dataclass(frozen=True, kw_only=True, eq=False)
class Side:
    """One of two generations that are compared, and its answers."""

    subject: Subject = field(repr=False)
    answers: Answers = field(repr=False)

    @property
    def tower(self) -> str:
        """What made its vectors."""
        return self.subject.manifest.tower


def churn_of(questions: Questions, before: Side, now: Side, *, top: int) -> Churn:
    """Compare the answers of two generations to the same questions; each product that came or went has one reason."""
    known = _States(before, now)
    queries = []
    for row, name in enumerate(questions.names):
        old, new = _answer(before.answers, row), _answer(now.answers, row)
        queries.append(
            QueryChurn(
                query=name,
                overlap=len(set(old) & set(new)) / max(len(old), len(new), 1) if old or new else 1.0,
                came=tuple(_moved(now.answers, vid, rank, known.came(row, vid)) for rank, vid in enumerate(new, 1) if vid not in old),
                went=tuple(_moved(before.answers, vid, rank, known.went(row, vid)) for rank, vid in enumerate(old, 1) if vid not in new),
            )
        )
    overlaps = np.array([query.overlap for query in queries])
    order = np.argsort(overlaps, kind="stable")[:top].tolist()
    return Churn(
        overlap=Mean.of(overlaps),
        tenths=tuple(np.bincount(np.round(overlaps * _TENTHS).astype(np.int64), minlength=_TENTHS + 1).tolist()),
        changed=int((overlaps < 1).sum()),
        came=_counted([moved for query in queries for moved in query.came], CAME),
        went=_counted([moved for query in queries for moved in query.went], WENT),
        worst=tuple(queries[at] for at in order if overlaps[at] < 1),
    )


def centroid_moves(before: Floats, now: Floats, *, same: bool) -> CentroidMoves:
    """Follow centroids from one index to the next, by mutually nearest pairs."""
    counts = {"before": len(before), "now": len(now)}
    if same:
        return CentroidMoves(same=True, **counts, followed=len(before), matched=len(before), mean=0.0, largest=0.0)
    chosen = np.unique(np.linspace(0, len(before) - 1, min(len(before), _FOLLOWED)).astype(np.int64))
    old, new = _unit(before), _unit(now)
    nearest, cosines = _nearest(old[chosen], new)
    back, _ = _nearest(new[nearest], old)
    moves = np.maximum(1.0 - cosines[back == chosen].astype(np.float64), 0.0)
    found = len(moves) > 0
    return CentroidMoves(
        same=False,
        **counts,
        followed=len(chosen),
        matched=len(moves),
        mean=float(moves.mean()) if found else None,
        largest=float(moves.max()) if found else None,
    )


class _States:
    """What the tables and exact answers of both generations say of every product that came or went."""

    def __init__(self, before: Side, now: Side) -> None:
        old, new = before.answers.faiss, now.answers.faiss
        self._towers = before.tower != now.tower
        vids = np.unique(np.concatenate([old.vids.ravel(), new.vids.ravel()]))
        self._old_texts, self._new_texts = (_texts(side.subject, vids[vids >= 0]) for side in (before, now))
        self._was, self._is = _standing(old), _standing(new)
        # The answers of one generation, held against the exact search of the other.
        self._came = _standing(judged(before.subject, before.answers.exam, new.vids[: len(old.vids)]))
        self._went = _standing(judged(now.subject, now.answers.exam, old.vids))
        self._recall = old.recall, new.recall

    def went(self, row: int, vid: int) -> str:
        """Say why a product is no longer among the answers to a query."""
        if vid not in self._new_texts:
            return "deleted"
        if (stands := self._went[row, vid]) != "wrong":
            return "tied" if stands == "tied" and self._recall[1][row] == 1 else "missed"
        if not self._towers and self._old_texts.get(vid) != self._new_texts[vid]:
            return "text"
        if self._was[row, vid] == "wrong":
            return "wrong"
        return "tower" if self._towers else "outranked"

    def came(self, row: int, vid: int) -> str:
        """Say why a product is among the answers to a query."""
        if vid not in self._old_texts:
            return "new"
        if (stands := self._came[row, vid]) != "wrong":
            return "tied" if stands == "tied" and self._recall[0][row] == 1 else "found"
        if not self._towers and self._old_texts[vid] != self._new_texts.get(vid):
            return "text"
        if self._is[row, vid] == "wrong":
            return "wrong"
        return "tower" if self._towers else "risen"


def _texts(subject: Subject, vids: Vids) -> Mapping[int, bytes]:
    rows = subject.rows(vids, [TEXT_HASH])
    return dict(zip(rows.column(VID).to_pylist(), rows.column(TEXT_HASH).to_pylist(), strict=True))


def _standing(found: Found) -> Mapping[tuple[int, int], _Standing]:
    """Return for each query and answer whether it is right, right by a tie for the last place, or wrong."""
    words: tuple[_Standing, ...] = ("wrong", "right", "tied")
    kinds = found.right.astype(np.int64) + found.tied
    return {
        (row, vid): words[kind] for row, line in enumerate(found.vids.tolist()) for vid, kind in zip(line, kinds[row].tolist(), strict=True)
    }


def _answer(answers: Answers, row: int) -> list[int]:
    return [vid for vid in answers.faiss.vids[row].tolist() if vid >= 0]


def _moved(answers: Answers, vid: int, rank: int, reason: str) -> Moved:
    return Moved(id=answers.ids[vid], rank=rank, reason=reason)


def _counted(moved: Sequence[Moved], reasons: Mapping[str, str]) -> Mapping[str, int]:
    found = Counter(item.reason for item in moved)
    return {reason: found[reason] for reason in reasons if found[reason]}


def _unit(vectors: Floats) -> Floats:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Floats = (vectors / np.maximum(lengths, np.finfo(np.float32).tiny)).astype(np.float32)
    return unit


def _nearest(queries: Floats, among: Floats) -> tuple[npt.NDArray[np.int64], Floats]:
    """Return for each row the nearest of the others and its cosine, in bounded memory."""
    at = np.empty(len(queries), np.int64)
    cosines = np.empty(len(queries), np.float32)
    step = max(1, _SCORES_AT_ONCE // max(len(among), 1))
    for start in range(0, len(queries), step):
        scores = queries[start : start + step] @ among.T
        at[start : start + step] = scores.argmax(axis=1)
        cosines[start : start + step] = scores.max(axis=1)
    return at, cosines
