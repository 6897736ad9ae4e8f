from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder.augment import KINDS, NOISE_MARK, Kind, noisy, with_noise
from encoder.errors import EncoderError, TowerError
from encoder.examples import JUDGMENTS, Grades, join, same_query
from encoder.synthetic import QueryWriter, Seq2SeqWriter, TemplateWriter

QUERY = "leather phone case for samsung galaxy s21 128gb 5 kilogram"
WORDS = st.sampled_from(
    ["leather", "phone", "Schuhe", "straße", "été", "s21", "128gb", "5", "kg", "inches", "XPS-13", "tv", "靴", "WALLET", "t-shirt"]
)


def judged(queries: list[str], locale: str = "us") -> pa.Table:
    rows = [
        {"query_id": f"q{number}", "query": query, "locale": locale, "product_id": f"p{place}", "grade": place}
        for number, query in enumerate(queries)
        for place in range(3)
    ]
    return pa.Table.from_pylist(rows, schema=JUDGMENTS)


@settings(max_examples=300, deadline=None)
@given(
    query=st.lists(WORDS, min_size=1, max_size=6).map(" ".join) | st.text(max_size=20),
    seed=st.integers(0, 99),
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, unique=True),
    rate=st.floats(0.01, 1),
    locale=st.sampled_from(["us", "de_DE", "fr", "jp", ""]),
)
def test_noise_changes_the_query_keeps_what_has_digits_and_can_be_repeated(
    query: str, seed: int, kinds: list[Kind], rate: float, locale: str
) -> None:
    found = noisy(query, seed=seed, kinds=kinds, rate=rate, locale=locale)
    assert found == noisy(query, seed=seed, kinds=kinds, rate=rate, locale=locale)
    if found is None:
        return
    assert same_query(found)
    assert found.lower().split() != query.lower().split()
    assert [word for word in found.split() if any(map(str.isnumeric, word))] == [
        word for word in query.split() if any(map(str.isnumeric, word))
    ]


@pytest.mark.parametrize("query", ["", " ", "s21", "5 kilogram", "128gb 4k", "tv", "靴", "8 x GEFORCE"])
def test_a_query_without_a_word_to_misspell_has_no_noise(query: str) -> None:
    assert [noisy(query, seed=seed, rate=1.0) for seed in range(20)] == [None] * 20


def test_units_and_codes_stay() -> None:
    for seed in range(200):
        words = (noisy(QUERY, seed=seed, rate=1.0) or "").split()
        assert words[-2:] == ["5", "kilogram"]
        assert {"s21", "128gb"} <= set(words)
        assert "NZXTKRAKEN" in (noisy("cooler NZXTKRAKEN white", seed=seed, rate=1.0) or "NZXTKRAKEN")


def test_the_rate_is_a_share_of_the_words_and_at_least_one() -> None:
    query = "leather wallet waterproof running jacket winter summer spring autumn kitchen"
    for seed in range(50):
        for rate, wanted in ((0.01, 1), (0.3, 3), (1.0, 10)):
            found = (noisy(query, seed=seed, rate=rate, kinds=["doubling"]) or "").split()
            assert sum(one != other for one, other in zip(query.split(), found, strict=True)) == wanted


@pytest.mark.parametrize(
    ("kind", "locale", "query", "possible"),
    [
        ("transposition", "us", "bank", {"bnak", "bakn"}),
        ("omission", "us", "bank", {"bnk", "bak", "ban"}),
        ("doubling", "us", "bank", {"baank", "bannk", "bankk"}),
        (
            "keyboard",
            "us",
            "fizz",
            {f"f{letter}zz" for letter in "uojk"} | {f"fi{letter}z" for letter in "asx"} | {f"fiz{letter}" for letter in "asx"},
        ),
        ("keyboard", "de", "axyx", {f"a{key}yx" for key in "sdyc"} | {f"ax{key}x" for key in "asx"} | {f"axy{key}" for key in "sdyc"}),
        ("spacing", "us", "backpack", {"bac kpack", "back pack", "backp ack"}),
        ("phonetic", "de", "straße", {"strasse"}),
        ("phonetic", "fr", "pharmacie", {"farmacie"}),
        ("phonetic", "us", "phone", {"fone"}),
    ],
)
def test_each_kind_makes_its_errors_and_all_of_them(kind: Kind, locale: str, query: str, possible: set[str]) -> None:
    found = {noisy(query, seed=seed, kinds=[kind], locale=locale) for seed in range(300)}
    assert found == possible


