"""The systems that are measured side by side over one catalog and one set of judgments: words alone, towers, and both fused.

A query is answered from the products of its locale, as a shop would. Axes: Q queries, P products, N judged pairs, K ranks.
"""

# ruff: noqa: N803, N806, N815 - arrays carry their shape in their names

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from encoder.errors import EncoderError
from encoder.evaluation import Evaluation, Measures, evaluate, separation, with_vertical
from encoder.examples import JUDGMENTS, PRODUCTS, Grades, Ints, conform, keys_of
from encoder.lexical import Bm25, Fusion, fuse
from encoder.ranking import Catalog, Run, Scores, pair_scores, rank
from encoder.scoreboard import System
from encoder.tokens import Kind, Texts

BM25 = "bm25"


class Encodes(Protocol):
    """A tower that is ready: `Encoder`, or one in the middle of its training."""

    def encode(self, texts: Texts, *, kind: Kind = "document") -> npt.NDArray[np.float32]:
        """Return a unit vector for each text."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Contender:
    """A system and what it answered, so that it can be fused with another; `scores_N` are those of the judged pairs."""

    system: System
    run: Run
    scores_N: Scores | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Arena:
    """The products that are searched, the judged pairs whose product is among them, and the queries of these pairs."""

    products: pa.Table
    judgments: pa.Table
    grades: Grades
    measures: Measures
    catalog: Catalog
    queries: pa.Table
    query_N: Ints
    product_N: Ints
    missing: int

    @classmethod
    def of(cls, products: pa.Table, judgments: pa.Table, grades: Grades, *, measures: Measures | None = None) -> Arena:
        """Set judgments beside products; a pair whose product is not there cannot be found, and is counted in `missing`."""
        products, judgments = conform(products, PRODUCTS, "products"), conform(judgments, JUDGMENTS, "judgments")
        catalog = Catalog.of(products)
        keys_N = keys_of("product", judgments["locale"], judgments["product_id"])
        order = np.argsort(catalog.keys_P)
        at_N = np.minimum(np.searchsorted(catalog.keys_P[order], keys_N), max(len(order) - 1, 0))
        there_N = catalog.keys_P[order][at_N] == keys_N if len(order) else np.zeros(len(keys_N), bool)
        kept = judgments.filter(pa.array(there_N)).combine_chunks()
        if not len(kept):
            raise EncoderError(
                f"None of {len(judgments)} judged products is among {len(products)}. Check ids and locales of the judgments."
            )
        _check_one_locale(kept)
        ids = kept["query_id"].combine_chunks().dictionary_encode()
        query_N = ids.indices.to_numpy().astype(np.int64)
        first_Q = np.full(len(ids.dictionary), -1)
        first_Q[query_N[::-1]] = np.arange(len(query_N))[::-1]
        return cls(
            products=products,
            judgments=kept,
            grades=grades,
            measures=measures or Measures(),
            catalog=catalog,
            queries=kept.select(["query_id", "query", "locale"]).take(pa.array(first_Q)),
            query_N=query_N,
            product_N=order[at_N[there_N]],
            missing=int((~there_N).sum()),
        )

    @property
    def depth(self) -> int:
        """Return how many ranks are measured."""
        return max(*self.measures.recall_at, self.measures.ndcg_at, self.measures.map_at, self.measures.judged_at)

    def lexical(self) -> Contender:
        """Rank by words alone."""
        texts = self.products["text"].to_pylist()
        scores_N = np.zeros(len(self.query_N), np.float32)

        def answered(rows_Q: Ints, rows_P: Ints) -> tuple[Ints, Scores]:
            index = Bm25([texts[row] for row in rows_P.tolist()], self.catalog.ids.take(pa.array(rows_P)))
            asked = self.queries["query"].take(pa.array(rows_Q)).to_pylist()
            pairs_N = np.flatnonzero(np.isin(self.query_N, rows_Q))
            at_N = np.searchsorted(rows_Q, self.query_N[pairs_N]), np.searchsorted(rows_P, self.product_N[pairs_N])
            scores_N[pairs_N] = index.pair_scores(asked, *at_N)
            return index.top(asked, self.depth)

        return self._contender(BM25, "", self._run(answered), scores_N)

    def tower(self, name: str, encoder: Encodes, *, fingerprint: str = "", vectors_PD: Scores | None = None) -> Contender:
        """Rank by cosine; the vectors of the products are made here unless they are given."""
        found_PD = encoder.encode(self.products["text"].combine_chunks()) if vectors_PD is None else vectors_PD
        asked_QD = encoder.encode(self.queries["query"].combine_chunks(), kind="query")

        def answered(rows_Q: Ints, rows_P: Ints) -> tuple[Ints, Scores]:
            return rank(asked_QD[rows_Q], found_PD[rows_P], self.catalog.ids.take(pa.array(rows_P)), self.depth)

        scores_N = pair_scores(asked_QD, found_PD, self.query_N, self.product_N)
        return self._contender(name, fingerprint, self._run(answered), scores_N)

    def fused(self, name: str, parts: Sequence[Contender], *, method: Fusion = "rrf", weights: Sequence[float] | None = None) -> Contender:
        """Rank by several systems together; pairs have no common score, so what parts the grades is undefined."""
        return self._contender(name, "", fuse([part.run for part in parts], method=method, weights=weights), None)

    def _run(self, answered: Callable[[Ints, Ints], tuple[Ints, Scores]]) -> Run:
        """Ask the queries of each locale over its products."""
        locales, runs = np.array(self.queries["locale"].to_pylist(), dtype=np.str_), []
        for locale in dict.fromkeys(locales.tolist()):
            rows_Q, rows_P = np.flatnonzero(locales == locale), self.catalog.rows(locale)
            rows_QK, scores_QK = answered(rows_Q, rows_P)
            found_QK = np.append(rows_P, -1)[rows_QK]  # the last answers for padding
            runs.append(self.catalog.run(self.queries["query_id"].take(pa.array(rows_Q)).to_pylist(), found_QK, scores_QK))
        return Run.joined(runs)

    def _contender(self, name: str, fingerprint: str, run: Run, scores_N: Scores | None) -> Contender:
        found = evaluate(run, self.judgments, grades=self.grades, measures=self.measures)
        parted = separation(found, self.judgments, np.zeros(len(self.query_N), np.float32) if scores_N is None else scores_N, self.grades)
        if scores_N is None:
            parted = _undefined(parted, found.metrics)
        parted = with_vertical(parted, self.judgments, self.products)
        return Contender(system=System(name=name, evaluation=parted, fingerprint=fingerprint), run=run, scores_N=scores_N)


def _check_one_locale(judgments: pa.Table) -> None:
    """Refuse a query with products of two locales: it is searched in one, where a place means another product."""
    counts = judgments.group_by("query_id").aggregate([("locale", "count_distinct")])
    if several := counts.filter(pc.greater(counts["locale_count_distinct"], 1))["query_id"].to_pylist():
        raise EncoderError(
            f"{len(several)} query ids have products of two locales, {several[0]!r} for one. Give each locale's query its own id."
        )


def _undefined(evaluation: Evaluation, defined: Sequence[str]) -> Evaluation:
    """Leave the columns, and take out what they say of pairs that have no score."""
    table = evaluation.per_query
    for name in evaluation.metrics:
        if name not in defined:
            table = table.set_column(table.schema.get_field_index(name), name, pa.nulls(len(table), pa.float64()))
    return replace(evaluation, per_query=table, pooled=dict.fromkeys(evaluation.pooled))
