"""What a report asks of a generation, what its indexes answer, and which of the answers are right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import InputError, ManifestError
from pipelines.hashes import text_hashes
from pipelines.index.lists import Numbers
from pipelines.index.probe import TIE, Scores, recall_at
from pipelines.index.segments import Mask, Vids
from pipelines.index.tuning import Exam
from pipelines.manifest import Manifest, TablePin
from pipelines.reader import Opened
from pipelines.schema import ID, VECTOR, VID
from pipelines.storage import Store
from pipelines.stores import lance
from pipelines.truth import TOP, Truth, matrix

QUERY = "query"
_MAX_FILE_BYTES = 64 << 20
_MAX_ROWS = 1_000_000
_LONGEST = 10_000
_SEARCHERS = 4
_PARQUET = frozenset({".parquet", ".pq"})


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """A generation to look at: its table is read where it lies, and its index is open only as long as it is asked."""

    store: Store
    options: Mapping[str, str] = field(repr=False)
    manifest: Manifest
    pin: TablePin

    @classmethod
    def of(cls, store: Store, manifest: Manifest, options: Mapping[str, str]) -> Self:
        """Take a generation that has a table."""
        if manifest.table is None:
            raise ManifestError(f"{manifest.generation} pins no table, so it cannot be looked at. Choose another generation.")
        return cls(store=store, options=options, manifest=manifest, pin=manifest.table)

    def open(self) -> Opened:
        """Open it as a reader does, or raise what a reader would."""
        return Opened(self.store, self.manifest, options=self.options, tower=None, cache=None, verify="size")

    @property
    def uri(self) -> str:
        """The address of the table."""
        return self.store.uri(self.pin.uri)

    @property
    def truth(self) -> Truth:
        """What searches are compared with."""
        return Truth(uri=self.uri, version=self.pin.version, options=self.options, samples=1)

    def rows(self, vids: Vids, columns: Sequence[str]) -> pa.Table:
        """Return the rows of the products with these numbers, ascending; what is not live has none."""
        names, version = [*dict.fromkeys((VID, *columns))], self.pin.version
        found = lance.take(self.uri, version=version, by=VID, values=pa.array(vids, pa.int64()), columns=names, options=self.options)
        return found.sort_by(VID)


@dataclass(frozen=True, kw_only=True, eq=False)
class Questions:
    """Queries with the names that a person knows them by: ids of products, or texts. `total` is how many there were to choose from."""

    kind: Literal["products", "texts"]
    names: tuple[str, ...]
    vectors: Scores = field(repr=False)
    total: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """The answers of one index, a row for each query: numbers (-1 where there are fewer), which are right, and how much of all that is right.

    What is `tied` is right and scores like the last exact answer, so that another product could stand in its place.
    """

    vids: Vids
    right: Mask
    tied: Mask
    recall: npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """What a generation answers: by FAISS, by Lance to the queries `asked`, and exactly; and the ids of all that was answered."""

    faiss: Found
    lance: Found
    asked: Numbers
    exam: Exam = field(repr=False)
    ids: Mapping[int, str] = field(repr=False)


def products_of(subject: Subject, samples: int) -> Questions:
    """Choose products by hash, the same ones every night as far as they live, and ask for what is near them."""
    smallest, total = np.empty(0, np.int64), 0
    for batch in lance.read_rows(subject.uri, version=subject.pin.version, columns=[VID], options=subject.options):
        total += batch.num_rows
        smallest = np.sort(np.concatenate([smallest, batch.column(VID).to_numpy()]))[:samples]
    rows = subject.rows(smallest, [ID, VECTOR])
    return Questions(kind="products", names=tuple(rows.column(ID).to_pylist()), vectors=matrix(rows.column(VECTOR)), total=total)


def texts_of(opened: Opened, texts: Sequence[str], *, total: int) -> Questions:
    """Embed texts as queries, with the tower of the generation that is asked."""
    vectors = np.stack([opened.embed(text) for text in texts])
    return Questions(kind="texts", names=tuple(texts), vectors=vectors, total=total)


def read_texts(path: Path, limit: int) -> tuple[list[str], int]:
    """Return up to `limit` distinct queries of a file, in its order, and how many it has; of more, hashes choose."""
    try:
        if (size := path.stat().st_size) > _MAX_FILE_BYTES:
            raise InputError(f"{path} has {size} bytes, more than the {_MAX_FILE_BYTES} that are read. Give a sample of its queries.")
        lines = _from_parquet(path) if path.suffix.lower() in _PARQUET else _from_text(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{path} cannot be read: {str(error)[:200]}. Give a .txt file with one query a line, or a .parquet file."
        ) from error
    texts = [*dict.fromkeys(line.strip() for line in lines if line and line.strip())]
    if not texts:
        raise InputError(f"{path} holds no query. Write one a line, or leave `--queries` out to ask for products.")
    if len(longest := max(texts, key=len)) > _LONGEST:
        raise InputError(f"{path} holds a query of {len(longest)} characters, more than {_LONGEST}. Give one query a line.")
    if len(texts) <= limit:
        return texts, len(texts)
    hashes = [*map(bytes, text_hashes(pa.array(texts)).to_pylist())]
    chosen = sorted(sorted(range(len(texts)), key=hashes.__getitem__)[:limit])
    return [texts[row] for row in chosen], len(texts)


def spread(first: int, end: int, most: int) -> Numbers:
    """Return at most so many numbers from a range, evenly over it."""
    return np.unique(np.linspace(first, end - 1, min(end - first, most)).astype(np.int64))


def ask(subject: Subject, opened: Opened, queries: Scores, *, asked: Numbers) -> Answers:
    """Ask the FAISS index, and Lance for the queries `asked`, and compare with what exact search finds in one pass over the table."""
    exam = subject.truth.exam_for(queries)
    faiss = opened.segments.search(queries, TOP)
    by_lance = np.full((len(queries), TOP), -1, np.int64)
    ids = {vid: name for row, names in zip(faiss.vids.tolist(), faiss.ids, strict=True) for vid, name in zip(row, names, strict=False)}
    with ThreadPoolExecutor(max_workers=_SEARCHERS) as pool:
        searches = pool.map(lambda row: opened.table.nearest(queries[row], TOP), asked.tolist())
        for row, answers in zip(asked.tolist(), searches, strict=True):
            numbers = answers.column(VID).to_numpy()
            by_lance[row, : len(numbers)] = numbers
            ids |= dict(zip(numbers.tolist(), answers.column(ID).to_pylist(), strict=True))

    found = [judged(subject, exam, vids) for vids in (faiss.vids, by_lance)]
    return Answers(faiss=found[0], lance=found[1], asked=asked, exam=exam, ids=ids)


def judged(subject: Subject, exam: Exam, vids: Vids) -> Found:
    """Hold answers to the first queries of an exam against exact search. What is not in the table is wrong."""
    live = subject.rows(np.unique(vids[vids >= 0]), []).column(VID).to_numpy()
    known = np.where(np.isin(vids, live), vids, -1)
    # Asked about as many queries as the exam has, the others without an answer.
    asked = np.pad(known, ((0, len(exam.queries) - len(vids)), (0, 0)), constant_values=-1)
    scores = exam.score_of(asked)[: len(vids)]
    exact, exact_scores = exam.vids[: len(vids)], exam.scores[: len(vids)]
    last = np.where(exact >= 0, exact_scores, np.inf).min(axis=1, keepdims=True)
    right = ((known[:, :, None] == exact[:, None, :]).any(axis=2) | (scores >= last - TIE)) & (known >= 0)
    recall = recall_at(known, scores, exact, exact_scores, TOP)
    return Found(vids=vids, right=right, tied=right & (scores <= last + TIE), recall=recall)


def _from_text(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}). Save it as UTF-8 text, one query a line.") from error


def _from_parquet(path: Path) -> list[str | None]:
    with pq.ParquetFile(path) as file:
        if QUERY not in file.schema_arrow.names:
            found = ", ".join(file.schema_arrow.names)[:200] or "none"
            raise InputError(f"{path} has no column `{QUERY}`; its columns are: {found}. Rename the one that holds the queries.")
        if file.metadata.num_rows > _MAX_ROWS:
            raise InputError(
                f"{path} has {file.metadata.num_rows} rows, more than the {_MAX_ROWS} that are read. Give a sample of its queries."
            )
        column = file.read(columns=[QUERY]).column(QUERY)
    try:
        texts: list[str | None] = column.cast(pa.string()).to_pylist()
    except pa.ArrowException as error:
        raise InputError(f"{path}: `{QUERY}` is {column.type}, not text. Write the queries as strings.") from error
    return texts
