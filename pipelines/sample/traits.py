"""What a product is, before any words: codes for language, product type, color and so on, drawn for whole arrays of rows.

Rows stand in blocks of five. Some blocks begin with a family: a head and its variants, which share every trait that text
is made of and differ in size, price and stock.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from pipelines.sample.assortment import CATEGORIES, CATEGORY_OF_NOUN, NOUNS
from pipelines.sample.draws import Codes, Ids, below, bits, happens
from pipelines.sample.vocabulary import BRANDS, BRANDS_PER_CATEGORY, COLORS, MODELS

BLOCK = 5
# Families have 2 to 5 members, so 2.5 variants; 0.16 x 2.5 / 5 makes 8 % of all rows variants.
FAMILY_RATE = 0.16
SIXTEEN_BITS = 1 << 16
# English, German and French products, in parts of 20.
LANGUAGE_SHARES = (8, 7, 5)
# Tokens of the whole text: log-normal, half below 45 and one in twenty above 180.
MEDIAN_TOKENS, P95_TOKENS = 45, 180


@dataclass(frozen=True, kw_only=True)
class Traits:
    """One entry per row. `choices` holds material, feature, color and brand, as `Phrases.numbers` takes them."""

    head: Ids
    member: Codes
    language: Codes
    noun: Codes
    category: Codes
    choices: npt.NDArray[np.int64]
    model: Codes
    model_number: Codes
    tokens: Codes


def heads(seed: int, ids: Ids) -> tuple[Ids, Codes]:
    """Return each row's family head (itself, where there is no family) and its place in the family, from 0."""
    block = ids // np.uint64(BLOCK)
    place = (ids % np.uint64(BLOCK)).astype(np.int64)
    drawn = bits(seed, "family", block)
    members = 2 + below(drawn, 0, BLOCK - 1)
    inside = happens(drawn, FAMILY_RATE) & (place < members)
    return np.where(inside, block * np.uint64(BLOCK), ids), np.where(inside, place, 0)


def traits(seed: int, ids: Ids) -> Traits:
    """Draw the traits of the given rows."""
    head, member = heads(seed, ids)
    what, which, how = (bits(seed, stream, head) for stream in ("what", "which", "how"))
    in_family = happens(bits(seed, "family", head // np.uint64(BLOCK)), FAMILY_RATE) & (head % np.uint64(BLOCK) == 0)
    fields = below(what, 0, SIXTEEN_BITS)
    noun = np.where(in_family, _noun_table(sized_only=True)[fields], _noun_table(sized_only=False)[fields])
    category = np.array(CATEGORY_OF_NOUN, dtype=np.int64)[noun]
    brand = (2 * category + below(which, 32, BRANDS_PER_CATEGORY)) % len(BRANDS)
    material = below(which, 0, np.array([len(c.materials) for c in CATEGORIES])[category])
    feature = below(which, 16, np.array([len(c.features) for c in CATEGORIES])[category])
    return Traits(
        head=head,
        member=member,
        language=np.repeat(np.arange(3), LANGUAGE_SHARES)[below(what, 16, sum(LANGUAGE_SHARES))],
        noun=noun,
        category=category,
        choices=np.stack([material, feature, below(which, 48, len(COLORS)), brand], axis=1),
        model=below(how, 0, len(MODELS)),
        model_number=100 + below(how, 16, 900),
        tokens=_token_table()[below(how, 32, 1024)],
    )


@functools.cache
def _noun_table(*, sized_only: bool) -> Codes:
    """Map 16 random bits to a noun, by the share of its category."""
    shares = [CATEGORIES[c].share * (1 if CATEGORIES[c].sizes or not sized_only else 0) for c in CATEGORY_OF_NOUN]
    edges = np.cumsum(shares) * SIXTEEN_BITS // sum(shares)
    return np.searchsorted(edges, np.arange(SIXTEEN_BITS), side="right").astype(np.int64)


@functools.cache
def _token_table() -> Codes:
    """Map 10 random bits to the wanted number of tokens."""
    normal = NormalDist(sigma=math.log(P95_TOKENS / MEDIAN_TOKENS) / NormalDist().inv_cdf(0.95))
    return np.array([round(MEDIAN_TOKENS * math.exp(normal.inv_cdf((level + 0.5) / 1024))) for level in range(1024)], dtype=np.int64)


@functools.cache
def range_table(kind: str) -> Codes:
    """Map [noun, 10 random bits] to a whole number of euros (`price`) or grams (`weight`), log-uniform over the noun's range."""
    rows = []
    for noun in NOUNS:
        low, high = noun.price if kind == "price" else noun.weight
        rows.append([round(low * (high / low) ** (level / 1023)) for level in range(1024)])
    return np.array(rows, dtype=np.int64)
