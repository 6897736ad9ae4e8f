"""Splitting judgments by query into train, dev and test, with near-duplicate queries on one side.

Two queries are near-duplicates if one of these holds, or a chain of them; words with digits always have to be equal:
the same words but for order, spaces, punctuation and small words; one typing error (a letter more, less, other, or two
exchanged) among five letters or more; one word more among four words or more. Each has a key that both queries
share, so the search takes time in proportion to the letters, and finds every such pair.
"""
# ruff: noqa: N803, N806 - arrays carry their shape in their names (Q different queries, K keys, E edges)

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pyarrow as pa

from encoder.errors import EncoderError
from encoder.examples import JUDGMENTS, Ints, conform, hashed

_MIN_LETTERS = 5  # a letter changed in "tv" or "case" makes another word more often than a typing error
_MIN_WORDS = 4  # n of n + 1 words in common: Jaccard 0.8 or more
_SMALL = frozenset(
    [
        "a",
        "an",
        "and",
        "for",
        "from",
        "in",
        "of",
        "on",
        "or",
        "the",
        "to",
        "with",
        "auf",
        "das",
        "dem",
        "den",
        "der",
        "des",
        "die",
        "ein",
        "eine",
        "für",
        "im",
        "in",
        "mit",
        "oder",
        "und",
        "von",
        "zu",
        "zum",
        "zur",
        "a",
        "au",
        "aux",
        "avec",
        "d",
        "de",
        "des",
        "du",
        "en",
        "et",
        "l",
        "la",
        "le",
        "les",
        "ou",
        "par",
        "pour",
        "sans",
        "sur",
        "un",
        "une",
        "con",
        "de",
        "del",
        "el",
        "en",
        "la",
        "las",
        "los",
        "o",
        "para",
        "por",
        "sin",
        "un",
        "una",
        "y",
    ]
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """The judgments of three sets of queries, and how many clusters of near-duplicates there are, the largest of how many."""

    train: pa.Table
    dev: pa.Table
    test: pa.Table
    clusters: int
    largest: int


def split(judgments: pa.Table, *, dev: float = 0.1, test: float = 0.1, seed: int) -> Split:
    """Deal clusters of near-duplicate queries to train, dev and test, all locales together.

    A cluster is dealt by the hash of its smallest query and the seed. So a query stays where it is whatever is added or
    taken away, unless its own cluster gets another smallest query: by a new near-duplicate, or by one that joins two clusters.
    The shares are those of an endless number of clusters. A set that was asked for and came out empty is refused.
    """
    if not (0 <= dev < 1 and 0 <= test < 1 and dev + test < 1):
        raise EncoderError(f"dev is {dev} and test is {test}. Give shares that leave something to train on.")
    judgments = conform(judgments, JUDGMENTS, "judgments")
    encoded = judgments["query"].combine_chunks().dictionary_encode()
    names = [normal_form(query) for query in encoded.dictionary.to_pylist()]
    cluster_Q = clusters(encoded.dictionary.to_pylist())
    smallest: dict[int, str] = {}
    for cluster, name in zip(cluster_Q.tolist(), names, strict=True):
        smallest[cluster] = min(name, smallest.get(cluster, name))
    numbers = list(smallest)
    place = dict(zip(numbers, (hashed("split", [f"{seed}:{smallest[number]}" for number in numbers]) / 2.0**63).tolist(), strict=True))
    part_Q = np.array([0 if place[cluster] < test else 1 if place[cluster] < test + dev else 2 for cluster in cluster_Q.tolist()], np.int64)
    part_J = part_Q[encoded.indices.to_numpy()]
    parts = [judgments.filter(pa.array(part_J == part)) for part in range(3)]
    for name, share, part in (("test", test, parts[0]), ("dev", dev, parts[1]), ("train", 1 - dev - test, parts[2])):
        if share and not len(part):
            raise EncoderError(
                f"{name} got none of {len(numbers)} clusters of queries. Give it a larger share, more queries or another seed."
            )
    sizes = np.bincount(cluster_Q)
    return Split(train=parts[2], dev=parts[1], test=parts[0], clusters=len(numbers), largest=int(sizes.max(initial=0)))


def normal_form(query: str) -> str:
    """Return the words that count, folded and sorted; all of them where only small ones are there."""
    words = _words(query)
    return " ".join(sorted(set(words) - _SMALL or set(words))) or query


def clusters(queries: Sequence[str]) -> Ints:
    """Return for each query the number of the first query of its cluster of near-duplicates."""
    owners: list[int] = []
    texts: list[str] = []
    for number, query in enumerate(queries):
        for key in _keys(query):
            owners.append(number)
            texts.append(key)
    key_K, owner_K = hashed("near", texts), np.array(owners, np.int64)
    order = np.lexsort((owner_K, key_K))
    key_K, owner_K = key_K[order], owner_K[order]
    # "4 of 5 words" links a set to its supersets only, never two supersets with each other: those keys carry no chain.
    same = key_K[1:] == key_K[:-1]
    near = _components(len(queries), owner_K[1:][same], owner_K[:-1][same])
    left, right = _one_word_more(queries)
    return _components(len(queries), np.concatenate([near, left]), np.concatenate([np.arange(len(queries)), right]))


def _keys(query: str) -> Iterator[str]:
    """Yield the keys that near-duplicates share, the one-word rule aside; each names its rule first."""
    words = _words(query)
    if not words:
        yield f"raw {query}"
        return
    yield f"set {normal_form(query)}"
    joined = "".join(words)
    yield f"joined {joined}"
    if sum(letter.isalpha() for letter in joined) < _MIN_LETTERS:
        return
    # Two strings with one error between them have a string in common after at most one deletion on either side; the
    # words may be cut differently. A letter inside a word with digits is not deleted: 500gb is not 500mb.
    start = 0
    for word in words:
        if not any(letter.isdigit() for letter in word):
            for place in range(start, start + len(word)):
                if place == start or joined[place] != joined[place - 1]:
                    yield f"joined {joined[:place]}{joined[place + 1 :]}"
        start += len(word)


def _one_word_more(queries: Sequence[str]) -> tuple[Ints, Ints]:
    """Return the pairs of queries of which one has one word more, a word without digits."""
    exact: dict[str, int] = {}
    forms = [normal_form(query).split() for query in queries]
    for number, words in enumerate(forms):
        exact.setdefault(" ".join(words), number)
    pairs = []
    for number, words in enumerate(forms):
        if len(words) > _MIN_WORDS:
            for place, word in enumerate(words):
                shorter = exact.get(" ".join(words[:place] + words[place + 1 :]))
                if shorter is not None and not any(letter.isdigit() for letter in word):
                    pairs.append((shorter, number))
    edges = np.array(pairs, np.int64).reshape(-1, 2)
    return edges[:, 0], edges[:, 1]


def _components(size: int, left_E: Ints, right_E: Ints) -> Ints:
    """Return the smallest member of each node's connected component: hooking to the smaller root, and pointer jumping."""
    root = np.arange(size)
    while True:
        low, high = np.minimum(root[left_E], root[right_E]), np.maximum(root[left_E], root[right_E])
        if (low == high).all():
            return root
        np.minimum.at(root, high, low)
        while (root[root] != root).any():
            root = root[root]


def _words(query: str) -> list[str]:
    """Return the folded words without punctuation; signs such as + stay, c++ is not c."""
    return unicodedata.normalize("NFKC", query).casefold().translate(_punctuation()).split()


@cache
def _punctuation() -> dict[int, str]:
    return {code: " " for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)).startswith("P")}
