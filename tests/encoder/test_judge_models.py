from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from encoder.errors import EncoderError, TowerError
from encoder.judge import Guideline, Pair
from encoder.judge_models import ClassifierJudge, ClassifierOptions, TrainedJudge, TrainingOptions, train_cross_encoder
from tests.towers import WORDS, tiny_tower

COLOURS = WORDS[:3]
QUICK = TrainingOptions(epochs=1, max_steps=3, batch_pairs=8, seed=1, device="cpu")


def toy(count: int, *, seed: int = 0) -> tuple[list[Pair], list[int]]:
    """One word of the text says the level, whatever the query."""
    draws = np.random.default_rng(seed)
    pairs, levels = [], []
    for _ in range(count):
        level = int(draws.integers(0, 3))
        filler = draws.choice(WORDS[5:30], size=int(draws.integers(1, 4))).tolist()
        pairs.append(Pair(str(draws.choice(WORDS[5:60])), " ".join([*filler, COLOURS[level]])))
        levels.append(level)
    return pairs, levels


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainedJudge]:
    place = tmp_path_factory.mktemp("judge")
    torch.set_num_threads(1)  # a second thread costs more than it gives to so small a model
    pairs, levels = toy(400)
    options = TrainingOptions(epochs=4, batch_pairs=16, lr=4e-3, held_out=0.3, seed=3, device="cpu")
    return place / "judge", train_cross_encoder(tiny_tower(place / "tower"), pairs, levels, target=place / "judge", options=options)


def test_cross_encoder_learns_a_rule_that_it_was_not_shown_the_answers_to(trained: tuple[Path, TrainedJudge]) -> None:
    directory, report = trained
    assert report.agreement is not None
    assert report.agreement.accuracy is not None
    assert report.agreement.accuracy > 0.9
    assert report.held_out_pairs + report.trained_pairs == 400
    assert report.agreement.pairs == report.held_out_pairs > 100
    assert report.last_loss < report.first_loss
    fresh, levels = toy(50, seed=9)
    assert np.mean([verdict.grade for verdict in ClassifierJudge(directory).judge(fresh)] == np.array(levels)) > 0.9


def test_judge_opens_again_with_its_version_and_its_record(trained: tuple[Path, TrainedJudge]) -> None:
    directory, report = trained
    judge = ClassifierJudge(directory)
    record = json.loads((directory / "judge.json").read_bytes())
    assert judge.version == report.version == record["version"]
    assert (record["data_digest"], record["max_tokens"], judge.max_tokens) == (report.data_digest, 192, 128)  # 128 positions
    assert not list(directory.parent.glob(".judge-*"))
    assert {path.suffix for path in directory.iterdir()} <= {".json", ".safetensors", ".txt"}


def test_verdicts_are_those_of_one_pair_at_a_time_in_the_order_asked(trained: tuple[Path, TrainedJudge]) -> None:
    judge = ClassifierJudge(trained[0])
    pairs = [Pair(WORDS[number], " ".join(WORDS[: number % 40])) for number in range(40)] + [Pair("", ""), Pair(WORDS[0] * 500, WORDS[1])]
    together, alone = judge.judge(pairs), [judge.judge([pair])[0] for pair in pairs]
    assert [verdict.grade for verdict in together] == [verdict.grade for verdict in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)
        assert sum(one.probabilities) == pytest.approx(1)
    assert judge.judge([]) == []


def test_same_seed_and_data_give_the_same_judge_and_another_seed_or_label_another(tmp_path: Path) -> None:
    tower = tiny_tower(tmp_path / "tower")
    pairs, levels = toy(40)
    torch.manual_seed(5)
    made = [
        train_cross_encoder(tower, pairs, levels, target=tmp_path / "a", options=QUICK),
        train_cross_encoder(tower, pairs, levels, target=tmp_path / "b", options=QUICK),
        train_cross_encoder(tower, pairs, [*levels[1:], levels[0]], target=tmp_path / "c", options=QUICK),
    ]
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(5)))  # the caller's draws are untouched
    assert made[0] == made[1]
    assert made[0].version != made[2].version
    assert made[0].data_digest != made[2].data_digest


@pytest.mark.parametrize("kind", ["roberta", "distilbert", "modernbert", "qwen3"])
def test_other_towers_become_judges_too(tmp_path: Path, kind: str) -> None:
    tower = tiny_tower(tmp_path / "tower", kind=kind)  # type: ignore[arg-type]
    pairs, levels = toy(40)
    report = train_cross_encoder(tower, pairs, levels, target=tmp_path / "judge", options=QUICK)
    assert ClassifierJudge(tmp_path / "judge").version == report.version


def copied(source: Path, target: Path, **config: object) -> Path:
    """Copy a judge without its record, its configuration changed."""
    shutil.copytree(source, target)
    (target / "judge.json").unlink()
    tree = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**tree, **config}))
    return target


