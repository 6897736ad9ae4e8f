from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder.packing import Pack, Window
from encoder.tokens import Tokens

PAD = 9
TEXTS = st.lists(st.lists(st.integers(0, 20), max_size=12), min_size=1, max_size=30)


def tokens_of(texts: list[list[int]]) -> Tokens:
    ids = np.array([number for text in texts for number in text], np.int32)
    return Tokens(ids=ids, offsets=np.concatenate([[0], np.cumsum([len(text) for text in texts])]).astype(np.int64))


def cut_up(window: Window, *, budget: int, padding: bool = False) -> list[Pack]:
    packs, start = [], 0
    while start < len(window):
        end = window.cut(start, budget=budget, padding=padding)
        assert start < end <= len(window)
        packs.append(window.pack(start, end))
        start = end
    return packs


@settings(deadline=None)
@given(texts=TEXTS, budget=st.integers(1, 60), padding=st.booleans())
def test_every_text_is_in_one_pack_with_its_own_ids(texts: list[list[int]], budget: int, padding: bool) -> None:
    seen = {}
    for pack in cut_up(Window(tokens_of(texts), pad_id=PAD), budget=budget, padding=padding):
        assert pack.size(padding=padding) <= budget or len(pack.rows) == 1
        assert (np.diff(pack.lengths) <= 0).all(), "the longest comes first"
        ends = pack.boundaries
        for place, row in enumerate(pack.rows):
            assert row not in seen
            seen[int(row)] = pack.ids[ends[place] : ends[place + 1]].tolist()
    assert seen == {row: text or [PAD] for row, text in enumerate(texts)}


@settings(deadline=None)
@given(texts=TEXTS, budget=st.integers(1, 60))
def test_a_pack_ends_only_where_the_next_text_has_no_room(texts: list[list[int]], budget: int) -> None:
    packs = cut_up(Window(tokens_of(texts), pad_id=PAD), budget=budget)
    for pack, following in itertools.pairwise(packs):
        assert len(pack.ids) + int(following.lengths[0]) > budget


@settings(deadline=None)
@given(texts=TEXTS, after=st.none() | st.integers(0, 20))
def test_runs_positions_and_the_matrix_describe_the_same_texts(texts: list[list[int]], after: int | None) -> None:
    for pack in cut_up(Window(tokens_of(texts), pad_id=PAD), budget=25):
        assert [length for count, length in pack.runs for _ in range(count)] == pack.lengths.tolist()
        assert len({length for _, length in pack.runs}) == len(pack.runs)
        wanted = []
        for ids in np.split(pack.ids, pack.boundaries[1:-1]):
            count = 0
            for place, number in enumerate(ids):
                count += int(number != after)
                wanted.append(place if after is None else after + (count if number != after else 0))
        assert pack.positions(after=after).tolist() == wanted
        matrix = pack.padded(pad_id=PAD)
        assert matrix.shape == (len(pack.rows), pack.lengths[0])
        assert np.concatenate([row[:length] for row, length in zip(matrix, pack.lengths, strict=True)]).tolist() == pack.ids.tolist()
        assert all((row[length:] == PAD).all() for row, length in zip(matrix, pack.lengths, strict=True))


@pytest.mark.parametrize("budget", [1, 1000])
def test_no_texts_give_no_packs_and_one_giant_text_stands_alone(budget: int) -> None:
    assert cut_up(Window(tokens_of([]), pad_id=PAD), budget=budget) == []
    packs = cut_up(Window(tokens_of([[1], [2] * 5000, [3]]), pad_id=PAD), budget=budget)
    assert packs[0].rows.tolist() == [1]
    assert packs[0].lengths.tolist() == [5000]
