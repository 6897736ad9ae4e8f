"""Token ids as a batch: cut, taken, sent as Arrow, and made by a tokenizer that travels without its tower."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder.errors import EncoderError
from encoder.registry import TowerOptions
from encoder.tokens import Tokenizer, Tokens
from tests.towers import KINDS, Kind, tiny_tower

LISTS = st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=6), max_size=8)


def of(lists: list[list[int]]) -> Tokens:
    ids = np.array([number for item in lists for number in item], np.int32)
    return Tokens(ids=ids, offsets=np.cumsum([0, *map(len, lists)]))


@settings(deadline=None)
@given(lists=LISTS, begin=st.none() | st.integers(-9, 9), end=st.none() | st.integers(-9, 9), step=st.sampled_from([None, 1, 2, -1]))
def test_a_slice_is_that_of_the_list(lists: list[list[int]], begin: int | None, end: int | None, step: int | None) -> None:
    found = of(lists)[begin:end:step]
    assert found.to_arrow().to_pylist() == lists[begin:end:step]
    assert len(found) == len(lists[begin:end:step])


def test_a_slice_copies_no_ids() -> None:
    tokens = of([[1, 2], [3], [4, 5, 6]])
    assert np.shares_memory(tokens[1:3].ids, tokens.ids)


@settings(deadline=None)
@given(lists=LISTS, draws=st.data())
def test_taken_texts_stand_in_the_order_in_which_they_are_named(lists: list[list[int]], draws: st.DataObject) -> None:
    rows = draws.draw(st.lists(st.integers(0, len(lists) - 1), max_size=12)) if lists else []
    assert of(lists).take(rows).to_arrow().to_pylist() == [lists[row] for row in rows]


@settings(deadline=None)
@given(lists=LISTS, begin=st.integers(0, 8), count=st.integers(0, 8))
def test_arrow_gives_back_what_it_got_also_of_a_slice(lists: list[list[int]], begin: int, count: int) -> None:
    arrow = of(lists).to_arrow()
    assert arrow.type == pa.large_list(pa.int32())
    assert Tokens.from_arrow(arrow.slice(begin, count)).to_arrow().to_pylist() == lists[begin : begin + count]


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_that_travelled_gives_the_same_ids(tmp_path: Path, kind: Kind) -> None:
    tower = tiny_tower(tmp_path, kind=kind, prompts={"document": "item: ", "query": "find "}, max_tokens=24)
    tokenizer = Tokenizer(tower, TowerOptions(max_tokens=12))
    opened = Tokenizer.from_json(tokenizer.to_json())
    texts = ["", "red", "RED Shoes, größe 42 漢字 <mask> [SEP]", "a  b\tc " * 30, *(f"blue lamp {number} cm" for number in range(2500))]
    for side in ("document", "query"):
        wanted, found = tokenizer.tokenize(texts, kind=side), opened.tokenize(pa.array(texts), kind=side)
        np.testing.assert_array_equal(found.ids, wanted.ids)
        np.testing.assert_array_equal(found.offsets, wanted.offsets)
        assert found.ids.dtype == np.int32
        assert found.offsets.dtype == np.int64
        one_by_one = [tokenizer._backend.encode(getattr(opened.card, f"{side}_prompt") + text).ids for text in texts]
        assert found.to_arrow().to_pylist() == one_by_one
    assert (opened.card, opened.pad_id, opened.vocabulary) == (tokenizer.card, tokenizer.pad_id, tokenizer.vocabulary)


def test_a_tokenizer_that_travelled_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").write_bytes(Tokenizer(tiny_tower(tmp_path / "tower")).to_json())
    script = (
        "import sys\nfrom pathlib import Path\nfrom encoder.tokens import Tokenizer\n"
        "found = Tokenizer.from_json(Path(sys.argv[1]).read_bytes()).tokenize(['red shoes'])\n"
        "print(len(found), sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "tokenizer")], check=True, capture_output=True, text=True)
    assert done.stdout == "1 []\n"


def test_texts_that_are_none_are_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(tiny_tower(tmp_path))
    assert len(tokenizer.tokenize([])) == 0
    for wrong in (["red", None], pa.array(["red", None]), "red"):
        with pytest.raises(EncoderError):
            tokenizer.tokenize(wrong)
    with pytest.raises(EncoderError, match="Choose document or query"):
        tokenizer.tokenize(["red"], kind="title")  # type: ignore[arg-type]
