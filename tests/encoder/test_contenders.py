"""The systems of an arena beside plain computation: sorting by hand, locale by locale."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder.contenders import BM25, Arena, Contender
from encoder.errors import EncoderError
from encoder.evaluation import Measures
from encoder.examples import JUDGMENTS, PRODUCTS, Grades, keys_of
from encoder.inference import EncodeOptions, Encoder
from encoder.lexical import Bm25, Fusion
from encoder.ranking import NO_PRODUCT, Catalog, rank
from encoder.scoreboard import scoreboard
from encoder.significance import BootstrapOptions
from tests.towers import WORDS, tiny_tower

SHALLOW = Measures(recall_at=(1, 3), ndcg_at=4, map_at=3, judged_at=4)
DIMS = 4
LOCALES = ("de", "us")


class Drawn:
    """A tower whose vectors were drawn: small whole numbers, so that many products tie."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def encode(self, texts: Any, *, kind: str = "document") -> np.ndarray:
        draws = [np.random.default_rng([self.seed, *f"{kind} {text}".encode()]).integers(-1, 2, DIMS) for text in texts.to_pylist()]
        return np.array(draws, np.float32).reshape(-1, DIMS)


def product_table(rows: Sequence[tuple[str, str, str]]) -> pa.Table:
    """Make products of (locale, id, text); the vertical is the first word."""
    dicts = [
        {"locale": locale, "product_id": name, "text": text, "group": "", "vertical": text.split(" ")[0]} for locale, name, text in rows
    ]
    return pa.Table.from_pylist(dicts, schema=PRODUCTS)


def judgment_table(rows: Sequence[tuple[str, str, str, str, int]]) -> pa.Table:
    """Make judgments of (query id, query, locale, product id, grade)."""
    return pa.Table.from_pylist([dict(zip(JUDGMENTS.names, row, strict=True)) for row in rows], schema=JUDGMENTS)


def some(seed: int, *, products: int = 12, queries: int = 4) -> tuple[pa.Table, pa.Table]:
    """Return a shop in two languages whose products have the same ids in both, and judged queries of both."""
    draws = np.random.default_rng(seed)

    def words(most: int) -> str:
        return " ".join(draws.choice(WORDS[:12], size=int(draws.integers(1, most))))

    rows = [(locale, f"p{number:02d}", words(6)) for locale in LOCALES for number in range(products)]
    order = draws.permutation(len(rows)).tolist()
    judged = [
        (f"{locale}-{query}", text, locale, f"p{number:02d}", int(draws.integers(0, 4)))
        for locale in LOCALES
        for query in range(queries)
        for text in [words(4)]
        for number in draws.choice(products, size=5, replace=False).tolist()
    ]
    return product_table([rows[row] for row in order]), judgment_table([judged[row] for row in draws.permutation(len(judged)).tolist()])


def keys(run_row: np.ndarray) -> list[int]:
    return [int(key) for key in run_row if key != NO_PRODUCT]


def plain(products: pa.Table, locale: str, scores: dict[str, float], depth: int) -> list[int]:
    """Sort the ids of a locale by score and then by id, and return their keys."""
    first = sorted(scores, key=lambda name: (-scores[name], name))[:depth]
    return list(map(int, keys_of("product", pa.array([locale] * len(first), pa.string()), pa.array(first, pa.string()))))


def texts_of(products: pa.Table, locale: str) -> dict[str, str]:
    return {row["product_id"]: row["text"] for row in products.to_pylist() if row["locale"] == locale}


def asked(arena: Arena) -> list[tuple[str, str, str]]:
    return [(row["query_id"], row["query"], row["locale"]) for row in arena.queries.to_pylist()]


