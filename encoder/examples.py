"""Training examples: the tables and the batch that training reads, and judged queries joined with product texts.

Axes: Q queries, N own documents of a query, M documents of a batch, L labels of a query, P products, J judgments,
U different query keys, K any rows.
"""
# ruff: noqa: N802, N803, N806, N815 - arrays carry their shape in their names

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from encoder.errors import EncoderError

PRODUCTS = pa.schema([(name, pa.string()) for name in ("locale", "product_id", "text", "group", "vertical")])
JUDGMENTS = pa.schema([*((name, pa.string()) for name in ("query_id", "query", "locale", "product_id")), ("grade", pa.int8())])
PAIRS = pa.schema([(name, pa.string()) for name in ("query", "locale", "product_id")])
NEGATIVES = pa.schema([("query_id", pa.string()), ("locale", pa.string()), ("product_id", pa.string()), ("grade", pa.int8())])
NOT_JUDGED = -1

Ints: TypeAlias = npt.NDArray[np.int64]
Grade8: TypeAlias = npt.NDArray[np.int8]

_EDGES = ".,;:!?\"'()[]{}"


@dataclass(frozen=True)
class Grades:
    """The names of the grades, lowest first; from `positive` on a product counts as relevant."""

    names: tuple[str, ...] = ("I", "C", "S", "E")
    positive: int = 2

    def __post_init__(self) -> None:
        if len(self.names) < 2 or len(self.names) > 127 or len(set(self.names)) < len(self.names):  # noqa: PLR2004  int8
            raise EncoderError(f"The grades are {self.names}. Give 2 to 127 different names, the lowest first.")
        if not 1 <= self.positive <= self.best:
            raise EncoderError(f"positive is {self.positive}. Give the number of a grade from 1 to {self.best}.")

    @property
    def best(self) -> int:
        """Return the highest grade."""
        return len(self.names) - 1


ESCI = Grades()


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """What one rank trains on in one step. Keys are 63-bit hashes: they mean the same in every process.

    `own_QN` holds columns of `documents` and -1 as padding; in a row that has a positive, column 0 is the positive of
    InfoNCE. A mined document that nobody judged is a column, and no query's own. `labels_QL` pads with 0.
    """

    queries: tuple[str, ...]
    documents: tuple[str, ...]
    own_QN: Ints
    grades_QN: Grade8
    query_key_Q: Ints
    product_key_M: Ints
    group_key_M: Ints
    labels_QL: Ints
    label_grades_QL: Grade8


@dataclass(frozen=True, kw_only=True)
class Missing:
    """What a join left out: judgments and products that the product table lacks, and queries left without any product."""

    judgments: int = 0
    products: int = 0
    queries: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Judged:
    """The documents of queries, end to end and best grade first: those of query i are rows offsets[i] to offsets[i + 1]."""

    offsets_Q: Ints  # Q + 1
    product_J: Ints  # rows of the product table
    grade_J: Grade8
    mined_J: npt.NDArray[np.bool_]
    positives_Q: Ints  # how many lead with the query's best grade, 0 where that grade is not positive


@dataclass(frozen=True, kw_only=True, eq=False)
class Labels:
    """All known labels by query key, so that the twins of a query know each other's."""

    offsets_U: Ints  # U + 1, one row for each different query key
    row_Q: Ints
    product_key_J: Ints
    grade_J: Grade8


@dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """Queries with their judged documents, and the products whose texts they are."""

    grades: Grades
    missing: Missing
    queries: pa.Array
    id_key_Q: Ints
    query_key_Q: Ints
    texts: pa.Array
    product_key_P: Ints
    group_key_P: Ints
    judged: Judged
    labels: Labels

    def __len__(self) -> int:
        return self.id_key_Q.size

    @property
    def has_positive_Q(self) -> npt.NDArray[np.bool_]:
        """Return which queries own a document that counts as relevant."""
        return self.judged.positives_Q > 0

    def take(self, rows: npt.ArrayLike) -> Examples:
        """Return the examples of some queries, by number or by mask; they still know all labels."""
        chosen = np.arange(len(self))[np.asarray(rows)]
        offsets, at_J = ranges(self.judged.offsets_Q, chosen)
        judged = Judged(
            offsets_Q=offsets,
            product_J=self.judged.product_J[at_J],
            grade_J=self.judged.grade_J[at_J],
            mined_J=self.judged.mined_J[at_J],
            positives_Q=self.judged.positives_Q[chosen],
        )
        return replace(
            self,
            queries=self.queries.take(pa.array(chosen)),
            id_key_Q=self.id_key_Q[chosen],
            query_key_Q=self.query_key_Q[chosen],
            judged=judged,
            labels=replace(self.labels, row_Q=self.labels.row_Q[chosen]),
        )


def same_query(query: str) -> str:
    """Return the form in which two queries are the same one: width, case, spaces and punctuation at word ends do not count."""
    folded = unicodedata.normalize("NFKC", query).casefold()
    return " ".join(word for word in (word.strip(_EDGES) for word in folded.split()) if word) or folded.strip()


