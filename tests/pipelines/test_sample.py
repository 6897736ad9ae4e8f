from __future__ import annotations

import hashlib
import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import InputError
from pipelines.sample import phrases
from pipelines.sample.assortment import CATEGORIES, NOUNS
from pipelines.sample.catalog import SCHEMA, SampleSpec, products, write
from pipelines.sample.nights import changes, next_night
from pipelines.sample.queries import judgments, queries, write_queries
from pipelines.sample.sentences import OPENERS, SHORT_OPENERS
from pipelines.sample.spec import day
from pipelines.schema import ADD, ATTR, DELETE, TEXT
from pipelines.text import parse, render

SPEC = SampleSpec()
# Many changes per night, so that few rows show every kind and several kinds meet in one row.
BUSY = SampleSpec(
    seed=11, products=600, add_rate=0.05, text_rate=0.1, price_rate=0.2, stock_rate=0.1, tombstone_rate=0.04, absence_rate=0.04
)
TEXT_FIELDS = ("lang", "title", "description", "brand", "category", "attributes")
OTHER_FIELDS = ("price", "in_stock", "rating", "weight_g", "size", "variant_group")
TEMPLATE = "{{ title }} | {{ brand }} | {{ category }} | {{ attributes | pairs(12) }} | {{ description | tokens(96) }}"

small = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**63 - 1)


@pytest.fixture(scope="module")
def catalog() -> pa.Table:
    return products(SPEC, start=0, stop=SPEC.products)


def whole(spec: SampleSpec, *, night: int) -> pa.Table:
    return products(spec, start=0, stop=spec.rows(night), night=night)


def by_sku(table: pa.Table) -> dict[str, dict[str, Any]]:
    """Rows by SKU, attributes sorted: their order in a row means nothing."""
    rows = {row["sku"]: row | {"attributes": sorted(row["attributes"])} for row in table.to_pylist()}
    assert len(rows) == table.num_rows
    return rows


