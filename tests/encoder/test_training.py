"""`python -m tests.encoder.test_training TOWER FOLDER` dies again and again, and leaves what the tests compare."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from encoder import checkpoints
from encoder.curves import append_line, curves, drop_lines_after, read_lines, write_curves
from encoder.errors import EncoderError, TowerError
from encoder.examples import Batch
from encoder.gathering import alone
from encoder.gradients import Draw, step_gradients
from encoder.inference import EncodeOptions, Encoder
from encoder.objectives import Objective
from encoder.registry import read_card
from encoder.trainable import Lora, Trainable
from encoder.training import Outcome, TrainOptions, _undisturbed, learning_rate, train
from tests.encoder.test_gathering import batch_of
from tests.tower_tokenizers import Kind
from tests.towers import sentences, tiny_tower

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 6
OBJECTIVE = Objective(parts={"infonce": 1.0, "roar": 0.1}, tau=0.05, tau_a=0.05)
OPTIONS = TrainOptions(steps=STEPS, lr=1e-3, log_every=1, save_every=2, keep=2, chunk_texts=8)
LORA = Lora(rank=4, alpha=8)


def batches(step: int) -> Batch:
    return batch_of(4, seed=100 + step)


def run(tower: Path, work: Path, options: TrainOptions = OPTIONS, **how: Any) -> Outcome:
    lora = how.pop("lora", None)
    return train(Trainable.open(tower, device="cpu", lora=lora), how.pop("batches", batches), OBJECTIVE, options, work=work, **how)


def held(work: Path, step: int = STEPS) -> dict[str, bytes]:
    folder = checkpoints.place(work / "checkpoints", step)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def without_speed(work: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if not name.endswith("_per_s")} for line in read_lines(work / "metrics.jsonl")]


def cosines(left: Any, right: Any) -> Any:
    return (np.asarray(left) * np.asarray(right)).sum(1)


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tower(tmp_path_factory.mktemp("towers") / "bert", prompts={"query": "find: ", "document": "item: "})


# What the processes of the crash test do.


def attempt(tower: Path, work: Path, *, die_in: str, number: int) -> None:
    """Train, and be killed at the n-th step, batch or sync to disk."""
    torch.set_num_threads(1)
    counter = itertools.count(1)

    def tick(*_: Any) -> None:
        if next(counter) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def fatal(step: int) -> Batch:
        if die_in == "batch":
            tick()
        return batches(step)

    sync = os.fsync

    def fatal_sync(fd: Any) -> None:
        tick()
        sync(fd)

    if die_in == "sync":
        os.fsync = fatal_sync
    run(tower, work, batches=fatal, on_step=tick if die_in == "step" else None)


# In order: before any checkpoint, after one, in each write of the next one, past it, before and after the last rename.
DEATHS = (
    ("step", 1),
    ("batch", 3),
    ("sync", 4),
    ("sync", 5),
    ("sync", 6),
    ("step", 3),
    ("sync", 7),
    ("sync", 8),
    ("never", 0),
)


def die_and_resume(tower: Path, folder: Path) -> None:
    """Train undisturbed in one folder, and with many deaths in another. Each process is a fork, for one import."""
    torch.set_num_threads(1)
    Trainable.open(tower, device="cpu")  # imports what every process would import
    ends = []
    for work, (die_in, number) in [("whole", ("never", 0)), *(("killed", death) for death in DEATHS)]:
        process = os.fork()
        if not process:
            attempt(tower, folder / work, die_in=die_in, number=number)
            os._exit(0)
        ends.append(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
    (folder / "ends.json").write_text(json.dumps(ends))


def test_a_run_that_is_killed_again_and_again_ends_in_the_same_bytes(tower: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.encoder.test_training", str(tower), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, check=False, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    ends = json.loads((tmp_path / "ends.json").read_text())
    assert ends == [0, *[-signal.SIGKILL] * (len(DEATHS) - 1), 0]
    assert held(tmp_path / "killed") == held(tmp_path / "whole")
    assert without_speed(tmp_path / "killed") == without_speed(tmp_path / "whole")
    assert [line["step"] for line in read_lines(tmp_path / "killed" / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert sorted(path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]


@given(
    steps=st.integers(1, 300),
    warmup=st.floats(0, 1),
    floor=st.floats(0, 1),
)
def test_the_learning_rate_rises_then_falls_and_stays_within_its_bounds(steps: int, warmup: float, floor: float) -> None:
    options = TrainOptions(steps=steps, lr=1e-3, warmup_share=warmup, floor_share=floor)
    rates = [learning_rate(step, options) for step in range(steps)]
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert max(rates) == pytest.approx(1e-3)
    assert all(rate > 0 for rate in rates[: math.ceil(warmup * steps)])
    assert all(rate >= floor * 1e-3 * (1 - 1e-9) for rate in rates[math.ceil(warmup * steps) :])


def gradient(trainable: Trainable, *, cached: bool, seed: int = 0, chunk_texts: int = 3) -> dict[str, torch.Tensor]:
    trainable.model.zero_grad(set_to_none=True)
    draw = Draw(seed=seed, step=0, rank=0)
    step_gradients(trainable, batches(0), OBJECTIVE, draw=draw, chunk_texts=chunk_texts, cached=cached, world=alone)
    return {name: weight.grad.clone() for name, weight in trainable.parameters.items() if weight.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_cache_is_the_direct_gradient_with_dropout_on(tower: Path, *, checkpointing: bool) -> None:
    direct = gradient(Trainable.open(tower, device="cpu"), cached=False)
    trainable = Trainable.open(tower, device="cpu", checkpointing=checkpointing)
    cached = gradient(trainable, cached=True)
    other = gradient(trainable, cached=True, seed=1)
    assert cached.keys() == direct.keys()
    for name, expected in direct.items():
        torch.testing.assert_close(cached[name], expected, rtol=1e-4, atol=1e-6, msg=name)
    name = "encoder.layer.0.intermediate.dense.weight"
    assert not torch.allclose(other[name], direct[name], rtol=1e-2), "dropout was off, so this compares nothing"


def test_the_gradient_is_that_of_sentence_transformers(tower: Path) -> None:
    models = pytest.importorskip("sentence_transformers")
    losses = pytest.importorskip("sentence_transformers.losses")
    trainable = Trainable.open(tower, device="cpu")
    trainable.model.eval()
    batch = batch_of(6, seed=3, documents_each=1)
    plain = Objective(tau=0.05, delta=None, positive=1)
    batch = replace(batch, documents=batch.documents[:6], product_key_M=batch.product_key_M[:6], group_key_M=batch.group_key_M[:6])
    found = step_gradients(trainable, batch, plain, draw=Draw(seed=0, step=0, rank=0), chunk_texts=4, cached=False, world=alone)
    twin = models.SentenceTransformer(str(tower), device="cpu").eval()
    prompted = (["find: " + text for text in batch.queries], ["item: " + text for text in batch.documents])
    loss = losses.MultipleNegativesRankingLoss(twin, scale=20.0)([twin.tokenize(texts) for texts in prompted], None)
    loss.backward()
    assert found.loss == pytest.approx(loss.item(), rel=1e-5)
    theirs = {name: weight.grad for name, weight in twin[0].auto_model.named_parameters()}
    for name, weight in trainable.parameters.items():
        torch.testing.assert_close(weight.grad, theirs[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["bert", "qwen3"])
def test_an_empty_text_has_a_finite_gradient(tmp_path: Path, kind: Kind) -> None:
    trainable = Trainable.open(tiny_tower(tmp_path, kind=kind, pooling="lasttoken"), device="cpu")
    batch = replace(batches(0), queries=("", *batches(0).queries[1:]), documents=("", *batches(0).documents[1:]))
    step_gradients(trainable, batch, OBJECTIVE, draw=Draw(seed=0, step=0, rank=0), chunk_texts=3, cached=True, world=alone)
    assert all(bool(weight.grad.isfinite().all()) for weight in trainable.parameters.values() if weight.grad is not None)


def test_a_model_that_cannot_compute_layers_twice_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(TowerError, match="mpnet models cannot compute layers twice"):
        Trainable.open(tiny_tower(tmp_path, kind="mpnet"), device="cpu", checkpointing=True)


@pytest.mark.parametrize(
    ("kind", "pooling", "lora"),
    [("bert", "mean", None), ("bert", "cls", LORA), ("mpnet", "mean", None), ("modernbert", "mean", LORA), ("qwen3", "lasttoken", LORA)],
)
def test_a_saved_tower_encodes_what_the_trained_model_encodes(tmp_path: Path, kind: Kind, pooling: Any, lora: Lora | None) -> None:
    base = tiny_tower(tmp_path / "base", kind=kind, pooling=pooling, prompts={"query": "find: "})
    trainable = Trainable.open(base, device="cpu", lora=lora)
    texts = [text for text in sentences(20) if text]
    untrained = trainable.encode(texts)
    np.testing.assert_allclose(cosines(untrained, Encoder(base).encode(texts)), 1, atol=1e-5)
    train(trainable, batches, OBJECTIVE, replace(OPTIONS, steps=2, lr=0.01), work=tmp_path / "work")
    card = trainable.save(tmp_path / "saved", record={"dims": [16]})
    saved = Encoder(tmp_path / "saved", options=EncodeOptions(device="cpu"))
    assert saved.fingerprint == card.fingerprint != read_card(base).fingerprint
    assert saved.dims == 32
    for side in ("document", "query"):
        found = trainable.encode(texts, kind=side)
        assert cosines(found, saved.encode(texts, kind=side)).min() > 0.99999
    assert cosines(trainable.encode(texts), untrained).min() < 0.999, "training changed nothing, so this compares nothing"
    assert (tmp_path / "saved" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_adapters_begin_as_no_change_and_are_all_that_is_trained(tower: Path) -> None:
    trainable = Trainable.open(tower, device="cpu", lora=LORA)
    texts = sentences(10)
    np.testing.assert_array_equal(trainable.encode(texts), Trainable.open(tower, device="cpu").encode(texts))
    assert all(".lora_" in name for name in trainable.parameters)
    again = Trainable.open(tower, device="cpu", lora=LORA).parameters
    assert all(torch.equal(weight, again[name]) for name, weight in trainable.parameters.items())


def test_saving_twice_gives_the_same_bytes_and_spares_what_is_no_tower(tower: Path, tmp_path: Path) -> None:
    trainable = Trainable.open(tower, device="cpu")
    first, second = trainable.save(tmp_path / "tower"), trainable.save(tmp_path / "tower")
    assert first == second
    assert [path.name for path in tmp_path.iterdir()] == ["tower"]
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.txt").write_text("do not lose")
    with pytest.raises(TowerError, match="no tower"):
        trainable.save(tmp_path / "papers")
    assert (tmp_path / "papers" / "thesis.txt").read_text() == "do not lose"


def test_training_brings_queries_to_their_products(tower: Path, tmp_path: Path) -> None:
    outcome = run(tower, tmp_path, replace(OPTIONS, steps=25, lr=3e-3, save_every=0), batches=lambda _: batches(0))
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert outcome.last["loss"] < 0.5 * lines[0]["loss"]
    assert {"infonce", "roar", "mask_rate", "rows_masked", "lr", "grad_norm", "pairs_per_s", "tokens_per_s"} <= outcome.last.keys()


def test_a_finished_run_is_not_run_again(tower: Path, tmp_path: Path) -> None:
    first = run(tower, tmp_path)

    def none(step: int) -> Batch:
        raise AssertionError(step)

    again = run(tower, tmp_path, batches=none)
    assert (again.resumed_from, again.last, again.checkpoint) == (STEPS, first.last, first.checkpoint)


@pytest.mark.parametrize("where", ["batch", "evaluation", "step"])
def test_an_interrupt_saves_the_steps_done_and_is_raised_again(tower: Path, tmp_path: Path, where: str) -> None:
    def interrupting(at: str, value: Any) -> Any:
        if at == where:
            signal.raise_signal(signal.SIGINT)
        return value

    options = replace(OPTIONS, save_every=0, evaluate_every=3)
    how = {"evaluate": lambda step: {"recall": step / 10}}
    with pytest.raises(KeyboardInterrupt):
        run(
            tower,
            tmp_path / "stopped",
            options,
            batches=lambda step: interrupting("batch" if step == 3 else "", batches(step)),
            evaluate=lambda step: interrupting("evaluation", {"recall": step / 10}),
            on_step=lambda line: interrupting("step" if line["step"] == 3 else "", None),
        )
    assert checkpoints.newest(tmp_path / "stopped" / "checkpoints") == checkpoints.place(tmp_path / "stopped" / "checkpoints", 3)
    assert run(tower, tmp_path / "stopped", options, **how).resumed_from == 3
    run(tower, tmp_path / "whole", options, **how)
    assert held(tmp_path / "stopped") == held(tmp_path / "whole")
    assert [line["step"] for line in read_lines(tmp_path / "stopped" / "metrics.jsonl")] == list(range(1, STEPS + 1))


def test_an_interrupt_waits_for_the_end_of_an_update() -> None:
    seen = []

    def update() -> None:
        with _undisturbed():
            signal.raise_signal(signal.SIGINT)
            seen.append("the rest of the update")

    with pytest.raises(KeyboardInterrupt):
        update()
    assert seen


def test_a_checkpoint_of_another_run_is_refused_by_what_differs(tower: Path, tmp_path: Path) -> None:
    run(tower, tmp_path, replace(OPTIONS, steps=2))
    for changed, message in (
        (replace(OPTIONS, steps=2, lr=1e-4), "lr is 0.001 there and 0.0001 here"),
        (replace(OPTIONS, steps=2, recipe="abc"), "recipe is  there and abc here"),
        (OPTIONS, "steps is 2 there and 6 here"),
    ):
        with pytest.raises(EncoderError, match=message):
            run(tower, tmp_path, changed)
    with pytest.raises(EncoderError, match=r"objective\.tau is 0\.05 there and 0\.1 here"):
        train(Trainable.open(tower, device="cpu"), batches, replace(OBJECTIVE, tau=0.1), replace(OPTIONS, steps=2), work=tmp_path)
    other = tiny_tower(tmp_path / "other", seed=1)
    with pytest.raises(EncoderError, match=f"tower is {read_card(tower).fingerprint} there and {read_card(other).fingerprint} here"):
        run(other, tmp_path, replace(OPTIONS, steps=2))
    with pytest.raises(EncoderError, match="lora is None there"):
        run(tower, tmp_path, replace(OPTIONS, steps=2), lora=LORA)
    # What only decides when something is written may change.
    assert run(tower, tmp_path, replace(OPTIONS, steps=2, log_every=5, save_every=1, keep=1)).resumed_from == 2


def test_a_damaged_checkpoint_is_refused_and_an_older_one_serves(tower: Path, tmp_path: Path) -> None:
    run(tower, tmp_path)
    expected = held(tmp_path)
    newest = checkpoints.place(tmp_path / "checkpoints", STEPS)
    damaged = bytearray((newest / "optimizer.safetensors").read_bytes())
    damaged[-1] ^= 1
    (newest / "optimizer.safetensors").write_bytes(damaged)
    with pytest.raises(EncoderError, match=r"optimizer\.safetensors: expected sha256 .*Delete"):
        run(tower, tmp_path)
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    assert run(tower, tmp_path).resumed_from == 4
    assert held(tmp_path) == expected


def poisoned(trainable: Trainable, *, at: tuple[int, ...]) -> Any:
    """Return batches in whose steps the gradient of one weight is no number."""
    now = [-1]
    weight = next(iter(trainable.parameters.values()))
    weight.register_hook(lambda gradient: gradient * (math.nan if now[0] in at else 1.0))

    def given_batch(step: int) -> Batch:
        now[0] = step
        return batches(step)

    return given_batch


def test_a_gradient_that_is_no_number_stops_the_run_and_names_the_last_good_checkpoint(tower: Path, tmp_path: Path) -> None:
    trainable = Trainable.open(tower, device="cpu")
    with pytest.raises(EncoderError, match=r"Step 4: the loss is .*infonce .*gradient nan.*step-00000002"):
        train(trainable, poisoned(trainable, at=(3,)), OBJECTIVE, OPTIONS, work=tmp_path)
    assert all(bool(weight.isfinite().all()) for weight in trainable.parameters.values())
    assert run(tower, tmp_path).resumed_from == 2


def test_bad_steps_are_left_out_up_to_their_number_and_are_counted(tower: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, max_bad_steps=2, log_every=5)
    trainable = Trainable.open(tower, device="cpu")
    outcome = train(trainable, poisoned(trainable, at=(1, 3)), OBJECTIVE, options, work=tmp_path / "two")
    assert (outcome.steps, outcome.bad_steps) == (STEPS, 2)
    lines = read_lines(tmp_path / "two" / "metrics.jsonl")
    assert [(line["step"], line.get("bad_steps")) for line in lines] == [(2, 1), (4, 2), (5, None), (6, None)]
    assert all(bool(weight.isfinite().all()) for weight in trainable.parameters.values())
    trainable = Trainable.open(tower, device="cpu")
    with pytest.raises(EncoderError, match=r"Step 5.*left out before: 2"):
        train(trainable, poisoned(trainable, at=(1, 3, 4)), OBJECTIVE, options, work=tmp_path / "three")


def test_evaluation_sees_the_model_without_dropout_and_its_numbers_are_logged(tower: Path, tmp_path: Path) -> None:
    trainable = Trainable.open(tower, device="cpu")
    modes = []

    def evaluate(step: int) -> Mapping[str, float]:
        modes.append((step, trainable.model.training, torch.is_grad_enabled()))
        return {"recall": 0.5}

    train(trainable, batches, OBJECTIVE, replace(OPTIONS, log_every=100, evaluate_every=4), work=tmp_path, evaluate=evaluate)
    assert modes == [(4, False, False), (6, False, False)]
    assert [(line["step"], line["recall"]) for line in read_lines(tmp_path / "metrics.jsonl")] == [(4, 0.5), (6, 0.5)]
    assert trainable.model.training


def test_the_callers_random_numbers_go_on_undisturbed(tower: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(tower, tmp_path, replace(OPTIONS, steps=1))
    assert torch.equal(torch.rand(3), expected)


def test_bfloat16_learns_over_float32_weights(tower: Path, tmp_path: Path) -> None:
    trainable = Trainable.open(tower, device="cpu", dtype="bfloat16")
    outcome = train(trainable, lambda _: batches(0), OBJECTIVE, replace(OPTIONS, steps=12, lr=3e-3), work=tmp_path)
    assert outcome.last["loss"] < read_lines(tmp_path / "metrics.jsonl")[0]["loss"]
    assert {weight.dtype for weight in trainable.parameters.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "message"),
    [({"steps": 0}, "steps is 0"), ({"steps": 1, "lr": math.nan}, "lr is nan"), ({"steps": 1, "warmup_share": 2.0}, "warmup_share is 2.0")],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EncoderError, match=message):
        TrainOptions(**options)


@given(st.lists(st.dictionaries(st.sampled_from(["loss", "a<b&", 'x"y']), st.floats()), max_size=8))
def test_curves_of_any_numbers_are_a_document(numbers: list[dict[str, float]]) -> None:
    document = curves([{"step": step, **line} for step, line in enumerate(numbers)], title="<script>")
    root = ET.fromstring(document)  # noqa: S314  our own
    assert root.tag.endswith("svg")
    assert "<script>" not in document
    assert "nan" not in document.lower().replace("a<b&", "")


def test_a_torn_last_line_and_lines_past_a_step_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        append_line(path, {"step": step, "loss": math.inf if step == 2 else 1.0})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [line["loss"] for line in read_lines(path)] == [1.0, None, 1.0]
    assert drop_lines_after(path, 2) == 1
    assert path.read_text() == '{"step": 1, "loss": 1.0}\n{"step": 2, "loss": null}\n'
    write_curves(path, tmp_path / "curves.svg")
    assert "loss" in (tmp_path / "curves.svg").read_text()


if __name__ == "__main__":
    die_and_resume(Path(sys.argv[1]), Path(sys.argv[2]))