def conform(table: pa.Table, schema: pa.Schema, what: str) -> pa.Table:
    """Return the columns of a schema in its order and types; a lacking column, a null or a grade that is no int8 is refused."""
    lacking = [name for name in schema.names if name not in table.column_names]
    if lacking:
        raise EncoderError(f"The {what} lack {', '.join(lacking)}; they have {', '.join(table.column_names)}. Rename or add the columns.")
    try:
        conformed = table.select(schema.names).cast(schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        raise EncoderError(f"The {what} do not fit {', '.join(map(str, schema))}: {str(error)[:200]}.") from error
    nulls = {name: conformed[name].null_count for name in schema.names if conformed[name].null_count}
    if nulls:
        raise EncoderError(f"The {what} have nulls: {nulls}. Fill or drop those rows.")
    return conformed


def from_pairs(pairs: pa.Table, grades: Grades = ESCI) -> pa.Table:
    """Return pairs of a text and its product (`query`, `locale`, `product_id`) as judgments of the best grade.

    Equal texts of a locale become one query, and a pair counts once.
    """
    pairs = conform(pairs, PAIRS, "pairs").group_by(PAIRS.names, use_threads=False).aggregate([])
    keys = keys_of("pair", pairs["locale"], pairs["query"])
    ids = pa.array([f"pair-{key:016x}" for key in keys.tolist()], pa.string())
    grade = pa.array(np.full(len(pairs), grades.best, np.int8))
    return pairs.append_column("query_id", ids).append_column("grade", grade).select(JUDGMENTS.names).cast(JUDGMENTS)


def keys_of(kind: str, *columns: pa.Array | pa.ChunkedArray) -> Ints:
    """Return a 63-bit key for each row of some string columns, never 0; different kinds have different keys."""
    joined = columns[0] if len(columns) == 1 else pc.binary_join_element_wise(*columns, "\x1f")
    encoded = joined.combine_chunks().dictionary_encode() if isinstance(joined, pa.ChunkedArray) else joined.dictionary_encode()
    keys: Ints = hashed(kind, encoded.dictionary.to_pylist())[encoded.indices.to_numpy()]
    return keys


def join(judgments: pa.Table, products: pa.Table, *, grades: Grades = ESCI) -> Examples:
    """Group judgments by query and find their products by (locale, product_id); `missing` counts those that were not found."""
    judgments = conform(judgments, JUDGMENTS, "judgments")
    products = conform(products, PRODUCTS, "products")
    grade_J = _checked_grades(judgments["grade"], grades, lowest=0)
    product_key_P = keys_of("product", products["locale"], products["product_id"])
    family_P = keys_of("group", products["locale"], products["group"])
    in_family_P = pc.not_equal(products["group"], "").to_numpy()
    key_J = keys_of("product", judgments["locale"], judgments["product_id"])
    product_J = _lookup(product_key_P, key_J, "products")
    id_key_Q, first_Q, query_J = np.unique(
        keys_of("query id", judgments["locale"], judgments["query_id"]), return_index=True, return_inverse=True
    )
    _check_one_per_query(judgments, query_J, first_Q, key_J)
    at_J = np.argsort(key_J, kind="stable")
    found_J = product_J[at_J] >= 0
    lacking_J, at_J = at_J[~found_J], at_J[found_J]
    kept_Q = np.zeros(id_key_Q.size, bool)
    kept_Q[query_J[at_J]] = True
    queries = judgments["query"].take(pa.array(first_Q[kept_Q])).combine_chunks()
    query_key_Q = hashed("query", [same_query(query) for query in queries.to_pylist()])
    query_J, product_J, grade_J = (np.cumsum(kept_Q) - 1)[query_J[at_J]], product_J[at_J], grade_J[at_J]
    return Examples(
        grades=grades,
        missing=Missing(judgments=lacking_J.size, products=np.unique(key_J[lacking_J]).size, queries=int((~kept_Q).sum())),
        queries=queries,
        id_key_Q=id_key_Q[kept_Q],
        query_key_Q=query_key_Q,
        texts=products["text"].cast(pa.large_string()).combine_chunks(),
        product_key_P=product_key_P,
        group_key_P=np.where(in_family_P, family_P, product_key_P),
        judged=_judged(query_J, product_J, grade_J, np.zeros(grade_J.size, bool), grades),
        labels=_labels(query_key_Q, query_J, product_key_P[product_J], grade_J),
    )


def with_negatives(examples: Examples, negatives: pa.Table) -> Examples:
    """Add mined documents (`query_id`, `locale`, `product_id`, `grade`) to their queries; what was judged before stays as it was.

    Grade -1 says that nobody judged the document. `missing` also counts what names an unknown query or product.
    """
    negatives = conform(negatives, NEGATIVES, "negatives")
    grade_K = _checked_grades(negatives["grade"], examples.grades, lowest=NOT_JUDGED)
    key_K = keys_of("product", negatives["locale"], negatives["product_id"])
    product_K = _lookup(examples.product_key_P, key_K, "products")
    query_K = _lookup(examples.id_key_Q, keys_of("query id", negatives["locale"], negatives["query_id"]), "queries")
    found_K = (product_K >= 0) & (query_K >= 0)
    had = examples.judged
    query_J = np.concatenate([np.repeat(np.arange(len(examples)), np.diff(had.offsets_Q)), query_K[found_K]])
    product_J = np.concatenate([had.product_J, product_K[found_K]])
    mined_J = np.concatenate([had.mined_J, np.ones(int(found_K.sum()), bool)])
    grade_J = np.concatenate([had.grade_J, grade_K[found_K]])
    key_J = examples.product_key_P[product_J]
    order = np.lexsort((-grade_J, mined_J, key_J, query_J))
    kept = order[_starts(query_J[order], key_J[order])]
    query_J, product_J, grade_J, mined_J = query_J[kept], product_J[kept], grade_J[kept], mined_J[kept]
    missing = replace(
        examples.missing,
        judgments=examples.missing.judgments + int((~found_K).sum()),
        products=examples.missing.products + int(np.unique(key_K[product_K < 0]).size),
    )
    return replace(
        examples,
        missing=missing,
        judged=_judged(query_J, product_J, grade_J, mined_J, examples.grades),
        labels=_labels(examples.query_key_Q, query_J, examples.product_key_P[product_J], grade_J),
    )


def ranges(offsets: Ints, rows: Ints) -> tuple[Ints, Ints]:
    """Return the offsets of chosen rows laid end to end, and the places of all that they hold."""
    counts = np.diff(offsets)[rows]
    laid = np.concatenate([[0], np.cumsum(counts)])
    return laid, np.repeat(offsets[rows] - laid[:-1], counts) + np.arange(laid[-1])


def hashed(kind: str, texts: Iterable[str]) -> Ints:
    """Return the 63-bit key of each text, never 0."""
    person = kind.encode()[:16]
    digests = b"".join(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, person=person).digest() for text in texts)
    keys: Ints = np.maximum(np.frombuffer(digests, "<u8") >> np.uint64(1), np.uint64(1)).astype(np.int64)
    return keys