def answers(contender: Contender) -> dict[str, list[int]]:
    return dict(zip(contender.run.query_ids, map(keys, contender.run.keys_QK), strict=True))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_tower_is_what_sorting_its_dot_products_gives_in_each_locale(seed: int) -> None:
    products, judgments = some(seed)
    arena, encoder = Arena.of(products, judgments, Grades(), measures=SHALLOW), Drawn(seed)
    found = arena.tower("drawn", encoder)
    for name, query, locale in asked(arena):
        texts = texts_of(products, locale)
        vectors = dict(zip(texts, encoder.encode(pa.array(texts.values())), strict=True))
        vector = encoder.encode(pa.array([query]), kind="query")[0]
        scores = {product: float(vector @ vectors[product]) for product in texts}
        assert answers(found)[name] == plain(products, locale, scores, arena.depth)
    pairs = arena.judgments.to_pylist()
    expected = [encoder.encode(pa.array([row["query"]]), kind="query")[0] for row in pairs]
    own = [encoder.encode(pa.array([texts_of(products, row["locale"])[row["product_id"]]]))[0] for row in pairs]
    assert found.scores_N is not None
    np.testing.assert_array_equal(found.scores_N, np.einsum("nd,nd->n", expected, own))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_words_rank_by_bm25_over_the_texts_of_the_own_locale_alone(seed: int) -> None:
    products, judgments = some(seed)
    arena = Arena.of(products, judgments, Grades(), measures=SHALLOW)
    found = arena.lexical()
    expected = np.zeros(arena.judgments.num_rows, np.float32)
    for name, query, locale in asked(arena):
        texts = texts_of(products, locale)
        index = Bm25(list(texts.values()), list(texts))
        rows = np.arange(len(texts))
        scores = dict(zip(texts, index.pair_scores([query], np.zeros_like(rows), rows).tolist(), strict=True))
        assert answers(found)[name] == plain(products, locale, {key: score for key, score in scores.items() if score}, arena.depth)
        for number, row in enumerate(arena.judgments.to_pylist()):
            if row["query_id"] == name:
                expected[number] = scores[row["product_id"]]
    np.testing.assert_array_equal(found.scores_N, expected)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), method=st.sampled_from(["rrf", "convex"]))
def test_fusion_adds_what_ranks_or_scores_give_and_has_no_score_of_a_pair(seed: int, method: Fusion) -> None:
    products, judgments = some(seed)
    arena = Arena.of(products, judgments, Grades(), measures=SHALLOW)
    parts = [arena.tower("drawn", Drawn(seed)), arena.lexical()]
    found = arena.fused("both", parts, method=method)
    for name, row in answers(found).items():
        totals: dict[int, float] = {}
        for part in parts:
            at = part.run.query_ids.index(name)
            known = keys(part.run.keys_QK[at])
            scores = part.run.scores_QK[at, : len(known)].astype(np.float64)
            span = float(scores.max() - scores.min()) if known else 0.0
            for place, key in enumerate(known):
                share = (scores[place] - scores.min()) / span if span else 1.0
                totals[key] = totals.get(key, 0.0) + 0.5 * (1 / (61 + place) if method == "rrf" else share)
        given_totals = np.array([totals[key] for key in row], np.float32)
        assert (np.diff(given_totals) <= 0).all()
        assert min((totals[key] for key in row), default=0) >= max((total for key, total in totals.items() if key not in row), default=0)
    evaluation = found.system.evaluation
    aucs = [name for name in evaluation.metrics if name.startswith("auc_")]
    assert len(aucs) == 4
    assert all(evaluation.per_query[name].null_count == len(evaluation.per_query) for name in aucs)
    assert evaluation.pooled == dict.fromkeys(aucs)
    assert evaluation.metrics == parts[0].system.evaluation.metrics, "a board needs the same metrics of all systems"
    assert found.scores_N is None, "several systems have no common score of a pair"