def naive_changes(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What a plan would find: live rows of two states compared field by field."""
    old = {sku: row for sku, row in before.items() if row["is_active"]}
    new = {sku: row for sku, row in after.items() if row["is_active"]}
    found = dict.fromkeys(new.keys() - old.keys(), ADD) | dict.fromkeys(old.keys() - new.keys(), DELETE)
    for sku in old.keys() & new.keys():
        if any(old[sku][name] != new[sku][name] for name in TEXT_FIELDS):
            found[sku] = TEXT
        elif any(old[sku][name] != new[sku][name] for name in OTHER_FIELDS):
            found[sku] = ATTR
    return found


def truth(spec: SampleSpec, *, night: int) -> dict[str, str]:
    table = changes(spec, night=night)
    found = dict(zip(table["sku"].to_pylist(), table["action"].to_pylist(), strict=True))
    assert len(found) == table.num_rows
    return found


# Determinism


def test_a_seed_makes_the_same_rows_on_every_machine() -> None:
    rows = products(SampleSpec(seed=7, products=300), start=40, stop=340, night=5)
    digest = hashlib.sha256(json.dumps(rows.to_pylist(), default=str, ensure_ascii=False).encode()).hexdigest()
    assert digest == "fcfe976bad91f60792f5591d2d9a1b0c01dd8bc7dc63b34db9fa8454f594ff38"


@small
@given(seed=seeds, cuts=st.lists(st.integers(0, 660), max_size=4), night=st.integers(0, 3))
def test_ranges_put_together_are_the_whole(seed: int, cuts: list[int], night: int) -> None:
    spec = SampleSpec(seed=seed, products=600, add_rate=0.03, tombstone_rate=0.05, absence_rate=0.05)
    edges = [0, *sorted(cuts), 660]
    parts = [products(spec, start=start, stop=stop, night=night) for start, stop in itertools.pairwise(edges)]
    assert pa.concat_tables(parts).to_pylist() == whole(spec, night=night).to_pylist()


def test_rows_do_not_depend_on_how_many_there_are() -> None:
    few, many = SampleSpec(products=50), SampleSpec(products=10_000_000)
    assert products(few, start=0, stop=50).equals(products(many, start=0, stop=50))


def test_seeds_make_different_shops() -> None:
    one, other = (products(SampleSpec(seed=seed), start=0, stop=200)["title"].to_pylist() for seed in (1, 2))
    assert not set(one) & set(other)


def test_last_row_of_ten_million_needs_no_row_before_it() -> None:
    assert products(SampleSpec(products=10_000_000), start=9_999_999, stop=10_000_000)["sku"].to_pylist() == ["CE-09999999"]


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (5, 4)])
def test_impossible_range_is_refused(start: int, stop: int) -> None:
    with pytest.raises(InputError, match="range of rows"):
        products(SPEC, start=start, stop=stop)


@pytest.mark.parametrize("wrong", [{"products": 0}, {"seed": -1}, {"text_rate": 1.5}, {"price_rate": 0.9, "stock_rate": 0.2}])
def test_impossible_spec_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="sample:"):
        SampleSpec(**wrong)


# A real shop


def test_shop_has_three_languages_twelve_categories_and_two_dozen_brands(catalog: pa.Table) -> None:
    assert catalog.schema.equals(SCHEMA)
    assert catalog.num_rows == 5000
    assert min(Counter(catalog["lang"].to_pylist()).values()) > 1000
    for language in ("en", "de", "fr"):
        rows = catalog.filter(pc.equal(catalog["lang"], language))
        assert len(pc.unique(rows["category"])) == 12
        assert len(pc.unique(rows["brand"])) >= 20


def test_columns_are_typed_and_null_only_where_that_means_something(catalog: pa.Table) -> None:
    for name in set(SCHEMA.names) - {"description", "rating", "size"}:
        assert catalog[name].null_count == 0, name
    assert 0.02 < catalog["description"].null_count / 5000 < 0.08
    assert 0.1 < catalog["rating"].null_count / 5000 < 0.2
    sized = {category.name[0] for category in CATEGORIES if category.sizes}
    english = catalog.filter(pc.equal(catalog["lang"], "en"))
    assert set(english.filter(pc.is_valid(english["size"]))["category"].to_pylist()) == sized
    prices = catalog["price"].to_numpy()
    assert prices.min() > 1
    assert np.array_equal(prices, np.round(prices, 2))


def test_lengths_of_rendered_texts_are_near_log_normal(catalog: pa.Table) -> None:
    tokens = np.array([len(text.split()) * 1.3 for text in render(parse(TEMPLATE.replace(" | tokens(96)", "")), catalog).to_pylist()])
    assert 40 < np.median(tokens) < 50
    assert 150 < np.percentile(tokens, 95) < 210
    assert tokens.max() < 500
    logs = np.log(tokens)
    assert abs(((logs - logs.mean()) ** 3).mean() / logs.std() ** 3) < 1


def test_titles_have_the_length_of_titles(catalog: pa.Table) -> None:
    characters = pc.utf8_length(catalog["title"]).to_numpy()
    assert characters.min() >= 20
    assert characters.max() <= 90


def test_no_german_or_french_text_holds_english_words_or_open_slots(catalog: pa.Table) -> None:
    english = {"the", "and", "with", "of", "made", "is", "are", "this", "these"}
    for row in catalog.to_pylist():
        text = " ".join([row["title"], row["description"] or "", *(f"{key} {value}" for key, value in row["attributes"])])
        assert "{" not in text
        if row["lang"] != "en":
            assert not english & set(re.findall(r"\w+", text.lower())), text


def test_adjectives_agree_with_their_nouns() -> None:
    titles = set(phrases.titles().strings.to_pylist())
    assert {"Waterproof Trail Shoes", "Leichter Schlafsack", "Leichtes Zelt", "Leichte Jacke", "Chaussures de trail étanches"} <= titles
    assert {"Veste légère", "Porte-bagages léger", "Vêtements"} & titles == {"Veste légère", "Porte-bagages léger"}


def test_no_sentence_stands_twice_in_a_description(catalog: pa.Table) -> None:
    stepped = phrases.descriptions().patterns - len(OPENERS) - len(SHORT_OPENERS)
    assert all(stepped % divisor for divisor in range(2, stepped)), "stepping repeats none only over a prime number of sentences"
    for text in catalog["description"].drop_null().to_pylist():
        sentences = re.split(r"(?<=[.?!]) ", text)
        assert len(sentences) == len(set(sentences))


def test_everything_that_goes_with_a_product_is_in_the_shop() -> None:
    known = [noun.key for noun in NOUNS]
    assert len(known) == len(set(known))
    for noun in NOUNS:
        assert noun.goes_with
        assert set(noun.goes_with) <= set(known) - {noun.key}


def test_variants_share_what_text_is_made_of_and_nothing_that_is_sold(catalog: pa.Table) -> None:
    families: dict[str, list[dict[str, Any]]] = {}
    for row in by_sku(catalog).values():
        families.setdefault(row["variant_group"], []).append(row)
    assert 0.06 < 1 - len(families) / catalog.num_rows < 0.10
    for members in families.values():
        assert len({str([row[name] for name in TEXT_FIELDS]) for row in members}) == 1
        if len(members) > 1:
            assert len({row["size"] for row in members}) == len(members)
    assert max(map(len, families.values())) == 5
    several = [members for members in families.values() if len(members) > 1]
    assert sum(len({row["price"] for row in members}) > 1 for members in several) > len(several) * 0.9


def test_attributes_stand_in_another_order_in_another_row(catalog: pa.Table) -> None:
    orders = {
        tuple(key for key, _ in row)
        for row, lang in zip(catalog["attributes"].to_pylist(), catalog["lang"].to_pylist(), strict=True)
        if lang == "en" and len(row) == 3
    }
    assert len(orders) == 6


# Nights


@settings(max_examples=15, deadline=None)
@given(seed=seeds, night=st.integers(1, 5))
def test_changes_are_what_a_comparison_of_two_nights_finds(seed: int, night: int) -> None:
    spec = SampleSpec(**(BUSY.__dict__ | {"seed": seed}))
    before, after = (by_sku(whole(spec, night=n)) for n in (night - 1, night))
    assert truth(spec, night=night) == naive_changes(before, after)


@pytest.mark.parametrize("night", [1, 2, 7])
def test_modified_at_moves_exactly_when_a_row_changes_and_within_that_day(night: int) -> None:
    before, after, changed = by_sku(whole(BUSY, night=night - 1)), by_sku(whole(BUSY, night=night)), truth(BUSY, night=night)
    for sku, row in after.items():
        moved = sku not in before or row["modified_at"] != before[sku]["modified_at"]
        assert moved == (sku in changed)
        if moved:
            assert day(night) <= row["modified_at"] < day(night + 1)


def test_first_night_was_modified_over_the_year_before(catalog: pa.Table) -> None:
    times = catalog["modified_at"].to_pylist()
    assert max(times) < day(0)
    assert day(-365) <= min(times) < day(-350)


def test_price_edits_keep_text_and_text_edits_change_what_the_tower_reads() -> None:
    before, after, changed = whole(BUSY, night=3), whole(BUSY, night=4), truth(BUSY, night=4)
    template = parse(TEMPLATE)
    texts = [dict(zip(table["sku"].to_pylist(), render(template, table).to_pylist(), strict=True)) for table in (before, after)]
    kinds = Counter(changed.values())
    assert min(kinds[ATTR], kinds[TEXT]) > 20
    for sku, action in changed.items():
        if action in {ATTR, TEXT}:
            assert (texts[0][sku] != texts[1][sku]) == (action == TEXT)


def test_deletes_are_tombstones_that_stay_and_absences_that_are_missing() -> None:
    before, after = by_sku(whole(BUSY, night=1)), by_sku(whole(BUSY, night=2))
    deleted = [sku for sku, action in truth(BUSY, night=2).items() if action == DELETE]
    tombstones = [sku for sku in deleted if sku in after]
    assert min(len(tombstones), len(deleted) - len(tombstones)) > 10
    for sku in tombstones:
        assert after[sku] == before[sku] | {"is_active": False, "modified_at": after[sku]["modified_at"]}
    later = by_sku(whole(BUSY, night=6))
    assert all(later[sku] == after[sku] for sku in tombstones)
    assert not set(deleted) - set(tombstones) & set(later)


def test_rates_of_a_default_night_are_near_the_spec() -> None:
    spec = SampleSpec(products=200_000)
    counts = Counter(truth(spec, night=1).values())
    assert counts[ADD] == 800
    for action, rate in ((TEXT, 0.006), (ATTR, 0.02), (DELETE, 0.003)):
        assert counts[action] / 200_000 == pytest.approx(rate, rel=0.12)


def test_next_night_gives_the_default_catalog_and_its_changes() -> None:
    table, changed = next_night(7, 2)
    assert by_sku(table) == by_sku(whole(SPEC, night=2))
    assert changed.equals(changes(SPEC, night=2))
    assert table["sku"].to_pylist() != sorted(table["sku"].to_pylist())


def test_first_night_has_no_changes_to_ask_for() -> None:
    with pytest.raises(InputError, match="no night before"):
        changes(SPEC, night=0)


# Files


def test_files_of_two_nights_hold_their_rows_in_different_orders(tmp_path: Path) -> None:
    spec = SampleSpec(products=900, add_rate=0, text_rate=0, price_rate=0, stock_rate=0, tombstone_rate=0, absence_rate=0)
    orders = []
    for night in (0, 1):
        paths = write(tmp_path / str(night), spec, night=night, rows_per_file=200)
        assert [path.name for path in paths] == [f"part-{number:05d}.parquet" for number in range(5)]
        assert all(pq.read_metadata(path).num_rows <= 200 for path in paths)
        table = pa.concat_tables(pq.read_table(path) for path in paths)
        assert by_sku(table) == by_sku(whole(spec, night=night))
        orders.append(table["sku"].to_pylist())
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]
    assert [int(sku.removeprefix("CE-")) // 200 for sku in orders[0][::200]] != list(range(5))


def test_a_smaller_catalog_leaves_no_part_of_a_larger_one(tmp_path: Path) -> None:
    write(tmp_path, SampleSpec(products=1000), rows_per_file=100)
    (tmp_path / "part-of-something-else.parquet").write_bytes(b"kept")
    paths = write(tmp_path, SampleSpec(products=300), rows_per_file=100)
    assert {path.name for path in tmp_path.iterdir()} == {*(path.name for path in paths), "part-of-something-else.parquet"}


def test_same_spec_writes_the_same_bytes(tmp_path: Path) -> None:
    one, other = (write(tmp_path / name, SampleSpec(products=2000), night=2) for name in ("one", "other"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]


def test_memory_of_write_does_not_grow_with_the_catalog(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pipelines.sample.catalog import SampleSpec, write; from tests.memory import peak_mb;"
        "write(Path(sys.argv[1]), SampleSpec(products=int(sys.argv[2])));"
        "print(peak_mb())"
    )
    peaks = [
        int(subprocess.run([sys.executable, "-c", code, tmp_path, str(rows)], check=True, capture_output=True, text=True).stdout)
        for rows in (131_072, 786_432)
    ]
    assert peaks[1] < 600
    assert peaks[1] - peaks[0] < 80


# Queries


@pytest.fixture(scope="module")
def asked() -> pa.Table:
    return queries(SPEC, 120)


@pytest.fixture(scope="module")
def graded(asked: pa.Table) -> pa.Table:
    return judgments(SPEC, asked)


def test_queries_are_different_and_spread_over_languages(asked: pa.Table) -> None:
    assert Counter(asked["locale"].to_pylist()) == {"en": 40, "de": 40, "fr": 40}
    assert len(set(zip(asked["locale"].to_pylist(), asked["query"].to_pylist(), strict=True))) == 120
    assert queries(SPEC, 120).equals(asked)


def test_every_query_has_an_exact_match_and_all_grades_occur(asked: pa.Table, graded: pa.Table) -> None:
    exact = set(graded.filter(pc.equal(graded["grade"], "E"))["query_id"].to_pylist())
    assert exact == set(asked["query_id"].to_pylist())
    assert set(graded["grade"].to_pylist()) == set("ESCI")


def test_no_product_is_graded_twice_for_a_query(graded: pa.Table) -> None:
    assert len(set(zip(graded["query_id"].to_pylist(), graded["sku"].to_pylist(), strict=True))) == graded.num_rows


def test_tables_say_that_grades_are_derived(asked: pa.Table, graded: pa.Table, tmp_path: Path) -> None:
    assert b"no person" in asked.schema.metadata[b"derived"]
    assert b"no person" in graded.schema.metadata[b"derived"]
    for path in write_queries(tmp_path, SampleSpec(products=300), count=6):
        assert b"no person" in pq.read_schema(path).metadata[b"derived"]


def test_grades_follow_from_what_the_catalog_shows(catalog: pa.Table, asked: pa.Table, graded: pa.Table) -> None:
    """Recompute English grades from titles, attributes and prices alone."""
    rows, by_id = by_sku(catalog), {row["query_id"]: row for row in asked.to_pylist() if row["locale"] == "en"}
    checked: Counter[str] = Counter()
    for judgment in graded.to_pylist():
        query = by_id.get(judgment["query_id"])
        if query is None:
            continue
        row = rows[judgment["sku"]]
        shown, title = dict(row["attributes"]), row["title"].lower()
        assert row["lang"] == "en"
        of_type = query["product_type"] in title and row["category"] == query["category"]
        kept = [shown[key] == query[key.lower()] for key in ("Color", "Material", "Feature") if query[key.lower()] is not None]
        kept += [row["price"] <= query["max_price"]] if query["max_price"] is not None else []
        noun = next(noun for noun in NOUNS if noun.key == query["product_type"])
        goes_with = any(key in title for key in noun.goes_with)
        expected = "E" if of_type and all(kept) else "S" if of_type else "C" if goes_with else "I"
        assert judgment["grade"] == expected, (query, row)
        checked[expected] += 1
    assert set(checked) == set("ESCI")


def test_exact_and_substitute_grades_are_complete(catalog: pa.Table, graded: pa.Table, asked: pa.Table) -> None:
    # Some product types are part of another's name (shirt, t-shirt); the others can be counted by looking at titles.
    clear = [key for key in (noun.key for noun in NOUNS) if sum(key in noun.key for noun in NOUNS) == 1]
    titles = [(row["sku"], row["title"].lower()) for row in catalog.to_pylist() if row["lang"] == "en"]
    checked = [row for row in asked.to_pylist() if row["locale"] == "en" and row["product_type"] in clear]
    assert len(checked) > 20
    for query in checked:
        mine = graded.filter(pc.equal(graded["query_id"], query["query_id"]))
        found = mine.filter(pc.is_in(mine["grade"], pa.array(["E", "S"])))["sku"].to_pylist()
        assert set(found) == {sku for sku, title in titles if query["product_type"] in title}


def test_deleted_products_are_not_judged(asked: pa.Table) -> None:
    later = judgments(SPEC, asked, night=20)
    state = by_sku(whole(SPEC, night=20))
    assert all(state[sku]["is_active"] for sku in later["sku"].to_pylist())


def test_small_catalog_gives_fewer_queries_and_none_is_an_error() -> None:
    assert queries(SampleSpec(products=4), 50).num_rows <= 4
    assert judgments(SPEC, queries(SPEC, 1).slice(0, 0)).num_rows == 0
    with pytest.raises(InputError, match="queries"):
        queries(SPEC, 0)
