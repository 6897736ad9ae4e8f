from __future__ import annotations

import os
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder.errors import EncoderError
from encoder.examples import JUDGMENTS
from encoder.splits import Split, clusters, normal_form, split

WORDS = ("leather", "wallet", "shoes", "for", "women", "running", "128gb", "iphone", "12", "13", "case", "red", "the", "waterproof")


def judged(queries: list[str]) -> pa.Table:
    rows = [
        {"query_id": f"{number}", "query": query, "locale": "us", "product_id": f"p{place}", "grade": place}
        for number, query in enumerate(queries)
        for place in range(2)
    ]
    return pa.Table.from_pylist(rows, schema=JUDGMENTS)


def sides(parts: Split) -> dict[str, str]:
    return {query: name for name in ("train", "dev", "test") for query in getattr(parts, name)["query"].to_pylist()}


def one_error(left: str, right: str) -> bool:
    """Compare letter by letter, as the keys do not: one letter more, other or exchanged, and no digit involved."""
    if len(left) > len(right):
        left, right = right, left
    if len(right) - len(left) > 1 or left == right:
        return False
    start = next((place for place, (one, other) in enumerate(zip(left, right, strict=False)) if one != other), len(left))
    if len(left) < len(right):
        return left[start:] == right[start + 1 :]
    exchanged = left[start : start + 2] == right[start : start + 2][::-1] and left[start + 2 :] == right[start + 2 :]
    return left[start + 1 :] == right[start + 1 :] or exchanged


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join), min_size=2, max_size=8), st.data())
def test_a_query_and_its_rewriting_are_in_one_cluster(queries: list[str], data: st.DataObject) -> None:
    query = data.draw(st.sampled_from(queries))
    words = query.split()
    typed = [word for word in words if word.isalpha() and len(word) >= 5]
    rewritings = [
        " ".join(data.draw(st.permutations(words))),
        query.upper() + "!",
        query.replace(" ", "-"),
        query if set(words) <= {"for", "the"} else f"the {query}",
        query.replace(" ", ""),
    ]
    if typed:
        word = data.draw(st.sampled_from(typed))
        place = data.draw(st.integers(0, len(word) - 2))
        wrongs = (word[:place] + word[place + 1 :], word[:place] + "x" + word[place:], word[:place] + "q" + word[place + 1 :])
        rewritings += [query.replace(word, wrong, 1) for wrong in wrongs]
        rewritings.append(query.replace(word, word[:place] + word[place + 1] + word[place] + word[place + 2 :], 1))
    if len(normal_form(query).split()) >= 4:
        rewritings.append(f"{query} cheap")
    for rewriting in rewritings:
        found = clusters([*queries, rewriting])
        assert found[-1] == found[queries.index(query)], rewriting


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text("abc", min_size=5, max_size=7), min_size=2, max_size=12, unique=True))
def test_no_pair_with_one_typing_error_is_apart(words: list[str]) -> None:
    found = clusters(words)
    for left, one in enumerate(words):
        for right, other in enumerate(words):
            if one_error(one, other):
                assert found[left] == found[right], (one, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("iphone 12 case", "iphone 13 case"),
        ("ssd 500gb", "ssd 50gb"),
        ("ssd 500gb", "ssd 500tb"),
        ("iphone", "iphone 4"),
        ("tv", "tc"),
        ("red shoes", "red shoes women"),
        ("c++ primer", "c primer"),
        ("black leather wallet men 12", "black leather wallet men"),
    ],
)
def test_different_wishes_are_different_clusters(one: str, other: str) -> None:
    assert clusters([one, other]).tolist() == [0, 1]


def test_a_chain_of_near_duplicates_is_one_cluster() -> None:
    assert clusters(["wallets leather", "lamp", "leather wallets", "leather walletss", "leather wallettss"]).tolist() == [0, 1, 0, 0, 0]


def distinct(count: int) -> list[str]:
    return [f"{WORDS[number % 6]} model{number}" for number in range(count)]


def test_the_parts_are_the_whole_in_about_the_shares_and_no_cluster_crosses() -> None:
    queries = distinct(1500)
    queries += [f"the {query.upper()}" for query in queries[::3]]
    parts = split(judged(queries), dev=0.1, test=0.2, seed=3)
    assert (parts.clusters, parts.largest) == (1500, 2)
    assert len(parts.train) + len(parts.dev) + len(parts.test) == 4000
    side = sides(parts)
    assert all(side[query] == side[f"the {query.upper()}"] for query in distinct(1500)[::3])
    shares = Counter(side[query] for query in distinct(1500))
    assert 0.07 < shares["dev"] / 1500 < 0.13
    assert 0.16 < shares["test"] / 1500 < 0.24


def test_a_query_keeps_its_side_when_others_come_and_go() -> None:
    queries = distinct(300)
    before = sides(split(judged(queries), seed=1))
    after = sides(split(judged([*distinct(400)[::-1], *(f"kettle {word}" for word in WORDS)]), seed=1))
    assert all(after[query] == before[query] for query in queries)
    assert sides(split(judged(queries), seed=2)) != before


def test_shares_that_leave_nothing_and_empty_parts_are_refused() -> None:
    with pytest.raises(EncoderError, match="leave something to train on"):
        split(judged(["a"]), dev=0.5, test=0.5, seed=0)
    with pytest.raises(EncoderError, match="got none of 1 clusters"):
        split(judged(["leather wallet"]), seed=0)


@pytest.mark.skipif("CATALOG_EMBED_DATA" not in os.environ, reason="CATALOG_EMBED_DATA names no folder of judged data")
def test_typed_prefixes_of_real_queries_do_not_chain_them_all_together() -> None:
    queries = pq.read_table(Path(os.environ["CATALOG_EMBED_DATA"]) / "query_strings" / "queries.parquet")["query"].unique().to_pylist()
    assert np.bincount(clusters(queries)).max() < len(queries) // 20


def test_normal_forms_sort_words_and_drop_small_ones() -> None:
    assert normal_form("Shoes for  the WOMEN, red") == "red shoes women"
    assert normal_form("To be or") == "be"
    assert normal_form("for the") == "for the"
    assert normal_form("?!") == "?!"
    forms = [normal_form(query) for query in ("Ｗide ﬁt", "wide fit", "fit-wide")]
    assert all(one == other for one, other in pairwise(forms))
