"""What a report says of an index is true: every reason is checked against exact search, and no text of a catalog leaves its place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from encoder.registry import TowerOptions, read_card
from pipelines.errors import CorruptObject, InputError
from pipelines.hashes import id_hashes, vids
from pipelines.health import Asking, Report, Subject, measure, page, read_texts, report_text
from pipelines.health.churn import CAME, WENT, centroid_moves
from pipelines.health.questions import judged
from pipelines.towers import install
from tests.pipelines.both_indexes import LISTED, SPEC, Twins
from tests.pipelines.index_nights import DIMS, Floats, named, numbers, unit
from tests.towers import tiny_tower

ALL = Asking(samples=10_000, top=1000)
HOSTILE = "\x1b[2J<script>alert(1)</script>\u202e\"'><img src=x onerror=alert(2)>&amp;{{7*7}}\r\n"


def ranked(live: Mapping[str, Floats], query: Floats, k: int = 10) -> list[str]:
    """The exact answer."""
    names = sorted(live)
    scores = np.stack([live[name] for name in names]) @ query
    return [names[at] for at in np.argsort(-scores, kind="stable")[:k]]


def asked_so(subject: Subject, nprobe: int) -> Subject:
    """The same generation, whose index visits so many lists."""
    use = subject.manifest.indexes["faiss"]
    return replace(subject, manifest=replace(subject.manifest, indexes={"faiss": replace(use, search={"nprobe": nprobe})}))


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, dict[str, Floats], dict[str, Floats]]:
    """A night of every kind of change on indexes that compare all vectors; the products before it and after."""
    rng, twins = np.random.default_rng(1), Twins(tmp_path_factory.mktemp("flat"))
    before = twins.night(named("p", unit(rng, 150)))
    old = dict(twins.shop.live)
    after = twins.night(named("q", unit(rng, 12)), named("p", unit(rng, 9)), [f"p{number:05d}" for number in range(50, 62)])
    return measure(after, before, ALL), old, dict(twins.shop.live)


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> tuple[Twins, Subject]:
    """Eight lists and two deltas; what the second brings is of another kind than what the lists were trained on."""
    rng, twins = np.random.default_rng(2), Twins(tmp_path_factory.mktemp("lists"), options=LISTED)
    twins.night(named("p", unit(rng, 400)))
    twins.night(named("q", unit(rng, 20)), delete=["p00001", "p00002"])
    strange = rng.standard_normal((30, DIMS)).astype(np.float32)
    return twins, twins.night(named("r", strange / np.linalg.norm(strange, axis=1, keepdims=True)), delete=["q00003"])


# What came and went.


def test_every_product_that_came_or_went_has_its_true_reason(flat: tuple[Report, dict[str, Floats], dict[str, Floats]]) -> None:
    report, old, new = flat
    assert report.compared is not None
    churn = report.compared.churn
    assert churn is not None
    changed = {name for name in old.keys() & new.keys() if not np.array_equal(old[name], new[name])}
    shown = {query.query: query for query in churn.worst}
    came = went = 0
    for name, query in new.items():
        was, now = ranked(old, query), ranked(new, query)
        kept = len(set(was) & set(now)) / 10
        if kept == 1:
            assert name not in shown
            continue
        found = shown[name]
        assert found.overlap == pytest.approx(kept)
        reasons_in = {item: "new" if item not in old else "text" if item in changed else "risen" for item in now if item not in was}
        reasons_out = {
            item: "deleted" if item not in new else "text" if item in changed else "outranked" for item in was if item not in now
        }
        assert {item.id: (item.rank, item.reason) for item in found.came} == {
            item: (now.index(item) + 1, why) for item, why in reasons_in.items()
        }
        assert {item.id: (item.rank, item.reason) for item in found.went} == {
            item: (was.index(item) + 1, why) for item, why in reasons_out.items()
        }
        came, went = came + len(reasons_in), went + len(reasons_out)
    assert len(shown) == churn.changed > 20
    assert (sum(churn.came.values()), sum(churn.went.values())) == (came, went)
    assert churn.came.keys() == {"new", "text", "risen"}
    assert churn.went.keys() == {"deleted", "text", "outranked"}
    assert [query.overlap for query in churn.worst] == sorted(query.overlap for query in churn.worst)
    assert sum(churn.tenths) == churn.overlap.queries == len(new)


def test_lost_recall_is_told_from_better_products(lists: tuple[Twins, Subject]) -> None:
    _, subject = lists
    wide, narrow = asked_so(subject, 8), asked_so(subject, 1)
    lost = measure(narrow, wide, ALL).compared
    won = measure(wide, narrow, ALL).compared
    assert lost is not None
    assert won is not None
    assert lost.churn is not None
    assert won.churn is not None
    # Codes of eight bits miss a place now and then, in both.
    assert lost.churn.went["missed"] > 0.9 * sum(lost.churn.went.values()) > 50
    assert lost.churn.came["wrong"] > 0.9 * sum(lost.churn.came.values())
    assert won.churn.came["found"] == lost.churn.went["missed"]
    assert won.churn.went["wrong"] == lost.churn.came["wrong"]
    assert not {"deleted", "text", "outranked"} & lost.churn.went.keys()


def test_a_generation_beside_itself_has_no_churn(lists: tuple[Twins, Subject]) -> None:
    compared = measure(lists[1], lists[1], ALL).compared
    assert compared is not None
    assert compared.churn is not None
    assert (compared.churn.changed, compared.churn.overlap.mean, compared.churn.worst) == (0, 1.0, ())
    assert compared.centroids is not None
    assert (compared.centroids.same, compared.centroids.lost) == (True, 0)


def test_answers_that_grew_did_not_stay_the_same(tmp_path: Path) -> None:
    rng, twins = np.random.default_rng(12), Twins(tmp_path)
    few = twins.night(named("p", unit(rng, 4)))
    more = twins.night(named("q", unit(rng, 4)))
    for after, before, moved in ((more, few, "came"), (few, more, "went")):
        compared = measure(after, before, ALL).compared
        assert compared is not None
        assert compared.churn is not None
        assert compared.churn.overlap.mean == 0.5
        assert sum(getattr(compared.churn, moved).values()) == 4 * compared.churn.overlap.queries


def test_another_tower_is_not_compared_by_vectors(lists: tuple[Twins, Subject]) -> None:
    subject = lists[1]
    other = replace(subject, manifest=replace(subject.manifest, generation="g000002", parent="g000001", tower="77aa00"))
    compared = measure(subject, other, ALL).compared
    assert compared is not None
    assert (compared.churn, compared.centroids) == (None, None)
    assert "77aa00" in compared.notes[0]
    assert "--queries" in compared.notes[0]


def test_texts_are_embedded_by_the_tower_of_each_generation(tmp_path: Path) -> None:
    subjects = []
    for seed in (0, 1):
        directory = tiny_tower(tmp_path / f"tower-{seed}", dims=DIMS, seed=seed)
        twins = Twins(tmp_path / f"twins-{seed}", tower=read_card(directory, TowerOptions()).fingerprint)
        twins.attachments = install(twins.shop.store, directory, read_card(directory, TowerOptions()))
        subjects.append(twins.night(named("p", unit(np.random.default_rng(3), 60))))
    texts = ["waterproof leather shoes", "running shoes", "red dress"]
    report = measure(subjects[1], subjects[0], Asking(texts=texts, texts_total=9, top=9))
    assert (report.asked, report.questions, report.questions_total, dict(report.border_recall)) == ("texts", 3, 9, {})
    assert report.compared is not None
    assert report.compared.churn is not None
    assert "each embedded the queries by itself" in report.compared.notes[0]
    # Equal products and vectors: what differs is what the towers make of the words.
    assert report.compared.churn.went.keys() == report.compared.churn.came.keys() == {"tower"}
    assert {query.query for query in report.compared.churn.worst} <= set(texts)
    assert measure(subjects[1], None, Asking(texts=texts, texts_total=3)).recall["faiss"].mean == 1.0


# Do the indexes agree.


def test_a_disagreement_shows_who_is_right(lists: tuple[Twins, Subject]) -> None:
    twins, subject = lists
    report = measure(asked_so(subject, 1), None, ALL)
    assert report.parity is not None
    assert report.recall["lance"].mean == 1.0  # it has no index, and compares all
    assert report.recall["faiss"].mean < 0.99
    assert report.parity.overlap.mean == pytest.approx(
        measure(asked_so(subject, 1), None, replace(ALL, top=0)).recall["faiss"].mean, abs=0.02
    )
    assert report.parity.differing == len(report.parity.worst) > 5
    assert sum(report.parity.tenths) == report.parity.overlap.queries <= 128
    for query in report.parity.worst:
        exact = ranked(twins.shop.live, twins.shop.live[query.query])
        assert query.recall["lance"] == 1.0
        for product in query.products:
            assert product.right == (product.id in exact)
            assert product.engine == "faiss" or product.right
    assert report.border_recall["faiss"].queries == report.questions


def test_products_of_one_vector_are_no_disagreement(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    twins = Twins(tmp_path, options=LISTED)
    same = np.repeat(unit(rng, 1), 40, axis=0)
    report = measure(twins.night(named("same", same) | named("p", unit(rng, 320))), None, ALL)
    assert report.parity is not None
    crowd = [query for query in report.parity.worst if query.query.startswith("same")]
    assert crowd == []
    assert report.questions == 360


def test_what_one_index_has_and_the_table_has_not_is_wrong_and_no_crash(tmp_path: Path) -> None:
    rng, twins = np.random.default_rng(5), Twins(tmp_path)
    twins.night(named("p", unit(rng, 40)))
    torn = twins.night(delete=["p00007"])
    # The segments of the first night still show what the table dropped in the second.
    torn = replace(torn, manifest=replace(torn.manifest, tombstones=()))
    report = measure(torn, None, ALL)
    assert report.parity is not None
    ghosts = [product for query in report.parity.worst for product in query.products if product.id == "p00007"]
    assert ghosts
    assert {(product.engine, product.right) for product in ghosts} == {("faiss", False)}


def test_an_answer_is_judged_as_exact_search_would(lists: tuple[Twins, Subject]) -> None:
    twins, subject = lists
    queries = unit(np.random.default_rng(6), 5)
    exam = subject.truth.exam_for(queries)
    names = ranked(twins.shop.live, queries[0])
    answers = np.full((1, 10), -1, np.int64)
    answers[0, :3] = numbers([names[0], names[9], "q00003"])  # the best, the last, and one that was deleted
    found = judged(subject, exam, answers)
    assert found.right[0].tolist() == [True, True] + [False] * 8
    assert found.tied[0].tolist() == [False, True] + [False] * 8
    assert found.recall.tolist() == [0.2]


# The lists and how they fit.


def test_lists_are_counted_as_they_are(lists: tuple[Twins, Subject]) -> None:
    twins, subject = lists
    index = measure(subject, None, Asking(samples=1)).faiss
    assert index.lists is not None
    sizes = subject.open().segments.list_sizes
    assert sizes.sum() == index.live == len(twins.shop.live)
    assert sum(bar.count for bar in index.lists.bars) == index.lists.count == 8
    assert (index.lists.largest, index.lists.empty) == (sizes.max(), 0)
    assert index.lists.imbalance == pytest.approx(8 * (sizes**2).sum() / sizes.sum() ** 2)
    assert index.lists.trained_imbalance is not None
    assert sum(bar.count for bar in index.lists.bars if float(bar.label[:4]) >= 1) == (sizes >= sizes.mean()).sum()


def test_drift_is_told_by_segment_in_the_order_of_age(lists: tuple[Twins, Subject]) -> None:
    index = measure(lists[1], None, Asking(samples=1)).faiss
    assert [(item.kind, item.rows, item.live, item.dead) for item in index.segments] == [
        ("base", 400, 398, 2),
        ("delta", 20, 19, 1),
        ("delta", 30, 30, 0),
    ]
    base, alike, strange = (item.spread for item in index.segments)
    assert base is not None
    assert alike is not None
    assert strange is not None
    assert strange > 1.3 * base
    assert index.drift is not None
    assert index.drift.trained == pytest.approx(base, abs=1e-4)
    assert index.drift.deltas == pytest.approx((19 * alike + 30 * strange) / 49)
    assert index.drift.now == pytest.approx((398 * base + 19 * alike + 30 * strange) / 447)


def test_a_rebuild_shows_how_far_centroids_moved(lists: tuple[Twins, Subject], tmp_path: Path) -> None:
    twins, subject = lists
    other = Twins(tmp_path, options=replace(LISTED, factory="IVF6,SQ8"))
    rebuilt = other.night(twins.shop.live)
    compared = measure(rebuilt, subject, Asking(samples=8)).compared
    assert compared is not None
    moves = compared.centroids
    assert moves is not None
    assert (moves.same, moves.before, moves.now) == (False, 8, 6)
    assert moves.matched + moves.lost == 8
    assert 2 <= moves.lost <= 7
    assert moves.mean is not None
    assert moves.largest is not None
    assert 0 < moves.mean <= moves.largest < 1


def test_centroids_are_matched_whatever_their_order_and_length() -> None:
    rng = np.random.default_rng(7)
    centroids = unit(rng, 50, 32)
    moved = centroid_moves(2 * centroids, rng.uniform(0.1, 3, (50, 1)).astype(np.float32) * centroids[rng.permutation(50)], same=False)
    assert (moved.matched, moved.lost) == (50, 0)
    assert moved.mean == pytest.approx(0, abs=1e-6)
    turned = np.eye(8, dtype=np.float32)
    turned[0, :2] = [np.cos(0.5), np.sin(0.5)]
    moved = centroid_moves(np.eye(8, dtype=np.float32), turned, same=False)
    assert moved.largest == pytest.approx(1 - np.cos(0.5), abs=1e-6)
    assert moved.mean == pytest.approx((1 - np.cos(0.5)) / 8, abs=1e-6)
    alone = centroid_moves(np.eye(4, dtype=np.float32), np.eye(4, dtype=np.float32)[:1], same=False)
    assert (alone.matched, alone.lost, alone.mean) == (1, 3, 0.0)


def test_partitions_of_the_table_are_shown(tmp_path: Path) -> None:
    rng, spec = np.random.default_rng(8), replace(SPEC, flat_below=100, vector_index="IVF_FLAT")
    twins = Twins(tmp_path, spec=spec)
    twins.night(named("p", unit(rng, 600)))
    table = measure(twins.night(named("q", unit(rng, 9))), None, Asking(samples=4)).lance
    assert (table.kind, table.rows, table.piece_rows, table.unindexed) == ("IVF_FLAT", 609, (600, 9), 0)
    assert table.lists is not None
    assert sum(bar.count for bar in table.lists.bars) == table.lists.count


# Odd generations.


def test_a_generation_without_products_is_reported(tmp_path: Path) -> None:
    twins = Twins(tmp_path)
    full = twins.night(named("p", unit(np.random.default_rng(9), 20)))
    empty = twins.night(delete=[*twins.shop.live])
    report = measure(empty, full, ALL)
    assert (report.live, report.parity, report.questions) == (0, None, 0)
    assert "no product" in report.notes[-1]
    assert report_text(report)
    assert page(report)
    back = measure(full, empty, ALL).compared
    assert back is not None
    assert back.churn is not None
    assert back.churn.came.keys() == {"new"}


def test_a_damaged_older_generation_is_a_note_or_an_error(tmp_path: Path) -> None:
    twins, rng = Twins(tmp_path), np.random.default_rng(10)
    before = twins.night(named("p", unit(rng, 30)))
    after = twins.night(named("q", unit(rng, 3)))
    only = next(item for item in before.manifest.objects if item.key not in {other.key for other in after.manifest.objects})
    (tmp_path / "store" / only.key).unlink()
    with pytest.raises(CorruptObject, match="missing"):
        measure(after, before, ALL)
    report = measure(after, before, ALL, strict=False)
    assert report.compared is None
    assert report.notes[0].startswith("not compared with g000001: ")
    assert report.parity is not None


# What is shown.


class _Tags(HTMLParser):
    """Every tag and attribute of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.words: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in ("meta", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "rect":
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Report:
    rng = np.random.default_rng(11)
    names = {f"{HOSTILE}{name}": vector for name, vector in named("p", unit(rng, 350)).items()}
    twins = Twins(tmp_path_factory.mktemp("hostile"), options=LISTED, brands=dict.fromkeys(names, HOSTILE))
    before = twins.night(names)
    after = twins.night({f"{HOSTILE}{name}": vector for name, vector in named("q", unit(rng, 30)).items()}, delete=[*names][:20])
    report = measure(asked_so(after, 1), before, ALL, notes=[HOSTILE])
    assert report.parity is not None
    assert report.parity.worst
    assert report.labels
    return report


def test_hostile_texts_do_nothing_to_a_page(hostile: Report) -> None:
    shown = page(hostile)
    tags = _Tags()
    tags.feed(shown)
    assert tags.open == []
    assert not {"script", "img", "link", "iframe", "object", "a"} & tags.tags
    assert not {name for name in tags.attributes if name.startswith("on") or name in ("src", "href", "style")}
    assert all(char.isprintable() or char == "\n" for char in shown)
    assert "<script>alert(1)</script>" in "".join(tags.words)  # as words, for a person to see
    assert "http:" not in shown
    assert "https:" not in shown
    assert "url(" not in shown


def test_hostile_texts_do_nothing_to_a_terminal(hostile: Report) -> None:
    shown = report_text(hostile)
    assert "\\x1b[2J<script>" in shown
    assert all(char.isprintable() or char == "\n" for char in shown)
    assert all(len(line) < 300 for line in shown.splitlines())


def test_the_data_of_a_report_is_plain_json(hostile: Report) -> None:
    data = json.loads(json.dumps(asdict(hostile), allow_nan=False, default=str))
    assert data["generation"] == "g000002"
    assert data["compared"]["churn"]["came"].keys() <= CAME.keys()
    assert data["compared"]["churn"]["went"].keys() <= WENT.keys()
    assert data["faiss"]["use"]["action"] == "delta"


def test_no_more_is_shown_than_asked_for(lists: tuple[Twins, Subject]) -> None:
    twins, subject = lists
    report = measure(asked_so(subject, 1), asked_so(subject, 8), Asking(samples=64, top=2))
    assert report.parity is not None
    assert report.compared is not None
    assert report.compared.churn is not None
    assert (len(report.parity.worst), len(report.compared.churn.worst)) == (2, 2)
    assert len(report.labels) <= 2 * (20 + 20)
    smallest = np.sort(vids(id_hashes(pa.array(list(twins.shop.live)))))[:64]
    assert report.questions == 64
    assert {int(numbers([query.query])[0]) for query in report.compared.churn.worst} <= set(smallest.tolist())


# Files of queries.


def test_queries_are_read_once_each_in_their_order(tmp_path: Path) -> None:
    text, table = tmp_path / "queries.txt", tmp_path / "queries.parquet"
    text.write_bytes(b"\xef\xbb\xbfred shoes\r\n\n  blue dress \nred shoes\n")
    pq.write_table(pa.table({"query": ["red shoes", None, " blue dress", "", "red shoes"], "n": range(5)}), table)
    for path in (text, table):
        assert read_texts(path, 10) == (["red shoes", "blue dress"], 2)
    text.write_text("\n".join(f"query {number}" for number in range(50)), encoding="utf-8")
    chosen, total = read_texts(text, 7)
    assert (len(chosen), total) == (7, 50)
    assert chosen == read_texts(text, 7)[0] == sorted(chosen, key=lambda query: int(query.split()[1]))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.txt", None, "cannot be read"),
        ("empty.txt", b"\n  \n", "holds no query"),
        ("latin.txt", "größe".encode("latin-1"), "not UTF-8"),
        ("one-line.txt", b"shoes " * 5000, "one query a line"),
        ("torn.parquet", b"PAR1", "cannot be read"),
    ],
)
def test_a_file_without_queries_is_refused(tmp_path: Path, name: str, content: bytes | None, said: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=said):
        read_texts(path, 5)


@pytest.mark.parametrize(("columns", "said"), [({"text": ["a"]}, "no column `query`"), ({"query": [[1]]}, "not text")])
def test_a_parquet_file_without_a_column_of_queries_is_refused(tmp_path: Path, columns: dict[str, list[object]], said: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "q.parquet")
    with pytest.raises(InputError, match=said):
        read_texts(tmp_path / "q.parquet", 5)