def test_order_of_the_labels_comes_from_the_model_or_from_the_caller(trained: tuple[Path, TrainedJudge], tmp_path: Path) -> None:
    pairs, levels = toy(30, seed=4)
    wanted = [verdict.grade for verdict in ClassifierJudge(trained[0]).judge(pairs)]
    names = {"0": "EXACT", "1": "Partial", "2": "irrelevant"}  # mirrored
    mirrored = copied(trained[0], tmp_path / "mirrored", id2label=names, label2id={name: int(n) for n, name in names.items()})
    assert [verdict.grade for verdict in ClassifierJudge(mirrored).judge(pairs)] == [2 - grade for grade in wanted]
    nameless = {str(number): f"LABEL_{number}" for number in range(3)}
    bare = copied(trained[0], tmp_path / "bare", id2label=nameless, label2id={name: int(n) for n, name in nameless.items()})
    with pytest.raises(TowerError, match="Give labels"):
        ClassifierJudge(bare)
    named = ClassifierJudge(bare, ClassifierOptions(labels=("LABEL_0", "LABEL_1", "LABEL_2")))
    assert [verdict.grade for verdict in named.judge(pairs)] == wanted
    reverse = ClassifierJudge(bare, ClassifierOptions(labels=("LABEL_2", "LABEL_1", "LABEL_0")))
    assert reverse.version != named.version
    assert levels == wanted or sum(a == b for a, b in zip(levels, wanted, strict=True)) > 25


def test_reranker_of_one_output_becomes_a_judge_by_cuts(trained: tuple[Path, TrainedJudge], tmp_path: Path) -> None:
    one = copied(trained[0], tmp_path / "one", id2label={"0": "score"}, label2id={"score": 0}, num_labels=1)
    weights = load_file(one / "model.safetensors")
    weights["classifier.weight"], weights["classifier.bias"] = (
        weights["classifier.weight"][2:].clone(),
        weights["classifier.bias"][2:].clone(),
    )
    save_file(weights, one / "model.safetensors", metadata={"format": "pt"})
    pairs, levels = toy(60, seed=4)
    low, high = ClassifierJudge(one, ClassifierOptions(cuts=(-50.0, 50.0))), ClassifierJudge(one, ClassifierOptions(cuts=(-60.0, 0.0)))
    assert {verdict.grade for verdict in low.judge(pairs)} == {1}
    said = [verdict.grade for verdict in high.judge(pairs)]
    assert np.mean([(grade == 2) == (level == 2) for grade, level in zip(said, levels, strict=True)]) > 0.9
    assert low.version != high.version
    for options in (ClassifierOptions(cuts=(0.0,)), ClassifierOptions()):
        with pytest.raises(TowerError):
            ClassifierJudge(one, options)


def test_tower_is_no_judge_and_a_changed_judge_is_refused(trained: tuple[Path, TrainedJudge], tmp_path: Path) -> None:
    with pytest.raises(TowerError, match="A tower is no judge: train one from it"):
        ClassifierJudge(tiny_tower(tmp_path / "tower"))
    edited = tmp_path / "edited"
    shutil.copytree(trained[0], edited)
    weights = load_file(edited / "model.safetensors")
    weights["classifier.bias"] = weights["classifier.bias"] + 1
    save_file(weights, edited / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TowerError, match=r"not those that judge\.json tells of"):
        ClassifierJudge(edited)


def test_model_that_brings_code_or_pickles_or_lies_elsewhere_is_refused(trained: tuple[Path, TrainedJudge], tmp_path: Path) -> None:
    coded = copied(trained[0], tmp_path / "coded", auto_map={"AutoModelForSequenceClassification": "own.Judge"})
    with pytest.raises(TowerError, match="never run here"):
        ClassifierJudge(coded)
    pickled = copied(trained[0], tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(TowerError, match="no classifier can be made of it"):
        ClassifierJudge(pickled)
    with pytest.raises(TowerError, match=r"has no config\.json"):
        ClassifierJudge(tmp_path / "nowhere")


def test_training_refuses_what_cannot_teach(tmp_path: Path) -> None:
    tower = tiny_tower(tmp_path / "tower")
    pairs, levels = toy(20)
    (tmp_path / "full").mkdir()
    for wrong, target in (([3] * 20, "x"), (levels[:-1], "x"), ([1] * 20, "x"), (levels, "full")):
        with pytest.raises(EncoderError, match=r"Give|give|Name"):
            train_cross_encoder(tower, pairs, wrong, target=tmp_path / target, options=QUICK)
    with pytest.raises(EncoderError, match="Lower lr"):
        train_cross_encoder(tower, pairs, levels, target=tmp_path / "x", options=TrainingOptions(lr=1e30, warmup=0, epochs=9, device="cpu"))
    assert not (tmp_path / "x").exists()


def test_another_guideline_makes_another_judge(trained: tuple[Path, TrainedJudge]) -> None:
    names = ("irrelevant", "partial", "exact")
    assert ClassifierJudge(trained[0], guideline=Guideline(names=names, meanings=("a", "b", "c"))).version != trained[1].version