def test_a_product_of_another_locale_is_neither_found_nor_judged() -> None:
    products = product_table([("us", "a", "red shoe"), ("de", "a", "red shoe"), ("de", "b", "red red shoe")])
    judgments = judgment_table([("q", "red shoe", "us", "a", 3), ("q", "red shoe", "us", "b", 3)])
    arena = Arena.of(products, judgments, Grades(), measures=SHALLOW)
    assert arena.missing == 1, "`b` is sold in another country"
    for found in (arena.lexical(), arena.tower("drawn", Drawn(0))):
        assert answers(found) == {"q": plain(products, "us", {"a": 1.0}, 1)}
        assert found.system.evaluation.per_query["recall_E@1"].to_pylist() == [1.0]
        assert found.system.evaluation.per_query["vertical"].to_pylist() == ["red"]


def test_pairs_without_their_product_are_counted_and_none_at_all_is_an_error() -> None:
    products, judgments = some(3)
    strangers = judgment_table([("de-0", "kitten", "de", "gone", 3), ("us-9", "puppy", "us", "gone", 2)])
    known = judgments.filter(pa.array([row["query_id"] != "de-0" for row in judgments.to_pylist()]))
    arena = Arena.of(products, pa.concat_tables([known, strangers]), Grades(), measures=SHALLOW)
    assert (arena.missing, arena.judgments.num_rows) == (2, known.num_rows)
    assert {name for name, _, _ in asked(arena)} == set(known["query_id"].to_pylist())
    with pytest.raises(EncoderError, match="None of 2 judged products is among 24"):
        Arena.of(products, strangers, Grades())
    with pytest.raises(EncoderError, match="None of 2 judged products is among 0"):
        Arena.of(products.slice(0, 0), strangers, Grades())


def test_an_exact_search_over_a_real_tower_is_rank_and_ignores_the_order_of_the_rows(tmp_path: Path) -> None:
    products, judgments = some(5, products=40, queries=8)
    encoder = Encoder(tiny_tower(tmp_path, prompts={"query": "find: "}), options=EncodeOptions(device="cpu"))
    arena = Arena.of(products, judgments, Grades(), measures=SHALLOW)
    found = arena.tower("tiny", encoder, fingerprint=encoder.fingerprint)
    catalog = Catalog.of(products)
    for name, query, locale in asked(arena):
        rows = catalog.rows(locale)
        own = products.take(pa.array(rows))
        places, _ = rank(encoder.encode([query], kind="query"), encoder.encode(own["text"].to_pylist()), own["product_id"], arena.depth)
        assert answers(found)[name] == catalog.keys_P[rows[places[0]]].tolist()
    vectors = encoder.encode(products["text"].combine_chunks())
    given_vectors = arena.tower("tiny", encoder, vectors_PD=vectors)
    shuffled = np.random.default_rng(0).permutation(products.num_rows)
    again = Arena.of(products.take(pa.array(shuffled)), judgments, Grades(), measures=SHALLOW).tower("tiny", encoder)
    assert answers(given_vectors) == answers(found) == answers(again)
    assert found.system.fingerprint == encoder.fingerprint


def test_a_query_with_products_of_two_locales_is_refused_and_not_searched_in_the_wrong_one() -> None:
    products, judgments = some(3)
    astray = judgment_table([("de-0", "kitten", "us", "p00", 3)])
    with pytest.raises(EncoderError, match="1 query ids have products of two locales, 'de-0' for one"):
        Arena.of(products, pa.concat_tables([judgments, astray]), Grades())


def test_contenders_of_one_arena_stand_on_one_board() -> None:
    products, judgments = some(7)
    arena = Arena.of(products, judgments, Grades(), measures=SHALLOW)
    words, drawn = arena.lexical(), arena.tower("drawn", Drawn(7))
    systems = [item.system for item in (words, drawn, arena.fused("both", [drawn, words]))]
    board = scoreboard(systems, baseline="drawn", bootstrap=BootstrapOptions(resamples=50))
    assert list(board.systems) == [BM25, "drawn", "both"]
    assert b"NaN" not in board.to_json()
    assert drawn.scores_N is not None
    assert len(drawn.scores_N) == arena.judgments.num_rows
