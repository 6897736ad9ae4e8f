"""Shopping queries for the sample catalog, and their grades: E exact, S substitute, C complement, I irrelevant.

Grades are derived from the products' attributes by the rules below. No person gave them, and they say nothing about how
well a model would do on real queries; the tables say so in their schema's metadata, under `derived`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import InputError
from pipelines.sample.assortment import CATEGORIES, CATEGORY_OF_NOUN, NOUNS
from pipelines.sample.catalog import SKU, products, row_numbers
from pipelines.sample.draws import Codes, Ids, below, bits
from pipelines.sample.spec import SampleSpec
from pipelines.sample.traits import Traits, traits
from pipelines.sample.vocabulary import COLORS, LANGUAGES, Texts

DERIVED = {
    "derived": "Queries and grades are made by rule from product attributes; no person gave or checked them. E: the product type and "
    "every constraint. S: the product type, but not every constraint. C: a type that goes with it. I: another category. "
    "E and S are complete for the judged products of the query's language; C and I are samples; the rest is not judged."
}
QUERIES = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("query", pa.string(), nullable=False),
        pa.field("locale", pa.string(), nullable=False),
        pa.field("category", pa.string(), nullable=False),
        pa.field("product_type", pa.string(), nullable=False),
        ("color", pa.string()),
        ("material", pa.string()),
        ("feature", pa.string()),
        ("max_price", pa.float64()),
    ],
    metadata=DERIVED,
)
JUDGMENTS = pa.schema(
    [pa.field(name, pa.string(), nullable=False) for name in ("query_id", SKU, "grade")],
    metadata=DERIVED,
)

# Queries ask for, and grades cover, the products of the first rows; a larger catalog adds products that are not judged.
JUDGED_ROWS = 20_000
# Per query, at most so many complements and irrelevant products.
SAMPLED: Mapping[str, int] = {"C": 10, "I": 20}

# People name limits in steps of 5 below 50, of 10 below 200, of 50 above.
_PRICE_STEPS = ((50, 5), (200, 10), (float("inf"), 50))
_NUMBERS = {noun.key: number for number, noun in enumerate(NOUNS)}


@dataclass(frozen=True, kw_only=True)
class Phrasing:
    """One way to ask: the constraints it carries, and its words in English, German and French."""

    constraints: frozenset[str]
    words: Texts


def _phrasing(constraints: str, en: str, de: str, fr: str) -> Phrasing:
    return Phrasing(constraints=frozenset(constraints.split()), words=(en, de, fr))


PHRASINGS = (
    _phrasing("", "{noun}", "{noun}", "{noun}"),
    _phrasing("feature", "{featured} {noun}", "{featured} {noun}", "{noun} {featured}"),
    _phrasing("color", "{colored} {noun}", "{colored} {noun}", "{noun} {colored}"),
    _phrasing("material", "{material} {noun}", "{noun} aus {material}", "{noun} en {material}"),
    _phrasing("max_price", "{noun} under {price}", "{noun} bis {price} €", "{noun} moins de {price} €"),
    _phrasing(
        "feature max_price",
        "{featured} {noun} under {price}",
        "{featured} {noun} unter {price} Euro",
        "{noun} {featured} à moins de {price} euros",
    ),
    _phrasing("color material", "{colored} {noun} made of {material}", "{colored} {noun} aus {material}", "{noun} {colored} en {material}"),
    _phrasing("feature color", "{featured} {noun} in {color}", "{featured} {noun}, {color}", "{noun} {featured}, couleur {color}"),
)


def queries(spec: SampleSpec, count: int) -> pa.Table:
    """Return `count` different queries, evenly over the languages; fewer where the catalog gives no more.

    Each is asked with one product of night 0 in mind, so at least that product is an exact match.
    """
    if count < 1:
        raise InputError(f"sample: {count} queries were asked for. Choose 1 or more.")
    ids, rows, on_sale = _on_sale(spec, night=0)
    prices = on_sale["price"].to_numpy()
    drawn = bits(spec.seed, "query", ids)
    ways = below(drawn, 0, len(PHRASINGS))
    # Two languages may have one query more than the third.
    open_places = [(count + len(LANGUAGES) - 1 - language) // len(LANGUAGES) for language in range(len(LANGUAGES))]
    asked: dict[tuple[int, str], dict[str, Any]] = {}
    for at in np.argsort(drawn, kind="stable"):
        language = int(rows.language[at])
        if open_places[language]:
            question = _ask(rows, int(at), PHRASINGS[ways[at]], float(prices[at]))
            if (language, question["query"]) not in asked:
                asked[language, question["query"]] = question | {"query_id": f"Q-{len(asked):05d}"}
                open_places[language] -= 1
    return pa.Table.from_pylist(list(asked.values()), schema=QUERIES)


def _ask(rows: Traits, at: int, way: Phrasing, price: float) -> dict[str, Any]:
    """Word a query for the product at this place, with the constraints of this way to ask."""
    language, noun, category = int(rows.language[at]), NOUNS[rows.noun[at]], CATEGORIES[rows.category[at]]
    material, feature = category.materials[rows.choices[at, 0]], category.features[rows.choices[at, 1]]
    color, limit = COLORS[rows.choices[at, 2]], _round_up(price)
    words = way.words[language].format(
        noun=noun.word(language),
        featured=feature.attributive(language, noun),
        colored=color.attributive(language, noun),
        color=color.plain(language),
        material=material.plain(language),
        price=limit,
    )
    asked = {"color": color.en, "material": material.en, "feature": feature.en, "max_price": float(limit)}
    kept = {name: value if name in way.constraints else None for name, value in asked.items()}
    return {"query": words, "locale": LANGUAGES[language], "category": category.name[language], "product_type": noun.key} | kept


def _round_up(price: float) -> int:
    """Return a price limit that a person would name, at or above the price."""
    step = next(step for below_price, step in _PRICE_STEPS if price < below_price)
    return int(-(-price // step) * step)


def judgments(spec: SampleSpec, asked: pa.Table, *, night: int = 0) -> pa.Table:
    """Return (query_id, sku, grade) for the products that are on sale at a night, in the language of each query.

    E: the product type and every constraint holds. S: the product type, but a constraint fails. C: a product type that
    goes with it. I: a product of another category that does not. Other types of the same category are left unjudged:
    whether a running shoe replaces a trail shoe is not written in its attributes.
    """
    ids, rows, on_sale = _on_sale(spec, night=night)
    prices = on_sale["price"].to_numpy()
    parts = [JUDGMENTS.empty_table()]
    for query in asked.to_pylist():
        grades = _grades(rows, prices, query)
        order = bits(spec.seed, query["query_id"], ids)
        kept = np.concatenate([_pick(np.flatnonzero(grades == grade), order, limit=SAMPLED.get(grade)) for grade in "ESCI"])
        found = on_sale[SKU].take(pa.array(kept))
        parts.append(pa.table([pa.repeat(query["query_id"], len(kept)), found, pa.array(grades[kept])], schema=JUDGMENTS))
    return pa.concat_tables(parts).combine_chunks()


def _on_sale(spec: SampleSpec, *, night: int) -> tuple[Ids, Traits, pa.Table]:
    """Return the judged products that are active at a night: row numbers, traits, and the catalog's own columns."""
    table = products(spec, start=0, stop=min(spec.products, JUDGED_ROWS), night=night)
    table = table.filter(table["is_active"])
    ids: Ids = row_numbers(table[SKU])
    return ids, traits(spec.seed, ids), table.select([SKU, "price"])