def _judged(query_J: Ints, product_J: Ints, grade_J: Grade8, mined_J: npt.NDArray[np.bool_], grades: Grades) -> Judged:
    """Sort documents, which come in the order of their keys, by query and grade, and count the leading positives."""
    order = np.lexsort((-grade_J, query_J))
    query_J, grade_J = query_J[order], grade_J[order]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(query_J))])
    best_Q = grade_J[offsets[:-1]]
    leading_J = grade_J == best_Q[query_J]
    positives_Q = np.where(best_Q >= grades.positive, np.bincount(query_J[leading_J]), 0)
    return Judged(offsets_Q=offsets, product_J=product_J[order], grade_J=grade_J, mined_J=mined_J[order], positives_Q=positives_Q)


def _labels(query_key_Q: Ints, query_J: Ints, product_key_J: Ints, grade_J: Grade8) -> Labels:
    """Unite the labels of queries with one key. Where twins disagree the higher grade holds: it excludes rather than misleads."""
    keys_U, row_Q = np.unique(query_key_Q, return_inverse=True)
    row_J = row_Q[query_J]
    order = np.lexsort((-grade_J, product_key_J, row_J))
    order = order[grade_J[order] != NOT_JUDGED]
    kept = order[_starts(row_J[order], product_key_J[order])]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row_J[kept], minlength=keys_U.size))])
    return Labels(offsets_U=offsets, row_Q=row_Q, product_key_J=product_key_J[kept], grade_J=grade_J[kept])


def _starts(*columns_J: Ints) -> npt.NDArray[np.bool_]:
    """Return where a new combination begins in sorted columns."""
    new = np.zeros(columns_J[0].size, bool)
    new[:1] = True
    for column in columns_J:
        new[1:] |= column[1:] != column[:-1]
    return new


def _lookup(keys: Ints, wanted: Ints, what: str) -> Ints:
    """Return the row of each wanted key, -1 where there is none; keys that occur twice are refused."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    twice = int((ordered[1:] == ordered[:-1]).sum())
    if twice:
        raise EncoderError(f"{twice} {what} occur twice (same locale and id). Keep one row of each.")
    if not keys.size:
        return np.full(wanted.size, -1, np.int64)
    at = np.minimum(np.searchsorted(ordered, wanted), keys.size - 1)
    return np.where(ordered[at] == wanted, order[at], -1)


def _checked_grades(column: pa.ChunkedArray, grades: Grades, *, lowest: int) -> Grade8:
    values: Grade8 = column.to_numpy()
    wrong = np.flatnonzero((values < lowest) | (values > grades.best))
    if wrong.size:
        raise EncoderError(
            f"{wrong.size} grades are outside {lowest}..{grades.best} (row {wrong[0]}: {values[wrong[0]]}). "
            f"The scale is {', '.join(grades.names)}, the lowest first: map the grades, or give other names."
        )
    return values


def _check_one_per_query(judgments: pa.Table, query_J: Ints, first_Q: Ints, key_J: Ints) -> None:
    """Refuse a query id that has several texts, and a product that is judged twice for one query."""
    text_J = keys_of("text", judgments["query"])
    different = np.flatnonzero(text_J != text_J[first_Q][query_J])
    if different.size:
        name = judgments["query_id"][int(different[0])].as_py()
        raise EncoderError(f"{different.size} judgments have another text than their query ({name!r}). Give each query its own id.")
    order = np.lexsort((key_J, query_J))
    twice = order[~_starts(query_J[order], key_J[order])]
    if twice.size:
        row = {name: judgments[name][int(twice[0])].as_py() for name in ("query_id", "product_id")}
        raise EncoderError(f"{twice.size} products are judged twice for one query ({row}). Keep one judgment; `read_judgments` does.")
