from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder.errors import EncoderError
from encoder.lexical import Bm25, Bm25Options, Fusion, fuse, words_of
from encoder.ranking import NO_PRODUCT, Run

texts = st.lists(st.lists(st.sampled_from("abcdefg"), max_size=8).map(" ".join), min_size=1, max_size=12)


def plain_bm25(query: str, documents: Sequence[str], *, k1: float = 1.2, b: float = 0.75) -> list[float]:
    split = [document.split() for document in documents]
    mean = sum(map(len, split)) / len(split)
    scores = []
    for words in split:
        counts, score = Counter(words), 0.0
        for word in query.split():
            if counts[word]:
                holding = sum(word in other for other in split)
                idf = math.log(1 + (len(split) - holding + 0.5) / (holding + 0.5))
                score += idf * counts[word] / (counts[word] + k1 * (1 - b + b * len(words) / mean))
        scores.append(score)
    return scores


@settings(max_examples=60, deadline=None)
@given(texts, texts, st.integers(1, 14))
def test_bm25_is_its_formula_and_leaves_out_what_shares_no_word(documents: list[str], queries: list[str], k: int) -> None:
    ids = [f"p{(number * 7) % len(documents):02d}-{number}" for number in range(len(documents))]
    index = Bm25(documents, ids)
    rows, scores = index.top(queries, k)
    query_n, product_n = (grid.ravel() for grid in np.mgrid[: len(queries), : len(documents)])
    pairs = index.pair_scores(queries, query_n, product_n)
    assert pairs.tolist() == pytest.approx([score for query in queries for score in plain_bm25(query, documents)], rel=1e-5)
    for query, found, found_scores in zip(queries, rows.tolist(), scores.tolist(), strict=True):
        wanted = plain_bm25(query, documents)
        order = sorted((row for row, score in enumerate(wanted) if score > 0), key=lambda row: (-np.float32(wanted[row]), ids[row]))[:k]
        real = [row for row in found if row >= 0]
        assert len(real) == len(order)
        assert found == real + [-1] * (k - len(real))
        assert found_scores[: len(real)] == pytest.approx([wanted[row] for row in order], rel=1e-5)
        assert [wanted[row] for row in real] == pytest.approx([wanted[row] for row in order], rel=1e-5)


def test_equal_texts_tie_and_stand_in_the_order_of_their_ids() -> None:
    rows, scores = Bm25(["red shoe", "blue shoe", "red shoe", "red shoe"], ["d", "a", "c", "b"]).top(["red shoe"], 4)
    assert rows.tolist() == [[3, 2, 0, 1]]
    assert scores[0, 0] == scores[0, 1] == scores[0, 2] > scores[0, 3]


def test_words_are_folded_in_every_language_and_numbers_stay_whole() -> None:
    assert words_of("Straße ＷＨ-1000XM4, usb-c; 1.5 L / 3,200 mAh?") == [
        "strasse",
        "wh",
        "1000xm4",
        "usb",
        "c",
        "1.5",
        "l",
        "3,200",
        "mah",
    ]
    assert words_of("Кроссовки NIKE") == ["кроссовки", "nike"]
    assert words_of("無線イヤホンsony黒") == ["無線", "線イ", "イヤ", "ヤホ", "ホン", "sony", "黒"]
    assert words_of("  ,, ") == []


def test_no_texts_and_no_words_give_empty_ranks() -> None:
    assert Bm25([], []).top(["a"], 2)[0].tolist() == [[-1, -1]]
    assert Bm25(["", "a"], ["x", "y"]).top(["", "a", "b"], 2)[0].tolist() == [[-1, -1], [1, -1], [-1, -1]]
    with pytest.raises(EncoderError, match="k is 0"):
        Bm25(["a"], ["x"]).top(["a"], 0)
    with pytest.raises(EncoderError, match="2 ids name 1 texts"):
        Bm25(["a"], ["x", "y"])
    with pytest.raises(EncoderError, match="b from 0 to 1"):
        Bm25Options(b=2)


# --- fusion ---


def run_of(rows: Sequence[dict[int, float]], *, depth: int) -> Run:
    """Make a run from scores by place; the key of a product is its place plus 100."""
    keys, places = np.zeros((len(rows), depth), np.int64), np.full((len(rows), depth), -1)
    scores = np.full((len(rows), depth), -np.inf, np.float32)
    for number, row in enumerate(rows):
        for rank, (place, score) in enumerate(sorted(row.items(), key=lambda item: (-item[1], item[0]))[:depth]):
            keys[number, rank], places[number, rank], scores[number, rank] = place + 100, place, score
    return Run(query_ids=tuple(f"q{number}" for number in range(len(rows))), keys_QK=keys, places_QK=places, scores_QK=scores)


def plain_fusion(rows: Sequence[dict[int, float]], weights: Sequence[float], method: Fusion) -> dict[int, float]:
    total: dict[int, float] = {}
    for row, weight in zip(rows, weights, strict=True):
        order = sorted(row, key=lambda place: (-row[place], place))
        low, high = min(row.values(), default=0.0), max(row.values(), default=0.0)
        for rank, place in enumerate(order, start=1):
            scaled = (row[place] - low) / (high - low) if high > low else 1.0
            total[place] = total.get(place, 0.0) + weight / sum(weights) * (1 / (60 + rank) if method == "rrf" else scaled)
    return total


ranked = st.dictionaries(st.integers(0, 9), st.integers(-4, 4).map(float), max_size=6)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(ranked, ranked), min_size=1, max_size=4),
    st.sampled_from(["rrf", "convex"]),
    st.sampled_from([(1.0, 1.0), (0.5, 2.0)]),
)
def test_fusion_is_that_of_the_plain_loop(
    drawn: list[tuple[dict[int, float], dict[int, float]]], method: Fusion, weights: tuple[float, float]
) -> None:
    fused = fuse([run_of([pair[side] for pair in drawn], depth=6) for side in (0, 1)], weights=weights, method=method)
    for number, pair in enumerate(drawn):
        wanted = plain_fusion(pair, weights, method)
        order = sorted(wanted, key=lambda place: (-np.float32(wanted[place]), place))[:6]
        real = fused.keys_QK[number] != NO_PRODUCT
        assert fused.scores_QK[number][real].tolist() == pytest.approx([wanted[place] for place in order], abs=1e-6)
        assert [wanted[key - 100] for key in fused.keys_QK[number][real].tolist()] == pytest.approx(
            [wanted[place] for place in order], abs=1e-6
        )


def test_a_run_fused_with_itself_keeps_its_order() -> None:
    run = run_of([{3: 2.0, 1: 2.0, 5: -1.0}, {}], depth=4)
    methods: tuple[Fusion, ...] = ("rrf", "convex")
    for method in methods:
        fused = fuse([run, run], method=method)
        np.testing.assert_array_equal(fused.keys_QK, run.keys_QK)


def test_runs_of_other_queries_or_catalogs_are_not_fused() -> None:
    run = run_of([{1: 1.0}], depth=2)
    other = Run(query_ids=run.query_ids, keys_QK=run.keys_QK + np.array([[5, 0]]), places_QK=run.places_QK, scores_QK=run.scores_QK)
    with pytest.raises(EncoderError, match="different catalogs"):
        fuse([run, other])
    with pytest.raises(EncoderError, match="different queries"):
        fuse([run, run_of([{1: 1.0}, {1: 1.0}], depth=2)])
    with pytest.raises(EncoderError, match="not only zeros"):
        fuse([run, run], weights=[0, 0])