def _grades(rows: Traits, prices: npt.NDArray[np.float64], query: Mapping[str, Any]) -> npt.NDArray[np.str_]:
    """Return every product's grade for one query; empty where it is not judged."""
    noun = _NUMBERS[query["product_type"]]
    category = CATEGORIES[CATEGORY_OF_NOUN[noun]]
    wanted = rows.noun == noun
    exact = wanted.copy()
    words = {"material": category.materials, "feature": category.features, "color": COLORS}
    for column, (name, choices) in enumerate(words.items()):
        if query[name] is not None:
            exact &= rows.choices[:, column] == [word.en for word in choices].index(query[name])
    if query["max_price"] is not None:
        exact &= prices <= query["max_price"]
    goes_with = np.isin(rows.noun, [_NUMBERS[key] for key in NOUNS[noun].goes_with])
    elsewhere = rows.category != CATEGORY_OF_NOUN[noun]
    readable = rows.language == LANGUAGES.index(query["locale"])
    return np.select([~readable, exact, wanted, goes_with, elsewhere], ["", "E", "S", "C", "I"], "")


def _pick(places: Codes, order: Ids, *, limit: int | None) -> Codes:
    """Return all places, or the first `limit` in a random order, sorted."""
    if limit is None or len(places) <= limit:
        return places
    picked: Codes = np.sort(places[np.argsort(order[places], kind="stable")[:limit]])
    return picked


def write_queries(directory: Path, spec: SampleSpec, *, count: int = 300, night: int = 0) -> list[Path]:
    """Write `queries.parquet` and `judgments.parquet`; return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    asked = queries(spec, count)
    paths = [directory / "queries.parquet", directory / "judgments.parquet"]
    for path, table in zip(paths, (asked, judgments(spec, asked, night=night)), strict=True):
        pq.write_table(table, path, compression="zstd")
    return paths
