from __future__ import annotations

import json
import math
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder.errors import EncoderError
from encoder.examples import PRODUCTS, Grades
from encoder.judge import JUDGED, THREE_LEVELS, CachedJudge, Guideline, Pair, Verdict, agreement, ask

ROOT = Path(__file__).parents[2]


class WordJudge:
    """Counts the words of the query that the text has: none, some, all."""

    guideline = THREE_LEVELS

    def __init__(self, version: str = "words-1") -> None:
        self.version = version
        self.asked: list[Pair] = []

    def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        self.asked += pairs
        return [self.verdict(pair) for pair in pairs]

    def verdict(self, pair: Pair) -> Verdict:
        words, text = set(pair.query.split()), set(pair.text.split())
        grade = 2 if words <= text else int(bool(words & text))
        return Verdict(
            grade=grade, probabilities=tuple(0.8 if level == grade else 0.1 for level in range(3)), reason=f"words {words & text}"
        )


PAIRS = [Pair("red shoe", "a red shoe"), Pair("red shoe", "a shoe"), Pair("red shoe", "tea"), Pair("", ""), Pair("a red", "shoe")]
WORDS = st.sampled_from(["", "red", "shoe", "red shoe", "naïve 'q\"; DROP TABLE verdicts", "\x00", "\ud800"])


