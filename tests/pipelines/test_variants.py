"""Answers of variant groups: never more than asked for of one, as many as there are, and the same as from the whole ranking."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.variants import best_of_groups

GROUPS = st.lists(st.none() | st.sampled_from("abc") | st.text("xyz", min_size=3, max_size=3), max_size=400)


def by_hand(groups: list[str | None], per_group: int, k: int) -> list[int]:
    """Walk the whole ranking."""
    taken: Counter[str] = Counter()
    kept = []
    for place, group in enumerate(groups):
        if group is None or taken[group] < per_group:
            kept.append(place)
            taken.update([group] if group is not None else [])
    return kept[:k]


@settings(deadline=None)
@given(groups=GROUPS, per_group=st.integers(1, 4), k=st.integers(1, 30), more=st.integers(0, 50))
def test_the_answers_are_those_of_a_walk_through_the_whole_ranking(groups: list[str | None], per_group: int, k: int, more: int) -> None:
    ranking = pa.table({"place": pa.array(range(len(groups)), pa.int64()), "group": pa.array(groups, pa.string())})
    asked: list[int] = []

    def fetch(size: int) -> pa.Table:
        asked.append(size)
        assert len(asked) < 8
        return ranking.slice(0, size)

    # Where a filter leaves fewer rows than the table has, the ranking ends before the total.
    found = best_of_groups(fetch, group="group", per_group=per_group, k=k, total=len(groups) + more)
    assert found.column("place").to_pylist() == by_hand(groups, per_group, k)
    assert asked == sorted(set(asked))


def test_one_group_of_everything_is_read_to_its_end_in_few_steps() -> None:
    ranking = pa.table({"group": pa.array([7] * 100_000 + [8])})
    asked: list[int] = []

    def fetch(size: int) -> pa.Table:
        asked.append(size)
        return ranking.slice(0, size)

    found = best_of_groups(fetch, group="group", per_group=1, k=10, total=ranking.num_rows)
    assert found.column("group").to_pylist() == [7, 8]
    assert asked == [40, 160, 640, 2560, 10240, 40960, 100_001]


def test_groups_of_every_type_of_column_are_told_apart() -> None:
    for values in ([True, False, None, True], [1.5, 2.5, None, 1.5], [3, 4, None, 3]):
        table = pa.table({"group": pa.array(values)})
        assert best_of_groups(partial(table.slice, 0), group="group", per_group=1, k=9, total=4).num_rows == 3