def test_spacing_also_joins_words_but_not_numbers() -> None:
    found = Counter(noisy("phone case 12 pro", seed=seed, kinds=["spacing"]) for seed in range(50))
    assert found["phonecase 12 pro"] > 0
    assert not [query for query in found if query and ("case12" in query or "12pro" in query)]


def test_noise_is_added_and_takes_nothing_away() -> None:
    table = judged([f"leather wallet number{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"])
    noise = with_noise(table, share=0.5, seed=4)
    assert noise.schema == JUDGMENTS
    assert noise.slice(0, len(table)).equals(table)
    added = noise.slice(len(table)).to_pylist()
    assert 5 * 3 <= len(added) <= 21 * 3
    clean = {(row["query_id"], row["product_id"]): row for row in table.to_pylist()}
    for row in added:
        before = clean[row["query_id"].removesuffix(NOISE_MARK), row["product_id"]]
        assert row["query_id"].endswith(NOISE_MARK)
        assert row["query"] != before["query"]
        assert {name: row[name] for name in ("locale", "grade")} == {name: before[name] for name in ("locale", "grade")}
    assert noise.equals(with_noise(table, share=0.5, seed=4))
    assert with_noise(noise, share=1.0, seed=4)["query_id"].to_pylist().count(f"q0{NOISE_MARK}{NOISE_MARK}") == 0
    assert with_noise(table, share=0.0, seed=4).equals(table)


def test_a_misspelling_that_is_a_query_of_its_own_is_left_out() -> None:
    table = judged(["bank", "bnak", "bakn"])
    added = with_noise(table, share=1.0, seed=0, kinds=["transposition"]).slice(len(table))
    assert not {"bank", "bnak", "bakn"} & set(added["query"].to_pylist())


def test_options_of_noise_are_checked() -> None:
    wrongs: list[dict[str, Any]] = [{"kinds": ["typo"]}, {"kinds": []}, {"rate": 0.0}, {"rate": 1.5}]
    for wrong in wrongs:
        with pytest.raises(EncoderError, match="choose among keyboard"):
            noisy("leather", seed=0, **wrong)
    with pytest.raises(EncoderError, match="share is 2"):
        with_noise(judged(["a"]), share=2, seed=0)


SHOP = pa.Table.from_pylist(
    [
        {"locale": "us", "product_id": f"{brand}-{category}-{number}", "brand": brand, "category": category, "text": f"{brand} {category} no {number}", "group": "", "vertical": ""}
        for brand in ("Acme", "Bolt", "Crow")
        for category in ("shoe", "lamp", "tent")
        for number in range(4)
    ]
    + [{"locale": "us", "product_id": "bare", "brand": None, "category": None, "text": "bare", "group": "", "vertical": ""}]
)  # fmt: skip


def write(writer: QueryWriter, shop: pa.Table = SHOP) -> pa.Table:
    return writer.write(shop)


def test_template_grades_follow_from_the_columns_that_agree() -> None:
    table = write(TemplateWriter(templates=("{brand} {category}",), exact=3, substitutes=5, irrelevant=2))
    assert table.schema == JUDGMENTS
    assert set(table["query"].to_pylist()) == {
        f"{brand} {category}" for brand in ("Acme", "Bolt", "Crow") for category in ("shoe", "lamp", "tent")
    }
    for row in table.to_pylist():
        brand, category = row["query"].split()
        other = row["product_id"].split("-")
        assert row["grade"] == (3 if other[:2] == [brand, category] else 2 if other[1] == category else 0)
    counts = Counter((row["query"], row["grade"]) for row in table.to_pylist())
    assert {grade: {count for (_, found), count in counts.items() if found == grade} for grade in (3, 2, 0)} == {3: {3}, 2: {5}, 0: {2}}
    assert join(table, SHOP).missing.judgments == 0