@given(st.lists(st.lists(st.builds(Pair, WORDS, WORDS), max_size=8), max_size=4), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_cache_answers_as_the_judge_and_asks_each_pair_once(
    tmp_path_factory: pytest.TempPathFactory, calls: list[list[Pair]], size: int
) -> None:
    calls = [[pair for pair in call if "\ud800" not in pair.query] for call in calls]  # the text may be anything: it is hashed
    judge = WordJudge()
    cached = CachedJudge(judge, tmp_path_factory.mktemp("cache") / "verdicts.sqlite", slice_pairs=size)
    for call in calls:
        assert cached.judge(call) == [judge.verdict(pair) for pair in call]
    everything = [pair for call in calls for pair in call]
    assert len(judge.asked) == len(set(judge.asked)) == len(set(everything)) == cached.misses
    assert cached.hits == len(everything) - cached.misses


def test_another_version_and_another_text_are_asked_anew_and_a_reopened_cache_is_not(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.sqlite"
    first, again, other = WordJudge(), WordJudge(), WordJudge("words-2")
    CachedJudge(first, path).judge(PAIRS[:2])
    CachedJudge(again, path).judge(PAIRS[:3])
    CachedJudge(other, path).judge(PAIRS[:2])
    assert (first.asked, again.asked, other.asked) == (PAIRS[:2], PAIRS[2:3], PAIRS[:2])


def test_crash_costs_the_slice_that_was_out_and_no_other(tmp_path: Path) -> None:
    class Fails(WordJudge):
        def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
            if PAIRS[2] in pairs:
                raise KeyboardInterrupt
            return super().judge(pairs)

    path = tmp_path / "verdicts.sqlite"
    with pytest.raises(KeyboardInterrupt):
        CachedJudge(Fails(), path, slice_pairs=2).judge(PAIRS)
    again = WordJudge()
    CachedJudge(again, path).judge(PAIRS)
    assert again.asked == PAIRS[2:]


PROCESS = """
import sys
from pathlib import Path
from encoder.judge import THREE_LEVELS, CachedJudge, Pair, Verdict
class Judge:
    version, guideline = "v", THREE_LEVELS
    def judge(self, pairs):
        return [Verdict(grade=int(sys.argv[2]), reason=sys.argv[2]) for pair in pairs]
print([v.grade for v in CachedJudge(Judge(), Path(sys.argv[1]), slice_pairs=3).judge([Pair("q", str(n)) for n in range(60)])])
"""


def test_processes_that_judge_the_same_pairs_at_once_agree_in_the_end(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.sqlite"
    started = [subprocess.Popen([sys.executable, "-c", PROCESS, path, str(n)], stdout=subprocess.PIPE, cwd=ROOT) for n in range(3)]
    said = [json.loads(process.communicate(timeout=60)[0]) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert said[0] == said[1] == said[2]


def test_threads_share_a_cache(tmp_path: Path) -> None:
    cached = CachedJudge(WordJudge(), tmp_path / "verdicts.sqlite", slice_pairs=1)
    answers: list[list[Verdict]] = []
    threads = [threading.Thread(target=lambda: answers.append(cached.judge(PAIRS))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [WordJudge().judge(PAIRS)] * 4
    assert cached.hits + cached.misses == 4 * len(PAIRS)


def test_cache_that_is_none_or_is_damaged_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.sqlite"
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(EncoderError, match=r"verdicts\.sqlite: the cache of verdicts cannot be used"):
        CachedJudge(WordJudge(), path)
    path.unlink()
    CachedJudge(WordJudge(), path).judge(PAIRS)
    with sqlite3.connect(path) as database:
        database.execute("UPDATE verdicts SET grade = 7")
    with pytest.raises(EncoderError, match="a kept verdict cannot be read"):
        CachedJudge(WordJudge(), path).judge(PAIRS)


@pytest.mark.parametrize(
    "verdicts", [[], [Verdict(grade=3)], [Verdict(grade=-1)], [Verdict(grade=1, probabilities=(1.0,))], [Verdict(grade=True)]]
)
def test_judge_that_breaks_the_contract_is_never_believed_nor_kept(tmp_path: Path, verdicts: list[Verdict]) -> None:
    class Broken(WordJudge):
        def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
            return verdicts if pairs else []

    path = tmp_path / "verdicts.sqlite"
    with pytest.raises(EncoderError, match="Judge words-1 gave"):
        CachedJudge(Broken(), path).judge(PAIRS[:1])
    fresh = WordJudge()
    CachedJudge(fresh, path).judge(PAIRS[:1])
    assert fresh.asked == PAIRS[:1]


class Says:
    guideline = THREE_LEVELS
    version = "says"

    def __init__(self, levels: Sequence[int]) -> None:
        self.levels = levels

    def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        return [Verdict(grade=level) for level in self.levels[: len(pairs)]]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=30))
@settings(max_examples=40, deadline=None)
def test_agreement_equals_the_plain_formulas(rows: list[tuple[int, int, int]]) -> None:
    people, judge = [row[0] for row in rows], [row[1] for row in rows]
    found = agreement(Says(judge), [Pair(f"q{row[2]}", "") for row in rows], people, resamples=20)
    count = len(rows)
    assert found.accuracy == pytest.approx(sum(a == b for a, b in zip(people, judge, strict=True)) / count)
    assert found.within_one == pytest.approx(sum(abs(a - b) <= 1 for a, b in zip(people, judge, strict=True)) / count)
    expected = sum((a - b) ** 2 for a in people for b in judge) / count
    if expected == 0:
        assert found.kappa is None
    else:
        assert found.kappa == pytest.approx(1 - sum((a - b) ** 2 for a, b in zip(people, judge, strict=True)) / expected)
    for level in range(3):
        hits = sum(a == b == level for a, b in zip(people, judge, strict=True))
        given_out, true = judge.count(level), people.count(level)
        assert found.precision[level] == (hits / given_out if given_out else None)
        assert found.recall[level] == (hits / true if true else None)
        assert [found.confusion_GG[level][other] for other in range(3)] == [
            sum((a, b) == (level, other) for a, b in zip(people, judge, strict=True)) for other in range(3)
        ]
    assert found.queries == len({row[2] for row in rows})
    assert json.loads(found.to_json())["pairs"] == count
    assert f"{count} pairs" in found.to_text()


def test_interval_resamples_queries_so_that_repeated_pairs_add_no_certainty() -> None:
    draws = np.random.default_rng(0)
    right = (draws.random(100) < 0.7).tolist()
    once = agreement(Says([int(ok) for ok in right]), [Pair(str(n), "") for n in range(100)], [1] * 100)
    pairs = [Pair(str(n), str(copy)) for n in range(100) for copy in range(9)]
    nine = agreement(Says([int(right[int(pair.query)]) for pair in pairs]), pairs, [1] * 900)
    assert once.accuracy_interval == nine.accuracy_interval
    assert once.accuracy_interval is not None
    low, high = once.accuracy_interval
    half = 1.96 * math.sqrt(0.7 * 0.3 / 100)
    assert low == pytest.approx(sum(right) / 100 - half, abs=0.03)
    assert high == pytest.approx(sum(right) / 100 + half, abs=0.03)


def test_agreement_of_a_table_worked_out_by_hand() -> None:
    people, judge = [0, 0, 1, 1, 2, 2, 2, 2], [0, 1, 1, 1, 2, 2, 1, 0]
    found = agreement(Says(judge), [Pair("q", "")] * 8, people, resamples=0)
    assert (found.accuracy, found.within_one) == (5 / 8, 7 / 8)
    # Squared gaps: 1 + 1 + 4 = 6 seen; people 2, 2, 4 and judge 2, 4, 2 expect (2*4 + 2*2*4 + 2*2 + 2*2 + 4*2*4 + 4*4) / 8 = 10.
    assert found.kappa == pytest.approx(1 - 6 / 10)
    assert (found.kappa_interval, found.accuracy_interval) == (None, None)
    assert found.confusion_GG == ((1, 1, 0), (0, 2, 0), (1, 1, 2))
    assert (found.precision, found.recall) == ((1 / 2, 1 / 2, 1.0), (1 / 2, 1.0, 1 / 2))


def test_levels_that_do_not_fit_the_pairs_are_refused() -> None:
    for levels in ([1], [1, 3], [1, -1]):
        with pytest.raises(EncoderError, match="for 2 pairs: give one from 0 to 2"):
            agreement(Says([0, 0]), PAIRS[:2], levels)


def test_levels_and_grades_map_as_the_three_level_guideline_says() -> None:
    assert THREE_LEVELS.from_grades(Grades()) == (0, 1, 1, 2)  # I, C, S, E
    assert THREE_LEVELS.to_grades(Grades()) == (0, 2, 3)
    three = Grades(names=("irrelevant", "partial", "exact"), positive=1)
    assert THREE_LEVELS.from_grades(three) == THREE_LEVELS.to_grades(three) == (0, 1, 2)
    with pytest.raises(EncoderError, match="two or more names"):
        Guideline(names=("one",), meanings=("all",))


def test_ask_joins_texts_and_counts_pairs_without_one() -> None:
    names = ["query_id", "query", "locale", "product_id"]
    rows = [("1", "red shoe", "us", "b"), ("1", "red shoe", "us", "a"), ("1", "red shoe", "de", "a"), ("2", "tea", "us", "gone")]
    unknown = pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows])
    texts = [("us", "a", "a red shoe"), ("us", "b", "red tea"), ("de", "a", "ein Schuh")]
    products = pa.Table.from_pylist([dict(zip(PRODUCTS.names, (*row, "", ""), strict=True)) for row in texts], schema=PRODUCTS)
    asked = ask(WordJudge(), unknown, products, grades=Grades())
    assert asked.without_text == 1
    assert asked.judged.schema == JUDGED
    found = [tuple(row[name] for name in ("query_id", "locale", "product_id", "grade", "judge")) for row in asked.judged.to_pylist()]
    assert found == [("1", "de", "a", 0, "words-1"), ("1", "us", "a", 3, "words-1"), ("1", "us", "b", 2, "words-1")]
    assert asked.judged["confidence"].to_pylist() == pytest.approx([0.8] * 3)
    with pytest.raises(EncoderError, match="stands twice"):
        ask(WordJudge(), unknown, pa.concat_tables([products, products]), grades=Grades())
