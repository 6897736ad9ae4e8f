from __future__ import annotations

import math
import re
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.errors import InputError
from pipelines.metrics import METRICS, PREFIX, Key, carried, parse_prometheus, read_textfile, render_prometheus, write_textfile

HOSTILE = 'a"} 9\nfake_metric 1\\'


def strict(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Read the exposition format by its grammar, one character after the other; anything else is an AssertionError."""
    found: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    family, types = "", {}
    assert text == "" or text.endswith("\n")
    for line in text.split("\n")[:-1]:
        if comment := re.fullmatch(r"# (HELP|TYPE) ([a-zA-Z_:][a-zA-Z0-9_:]*) (.+)", line):
            if comment[1] == "HELP":
                assert comment[2] not in types, "one block for each metric"
                family = comment[2]
            else:
                assert comment[2] == family
                assert comment[3] in {"gauge", "counter"}
                types[family] = comment[3]
            continue
        name, rest = re.match(r"[a-zA-Z_:][a-zA-Z0-9_:]*", line)[0], re.sub(r"^[a-zA-Z0-9_:]*", "", line)  # type: ignore[index]
        assert name == family
        assert name in types, "HELP and TYPE come before samples"
        labels = []
        if rest.startswith("{"):
            at = 1
            while rest[at] != "}":
                label = re.match(r"[a-zA-Z_][a-zA-Z0-9_]*", rest[at:])[0]  # type: ignore[index]
                at += len(label)
                assert rest[at : at + 2] == '="'
                at, value = at + 2, ""
                while rest[at] != '"':
                    if rest[at] == "\\":
                        value += {"\\": "\\", '"': '"', "n": "\n"}[rest[at + 1]]
                        at += 2
                    else:
                        value += rest[at]
                        at += 1
                labels.append((label, value))
                at += 1
                if rest[at] == ",":
                    at += 1
            rest = rest[at + 1 :]
        assert rest.startswith(" ")
        assert (name, tuple(labels)) not in found, "a sample is there once"
        found[name, tuple(labels)] = float(rest[1:])
    return found


def key(name: str, *labels: str) -> Key:
    return name, labels


def test_metrics_are_rendered_in_one_order_with_help_and_type() -> None:
    values = {key("retries_total", "storage"): 2, key("gate_result", "recall"): 0.5, key("gate_result", "churn"): 1, key("rows_read"): 7.0}
    text = render_prometheus(values)
    assert text == (
        "# HELP catalog_embed_rows_read Catalog rows that the last run read.\n"
        "# TYPE catalog_embed_rows_read gauge\n"
        "catalog_embed_rows_read 7\n"
        "# HELP catalog_embed_gate_result Gates of the last candidate: 1 passed, 0.5 warned, 0 failed.\n"
        "# TYPE catalog_embed_gate_result gauge\n"
        'catalog_embed_gate_result{gate="churn"} 1\n'
        'catalog_embed_gate_result{gate="recall"} 0.5\n'
        "# HELP catalog_embed_retries_total Attempts that were repeated, by kind.\n"
        "# TYPE catalog_embed_retries_total counter\n"
        'catalog_embed_retries_total{kind="storage"} 2\n'
    )
    assert render_prometheus(dict(reversed(values.items()))) == text
    assert len(strict(text)) == 4


def test_registry_keeps_the_naming_rules() -> None:
    for metric in METRICS.values():
        assert re.fullmatch(r"[a-z][a-z0-9_]*", metric.name)
        assert metric.name.endswith("_total") == (metric.type == "counter")
        assert "\n" not in metric.help
        assert "\\" not in metric.help
        assert not (metric.lasting and metric.type == "counter")


@st.composite
def samples(draw: st.DrawFn) -> dict[Key, float]:
    found = {}
    for name in draw(st.lists(st.sampled_from(sorted(METRICS)), max_size=6)):
        labels = tuple(draw(st.text(st.characters(codec="utf-8"), max_size=30) | st.just(HOSTILE)) for _ in METRICS[name].labels)
        found[name, labels] = draw(st.floats(allow_nan=False) | st.integers(0, 2**60).map(float))
    return found


@given(samples(), st.sampled_from([{}, {"alias": "prod"}, {"alias": HOSTILE, "project": "\u202e"}]))
def test_rendered_text_parses_strictly_and_reads_back(values: dict[Key, float], labels: dict[str, str]) -> None:
    text = render_prometheus(values, labels=labels)
    assert all(char.isprintable() or char == "\n" for char in text)
    parsed = strict(text)
    assert all(len(pairs) == len(METRICS[name.removeprefix(PREFIX)].labels) + len(labels) for name, pairs in parsed)
    back = parse_prometheus(text, labels=labels)
    assert sorted(back.values()) == sorted(parsed.values())
    assert render_prometheus(back, labels=labels).count("\n") == text.count("\n")
    # What was made printable once stays as it is: a series keeps its name from run to run.
    if all("\\" not in label and label.isprintable() for _, given in values for label in given):
        assert back == values


def test_hostile_label_forges_no_sample() -> None:
    text = render_prometheus({key("rows_quarantined", HOSTILE): 1, key("rows_quarantined", "\x1b[2J\r\u2028"): 2, key("rows_read"): 3})
    assert len(strict(text)) == 3
    assert "\x1b" not in text
    assert not any(line.startswith("fake_metric") for line in text.splitlines())


def test_labels_that_are_shown_alike_are_one_sample() -> None:
    values = {key("retries_total", "a\n"): 1, key("retries_total", "a\\n"): 2}
    assert list(strict(render_prometheus(values)).values()) == [3.0]


def test_long_labels_are_cut() -> None:
    assert len(render_prometheus({key("retries_total", "x" * 10**5): 1})) < 500


def test_not_a_number_and_infinity_have_their_spelling() -> None:
    values = {key("recall_at_10", "a"): math.nan, key("recall_at_10", "b"): math.inf, key("recall_at_10", "c"): -math.inf}
    assert re.findall(r"\} (\S+)", render_prometheus(values)) == ["NaN", "+Inf", "-Inf"]


def test_unknown_metric_and_wrong_labels_are_refused() -> None:
    with pytest.raises(KeyError, match="rows_red is no metric"):
        render_prometheus({key("rows_red"): 1})
    for wrong in (key("rows_read", "x"), key("gate_result"), key("gate_result", "a", "b")):
        with pytest.raises(AssertionError):
            render_prometheus({wrong: 1})
    with pytest.raises(AssertionError, match="label of its own"):
        render_prometheus({key("gate_result", "recall"): 1}, labels={"gate": "x"})
    with pytest.raises(AssertionError):
        render_prometheus({key("rows_read"): 1}, labels={"a b": "x"})


def test_failed_run_does_not_erase_the_last_success() -> None:
    before = {
        key("last_success_timestamp_seconds"): 100.0,
        key("recall_at_10", "faiss"): 0.97,
        key("gate_result", "churn"): 1.0,
        key("retries_total", "storage"): 3.0,
        key("retries_total", "actor"): 1.0,
    }
    now = {key("recall_at_10", "lance"): 0.98, key("retries_total", "storage"): 2.0, key("run_exit_code"): 1.0}
    assert carried(before, now) == {
        key("last_success_timestamp_seconds"): 100.0,
        key("recall_at_10", "lance"): 0.98,
        key("retries_total", "storage"): 5.0,
        key("retries_total", "actor"): 1.0,
        key("run_exit_code"): 1.0,
    }


def test_textfile_is_replaced_whole_readable_and_alone(tmp_path: Path) -> None:
    path = tmp_path / "catalog_embed.prom"
    labels = {"alias": "prod"}
    for number in (1, 2):
        write_textfile(path, render_prometheus(carried(read_textfile(path, labels=labels), {key("runs_total", "built"): 1}), labels=labels))
        assert read_textfile(path, labels=labels) == {key("runs_total", "built"): number}
    assert read_textfile(path, labels={"alias": "staging"}) == {}
    assert read_textfile(path) == {}
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [item.name for item in tmp_path.iterdir()] == ["catalog_embed.prom"]


def test_textfile_that_is_not_ours_is_read_as_nothing(tmp_path: Path) -> None:
    path = tmp_path / "catalog_embed.prom"
    path.write_bytes(
        b"\xff\xfe node_load1 3\ncatalog_embed_rows_read abc\ncatalog_embed_gate_result{gate=x} 1\ncatalog_embed_rows_read 4 5\n"
    )
    assert read_textfile(path) == {}
    assert read_textfile(tmp_path / "absent.prom") == {}


def test_textfile_that_cannot_be_written_leaves_the_old_one_and_says_which(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent/x\.prom cannot be used: No such file"):
        write_textfile(tmp_path / "absent" / "x.prom", "")
    path = tmp_path / "x.prom"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_textfile(path, "\udc80")
    assert [item.name for item in tmp_path.iterdir()] == ["x.prom"]
    assert path.read_text() == "old"
