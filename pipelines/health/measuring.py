"""The whole report: one generation, and where there is another to compare with, what changed since."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import pyarrow as pa

from pipelines.errors import ManifestError, StoreError
from pipelines.health.churn import CentroidMoves, Churn, Side, centroid_moves, churn_of
from pipelines.health.indexes import FaissHealth, LanceHealth, bytes_by_kind, faiss_health, lance_health
from pipelines.health.parity import Mean, Parity, parity_of, recall_of
from pipelines.health.questions import Questions, Subject, ask, products_of, spread, texts_of
from pipelines.index.lists import Floats
from pipelines.index.probe import Scores
from pipelines.index.segments import segments_of
from pipelines.index.tuning import border
from pipelines.reader import Opened
from pipelines.schema import ACTIONS, ID, LOCALE
from pipelines.stores import lance

# A search of the table costs milliseconds, so it is asked no more questions than this, and half as many that were moved.
_MOST_LANCE = 128
_LABEL_COLUMNS, _LABEL_CHARACTERS = 3, 80
_EACH_EMBEDS = "each embedded the queries by itself, and answers are compared by product"
_ASK_WITH_TEXTS = "to compare answers, ask with `--queries FILE`, which each tower embeds by itself"


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What changed since another generation. What could not be compared is None, and `notes` say why."""

    generation: str
    created_at: datetime
    live: int
    churn: Churn | None
    centroids: CentroidMoves | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Report:
    """A generation in numbers. `labels` show products by what the table keeps of them; `notes` say what could not be measured.

    `recall` is on the questions, `border_recall` on products moved to where shoppers ask from.
    """

    generation: str
    parent: str | None
    created_at: datetime
    tower: str
    live: int
    planned: Mapping[str, int]
    bytes: Mapping[str, int]
    faiss: FaissHealth
    lance: LanceHealth
    asked: str
    questions: int
    questions_total: int
    recall: Mapping[str, Mean]
    border_recall: Mapping[str, Mean]
    parity: Parity | None
    compared: Compared | None
    labels: Mapping[str, str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Asking:
    """What is asked: texts, or products chosen by hash; how many; and how many of the worst queries are shown."""

    texts: Sequence[str] = ()
    texts_total: int = 0
    samples: int = 128
    top: int = 5


@dataclass(frozen=True, kw_only=True, eq=False)
class _Seen:
    """What stays of a generation when its index is closed."""

    tower: str
    side: Side | None
    faiss: FaissHealth
    centroids: Floats | None


def measure(now: Subject, before: Subject | None, asking: Asking, *, notes: Sequence[str] = (), strict: bool = True) -> Report:
    """Measure a generation and compare it with another. One index is open at a time.

    Unless it is `strict`, another generation that cannot be read any more is a note, not an error.
    """
    opened = now.open()
    questions = _questions(now, opened, asking)
    centroids = opened.segments.centroids
    edge = border(questions.vectors, centroids) if centroids is not None and questions.kind == "products" else questions.vectors[:0]
    count = len(questions.names)
    asked = np.concatenate([spread(0, count, _MOST_LANCE), spread(count, count + len(edge), _MOST_LANCE // 2)])
    answers = ask(now, opened, np.concatenate([questions.vectors, edge]), asked=asked) if count else None
    seen = _Seen(
        tower=now.manifest.tower,
        side=Side(subject=now, answers=answers) if answers else None,
        faiss=faiss_health(now, opened.segments),
        centroids=centroids,
    )
    del opened
    parity = parity_of(questions, answers, top=asking.top) if answers else None
    compared, why_not = _tried(before, seen, questions, asking, strict=strict)
    manifest = now.manifest
    return Report(
        generation=manifest.generation,
        parent=manifest.parent,
        created_at=manifest.created_at,
        tower=manifest.tower,
        live=manifest.counts["live"],
        planned=_planned(now),
        bytes=bytes_by_kind(now),
        faiss=seen.faiss,
        lance=lance_health(now),
        asked=questions.kind,
        questions=count,
        questions_total=questions.total,
        recall=recall_of(answers, slice(0, count)) if answers else {},
        border_recall=recall_of(answers, slice(count, None)) if answers and len(edge) else {},
        parity=parity,
        compared=compared,
        labels=_labels(_shown(questions, parity, compared), [now, *([before] if before and compared else [])]),
        notes=(*notes, *why_not, *([] if count else ["the generation has no product, so nothing was asked of it"])),
    )


def _questions(subject: Subject, opened: Opened, asking: Asking) -> Questions:
    if asking.texts and subject.manifest.counts["live"]:
        return texts_of(opened, asking.texts, total=asking.texts_total)
    return products_of(subject, asking.samples)


def _tried(
    before: Subject | None, now: _Seen, questions: Questions, asking: Asking, *, strict: bool
) -> tuple[Compared | None, Sequence[str]]:
    """Compare with another generation if there is one, or say why not."""
    try:
        return (_compared(before, now, questions, asking) if before else None), ()
    except (StoreError, ManifestError) as error:
        if strict or before is None:
            raise
        return None, [f"not compared with {before.manifest.generation}: {error}"]


def _compared(before: Subject, now: _Seen, questions: Questions, asking: Asking) -> Compared:
    """Compare with another generation as far as vectors and lists mean the same in both."""
    manifest, notes = before.manifest, []
    same_tower = manifest.tower == now.tower
    opened = before.open()
    queries: Scores | None = questions.vectors if now.side else None
    if not same_tower:
        how = _EACH_EMBEDS if questions.kind == "texts" else _ASK_WITH_TEXTS
        notes.append(f"{manifest.generation} was made by the tower {manifest.tower[:12]}, whose vectors mean other things: {how}")
        queries = texts_of(opened, questions.names, total=questions.total).vectors if now.side and questions.kind == "texts" else None
    side = Side(subject=before, answers=ask(before, opened, queries, asked=spread(0, 0, 0))) if queries is not None else None
    old = opened.segments.centroids
    cards = segments_of(before.store, manifest)
    del opened
    churn = churn_of(questions, side, now.side, top=asking.top) if side and now.side else None
    moves = None
    if same_tower and old is not None and now.centroids is not None:
        trained = cards[0].trained
        moves = centroid_moves(old, now.centroids, same=trained is not None and trained.sha256 == now.faiss.trained_sha256)
    elif same_tower:
        notes.append("centroids: one of the indexes has no lists, it compares every vector")
    return Compared(
        generation=manifest.generation,
        created_at=manifest.created_at,
        live=manifest.counts["live"],
        churn=churn,
        centroids=moves,
        notes=tuple(notes),
    )


def _planned(subject: Subject) -> Mapping[str, int]:
    """Return what the run did to products, as its report says; nothing where it left none."""
    for item in subject.manifest.attachments:
        if item.key == f"generations/{subject.manifest.generation}/report.json":
            actions = json.loads(subject.store.read_verified(item)).get("plan", {}).get("actions", {})
            return {name: actions[name] for name in ACTIONS if type(actions.get(name)) is int}
    return {}


def _shown(questions: Questions, parity: Parity | None, compared: Compared | None) -> set[str]:
    """Return the ids of all products that the report names."""
    worst = parity.worst if parity else ()
    changed = compared.churn.worst if compared and compared.churn else ()
    ids = {product.id for query in worst for product in query.products}
    ids |= {moved.id for query in changed for moved in (*query.came, *query.went)}
    if questions.kind == "products":
        ids |= {query.query for query in worst} | {query.query for query in changed}
    return ids


def _labels(ids: set[str], subjects: Sequence[Subject]) -> Mapping[str, str]:
    """Return what the tables keep of products in words, such as brand and category; the newer table first."""
    found: dict[str, str] = {}
    for subject in subjects:
        table = lance.TableSearcher(subject.uri, subject.pin.version, subject.options)
        names = [name for name in table.kept if name != LOCALE and pa.types.is_string(table.columns[name])][:_LABEL_COLUMNS]
        for row in table.rows(sorted(ids - found.keys()), [ID, *names]).to_pylist() if names else ():
            words = " \u00b7 ".join(row[name] for name in names if row[name])
            found[row[ID]] = words[:_LABEL_CHARACTERS]
    return found
