"""The benchmark measures what it says: lengths, operations, faithful vectors, everyone in turn, and a report that holds it."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from encoder.bench import rivals
from encoder.bench.__main__ import main
from encoder.bench.corpus import Corpus, make_corpus, vocabulary
from encoder.bench.fidelity import compare, sample
from encoder.bench.limits import Products, Work, matrix_rate, work_of
from encoder.bench.rounds import Entrant, alternate, rotated
from encoder.bench.towers import SHAPES, write_tower
from encoder.bench.workbench import SkippedError, Started, Workbench
from encoder.errors import EncoderError, TowerError
from encoder.loading import load_model
from encoder.registry import default_tower, read_card
from encoder.tokens import Tokenizer

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")
QUICK = ["--texts", "60", "--rounds", "1", "--sample-texts", "12", "--queries", "3", "--threads", "1", "--device", "cpu", "--pace", "usual"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    # Two threads on busy cores run a tiny tower fifteen times slower than one.
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=["tiny", "tiny-qwen3"])
def tower(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bench") / str(request.param)
    directory.mkdir()
    write_tower(directory, SHAPES[request.param])
    return directory


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bench-bert")
    write_tower(directory, SHAPES["tiny"])
    return directory


def lengths(*tokens: int) -> Any:
    return np.array(tokens, np.int64)


def test_a_mixed_corpus_has_the_lengths_and_repeats_of_a_shop_in_tokens(tower: Path) -> None:
    corpus = make_corpus(Tokenizer(tower), name="mixed", texts=5000)
    facts = corpus.facts()
    assert facts["texts"] == 5000
    assert 42 <= facts["median"] <= 48
    assert 165 <= facts["p95"] <= 195
    assert facts["duplicates"] == pytest.approx(0.08, abs=0.002)
    assert facts["tokens"] == Tokenizer(tower).tokenize(corpus.texts).ids.size
    assert len(corpus.unique_lengths()) == 4600


def test_a_corpus_is_measured_in_the_tokens_of_a_real_tokenizer() -> None:
    facts = make_corpus(Tokenizer(default_tower()), name="mixed", texts=2000).facts()
    assert 41 <= facts["median"] <= 49
    assert 160 <= facts["p95"] <= 200


@pytest.mark.parametrize("length", [32, 256])
def test_a_fixed_corpus_has_one_length_and_no_repeats(tower: Path, length: int) -> None:
    facts = make_corpus(Tokenizer(tower), name=str(length), texts=300).facts()
    assert (facts["min"], facts["max"], facts["duplicates"]) == (length, length, 0)


def test_equal_seeds_give_equal_texts(bert: Path) -> None:
    tokenizer = Tokenizer(bert)
    one, same, other = (make_corpus(tokenizer, name="mixed", texts=50, seed=seed).texts for seed in (0, 0, 1))
    assert one == same
    assert one != other
    assert vocabulary(4000)[:100] == vocabulary(100)
    assert len(set(vocabulary(4000))) == 4000


def test_lengths_that_are_none_are_refused(bert: Path) -> None:
    with pytest.raises(EncoderError, match="Choose mixed, or a number"):
        make_corpus(Tokenizer(bert), name="long", texts=5)


def test_a_tower_of_equal_arguments_has_equal_bytes_and_may_be_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "same"):
        (tmp_path / name).mkdir()
        write_tower(tmp_path / name, replace(SHAPES["tiny-qwen3"], stored=torch.bfloat16))
    assert read_card(tmp_path / "one").fingerprint == read_card(tmp_path / "same").fingerprint
    monkeypatch.setattr("encoder.bench.towers._SHARD_BYTES", 50_000)
    (tmp_path / "sharded").mkdir()
    write_tower(tmp_path / "sharded", SHAPES["tiny-qwen3"])
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    model = load_model(tmp_path / "sharded", read_card(tmp_path / "sharded"), dtype=torch.float32, attention="sdpa")
    assert model.embed_tokens.weight.shape == (20_000, 32)


def test_operations_are_those_counted_by_hand() -> None:
    work = Work(linears=((8, 4), (4, 8)), heads=2, head_dims=3, windows=(None, 5), causal=False)
    # 2 * 64 weights * 10 tokens; then 4 * 6 * (3*3 + 7*7) of the layer that sees all, and (3*3 + 7*5) of the other.
    assert work.flops(lengths(3, 7)) == 2 * 64 * 10 + 4 * 6 * (9 + 49) + 4 * 6 * (9 + 35)
    causal = replace(work, causal=True, windows=(None,))
    assert causal.flops(lengths(3, 7)) == 2 * 64 * 10 + 4 * 6 * (9 + 49) / 2


def test_operations_are_those_that_torch_counts(tower: Path) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    card = read_card(tower)
    model = load_model(tower, card, dtype=torch.float32, attention="eager")
    causal = card.model_type == "qwen3"
    work = work_of(model, causal=causal)
    assert work.causal == causal
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(input_ids=torch.ones(3, 20, dtype=torch.long))
    # Eager attention makes the whole square.
    assert counter.get_total_flops() == replace(work, causal=False).flops(lengths(20, 20, 20))


def test_the_real_shapes_have_the_parameters_of_their_models() -> None:
    layers = {"minilm": 10_616_832, "e5-base": 84_934_656, "qwen3-0.6b": 440_401_920}
    for name, wanted in layers.items():
        shape = SHAPES[name]
        attention = shape.dims * shape.head_dims * 2 * (shape.heads + shape.kv_heads)
        inner = (3 if shape.kind == "qwen3" else 2) * shape.dims * shape.inner
        assert shape.layers * (attention + inner) == wanted


def test_packs_hold_every_text_within_the_budget_and_every_way_runs(tower: Path) -> None:
    card = read_card(tower)
    model = load_model(tower, card, dtype=torch.float32, attention="sdpa")
    products = Products(model, work_of(model, causal=card.model_type == "qwen3"), budget=64, threads=2)
    many = np.random.default_rng(0).integers(1, 65, 24)
    packs = products.packs(many)
    assert max(sum(texts * length for texts, length in pack) for pack in packs) <= 64
    assert sorted(length for pack in packs for texts, length in pack for _ in range(texts)) == sorted(many.tolist())
    assert len(packs) < 1.5 * many.sum() / 64
    way, seconds = products.choose(many[:4])
    assert str(way) in seconds
    assert {(one.lanes, one.threads) for one in products.ways()} == {(1, 2), (2, 1)}
    before = torch.get_num_threads()
    for one in products.ways():
        products.run(many[:4], one)
    assert torch.get_num_threads() == before


def test_the_rate_of_a_product_grows_with_nothing_but_the_machine() -> None:
    assert matrix_rate(CPU, torch.float32, size=128, seconds=0.05) > 1e8


def test_a_sample_has_the_shortest_and_the_longest(bert: Path) -> None:
    corpus = make_corpus(Tokenizer(bert), name="mixed", texts=300)
    chosen = Tokenizer(bert).tokenize(sample(corpus, 20)).lengths
    assert (chosen.min(), chosen.max()) == (corpus.lengths.min(), corpus.lengths.max())
    assert len(sample(Corpus(name="mixed", texts=["a"], lengths=lengths(3)), 20)) == 1


def test_a_vector_that_is_not_finite_or_of_another_shape_is_as_far_as_can_be() -> None:
    good = np.eye(3, dtype=np.float32)
    assert compare(good, good, good).least == 1
    bad = good.copy()
    bad[1] = np.nan
    assert compare(bad, good, good).least == -1
    assert compare(good[:2], good, good).mean == -1


def test_all_take_turns_and_a_failure_ends_only_its_own_run() -> None:
    seen: list[str] = []

    def failing() -> None:
        seen.append("b")
        raise MemoryError("too large\n")

    entrants = {"a": lambda: seen.append("a"), "b": failing, "c": lambda: seen.append("c")}
    lined = {name: Entrant(run=run, texts=1, tokens=10) for name, run in entrants.items()}
    rounds = alternate(lined, rounds=3, threads=1, device=CPU, say=lambda _: None)
    assert "".join(seen) == "abc" + "ca" + "ca"
    assert rounds.failures == {"b": "MemoryError: too large"}
    assert {name: len(laps) for name, laps in rounds.laps.items()} == {"a": 3, "c": 3}
    assert rotated(["a", "b", "c"], 4) == ["b", "c", "a"]


def test_growth_of_memory_is_seen_while_it_lasts() -> None:
    def hoard() -> None:
        torch.ones(50, 1024, 1024).sum()  # 200 MiB, given back at the end

    rounds = alternate({"a": Entrant(run=hoard, texts=1, tokens=1)}, rounds=1, threads=1, device=CPU, say=lambda _: None)
    assert (rounds.laps["a"][0].grown_bytes or 0) > 100 * 2**20


def test_a_run_writes_everyone_measured_or_left_out_with_a_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, before = tmp_path / "new" / "bench.json", torch.get_num_threads()
    arguments = ["--tower", "tiny", *QUICK, "--rounds", "2", "--lengths", "mixed,32", "--batch-sizes", "8,16", "--out", str(out)]
    assert main(arguments) == 0
    assert torch.get_num_threads() == before
    tree = json.loads(out.read_text())
    assert tree["machine"]["cpu"]
    assert tree["machine"]["versions"]["torch"]
    assert [result["corpus"]["name"] for result in tree["results"]] == ["mixed", "32"]
    for result in tree["results"]:
        lines = {line["name"]: line for line in result["rivals"]}
        assert set(lines) == {*rivals.RIVALS, "limit", "limit-linear"}
        left_out = {name: line["reason"] for name, line in lines.items() if line["status"] != "measured"}
        assert left_out["ray"] == "Not asked for: give --ray"
        assert all(left_out.values())
        measured = {name: line for name, line in lines.items() if line["status"] == "measured"}
        assert {"ours", "padded", "sentence-transformers", "sorted-loop", "plain-loop", "ray-blocks", "daft-chunks"} <= set(measured)
        for name, line in measured.items():
            assert line["ratio"]["min"] <= line["ratio"]["median"] <= line["ratio"]["max"]
            assert len(line["wall_s"]) == len(line["cpu_s"]) == 2
            assert line["cpu_ratio"]["median"] > 0
            assert name.startswith("limit") or line["cosine"]["min"] > 0.99999
        assert lines["sentence-transformers"]["ratio"] == {"min": 1, "median": 1, "max": 1}
        assert lines["sentence-transformers"]["settings"]["batch_size"] in {8, 16}
        assert result["between_texts"] < 0.95
        assert result["latency"]["ours"]["p50_ms"] > 0
        # No limit is passed but by doing less, and that is told apart.
        ours = lines["ours"]
        assert ours["of_limit_of_different_texts"]["median"] <= ours["of_limit"]["median"]
    ET.fromstring(out.with_suffix(".svg").read_text())  # noqa: S314 - our own file
    printed = capsys.readouterr().out
    assert "random weights" in printed
    assert "Ratios are to sentence-transformers" in printed
    assert "skipped. Not asked for: give --ray" in printed


def test_the_way_of_an_accelerator_runs_on_a_cpu_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    counted = ["--limit", "counted", "--matrix-size", "64", "--peak", "0.5", "--warm-texts", "20", "--rivals", "sorted-loop,plain-loop"]
    assert main(["--tower", "tiny-qwen3", *QUICK, *counted, "--dtype", "bfloat16", "--out", str(out)]) == 0
    result = json.loads(out.read_text())["results"][0]
    lines = {line["name"]: line for line in result["rivals"]}
    assert set(lines) == {"ours", "sorted-loop", "plain-loop"}
    assert lines["sorted-loop"]["ratio"]["median"] == 1, "without sentence-transformers the sorted loop is the baseline"
    ours = lines["ours"]
    assert ours["mfu_of_peak"] == pytest.approx(ours["tflops"] / 0.5, rel=1e-3)
    assert ours["mfu"] == pytest.approx(ours["tflops"] / result["matrix_tflops"], rel=1e-3)
    # What is not run, because it was run before, is no work done.
    assert ours["mfu"] < ours["of_limit"]["median"]
    assert lines["sorted-loop"]["mfu"] == pytest.approx(lines["sorted-loop"]["of_limit"]["median"], rel=1e-3)
    assert "of the given peak" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["ours", "sentence-transformers"])
def test_wrong_vectors_end_the_run_before_anything_is_timed(
    name: str, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rival = rivals.RIVALS[name]

    def tampered(bench: Workbench) -> Started:
        started = rival.start(bench)

        def run(texts: Any) -> Any:
            vectors = started.run(texts)
            vectors[3] = np.roll(vectors[3], 1)  # one text of many
            return vectors

        return replace(started, run=run)

    monkeypatch.setitem(rivals.RIVALS, name, replace(rival, start=tampered))
    out = tmp_path / "bench.json"
    assert main(["--tower", str(bert), *QUICK, "--rivals", "sentence-transformers", "--batch-sizes", "8", "--out", str(out)]) == 1
    captured = capsys.readouterr()
    assert "differ" in captured.err
    assert "round" not in captured.out
    assert not out.exists()


def test_a_rival_that_fails_is_reported_and_the_others_go_on(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(bench: Workbench) -> Started:
        raise KeyError(bench.label)

    def absent(bench: Workbench) -> Started:
        raise SkippedError("no such library")

    monkeypatch.setitem(rivals.RIVALS, "padded", replace(rivals.RIVALS["padded"], start=broken))
    monkeypatch.setitem(rivals.RIVALS, "sentence-transformers", replace(rivals.RIVALS["padded"], start=absent))
    out = tmp_path / "bench.json"
    chosen = "padded,sentence-transformers,sorted-loop"
    assert main(["--tower", str(bert), *QUICK, "--rivals", chosen, "--out", str(out)]) == 0
    lines = {line["name"]: line for line in json.loads(out.read_text())["results"][0]["rivals"]}
    assert lines["padded"]["status"] == "failed"
    assert lines["padded"]["reason"].startswith("KeyError")
    assert lines["sentence-transformers"] == {"name": "sentence-transformers", **_left_out(lines["sentence-transformers"])}
    assert lines["ours"]["baseline"] == "sorted-loop"
    assert "no such library" in capsys.readouterr().out


def _left_out(line: dict[str, Any]) -> dict[str, Any]:
    assert line["status"] == "skipped"
    return {"label": line["label"], "status": "skipped", "reason": "no such library"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rivals", "vllm"], "--rivals vllm: no such rival"),
        (["--tower", "/nowhere"], "no such directory, and no shape of that name"),
        (["--texts", "0"], "--texts is 0. Give 1 or more"),
    ],
)
def test_what_cannot_be_run_is_refused_in_words(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) in {1, 2}
    assert message in capsys.readouterr().err


def test_a_bare_machine_runs_it_and_importing_does_nothing(bert: Path) -> None:
    script = (
        "import sys\n"
        "absent = ('ray', 'lance', 'lancedb', 'faiss', 'duckdb', 'click', 'rich', 'pipelines', 'jobs', 'sentence_transformers')\n"
        "for name in absent:\n"
        "    sys.modules[name] = None\n"
        "from encoder.bench.__main__ import main\n"
        "assert not {'onnxruntime', 'daft', 'matplotlib'} & set(sys.modules)\n"
        "raise SystemExit(main(sys.argv[1:]))"
    )
    arguments = ["--tower", str(bert), *QUICK, "--rivals", "ours,sentence-transformers,sorted-loop"]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "sentence_transformers cannot be imported" in done.stdout
    assert "Ratios are to transformers, length-sorted" in done.stdout
    assert done.stderr == ""


def test_a_machine_without_the_package_measures_the_shape_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from encoder.bench import towers

    with towers.open_tower("minilm") as (directory, label):
        assert directory == default_tower()
        assert "real weights" in label

    def absent() -> Path:
        raise TowerError("not installed")

    monkeypatch.setattr(towers, "default_tower", absent)
    with towers.open_tower("minilm") as (directory, label):
        assert read_card(directory).full_dims == 384
        assert "random weights" in label
    assert not directory.exists()


@pytest.mark.parametrize(
    "wrong",
    [
        ["--threads", "1000000"],
        ["--seed", "-1"],
        ["--lengths", ","],
        ["--batch-sizes", "0"],
        ["--peak", "0"],
        ["--warm-texts", "-1"],
        ["--out", "result.svg"],
        ["--out", "/proc/nowhere/result.json"],
        ["--device", "cuda:9"],
    ],
    ids=" ".join,
)
def test_what_cannot_be_run_is_refused_before_anything_is_measured(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tower", "tiny", *wrong]) != 0
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    assert said.err.strip().endswith(".")
    assert "round 1" not in said.out