def test_a_template_without_the_category_gives_exact_products_only() -> None:
    assert set(write(TemplateWriter(templates=("{brand}",)))["grade"].to_pylist()) == {3}
    assert set(write(TemplateWriter(templates=("{category}",)))["grade"].to_pylist()) == {3, 0}
    two = TemplateWriter(templates=("{brand} {category}",), grades=Grades(("no", "yes"), positive=1))
    assert set(write(two)["grade"].to_pylist()) == {1, 0}


def test_templates_do_not_depend_on_the_order_of_products_for_their_queries_and_stay_the_same() -> None:
    writer = TemplateWriter(templates=("{brand} {category}", "{category} from {brand}", "{category}"), per_product=1, seed=5)
    assert write(writer).equals(write(writer))
    turned = SHOP.take(list(range(len(SHOP) - 1, -1, -1)))
    assert set(write(writer)["query"].to_pylist()) == set(write(writer, turned)["query"].to_pylist())
    many = write(TemplateWriter(templates=writer.templates, per_product=3))
    assert len(set(many["query_id"].to_pylist())) == len(set(many["query"].to_pylist())) == 9 + 9 + 3


def test_templates_that_name_no_column_or_do_more_than_name_one_are_refused() -> None:
    for template in ("shoes", "{brand!r}", "{brand.upper}", "{0}", "{brand", ""):
        with pytest.raises(EncoderError):
            TemplateWriter(templates=(template,))
    with pytest.raises(EncoderError, match="lack colour"):
        write(TemplateWriter(templates=("{colour} {category}",)))


@pytest.fixture(scope="module")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tokenizers
    import torch
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    directory = tmp_path_factory.mktemp("t5")
    words = [
        "<pad>",
        "</s>",
        "<unk>",
        *[
            "Write",
            "a",
            "search",
            "query",
            "for",
            "this",
            "product",
            ":",
            "Acme",
            "Bolt",
            "Crow",
            "shoe",
            "lamp",
            "tent",
            "no",
            "red",
            "blue",
        ],
    ]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: number for number, word in enumerate(dict.fromkeys(words))}, unk_token="<unk>")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.decoder = tokenizers.decoders.WordPiece(prefix="##")
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>").save_pretrained(directory)
    torch.manual_seed(0)
    size = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=backend.get_vocab_size(), decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, **size)
    )
    torch.nn.init.normal_(model.shared.weight, std=2.0)
    with torch.no_grad():
        model.shared.weight[0] = 0  # the first step reads padding, and would write what it reads
    model.save_pretrained(directory, safe_serialization=True)
    return directory


def test_a_local_model_writes_queries_within_limits_and_the_same_ones_again(tiny_t5: Path) -> None:
    import torch

    shop = SHOP.slice(0, 6)
    limits: dict[str, Any] = {"per_product": 4, "max_words": 3, "max_new_tokens": 4, "batch": 4}
    writer = Seq2SeqWriter(directory=tiny_t5, seed=1, **limits)
    state = torch.random.get_rng_state()
    table = write(writer, shop)
    assert torch.equal(state, torch.random.get_rng_state()), "the caller's random numbers are left as they were"
    assert table.schema == JUDGMENTS
    assert len(table) > 0
    assert all(1 <= len(query.split()) <= 3 for query in table["query"].to_pylist())
    assert set(table["grade"].to_pylist()) == {3}
    assert len({(row["query_id"], row["product_id"]) for row in table.to_pylist()}) == len(table)
    assert table.equals(write(writer, shop))
    assert not table.equals(write(Seq2SeqWriter(directory=tiny_t5, seed=2, **limits), shop))


def test_a_greedy_model_draws_nothing(tiny_t5: Path) -> None:
    one, other = (write(Seq2SeqWriter(directory=tiny_t5, max_new_tokens=4, seed=seed), SHOP.slice(0, 6)) for seed in (1, 2))
    assert len(one) > 0
    assert one.equals(other)


def test_a_directory_without_safetensors_and_a_prompt_without_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(TowerError, match=r"no \.safetensors file"):
        write(Seq2SeqWriter(directory=tmp_path))
    with pytest.raises(EncoderError, match="The prompt is"):
        Seq2SeqWriter(directory=tmp_path, prompt="Write a query")
